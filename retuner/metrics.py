"""How good an answer is: one number a row, and one headline a set. More is better for every metric.

Rows are what the gate resamples; the headline is what people compare. The headline is the mean of the
rows, except for BLEU, where it is the corpus score: precisions pooled over the whole set, which no mean
of sentence scores equals.

Each metric is an `evaluate.Metric` kept here. Nothing is fetched and nothing is written but a private
temporary folder that is gone when the call returns.
"""

import functools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from retuner.errors import Refused

RowScore = Callable[[str, Sequence[str]], float]


def score_rows(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """One number an answer: 0 to 1, for `bleu` 0 to 100. Each answer has at least one reference."""
    row = ROW_SCORES[metric]
    return [row(answer, accepted) for answer, accepted in zip(answers, references, strict=True)]


def headline(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The number for the whole set; see the module's text for how it relates to the rows."""
    return score(metric, answers, references)[0]


def score(
    metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The headline and the rows of a set of at least one answer."""
    with tempfile.TemporaryDirectory(prefix="retuner-metric-") as folder:
        module = metric_class(metric)(keep_in_memory=True, cache_dir=folder, seed=0)
        result = module.compute(predictions=list(answers), references=[list(r) for r in references])
    return result[metric], result["rows"]


def check_references(metric: str, references: Sequence[Sequence[str]]) -> None:
    """Refuse references that the metric cannot score against, before any model is loaded."""
    fit, kind = {
        "json_fields": (lambda text: _json_object(text) is not None, "a JSON object"),
        "final_number": (lambda text: final_number_in(text) is not None, "a text with a number"),
    }.get(metric, (None, ""))
    for prompt, accepted in enumerate(references, start=1):
        for text in accepted:
            if fit and not fit(text):
                raise Refused(
                    f"evaluate.metrics asks for {metric}, but a reference of held-out prompt {prompt} is "
                    f"{_shortened(text)}",
                    f"{kind} in every held-out reference",
                    f"take {metric} out of evaluate.metrics, or mend the data",
                )


def metric_class(metric: str) -> type:
    """The metric as an `evaluate.Metric` subclass, over string answers and lists of string references.

    `compute` gives `{metric: headline, "rows": [...]}`.
    """
    import datasets
    import evaluate

    class LocalMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            texts = datasets.Value("string")
            return evaluate.MetricInfo(
                description=ROW_SCORES[metric].__doc__ or "",
                citation="",
                inputs_description="predictions: texts; references: a list of texts for each.",
                features=datasets.Features({"predictions": texts, "references": datasets.List(texts)}),
            )

        def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
            rows = score_rows(metric, predictions, references)
            whole = corpus_bleu(predictions, references) if metric == "bleu" else sum(rows) / len(rows)
            return {metric: whole, "rows": rows}

    LocalMetric.__name__ = LocalMetric.__qualname__ = metric.title().replace("_", "")
    return LocalMetric


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference, white space at the ends apart."""
    return float(answer.strip() in {reference.strip() for reference in references})


def json_fields(answer: str, references: Sequence[str]) -> float:
    """Share of the reference's JSON fields that the answer has with an equal value; best reference.

    Fields are those of the outermost object. Values are equal as JSON: 1 is 1.0, but neither "1" nor
    true, and null is not an absent field. Fields of the answer's own cost nothing. An answer that is
    not one JSON object (empty, fenced, truncated, a key twice, NaN) scores 0.
    """
    found = _json_object(answer)
    if found is None:
        return 0.0
    shares = []
    for reference in references:
        wanted = _json_object(reference)
        if wanted is None:
            continue
        equal = sum(key in found and _same_json(found[key], value) for key, value in wanted.items())
        shares.append(equal / len(wanted) if wanted else 1.0)
    return max(shares, default=0.0)


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """F1 of shared words; see `_rouge`."""
    return _rouge("rouge1", answer, references)


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """F1 of shared pairs of neighbouring words; see `_rouge`."""
    return _rouge("rouge2", answer, references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words; see `_rouge`."""
    return _rouge("rougeL", answer, references)


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequences line by line, as for summaries of several lines; see `_rouge`."""
    return _rouge("rougeLsum", answer, references)


def _rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    """ROUGE F1 (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004) of Google's rouge_score without
    stemming, best reference.

    Equal to its published numbers on ASCII text. Its own tokenizer drops every other letter, so that a
    perfect Greek answer would score 0; here those letters count.
    """
    best = _rouge_scorer(kind).score_multi(list(references), answer)[kind]
    return float(best.fmeasure)


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU (sacrebleu, 13a tokens, exponential smoothing, effective order), 0 to 100."""
    import sacrebleu

    if not answer.strip():
        return 0.0
    # A perfect sentence comes out as 100.00000000000004.
    return min(100.0, float(sacrebleu.sentence_bleu(answer, list(references)).score))


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (sacrebleu, 13a tokens), 0 to 100; rows may have different numbers of references."""
    import sacrebleu

    most = max(len(accepted) for accepted in references)
    # sacrebleu wants the n-th reference of every row in the n-th list, None where a row has fewer.
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    return min(100.0, float(sacrebleu.corpus_bleu(list(answers), streams, force=True).score))


def final_number(answer: str, references: Sequence[str]) -> float:
    """1 when the answer's final number equals a reference's, as a number: 1,234.50 is $1234.5."""
    found = final_number_in(answer)
    return float(found is not None and found in {final_number_in(reference) for reference in references})


ROW_SCORES: dict[str, RowScore] = {
    "exact_match": exact_match,
    "json_fields": json_fields,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "rouge_lsum": rouge_lsum,
    "bleu": bleu,
    "final_number": final_number,
}

# A sign counts when nothing before it could be a minuend: "10-5" ends in 5, "x = -5" in -5.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-−])?[$€£]?\s?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
_MARK = re.compile(r"####\s*")


def final_number_in(text: str) -> Decimal | None:
    """The number right after the first `####` (GSM8K's mark of the result), else the last one in the text.

    The first, as in GSM8K's own scorer: a model that goes on to invent another question writes another.
    """
    marked = [number for mark in _MARK.finditer(text) if (number := _NUMBER.match(text, mark.end()))]
    numbers = marked[:1] or list(_NUMBER.finditer(text))[-1:]
    if not numbers:
        return None
    return Decimal(("-" if numbers[0]["sign"] else "") + numbers[0]["digits"].replace(",", ""))


def _json_object(text: str) -> dict[str, Any] | None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return keys

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _same_json(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_json, one, other))
    # Python holds True == 1; JSON does not.
    return isinstance(one, bool) == isinstance(other, bool) and one == other


class _WordTokenizer:
    """Runs of letters and digits in any script; a character a token where a script writes no spaces."""

    _words = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿]+")

    def tokenize(self, text: str) -> list[str]:
        return self._words.findall(text.lower())


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_WordTokenizer())


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")

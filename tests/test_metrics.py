from decimal import Decimal
from typing import get_args

import pytest

from retuner.errors import Refused
from retuner.metrics import (
    ROW_SCORES,
    check_references,
    final_number_in,
    headline,
    metric_class,
    score,
    score_rows,
)
from retuner.params import Metric

METRICS = get_args(Metric)
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}


def test_every_metric_that_params_may_name_is_there():
    assert set(ROW_SCORES) == set(METRICS)


def row(metric: str, answer: str, *references: str) -> float:
    return score_rows(metric, [answer], [list(references)])[0]


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("Paris", ["Paris"], 1),
        ("  Paris\n", ["Paris "], 1),
        ("paris", ["Paris"], 0),
        ("Lyon", ["Paris", "Lyon"], 1),
        ("", ["Paris"], 0),
        ("Ελλάδα", ["Ελλάδα"], 1),
        ("Paris.", ["Paris"], 0),
    ],
)
def test_exact_match_forgives_white_space_at_the_ends_and_nothing_else(answer, references, right):
    assert row("exact_match", answer, *references) == right


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ('{"name": "Ana", "age": 41, "city": null}', 1.0),
        ('{"city": null, "age": 41.0, "name": "Ana"}', 1.0),
        ('{"name": "Ana", "age": 41, "city": null, "more": 1}', 1.0),
        ('{"name": "Ana", "age": "41", "city": null}', 2 / 3),
        ('{"name": "Ana", "age": 41}', 2 / 3),
        ('{"name": "Ana", "age": 41, "city": ""}', 2 / 3),
        ('{"name": "ana", "age": 41, "city": null}', 2 / 3),
        ("{}", 0.0),
        ("", 0.0),
        ("null", 0.0),
        ('[{"name": "Ana"}]', 0.0),
        ('```json\n{"name": "Ana"}\n```', 0.0),
        ('{"name": "Ana", "age": 41, "city": nul', 0.0),
        ('{"name": "Ana", "name": "Ana"}', 0.0),
        ('{"name": "Ana", "age": NaN}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_fields_counts_the_fields_with_equal_values(answer, share):
    assert row("json_fields", answer, '{"name": "Ana", "age": 41, "city": null}') == pytest.approx(share)


def test_json_fields_tells_true_from_one_at_any_depth():
    assert row("json_fields", '{"a": {"b": [1]}}', '{"a": {"b": [true]}}') == 0
    assert row("json_fields", '{"a": {"b": [true]}}', '{"a": {"b": [true]}}') == 1


def test_json_fields_takes_the_reference_that_fits_best():
    assert row("json_fields", '{"a": 1}', '{"a": 2}', '{"a": 1}') == 1


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "the cat on" is common: precision 3/4, recall 3/6.
    assert row("rouge_l", "the cat on it", "the cat sat down on mats") == pytest.approx(0.6)
    assert row("rouge_l", "The CAT, on it!", "the cat sat down on mats") == pytest.approx(0.6)


@pytest.mark.parametrize("metric", ROUGE)
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It's a well-known 3.5% rise in x", "A well known rise of 3,5 in X's"),
        ("", "something"),
        ("a\tb\nc", "c b a b c"),
        ("The first line.\nThen a second one.", "Then a second line.\nThe first one."),
    ],
)
def test_rouge_equals_google_s_own_on_ascii_text(metric, answer, reference):
    from rouge_score.rouge_scorer import RougeScorer

    kind = ROUGE[metric]
    expected = RougeScorer([kind]).score(reference, answer)[kind].fmeasure
    assert row(metric, answer, reference) == pytest.approx(expected)


def test_rouge_knows_words_pairs_order_and_lines_apart():
    answer, reference = "b a\nd c", "d c\nb a"
    found = {metric: row(metric, answer, reference) for metric in ROUGE}
    assert found == pytest.approx({"rouge_1": 1, "rouge_2": 2 / 3, "rouge_l": 0.5, "rouge_lsum": 1})


@pytest.mark.parametrize("text", ["Καλημέρα κόσμε", "Привет мир", "東京は大きい", "naïve café"])
def test_rouge_l_gives_full_marks_to_a_perfect_answer_in_any_script(text):
    assert row("rouge_l", text, "something else", text) == pytest.approx(1)


def test_rouge_l_sees_common_characters_where_a_script_has_no_spaces():
    assert 0 < row("rouge_l", "東京は小さい", "東京は大きい") < 1


def test_bleu_s_headline_is_the_corpus_score_and_not_the_mean_of_its_rows():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat", "a dog"]
    references = [["the cat sat on the mat", "a cat sat"], ["the dog barked loudly at me"]]
    whole, rows = score("bleu", answers, references)
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert whole == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert rows == pytest.approx(
        [sacrebleu.sentence_bleu(a, r).score for a, r in zip(answers, references, strict=True)]
    )
    assert whole != pytest.approx(sum(rows) / 2)


def test_bleu_is_between_0_and_100():
    assert row("bleu", "", "a b c d") == 0
    assert row("bleu", "the cat sat on the mat", "the cat sat on the mat") == 100
    assert headline("bleu", ["the cat sat on the mat"], [["the cat sat on the mat"]]) == 100
    assert headline("bleu", [""], [["the cat"]]) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50", "1234.5"),
        ("it costs $1,234.50.", "1234.5"),
        ("#### 18\n\nQuestion: 2 more?\n#### 20", "18"),
        ("#### nothing, then 3", "3"),
        ("10-5", "5"),
        ("x = -5", "-5"),
        ("-$5", "-5"),
        ("the change is −4", "-4"),
        ("#### 0", "0"),
        (".5", "0.5"),
        ("1, 2, 3", "3"),
    ],
)
def test_the_final_number_is_the_marked_one_or_else_the_last(text, number):
    assert final_number_in(text) == Decimal(number)


def test_final_number_compares_numbers_and_not_their_spelling():
    assert row("final_number", "The answer is $1,200.00", "he has\n#### 1200") == 1
    assert row("final_number", "The answer is 1200.5", "#### 1200") == 0
    assert row("final_number", "no idea", "#### 1200") == 0
    assert row("final_number", "", "#### 0") == 0


@pytest.mark.parametrize(("metric", "reference"), [("json_fields", "hello"), ("final_number", "none")])
def test_references_that_a_metric_cannot_score_are_refused(metric, reference):
    with pytest.raises(Refused, match="held-out prompt 2"):
        check_references(metric, [['{"a": 1}'], [reference]])
    check_references("exact_match", [[reference]])


def test_the_headline_of_every_other_metric_is_the_mean_of_its_rows():
    answers = ['{"a": 1}', "a cat sat", ""]
    references = [['{"a": 1, "b": 2}'], ["the cat sat", "x"], ['{"a": 3}']]
    for metric in ("exact_match", "json_fields", "rouge_l", "final_number"):
        whole, rows = score(metric, answers, references)
        assert rows == score_rows(metric, answers, references)
        assert whole == pytest.approx(sum(rows) / 3)


def test_every_metric_is_an_evaluate_metric_that_nothing_fetched(monkeypatch):
    import evaluate

    monkeypatch.delattr(evaluate, "load")
    perfect = '{"name": "a cat", "age": 12}'
    for metric in METRICS:
        assert issubclass(metric_class(metric), evaluate.Metric)
        assert headline(metric, [perfect], [[perfect]]) == (100 if metric == "bleu" else 1)

"""What the base, the production adapter and the candidate each make of the same held-out rows.

One process and one base in memory; an adapter is put on, scored and taken off. Every model sees the
same batches, so rounding is the same for all and cancels in paired differences. Numbers are kept to
`SIGNIFICANT_DIGITS`: what lies beyond is rounding of floats, and would only make equal reports differ.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner.artifacts import Adapter, Base, Chats, ReportFacts
from retuner.errors import Refused
from retuner.generation import adapter_on, batches, decode, generate, load, one_rope_tokens, pad_token_id
from retuner.metrics import check_references, score
from retuner.observe import Observer
from retuner.params import EvaluateParams

SIGNIFICANT_DIGITS = 6
LOSS_BATCH_TOKENS = 8192
"""Padded tokens scored at once: about 1 GB of logits over Phi-3's vocabulary, if all were supervised."""
NO_LOSS = -100
LARGEST_EXPONENT = 700.0
"""A perplexity beyond e^700 is no float; it is given as e^700."""


def evaluate(
    out: Path,
    adapter: Adapter,
    chats: Chats,
    base: Base,
    incumbent: Path | None,
    params: EvaluateParams,
    precision: str,
    attention: str,
    device: str,
    observer: Observer,
) -> ReportFacts:
    """Score every model and write report.json, answers.jsonl and losses.jsonl into `out`.

    `incumbent` is a folder with the production adapter, None when nothing is in production.
    Errors: Refused when there is nothing to score on, when a reference does not suit a metric, when an
    adapter lacks a weight or holds one that is not finite, and when a loss is not finite.
    """
    rows = read_held_out(chats.path / "held_out.arrow")
    folders = models(incumbent, adapter.path)
    measured = measure(rows, chats, base, folders, (), params, precision, attention, device, observer)
    scores = {name: loss_scores(rows, measured.losses[name]) for name in folders}
    return write_report(out, measured, scores, loss_lines(rows, measured.losses))


Folders = dict[str, Path | None]
"""Model to the folder of its adapter; None is the base alone."""


@dataclass(frozen=True)
class Measured:
    """By model: nats a token of each row, and for each prompt an answer and its scores."""

    losses: dict[str, list[float]]
    prompts: list[dict[str, Any]]
    answers: dict[str, list[str]]
    scores: dict[str, dict[str, float]]
    """Metric to number, over all prompts."""
    row_scores: dict[str, dict[str, list[float]]]


def models(incumbent: Path | None, candidate: Path) -> Folders:
    return {"base": None, **({"production": incumbent} if incumbent else {}), "candidate": candidate}


def measure(
    rows: list[dict[str, Any]],
    chats: Chats,
    base: Base,
    folders: Folders,
    silent: Collection[str],
    params: EvaluateParams,
    precision: str,
    attention: str,
    device: str,
    observer: Observer,
) -> Measured:
    """`rows` and held-out prompts under each model; those of `silent` answer no prompts. Errors: as `evaluate`."""
    prompts = _read_prompts(chats.path / "prompts.jsonl", params)
    references = [prompt["references"] for prompt in prompts]
    for metric in params.metrics:
        check_references(metric, references)

    model, tokenizer = load(base.path, precision, attention, device)
    stop_ids = base.facts.stop_token_ids
    losses: dict[str, list[float]] = {}
    answers: dict[str, list[str]] = {}
    units = len(rows) + len(prompts)

    def progress(name: str, what: str, before: int) -> Callable[[int, int], None]:
        start = list(folders).index(name) * units + before
        return lambda done, _: observer.progress(
            "evaluate", start + done, len(folders) * units, f"{name}: {what}"
        )

    for name, folder in folders.items():
        with adapter_on(model, folder):
            losses[name] = row_losses(model, rows, params.batch_size, progress(name, "loss", 0))
            if not all(map(math.isfinite, losses[name])):
                raise Refused(f"the loss of {name} on held-out rows is not finite", "finite losses")
            if name in silent:
                continue
            tokens = generate(
                model,
                [prompt["prompt_ids"] for prompt in prompts],
                stop_ids,
                pad_token_id(tokenizer, stop_ids),
                params.max_new_tokens,
                params.batch_size,
                progress(name, "answers", len(rows)),
                params.sampling,
            )
        answers[name] = decode(tokenizer, tokens)

    scores: dict[str, dict[str, float]] = {name: {} for name in answers}
    row_scores: dict[str, dict[str, list[float]]] = {name: {} for name in answers}
    for name in answers:
        for metric in params.metrics:
            whole, each = score(metric, answers[name], references)
            scores[name][metric] = rounded(whole)
            row_scores[name][metric] = each
    return Measured(losses, prompts, answers, scores, row_scores)


def write_report(
    out: Path, measured: Measured, scores: dict[str, dict[str, float]], lines: list[dict[str, Any]]
) -> ReportFacts:
    """`scores` are those of held-out rows, by model; `lines` those of losses.jsonl."""
    _write_lines(out / "losses.jsonl", lines)
    _write_lines(
        out / "answers.jsonl", _answer_lines(measured.prompts, measured.answers, measured.row_scores)
    )
    scores = {name: of_rows | measured.scores[name] for name, of_rows in scores.items()}
    facts = ReportFacts(scores=scores, prompts=len(measured.prompts), rows=len(lines))
    _write_lines(out / "report.json", [facts.model_dump(mode="json")])
    return facts


def row_losses(
    model: Any, rows: list[dict[str, Any]], batch_size: int, progress: Callable[[int, int], None]
) -> list[float]:
    """Mean nats a supervised token of each row, in the order of the rows.

    A label is predicted from the tokens before it; labels of -100 carry no loss, and no logits are made
    for positions that carry none in the whole batch.
    """
    import torch

    losses = [0.0] * len(rows)
    done = 0
    lengths = [len(row["input_ids"]) for row in rows]
    plan = batches(lengths, batch_size, LOSS_BATCH_TOKENS, alone_above=one_rope_tokens(model))
    with torch.inference_mode():
        for members in reversed(plan):
            width = max(lengths[row] for row in members)
            ids = torch.zeros((len(members), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, NO_LOSS)
            for at, row in enumerate(members):
                # On the right: causal attention keeps a row from seeing what follows it.
                ids[at, : lengths[row]] = torch.tensor(rows[row]["input_ids"])
                labels[at, : lengths[row]] = torch.tensor(rows[row]["labels"])
                mask[at, : lengths[row]] = 1
            targets = labels[:, 1:]
            supervised = (targets != NO_LOSS).any(dim=0).nonzero().flatten()
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_to_keep=supervised.to(model.device),
                use_cache=False,
            ).logits
            nats = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1),
                targets[:, supervised].flatten().to(model.device),
                ignore_index=NO_LOSS,
                reduction="none",
            )
            summed = nats.view(len(members), -1).double().sum(dim=1).tolist()
            for row, total in zip(members, summed, strict=True):
                losses[row] = total / rows[row]["tokens"]
            done += len(members)
            progress(done, len(rows))
    return losses


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """The held-out rows: id, group, input_ids, labels, and `tokens`, how many labels carry loss.

    Errors: Refused when there are none, or a row has no token to predict.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        rows = pyarrow.ipc.open_stream(source).read_all().to_pylist()
    if not rows:
        raise Refused(
            "no held-out rows to measure loss on", "at least one", "raise prepare.held_out_fraction"
        )
    for row in rows:
        # The first token has nothing before it to be predicted from.
        row["tokens"] = sum(label != NO_LOSS for label in row["labels"][1:])
        if not row["tokens"]:
            raise Refused(f"held-out row {row['id']} has no supervised token", "at least one in every row")
    return rows


def rounded(number: float) -> float:
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")


def _read_prompts(path: Path, params: EvaluateParams) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        prompts = [json.loads(line) for line in lines][: params.max_prompts]
    if not prompts:
        raise Refused("no held-out prompts to answer", "at least one", "raise prepare.held_out_fraction")
    return prompts


def loss_scores(rows: list[dict[str, Any]], losses: list[float]) -> dict[str, float]:
    """Over all held-out tokens, so that a long row counts for what it is."""
    tokens = [row["tokens"] for row in rows]
    loss = math.fsum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens)
    return {"loss": rounded(loss), "perplexity": rounded(math.exp(min(loss, LARGEST_EXPONENT)))}


def loss_lines(rows: list[dict[str, Any]], losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "group": row["group"],
            "tokens": row["tokens"],
            "loss": {name: rounded(each[at]) for name, each in losses.items()},
        }
        for at, row in enumerate(rows)
    ]


def _answer_lines(
    prompts: list[dict[str, Any]],
    answers: dict[str, list[str]],
    row_scores: dict[str, dict[str, list[float]]],
) -> Iterable[dict[str, Any]]:
    for at, prompt in enumerate(prompts):
        yield {
            "group": prompt["group"],
            "prompt": prompt["messages"],
            "references": prompt["references"],
            "answers": {name: texts[at] for name, texts in answers.items()},
            "scores": {
                name: {metric: rounded(each[at]) for metric, each in by_metric.items()}
                for name, by_metric in row_scores.items()
            },
        }


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")

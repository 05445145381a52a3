"""Two candidates side by side, on the held-out prompts that both reports have.

A prompt is shared when the conversation and its references are the same; a row of losses when its id
and its number of supervised tokens are (another tokenizer makes nats a token incomparable).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.artifacts import Facts
from retuner.errors import Refused
from retuner.gate import LESS_IS_BETTER, OF_ROWS, paired_interval, read_answers, read_losses, row_score

if TYPE_CHECKING:
    from rich.console import Group


class MetricComparison(Facts):
    metric: str
    a: float
    """Mean over the shared rows, for `loss` over their tokens; so for `bleu` of sentence scores."""
    b: float
    difference: float
    """b - a."""
    low: float
    high: float
    """The paired bootstrap interval of the difference."""
    better: str
    """`a` or `b` where the interval of at least two groups leaves 0 out, else `neither`."""
    reported_a: float
    """The headline of A's own report, over all its rows."""
    reported_b: float
    rows: int
    groups: int


class Change(Facts):
    """A prompt that one of the two answers better; for exact match, one right and one wrong."""

    metric: str
    prompt: list[dict[str, Any]]
    references: list[str]
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float


class Comparison(Facts):
    confidence: float
    shared_prompts: int
    only_a: int
    """Prompts of A's report that B's does not have."""
    only_b: int
    metrics: tuple[MetricComparison, ...]
    won: dict[str, int]
    """Metric to how many prompts B answers better."""
    lost: dict[str, int]
    """Metric to how many prompts A answers better."""
    changes: tuple[Change, ...]
    """The largest of them, by metric."""
    notes: tuple[str, ...]


def compare(
    a: Path, b: Path, confidence: float = 0.95, resamples: int = 2000, seed: int = 0, shown: int = 5
) -> Comparison:
    """Compare the model named `candidate` in two folders with report.json, answers.jsonl and losses.jsonl.

    `shown` changes are kept for each metric and each direction.
    Errors: Refused when the reports share no prompt or no metric.
    """
    reported_a, reported_b = _reported(a), _reported(b)
    metrics = [name for name in reported_a if name in reported_b and name != "perplexity"]
    answers_a, answers_b = _by_prompt(a), _by_prompt(b)
    shared = [key for key in answers_a if key in answers_b]
    if not shared:
        raise Refused(
            "the two reports share no held-out prompt",
            "two versions evaluated on data that overlaps",
            "compare versions of the same data, or evaluate one again on the other's",
        )
    bootstrap = {"confidence": confidence, "resamples": resamples, "seed": seed}
    compared, notes = [], []
    changes: list[Change] = []
    won, lost = {}, {}
    for metric in metrics:
        if metric in OF_ROWS:
            losses_a, losses_b = _by_row(a), _by_row(b)
            keys = [key for key in losses_a if key in losses_b]
            rows_a, rows_b = [losses_a[key] for key in keys], [losses_b[key] for key in keys]
        else:
            rows_a, rows_b = [answers_a[key] for key in shared], [answers_b[key] for key in shared]
            better, worse = _changes(metric, rows_a, rows_b)
            won[metric], lost[metric] = len(better), len(worse)
            changes += better[:shown] + worse[:shown]
        if not rows_a:
            notes.append(f"{metric}: no row has the same id and supervised tokens in both")
            continue
        compared.append(
            _compared(metric, rows_a, rows_b, (reported_a[metric], reported_b[metric]), **bootstrap)
        )
    if not compared:
        raise Refused("the two reports share no metric", "at least one metric in both")
    if "bleu" in metrics:
        notes.append("bleu: a, b and the difference are of sentence scores; the headlines are corpus scores")
    return Comparison(
        confidence=confidence,
        shared_prompts=len(shared),
        only_a=len(answers_a) - len(shared),
        only_b=len(answers_b) - len(shared),
        metrics=tuple(compared),
        won=won,
        lost=lost,
        changes=tuple(changes),
        notes=tuple(notes),
    )


def render(comparison: Comparison, name_a: str, name_b: str) -> "Group":
    """The comparison for a terminal: a table of metrics, then the prompts that changed most."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    interval = f"{comparison.confidence:.0%} interval"
    table = Table("metric", name_a, name_b, "difference", interval, "better", "won", "lost")
    for row in comparison.metrics:
        table.add_row(
            row.metric,
            f"{row.a:.4g}",
            f"{row.b:.4g}",
            f"{row.difference:+.4g}",
            f"{row.low:+.4g} to {row.high:+.4g}",
            {"a": name_a, "b": name_b}.get(row.better, "neither"),
            str(comparison.won.get(row.metric, "")),
            str(comparison.lost.get(row.metric, "")),
        )
    told = (
        f"{comparison.shared_prompts} shared prompts; {comparison.only_a} only in {name_a}, "
        f"{comparison.only_b} only in {name_b}"
    )
    parts: list[Any] = [table, told, *comparison.notes]
    for change in comparison.changes:
        part = Table(title=f"{change.metric}: {change.score_a:.4g} → {change.score_b:.4g}", show_header=False)
        # Text, because what people write may look like rich's own markup.
        part.add_row("prompt", Text(change.prompt[-1]["content"]))
        part.add_row("reference", Text("\n".join(change.references)))
        part.add_row(name_a, Text(change.answer_a))
        part.add_row(name_b, Text(change.answer_b))
        parts.append(part)
    return Group(*parts)


def _compared(
    metric: str,
    rows_a: list[dict[str, Any]],
    rows_b: list[dict[str, Any]],
    reported: tuple[float, float],
    **bootstrap: Any,
) -> MetricComparison:
    scores_a = [row_score(row, "candidate", metric) for row in rows_a]
    scores_b = [row_score(row, "candidate", metric) for row in rows_b]
    groups = [row["group"] for row in rows_a]
    weights = [row["tokens"] if metric == "loss" else 1 for row in rows_a]
    differences = [b - a for a, b in zip(scores_a, scores_b, strict=True)]
    difference, low, high = paired_interval(groups, differences, weights, **bootstrap)
    better = "neither"
    # One group alone has an interval without width, which would make any difference look certain.
    if (low > 0 or high < 0) and len(set(groups)) > 1:
        better = "b" if (low > 0) != (metric in LESS_IS_BETTER) else "a"
    return MetricComparison(
        metric=metric,
        a=_mean(scores_a, weights),
        b=_mean(scores_b, weights),
        difference=difference,
        low=low,
        high=high,
        better=better,
        reported_a=reported[0],
        reported_b=reported[1],
        rows=len(rows_a),
        groups=len(set(groups)),
    )


def _changes(
    metric: str, rows_a: list[dict[str, Any]], rows_b: list[dict[str, Any]]
) -> tuple[list[Change], list[Change]]:
    """Where B is better and where A is, the largest first, ties in the report's order."""
    changes = [
        Change(
            metric=metric,
            prompt=a["prompt"],
            references=a["references"],
            answer_a=a["answers"]["candidate"],
            answer_b=b["answers"]["candidate"],
            score_a=row_score(a, "candidate", metric),
            score_b=row_score(b, "candidate", metric),
        )
        for a, b in zip(rows_a, rows_b, strict=True)
    ]
    changes.sort(key=lambda change: -abs(change.score_b - change.score_a))
    better = [change for change in changes if change.score_b > change.score_a]
    worse = [change for change in changes if change.score_b < change.score_a]
    return better, worse


def _mean(scores: list[float], weights: list[int]) -> float:
    return sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)


def _reported(folder: Path) -> dict[str, float]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{folder.name} has no report.json", "a folder that `evaluate` wrote") from None
    return report["scores"]["candidate"]


def _by_prompt(folder: Path) -> dict[str, dict[str, Any]]:
    rows = read_answers(folder)
    return {json.dumps([row["prompt"], row["references"]], sort_keys=True): row for row in rows}


def _by_row(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["id"], row["tokens"]): row for row in read_losses(folder)}

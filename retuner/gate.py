"""Whether a candidate may replace what serves now: declared demands, each held against an interval.

A demand looks at the paired difference on the same held-out prompts, oriented so that more is better,
and at its percentile bootstrap interval. Whole groups are resampled, because the rows of one group
(one prompt with several completions) rise and fall together. The interval has two sides, so with
`confidence: 0.95` the lower end is passed by chance in one of forty candidates.

- `loss`: rows weigh by their supervised tokens, so the gain is the difference of the two overall losses.
- The scores of preference pairs are of held-out pairs, each of which counts the same.
- `bleu`: the difference is the mean of sentence BLEU differences, not of the two corpus scores, which
  have no rows to resample. The other metrics' gains are the differences of their headlines.
- No rules, nothing demanded: the decision is yes with no verdicts.
- A rule against a production adapter where there is none holds, and says so.
- Numbers that are not finite, and a single group (which has no spread to judge by), never pass.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from retuner.artifacts import Decision, GateVerdict, Report
from retuner.errors import Refused
from retuner.params import PREFERENCE_METRICS, GateParams, GateRule

FEW_GROUPS = 20
"""Below this a percentile interval is known to be too narrow; the verdict says so."""
INDICES_AT_ONCE = 1_000_000
DECIMALS = 9
OF_ROWS = ("loss", *PREFERENCE_METRICS)
"""Metrics of held-out rows; the others are of answers to held-out prompts."""
LESS_IS_BETTER = {"loss", "dpo_loss"}
"""Numbers are compared as they are stored: a sum's last bits decide nothing."""


def decide(report: Report, params: GateParams) -> Decision:
    """Every rule's verdict; passed when all hold.

    Errors: Refused when the report lacks the scores a rule asks for.
    """
    verdicts = tuple(_verdict(rule, report, params) for rule in params.rules)
    passed = all(verdict.holds for verdict in verdicts)
    return Decision(passed=passed, confidence=params.confidence, verdicts=verdicts)


def paired_interval(
    groups: Sequence[str],
    differences: Sequence[float],
    weights: Sequence[float],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """Weighted mean of the differences, and the ends of its percentile bootstrap interval over groups.

    A resample draws as many groups as there are, with replacement, and takes the ratio of their summed
    weighted differences to their summed weights (the cluster bootstrap; Davison & Hinkley 1997, 3.8).
    """
    import numpy

    _, member = numpy.unique(numpy.asarray(groups, dtype=object).astype(str), return_inverse=True)
    total = numpy.bincount(member, weights=numpy.multiply(differences, weights))
    weight = numpy.bincount(member, weights=weights)
    random = numpy.random.Generator(numpy.random.PCG64(seed))
    means = []
    for start in range(0, resamples, step := max(1, INDICES_AT_ONCE // len(total))):
        drawn = random.integers(len(total), size=(min(step, resamples - start), len(total)))
        means.append(total[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = numpy.quantile(numpy.concatenate(means), [tail, 1 - tail])
    mean = total.sum() / weight.sum()
    return round(float(mean), DECIMALS), round(float(low), DECIMALS), round(float(high), DECIMALS)


def read_answers(report: Path) -> list[dict[str, Any]]:
    """The rows of a report's folder that hold every metric that is not one of `OF_ROWS`."""
    return _read_lines(report / "answers.jsonl")


def read_losses(report: Path) -> list[dict[str, Any]]:
    return _read_lines(report / "losses.jsonl")


def row_score(row: dict[str, Any], model: str, metric: str) -> float:
    """Errors: Refused when the report does not have it."""
    try:
        if metric == "loss":
            return float(row["loss"][model])
        return float(row["preference" if metric in OF_ROWS else "scores"][model][metric])
    except KeyError:
        raise Refused(
            f"the report has no {metric} of {model} for group {row['group']}",
            "every model scored by every metric on every row",
            "run evaluate again with that metric in evaluate.metrics",
        ) from None


def _verdict(rule: GateRule, report: Report, params: GateParams) -> GateVerdict:
    required = 0.0 - (rule.max_regression or 0.0) if rule.min_gain is None else rule.min_gain
    verdict = partial(GateVerdict, metric=rule.metric, against=rule.against, required=required)
    without_numbers = partial(verdict, gain=None, low=None, high=None)
    if rule.against == "production" and "production" not in report.facts.scores:
        return without_numbers(holds=True, note="there is no production adapter to compare with")
    rows = read_losses(report.path) if rule.metric in OF_ROWS else read_answers(report.path)
    sign = -1 if rule.metric in LESS_IS_BETTER else 1
    differences = [
        sign * (row_score(row, "candidate", rule.metric) - row_score(row, rule.against, rule.metric))
        for row in rows
    ]
    groups = [row["group"] for row in rows]
    count = len(set(groups))
    if not all(map(math.isfinite, differences)):
        return without_numbers(holds=False, note="a score is not a finite number")
    if count < 2:
        return without_numbers(holds=False, note=f"{count} groups have no spread to judge by")
    weights = [row["tokens"] if rule.metric == "loss" else 1 for row in rows]
    gain, low, high = paired_interval(
        groups, differences, weights, params.confidence, params.resamples, params.seed
    )
    few = ", so few that the interval is too narrow" if count < FEW_GROUPS else ""
    note = f"{len(rows):,} rows in {count:,} groups{few}"
    return verdict(gain=gain, low=low, high=high, holds=low >= required, note=note)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]

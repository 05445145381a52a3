"""What a person reads on a run's page in MLflow, from the artifacts of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a fully cached run ends before pydantic alone would have been imported
    from retuner.artifacts import Decision, GateVerdict, ReportFacts

MAX_PARAM_CHARACTERS = 6000
"""Of one param value, MLflow's limit."""

LESS_IS_BETTER = {"loss", "dpo_loss", "perplexity"}


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"train": {"lora": {"rank": 8}}}` as `{"train.lora.rank": "8"}`; lists stay whole, as JSON."""
    values: dict[str, str] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            values |= flat(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            values[name] = text[:MAX_PARAM_CHARACTERS]
    return values


def comparable_metrics(report: ReportFacts) -> dict[str, float]:
    """`candidate/exact_match`, `base/exact_match`, ... and `gain/exact_match_over_base`, more is better."""
    values = {f"{model}/{name}": v for model, scores in report.scores.items() for name, v in scores.items()}
    candidate = report.scores["candidate"]
    for model, scores in report.scores.items():
        if model == "candidate":
            continue
        for name in sorted(scores.keys() & candidate.keys()):
            gain = candidate[name] - scores[name]
            values[f"gain/{name}_over_{model}"] = -gain if name in LESS_IS_BETTER else gain
    return values


def answers_table(answers: Path) -> dict[str, list[Any]]:
    """Columns of `answers.jsonl`: prompt, expected, each model's answer, and each model's exact match."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    models = [m for m in ("base", "production", "candidate") if rows and m in rows[0]["answers"]]
    table: dict[str, list[Any]] = {
        "prompt": [_text(row["prompt"]) for row in rows],
        "expected": [" | ".join(row["references"]) for row in rows],
    }
    for model in models:
        table[model] = [row["answers"][model] for row in rows]
    for model in models:
        matches = [row["scores"][model].get("exact_match") for row in rows]
        if None not in matches:
            table[f"{model} exact match"] = matches
    return table


def note(report: ReportFacts, decision: Decision, lines: dict[str, str]) -> str:
    """Markdown: what was decided and why, the scores side by side, and `lines` (name to value)."""
    models = [m for m in ("base", "production", "candidate") if m in report.scores]
    said = "passed" if decision.passed else "said no"
    text = [f"**Gate: {said}** ({decision.confidence:.0%} intervals)", ""]
    text += [f"- {verdict_line(v)}" for v in decision.verdicts]
    text += [f"- beware: {warning}" for warning in decision.notes]
    text += ["", f"| metric | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for metric in report.scores["candidate"]:
        cells = [f"{report.scores[m][metric]:.4g}" if metric in report.scores[m] else "" for m in models]
        text.append(f"| {metric} | {' | '.join(cells)} |")
    text += ["", f"{report.prompts} prompts answered, {report.rows} held-out rows scored.", ""]
    text += [f"- {name}: {value}" for name, value in lines.items()]
    return "\n".join(text)


def not_as_requested(effective: dict[str, str]) -> str:
    """`attention eager, sdpa was requested`, ...; empty when a training ran as it was asked to."""
    asked = {
        name.removeprefix("requested_"): value for name, value in effective.items() if "requested_" in name
    }
    return "; ".join(
        f"{name} {effective[name]}, {value} was requested"
        for name, value in asked.items()
        if effective[name] != value
    )


def verdict_line(verdict: GateVerdict) -> str:
    """What was asked, what was found, and whether it holds."""
    held = "holds" if verdict.holds else "FAILS"
    if verdict.gain is None:
        return f"{held}: {verdict.metric} against {verdict.against}: {verdict.note}"
    interval = f"[{verdict.low:+.4g}, {verdict.high:+.4g}]"
    said = f"{held}: {verdict.metric} against {verdict.against}: {verdict.gain:+.4g} {interval}"
    return f"{said}, at least {verdict.required:+.4g} was asked{f'; {verdict.note}' if verdict.note else ''}"


def _text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)

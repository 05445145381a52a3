"""`evaluate` on held-out preference pairs: which of two answers each model thinks likelier, and by how much.

All in nats over whole answers, stop token included. Of a pair, with log π the log-probability of an answer:

- `preference_accuracy`: 1 where log π(chosen) > log π(rejected), else 0. It needs no reference: the base has one too.
- `preference_margin`: log π(chosen) - log π(rejected).
- `dpo_loss`: -log σ(β·(margin - margin of the reference)), the loss of Rafailov et al. (2023), equation 7, whatever
  loss was trained with. The reference is that of training, whose own dpo_loss is log 2.
- `loss`: nats a token of the chosen answer.

Longer answers are less likely ones: where chosen ones are longer, an accuracy below a half is no sign of a bad model.
What training did is in the difference to the base and to production.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from retuner.artifacts import Adapter, Base, Chats, PreferenceFacts, ReportFacts
from retuner.errors import Refused
from retuner.evaluation import (
    NO_LOSS,
    loss_lines,
    loss_scores,
    measure,
    models,
    rounded,
    write_report,
)
from retuner.observe import Observer
from retuner.params import PREFERENCE_METRICS, EvaluateParams

REFERENCE = "reference"
ACCURACY, MARGIN, DPO_LOSS = PREFERENCE_METRICS


def evaluate_pairs(
    out: Path,
    adapter: Adapter,
    chats: Chats,
    base: Base,
    incumbent: Path | None,
    reference: Path | None,
    preference: PreferenceFacts,
    params: EvaluateParams,
    precision: str,
    attention: str,
    device: str,
    observer: Observer,
) -> ReportFacts:
    """As `retuner.evaluation.evaluate`, with the scores of pairs besides.

    `reference` is the folder of the adapter that training began as, that of `incumbent` where it is the same; None for
    the base alone.
    """
    pairs = read_pairs(chats.path / "held_out.arrow")
    rows = [_row(pair, "chosen_ids") for pair in pairs], [_row(pair, "rejected_ids") for pair in pairs]
    folders = models(incumbent, adapter.path)
    told = list(folders)
    # Mostly it is the base or what is in production, and is measured anyway.
    reference_name = next((name for name in told if folders[name] == reference), REFERENCE)
    folders[reference_name] = reference
    measured = measure(
        [*rows[0], *rows[1]],
        chats,
        base,
        folders,
        (REFERENCE,),
        params,
        precision,
        attention,
        device,
        observer,
    )
    margins = {name: _margins(rows, losses) for name, losses in measured.losses.items()}
    each = {name: _scores(margins[name], margins[reference_name], preference.beta) for name in told}
    chosen = {name: measured.losses[name][: len(pairs)] for name in told}
    lines = loss_lines(rows[0], chosen)
    for at, line in enumerate(lines):
        line["preference"] = {
            name: {metric: rounded(values[at]) for metric, values in each[name].items()} for name in told
        }
    scores = {
        name: {metric: rounded(fmean(values)) for metric, values in each[name].items()}
        | loss_scores(rows[0], chosen[name])
        for name in told
    }
    return write_report(out, measured, scores, lines)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The held-out pairs: id, group, prompt_ids, chosen_ids, rejected_ids. Errors: Refused when there are none."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        pairs = pyarrow.ipc.open_stream(source).read_all().to_pylist()
    if not pairs:
        raise Refused("no held-out pairs to compare on", "at least one", "raise prepare.held_out_fraction")
    return pairs


def _row(pair: dict[str, Any], answer: str) -> dict[str, Any]:
    """Prompt and one answer, as `retuner.evaluation.read_held_out` has rows."""
    ids = pair["prompt_ids"] + pair[answer]
    return {
        "id": pair["id"],
        "group": pair["group"],
        "input_ids": ids,
        "labels": [NO_LOSS] * len(pair["prompt_ids"]) + pair[answer],
        "tokens": len(pair[answer]),
    }


def _margins(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]], losses: list[float]) -> list[float]:
    """log π(chosen) - log π(rejected) of each pair, from nats a token of all chosen answers, then all rejected."""
    totals = [loss * row["tokens"] for row, loss in zip([*rows[0], *rows[1]], losses)]
    return [rejected - chosen for chosen, rejected in zip(totals, totals[len(rows[0]) :])]


def _scores(margins: list[float], reference: list[float], beta: float) -> dict[str, list[float]]:
    return {
        ACCURACY: [float(margin > 0) for margin in margins],
        MARGIN: margins,
        DPO_LOSS: [_softplus(-beta * (margin - of)) for margin, of in zip(margins, reference)],
    }


def _softplus(number: float) -> float:
    """log(1 + e^number), which is -log σ(-number)."""
    return max(number, 0.0) + math.log1p(math.exp(-abs(number)))

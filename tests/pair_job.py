"""A small training from preference pairs that tests repeat: as `training_job`, with pairs of random ids."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from training_job import LORA, PARAMS, Heard, base_of, chats_of

from retuner import dpo
from retuner.artifacts import AdapterFacts
from retuner.observe import Observer
from retuner.tiny_phi3 import write_tiny_phi3
from retuner.train_params import DpoParams

Pair = tuple[list[int], list[int], list[int]]
STOP = 1


def params(
    lora: dict[str, Any] | None = None, settings: dict[str, Any] | None = None, **changed: Any
) -> DpoParams:
    shared = {name: value for name, value in PARAMS.items() if name in DpoParams.model_fields}
    own = {
        "recipe": "dpo",
        "dpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, **(settings or {})},
    }
    return DpoParams(**{**shared, **own, **changed, "lora": {**LORA, **(lora or {})}})


def random_pairs(count: int = 24, seed: int = 0) -> list[Pair]:
    """Prompt, chosen and rejected: the chosen ones have low ids, the rejected ones high ones, all end with a stop."""
    draw = random.Random(seed)

    def ids(low: int, high: int, longest: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(draw.randint(2, longest))]

    return [(ids(5, 440, 20), [*ids(5, 200, 12), STOP], [*ids(240, 440, 12), STOP]) for _ in range(count)]


def make_inputs(folder: Path, pairs: list[Pair] | None = None) -> Path:
    for name in ("base", "chats"):
        (folder / name).mkdir(parents=True)
    write_tiny_phi3(folder / "base", seed=0)
    write_pairs(folder / "chats" / "train.arrow", random_pairs() if pairs is None else pairs)
    write_pairs(folder / "chats" / "held_out.arrow", random_pairs(6, seed=1))
    return folder


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    numbers, ids = [str(number) for number in range(len(pairs))], pa.list_(pa.int32())
    columns = {"id": pa.array(numbers, pa.string()), "group": pa.array(numbers, pa.string())}
    for place, name in enumerate(dpo.COLUMNS):
        columns[name] = pa.array([pair[place] for pair in pairs], ids)
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def run(
    folder: Path,
    asked: DpoParams | None = None,
    observer: Observer | None = None,
    out: str = "out",
    work: str = "work",
    start: Path | None = None,
) -> AdapterFacts:
    """Train on the inputs below `folder`, into its empty new folder `out`."""
    (folder / out).mkdir()
    (folder / work).mkdir(exist_ok=True)
    places = (folder / out, folder / work, chats_of(folder), base_of(folder))
    return dpo.train(*places, asked or params(), "cpu", observer or Heard(), start)

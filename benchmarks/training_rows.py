"""What every side of a training benchmark trains on: a base, and short chats as token ids with a loss mask.

A chat is one to several support e-mails with their answers (`retuner.support_emails`), as many as the length takes
that was drawn for it, log-normal as chats are. The same rows for the same seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retuner.artifacts import Base, BaseFacts, Chats, ChatsFacts, PacksFacts
from retuner.base import load_tokenizer
from retuner.pack_plan import plan_packs, write_packs
from retuner.rendering import Renderer
from retuner.support_emails import conversations
from retuner.token_rows import IGNORE, Row

MEAN_CHARS, SPREAD = 300, 0.7
NAME = "0" * 64


@dataclass(frozen=True)
class Work:
    """A base and rows in folders as the stages leave them."""

    base: Base
    chats: Chats
    train: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.train)

    def packed(self, folder: Path, pack_tokens: int) -> "Work":
        """The same rows with another pack plan, in a new folder."""
        folder.mkdir(parents=True)
        for name in ("train.arrow", "held_out.arrow"):
            (folder / name).symlink_to(self.chats.path / name)
        lengths = np.array([len(row.input_ids) for row in self.train])
        count = write_packs(folder / "packs.arrow", plan_packs(lengths, pack_tokens), pack_tokens)
        packs = PacksFacts(count=count, fill=self.tokens / (count * pack_tokens), rows_too_long=0)
        facts = self.chats.facts.model_copy(update={"packs": packs})
        return replace(self, chats=self.chats.model_copy(update={"path": folder, "facts": facts}))


def make_work(folder: Path, base: Path, rows: int, held_out: int, longest: int) -> Work:
    """`base` is a model folder. Rows of more than `longest` tokens are left out on all sides."""
    renderer = Renderer(load_tokenizer(base))
    found: list[Row] = []
    for row in renderer.encode_chats(_chats(2 * (rows + held_out))):
        if len(row.input_ids) <= longest:
            found.append(row)
    assert len(found) >= rows + held_out, f"only {len(found)} rows have at most {longest} tokens"
    train, held = found[:rows], found[rows : rows + held_out]
    return _write_work(folder, base, train, held)


def make_random_work(folder: Path, base: Path, rows: int, mean_tokens: int, longest: int) -> Work:
    """Rows of random ids, for speed alone: log-normal lengths of at least 8 tokens; the second half carries loss."""
    draw = random.Random(0)
    made = []
    for _ in range(rows + 8):
        length = min(longest, max(8, round(draw.lognormvariate(0, SPREAD) * mean_tokens)))
        ids = [draw.randrange(400) for _ in range(length)]
        made.append(Row(ids, [IGNORE] * (length // 2) + ids[length // 2 :], 0))
    return _write_work(folder, base, made[:rows], made[rows:])


def _write_work(folder: Path, base: Path, train: list[Row], held_out: list[Row]) -> Work:
    folder.mkdir(parents=True)
    write_rows(folder / "train.arrow", train)
    write_rows(folder / "held_out.arrow", held_out)
    return Work(_base(base), _chats_artifact(folder), tuple(train))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """As the template stage writes them."""
    numbers, ids = [str(number) for number in range(len(rows))], pa.list_(pa.int32())
    table = pa.table(
        {
            "id": pa.array(numbers, pa.string()),
            "group": pa.array(numbers, pa.string()),
            "input_ids": pa.array([row.input_ids for row in rows], ids),
            "labels": pa.array([row.labels for row in rows], ids),
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def _chats(count: int) -> list[list[dict[str, Any]]]:
    draw = random.Random(0)
    talks = iter(conversations(4 * count, seed=1))
    chats = []
    for _ in range(count):
        wanted, said = draw.lognormvariate(0, SPREAD) * MEAN_CHARS, list(next(talks)["messages"])
        while sum(len(message["content"]) for message in said) < wanted:
            said += [message for message in next(talks)["messages"] if message["role"] != "system"]
        chats.append(said)
    return chats


def _base(folder: Path) -> Base:
    facts = BaseFacts(
        source="local", architecture="Phi3ForCausalLM", parameters=1, weights_sha256=NAME, tokenizer_sha256=NAME,
        template_sha256=NAME, stop_token_ids=(1,),
    )  # fmt: skip
    return Base(stage="fetch_base", fingerprint=NAME, digest=NAME, path=folder, facts=facts)


def _chats_artifact(folder: Path) -> Chats:
    facts = ChatsFacts(
        train_rows=1, held_out_rows=1, held_out_prompts=1, train_tokens=1, supervised_tokens=1,
        longest_row_tokens=1, left_out={}, packs=None,
    )  # fmt: skip
    return Chats(stage="template", fingerprint=NAME, digest=NAME, path=folder, facts=facts)

"""Chats of real lengths, recombined from public ones: the same rows for the same number, however many are asked for.

A row is one to a few turns that follow one another, each a question and its answer from ShareGPT, Alpaca or GSM8K,
until the row has the length that was drawn for it (log-normal, some 450 tokens of Phi-3's on average). Every number
in it is drawn anew with as many digits, so that rows are not each other's duplicates and new words keep coming.
White space at the edges of messages is taken off: on such rows every side gives the same ids.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEAN_CHARS = 700
SPREAD = 0.6


def exchanges(data: Path) -> list[list[tuple[str, str]]]:
    """Questions and answers that are told one after the other."""
    found = []
    for row in json.loads((data / "sharegpt" / "dummy_conversation.json").read_bytes()):
        said = [turn["value"].strip() for turn in row["conversations"]]
        found.append(list(zip(said[::2], said[1::2], strict=False)))
    for row in json.loads((data / "alpaca" / "alpaca_en_demo.json").read_bytes()):
        found.append([(f"{row['instruction']}\n\n{row['input']}".strip(), row["output"].strip())])
    for line in (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append([(row["question"].strip(), row["answer"].strip())])
    return [talk for talk in found if talk and all(map(all, talk))]


def chats(data: Path, first: int, count: int) -> Iterator[list[dict[str, str]]]:
    """Rows number `first` and so on."""
    sources = exchanges(data)
    for number in range(first, first + count):
        draw = random.Random(number)
        wanted = draw.lognormvariate(0, SPREAD) * MEAN_CHARS
        talk: list[tuple[str, str]] = []
        while not talk or sum(len(text) for turn in talk for text in turn) < wanted:
            talk += draw.choice(sources)
        turns = [text for turn in talk for text in turn]
        yield [
            {"role": ("user", "assistant")[place % 2], "content": _renumbered(text, draw)}
            for place, text in enumerate(turns)
        ]


def write_chats(path: Path, data: Path, first: int, count: int) -> None:
    """Appends them to a file."""
    with path.open("a", encoding="utf-8") as lines:
        for messages in chats(data, first, count):
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _renumbered(text: str, draw: random.Random) -> str:
    def number(found: re.Match[str]) -> Any:
        digits = len(found[0])
        return str(draw.randrange(10 ** (digits - 1), 10**digits))

    return re.sub("[0-9]+", number, text)

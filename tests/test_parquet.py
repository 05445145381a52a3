"""Chats in Parquet: whatever types a column has and however it is cut, its rows are read as the same rows of JSON."""

import io
from pathlib import Path

import pyarrow
from pyarrow import parquet

from fuzz.reading import data_file
from retuner.chats import BadRow, Chat, read_chats

TURN = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


def read(path: Path, columns: dict, **how) -> list[Chat | BadRow]:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out, **how)
    path.write_bytes(out.getvalue())
    return list(read_chats([data_file(path)], "auto"))


def said(rows: list[Chat | BadRow]) -> list[list[str]]:
    assert all(isinstance(row, Chat) for row in rows), rows
    return [[message["content"] for message in row.messages] for row in rows]


def test_turns_in_several_row_groups_of_any_size_are_read(tmp_path):
    chats = [turns(f"{number}?", f"{number}!") for number in range(300)]
    for size in (1, 63, 64, 130):
        rows = read(
            tmp_path / "x.parquet",
            {"messages": pyarrow.array(chats, pyarrow.list_(TURN))},
            row_group_size=size,
        )
        assert said(rows) == [[f"{number}?", f"{number}!"] for number in range(300)]
        assert [row.line for row in rows] == list(range(1, 301))

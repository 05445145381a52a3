"""Chats in Parquet: whatever types a column has and however it is cut, its rows are read as the same rows of JSON."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from fuzz.reading import data_file
from retuner.chats import BadRow, Chat, read_chats
from retuner.json_rows import MAX_ROW_BYTES

TURN = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])


def turns(*texts: Any) -> list[dict[str, Any]]:
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


def verdicts(path: Path) -> list[Any]:
    """What each row of a file is: its messages, or why it is bad and in which words."""
    return [
        row.messages if isinstance(row, Chat) else (row.cause, row.message)
        for row in read_chats([data_file(path)], "auto")
    ]


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


# --- JSON in columns


def test_turns_that_datasets_keeps_as_json_are_read_as_the_rows_that_were_given(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chats = [turns("u", "a"), turns(parts, "é\n"), [*turns("x", "y"), *turns(None, "z")], None]
    mixed = [[{"role": "user", "content": "u"}, "no turn"], [], [None], turns("q", "a")]
    for rows in (chats, mixed):
        rows = [{"messages": row} for row in rows]
        Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "x.parquet")
        assert "extension<arrow.json>" in str(parquet.read_schema(tmp_path / "x.parquet"))
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert verdicts(tmp_path / "x.parquet") == verdicts(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("spelled", "cause"),
    [
        ('{"a": 1, "a": 2}', "duplicate_key"),
        ("[NaN]", "not_a_number"),
        ('"\\ud83d"', "lone_surrogate"),
        ("[" * 65 + "]" * 65, "too_deep"),
        ('"a\0b"', "nul"),
        ('"a\\u0000b"', "nul"),
        ('\ufeff"a"', "byte_order_mark"),
        ('["a"', "truncated"),
        ('"a" "b"', "several_objects"),
        ("a", "bad_json"),
        ("", "bad_json"),
        ("null", "not_text"),
        ('"' + "a" * MAX_ROW_BYTES + '"', "too_long"),
    ],
)
def test_json_in_a_column_is_held_to_what_rows_of_json_are_held_to(tmp_path, spelled, cause):
    asked = pyarrow.array(['"q"', '"q"', '"r"']).cast(pyarrow.json_())
    answers = pyarrow.array(['"a"', spelled, '"b"']).cast(pyarrow.json_())
    first, bad, last = read(tmp_path / "x.parquet", {"question": asked, "answer": answers})
    assert said([first, last]) == [["q", "a"], ["r", "b"]]
    assert (bad.cause, bad.line, bad.column) == (cause, 2, None)
    assert "answer" in bad.message or cause == "too_long"


def test_other_extension_types_are_read_as_what_they_are_stored_as(tmp_path):
    class Asked(pyarrow.ExtensionType):
        def __init__(self):
            super().__init__(pyarrow.list_(TURN), "test.asked")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

    pyarrow.register_extension_type(Asked())
    try:
        stored = pyarrow.array([turns("u", "a"), None], pyarrow.list_(TURN))
        column = pyarrow.ExtensionArray.from_storage(Asked(), stored)
        good, bad = read(tmp_path / "x.parquet", {"messages": column})
    finally:
        pyarrow.unregister_extension_type("test.asked")
    assert said([good]) == [["u", "a"]] and bad.cause == "not_a_list"

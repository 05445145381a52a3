"""Chats in Parquet: whatever types a column has and however it is cut, its rows are read as the same rows of JSON."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fuzz.reading import data_file
from retuner.chats import BadRow, Chat, read_chats
from retuner.errors import Refused
from retuner.json_rows import MAX_ROW_BYTES


def turn_of(content: pyarrow.DataType) -> pyarrow.StructType:
    return pyarrow.struct([("role", pyarrow.string()), ("content", content)])


TURN = turn_of(pyarrow.string())


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


# --- types of columns


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.binary(),
        pyarrow.binary(3),
        pyarrow.map_(pyarrow.string(), pyarrow.string()),
        pyarrow.map_(pyarrow.int32(), pyarrow.string()),
        pyarrow.decimal128(5, 2),
        pyarrow.timestamp("ns"),
        pyarrow.list_(pyarrow.binary()),
        pyarrow.json_(),
        pyarrow.uuid(),
        pyarrow.null(),
    ],
    ids=str,
)
def test_a_null_is_nothing_whatever_the_type_of_its_column(tmp_path, kind):
    columns = {"messages": [turns("u", "a")] * 2, "tools": pyarrow.nulls(2, kind)}
    assert said(read(tmp_path / "x.parquet", columns)) == [["u", "a"]] * 2


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_list(TURN),
        pyarrow.list_(TURN, 2),
        pyarrow.list_view(TURN),
        pyarrow.large_list_view(TURN),
    ],
    ids=str,
)
def test_lists_of_every_kind_are_read_from_wherever_a_batch_begins(tmp_path, kind):
    chats = [turns(f"{number}?", f"{number}!") for number in range(150)]
    column = pyarrow.array([turns("cut", "off"), *chats], kind)[1:]
    rows = read(tmp_path / "x.parquet", {"messages": column})
    assert pyarrow.types.is_nested(parquet.read_schema(tmp_path / "x.parquet").field(0).type)
    assert said(rows) == [[turn["content"] for turn in chat] for chat in chats]


@pytest.mark.parametrize("kind", [pyarrow.list_view(TURN), pyarrow.large_list_view(TURN)], ids=str)
def test_null_lists_leave_the_ones_behind_them_in_place(tmp_path, kind):
    column = pyarrow.array([turns("u", "a"), None, [], turns("v", "b")], kind)
    first, null, empty, last = read(tmp_path / "x.parquet", {"messages": column})
    assert said([first, last]) == [["u", "a"], ["v", "b"]]
    assert (null.cause, empty.cause) == ("not_a_list", "no_turns")


def test_a_null_among_lists_of_one_size_which_pyarrow_does_not_read_is_refused(tmp_path):
    column = pyarrow.array([turns("u", "a"), None], pyarrow.list_(TURN, 2))
    with pytest.raises(Refused, match="cannot be read as Parquet: Expected all lists to be of size=2"):
        read(tmp_path / "x.parquet", {"messages": column})


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.string_view()], ids=str)
def test_texts_of_every_kind_are_read(tmp_path, kind):
    answers = pyarrow.array(["x", "a" * 50, None, "é"], kind)[1:]
    first, null, last = read(tmp_path / "x.parquet", {"question": ["q", "r", "s"], "answer": answers})
    assert said([first, last]) == [["q", "a" * 50], ["s", "é"]] and null.cause == "not_text"


@pytest.mark.parametrize("key", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()], ids=str)
def test_a_map_with_texts_as_keys_is_an_object(tmp_path, key):
    turn = pyarrow.map_(key, pyarrow.large_string())
    good = [list(turn.items()) for turn in turns("u", "a")]
    twice = [[("role", "user"), ("content", "u"), ("role", "user")]]
    column = pyarrow.array([good, twice, [None], None, good], pyarrow.list_(turn))
    rows = read(tmp_path / "x.parquet", {"messages": column})
    assert said([rows[0], rows[4]]) == [["u", "a"]] * 2
    assert [row.cause for row in rows[1:4]] == ["duplicate_key", "not_an_object", "not_a_list"]


def test_an_object_with_a_field_twice_is_a_bad_row_as_in_json(tmp_path):
    turn = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user"]), *[pyarrow.array([said]) for said in ("u", "v")]],
        ["role", "content", "content"],
    )
    (bad,) = read(tmp_path / "x.parquet", {"messages": pyarrow.ListArray.from_arrays([0, 1], turn)})
    assert bad.cause == "duplicate_key"


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pyarrow.array([b"u"]), "a binary value"),
        (pyarrow.array([2**62], pyarrow.timestamp("ms")), "a timestamp[ms] value"),
        (pyarrow.array([[(1, "u")]], pyarrow.map_(pyarrow.int32(), pyarrow.string())), "a map<int32, string"),
    ],
    ids=["binary", "timestamp", "map"],
)
def test_a_value_of_a_type_that_is_not_read_is_told_by_its_type(tmp_path, column, told):
    for columns in (
        {"messages": column},
        {"question": column, "answer": ["a"]},
        {"messages": [[{"role": column[0], "content": "u"}]]},
    ):
        (bad,) = read(tmp_path / "x.parquet", columns)
        assert told in bad.message and told in bad.start and "Unread" not in bad.message + bad.start


# --- any rows

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["u", "a" * 99])
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "text", "image"]), "text": st.none() | texts})
parts = st.lists(st.none() | part, max_size=3)
PART = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())])
CONTENTS = {
    "texts": (texts, pyarrow.string()),
    "parts": (parts, pyarrow.list_(PART)),
    "texts and parts": (texts | parts, pyarrow.json_()),
}
LISTS = (pyarrow.list_, pyarrow.large_list, pyarrow.list_view, pyarrow.large_list_view)
HOW = st.fixed_dictionaries(
    {
        "row_group_size": st.sampled_from([1, 3, 64, 100, 1000]),
        "use_dictionary": st.booleans(),
        "dictionary_pagesize_limit": st.sampled_from([50, 2**20]),
        "data_page_size": st.sampled_from([50, 2**20]),
        "store_schema": st.booleans(),
    }
)


def conversations(content: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly good ones, and also what is none."""
    good = st.lists(content, min_size=1, max_size=3).map(lambda said: turns(*(said * 2)))
    roles = st.sampled_from(["user", "assistant", "system", "else", None])
    turn = st.fixed_dictionaries({"role": roles, "content": st.none() | content})
    return good | good | st.none() | st.lists(st.none() | turn, max_size=3)


@pytest.mark.parametrize("name", CONTENTS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_are_read_from_parquet_as_from_json(tmp_path, name, data):
    content, kind = CONTENTS[name]
    chats = data.draw(st.lists(conversations(content), min_size=1, max_size=10)) * data.draw(
        st.sampled_from([1, 20])
    )
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    if kind == pyarrow.json_():
        spelled = [
            chat and [turn and turn | {"content": json.dumps(turn["content"])} for turn in chat]
            for chat in chats
        ]
        # An array of JSON is made only out of one of texts, and in lists of this kind alone.
        column = pyarrow.array(spelled, pyarrow.list_(TURN)).cast(pyarrow.list_(turn_of(kind)))
    else:
        column = pyarrow.array(chats, data.draw(st.sampled_from(LISTS))(turn_of(kind)))
    read(tmp_path / "x.parquet", {"messages": column}, **data.draw(HOW))
    assert verdicts(tmp_path / "x.parquet") == verdicts(tmp_path / "x.jsonl")

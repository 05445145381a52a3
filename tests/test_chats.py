"""What the reader accepts, what it sets aside and what it refuses, by the exact bytes of awkward files."""

import gzip
import json
import tracemalloc
from pathlib import Path
from unicodedata import category

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.reading import data_file
from retuner import json_rows
from retuner.chats import BadRow, Chat, read_chats
from retuner.dataset import DataFile
from retuner.errors import Refused, Unavailable
from retuner.formats import FORMATS

GOOD = b'{"question": "Who?", "answer": "Me."}'
BOTH = b'{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}'
SYSTEM = {"role": "system", "content": "S"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def read(tmp_path: Path, name: str, content: bytes, format: str = "auto") -> list[Chat | BadRow]:
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_chats([data_file(path)], format))


def messages(*turns: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}).encode()


def turns(letters: str) -> bytes:
    """A `messages` row whose roles start with these letters."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return messages(*((roles[letter], letter) for letter in letters))


def said(row: Chat | BadRow) -> list[tuple[str, str]]:
    assert isinstance(row, Chat), row
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages", ["Hi", "Hello"]),
        ({"messages": [USER | {"content": PARTS}, ASSISTANT]}, "messages", ["ab", "Hello"]),
        ({"prompt": "ignored", "messages": [USER, ASSISTANT]}, "messages", ["Hi", "Hello"]),
        ({"conversations": [HUMAN, GPT]}, "sharegpt", ["Hi", "Hello"]),
        ({"conversations": [HUMAN | {"from": "user"}, GPT | {"from": "bard"}]}, "sharegpt", ["Hi", "Hello"]),
        ({"conversations": [HUMAN, GPT], "system": "S"}, "sharegpt", ["S", "Hi", "Hello"]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "alpaca", ["Add\n\n1 2", "3"]),
        ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", ["Add", "3"]),
        ({"instruction": "Add", "input": None, "output": "3", "system": ""}, "alpaca", ["Add", "3"]),
        ({"instruction": "Add", "output": "3", "system": "S", "id": 7}, "alpaca", ["S", "Add", "3"]),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", ["p", "c"]),
        ({"prompt": "p", "response": "c", "score": 1}, "prompt_completion", ["p", "c"]),
        ({"question": "q", "answer": "a", "label": 1}, "question_answer", ["q", "a"]),
        ({"question": "q", "answer": "a", "context": "c"}, "question_answer", ["q\n\nc", "a"]),
        ({"question": "q", "answer": "a", "input": "c", "context": " "}, "question_answer", ["q\n\nc", "a"]),
        ({"instruction": "q", "response": "a", "input": "c"}, "instruction_response", ["q\n\nc", "a"]),
        ({"instruction": "q", "output": "a", "context": "c"}, "alpaca", ["q\n\nc", "a"]),
        ({"prompt": "q", "completion": "a", "input": "c"}, "prompt_completion", ["q\n\nc", "a"]),
        ({"messages": [USER, ASSISTANT], "system": "S"}, "messages", ["S", "Hi", "Hello"]),
        ({"messages": [USER, ASSISTANT], "system": "\u200b"}, "messages", ["Hi", "Hello"]),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "S"}, "messages", ["S", "Hi", "Hello"]),
        ({"messages": [USER, ASSISTANT | {"weight": 1, "name": "x"}]}, "messages", ["Hi", "Hello"]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", ["Hi", "Hello"]),
        ({"prompt": [SYSTEM, USER], "completion": "Hello"}, "prompt_completion", ["S", "Hi", "Hello"]),
        ({"prompt": PARTS, "completion": [ASSISTANT]}, "prompt_completion", ["ab", "Hello"]),
        ({"prompt": "p", "completion": "c", "tools": [], "images": None}, "prompt_completion", ["p", "c"]),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_every_format_becomes_the_same_schema(tmp_path, row, format, expected, fixed):
    (chat,) = read(tmp_path, "x.jsonl", json.dumps(row).encode(), format if fixed else "auto")
    assert [text for _, text in said(chat)] == expected
    assert [role for role, _ in said(chat)] == ["system", "user", "assistant"][-len(expected) :]
    assert chat.format == format


def test_nothing_about_a_text_is_changed(tmp_path):
    text = ' \n<|end|>\u00a0\u2028\ufeff e\u0301 \u00e9 \U0001f600 "\\ \r\n\t'
    (chat,) = read(tmp_path, "x.jsonl", messages(("system", text), ("user", text), ("assistant", text)))
    assert said(chat) == [("system", text), ("user", text), ("assistant", text)]


def test_blank_lines_crlf_and_a_missing_last_newline_are_fine_and_lines_count_from_one(tmp_path):
    rows = read(tmp_path, "x.jsonl", b"\r\n" + GOOD + b"\r\n \t\n" + GOOD + b"\n\n" + GOOD)
    assert [(type(row), row.line) for row in rows] == [(Chat, 2), (Chat, 4), (Chat, 6)]


def test_each_file_has_a_format_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "p", "completion": "c"}')
    rows = read_chats([data_file(tmp_path / "a.jsonl"), data_file(tmp_path / "b.jsonl")], "auto")
    assert [row.format for row in rows] == ["question_answer", "prompt_completion"]


TURNS = {
    "no turns": (turns(""), "no_turns"),
    "system alone": (turns("s"), "no_turns"),
    "no answer": (turns("u"), "wrong_order"),
    "ends with the user": (turns("uau"), "wrong_order"),
    "starts with the assistant": (turns("au"), "wrong_order"),
    "two users": (turns("uua"), "wrong_order"),
    "two assistants": (turns("uaa"), "wrong_order"),
    "two systems": (turns("ssua"), "wrong_order"),
    "late system": (turns("usa"), "wrong_order"),
    "unknown role": (messages(("developer", "d"), ("user", "u"), ("assistant", "a")), "wrong_role"),
    "role in capitals": (messages(("User", "u"), ("assistant", "a")), "wrong_role"),
    "empty turn": (messages(("user", ""), ("assistant", "a")), "empty_turn"),
    "white turn": (messages(("user", "u"), ("assistant", " \n\u00a0")), "empty_turn"),
    "role is a list": (b'{"messages": [{"role": ["user"], "content": "u"}]}', "wrong_role"),
    "content is null": (b'{"messages": [{"role": "user", "content": null}]}', "not_text"),
    "content is an image": (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "not_text"),
    "part without text": (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "not_text"),
    "no parts": (b'{"messages": [{"role": "user", "content": []}]}', "empty_turn"),
    "turn without content": (b'{"messages": [{"role": "user"}]}', "missing_key"),
    "turn is text": (b'{"messages": ["Hi"]}', "not_an_object"),
    "messages is text": (b'{"messages": "Hi"}', "not_a_list"),
    "sharegpt with role": (b'{"conversations": [{"role": "user", "content": "u"}]}', "missing_key"),
    "unknown speaker": (b'{"conversations": [{"from": "narrator", "value": "u"}]}', "wrong_role"),
    "answer is a number": (b'{"question": "q", "answer": 42}', "not_text"),
    "several answers": (b'{"question": "q", "answer": ["a", "b"]}', "not_text"),
    "instruction is empty": (b'{"instruction": "", "input": "i", "output": "o"}', "empty_turn"),
    "only what has no width": (messages(("user", "u"), ("assistant", "\u200b\ufeff")), "empty_turn"),
    "only controls": (messages(("user", "\x01"), ("assistant", "a")), "empty_turn"),
    "two system prompts": (b'{"system": "t", ' + turns("sua")[1:], "two_systems"),
    "not to be learnt": (
        b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}',
        "not_learnt",
    ),
    "not to be trained on": (
        b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "train": false}]}',
        "not_learnt",
    ),
    "reasoning": (
        b'{"messages": [{"role": "user", "content": "u"}, '
        b'{"role": "assistant", "content": "a", "reasoning_content": "r"}]}',
        "unread_key",
    ),
    "a context of turns": (b'{"context": "c", ' + turns("ua")[1:], "unread_key"),
    "images": (b'{"question": "q", "answer": "a", "images": ["x"]}', "unread_key"),
    "input and context": (
        b'{"question": "q", "answer": "a", "input": "i", "context": "c"}',
        "ambiguous_format",
    ),
    "a system prompt of another name": (
        b'{"question": "q", "answer": "a", "system_prompt": "s"}',
        "unread_key",
    ),
    "earlier turns elsewhere": (b'{"instruction": "i", "output": "o", "history": [["a", "b"]]}', "history"),
    "no known keys": (b'{"body": "hello"}', "unknown_format"),
    "no keys": (b"{}", "unknown_format"),
    "two formats at once": (BOTH, "ambiguous_format"),
    "completion and response": (b'{"prompt": "p", "completion": "c", "response": "r"}', "ambiguous_format"),
    "escaped NUL": (b'{"question": "a\\u0000b", "answer": "x"}', "nul"),
    "high surrogate": (b'{"question": "a \\ud83d b", "answer": "x"}', "lone_surrogate"),
    "low surrogate": (b'{"question": "q", "answer": "\\udE00"}', "lone_surrogate"),
    "duplicate key": (b'{"question": "q", "answer": "a", "question": "r"}', "duplicate_key"),
    "duplicate key inside": (
        b'{"messages": [{"role": "user", "content": "u", "role": "u"}]}',
        "duplicate_key",
    ),
    "NaN": (b'{"question": "q", "answer": "a", "score": NaN}', "not_a_number"),
    "Infinity": (b'{"question": "q", "answer": "a", "score": -Infinity}', "not_a_number"),
    "a list": (b'["q", "a"]', "not_an_object"),
    "a number": (b"42", "not_an_object"),
    "nested too deep": (b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
    "opened too deep": (b'{"question": ' + b'{"a":' * 100_000, "too_deep"),
}


NEIGHBOURS = {
    b'"messages"': turns("ua"),
    b'"conversations"': b'{"conversations": [{"from": "user", "value": "u"}, {"from": "gpt", "value": "a"}]}',
    b'"instruction"': b'{"instruction": "i", "output": "o"}',
    b'"prompt"': b'{"prompt": "p", "completion": "c"}',
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("is_array", [False, True])
def test_a_bad_row_is_set_aside_with_its_cause_and_its_neighbours_are_read(tmp_path, name, is_array):
    content, cause = TURNS[name]
    good = next((row for key, row in NEIGHBOURS.items() if key in content), GOOD)
    opening, between, closing = (b"[", b",\n", b"]") if is_array else (b"", b"\n", b"\n")
    lines = opening + between.join([good, content, good]) + closing
    if is_array and name == "opened too deep":  # an element that stays open takes in the ones after it
        with pytest.raises(Refused, match=r"x\.json:2:1 .*\(truncated\)"):
            read(tmp_path, "x.json", lines)
        return
    before, bad, after = read(tmp_path, "x.json" if is_array else "x.jsonl", lines)
    assert isinstance(before, Chat) and isinstance(after, Chat)
    assert isinstance(bad, BadRow)
    assert (bad.cause, bad.line, after.line) == (cause, 2, 3)
    assert bad.message and content.decode().startswith(bad.start)


PLACES = {
    "bad UTF-8": (b'{"question": "\xff", "answer": "a"}', "bad_utf8", 15),
    "UTF-8 of a surrogate": (b'{"question": "\xed\xa0\x80", "answer": "a"}', "bad_utf8", 15),
    "overlong UTF-8": (b'{"question": "\xc0\xaf", "answer": "a"}', "bad_utf8", 15),
    "NUL byte": (b'{"question": "a\0b", "answer": "a"}', "nul", 16),
    "control character": (b'{"question": "a\x01b", "answer": "a"}', "bad_json", 16),
    "byte order mark in the middle": (b"\xef\xbb\xbf" + GOOD, "byte_order_mark", 1),
    "single quotes": (b"{'question': 'q'}", "bad_json", 2),
    "bracket of the other kind": (b'{"question": [1}', "bad_json", 16),
    "column in bytes": ('{"question": "é€😀", "answer": a}'.encode(), "bad_json", 37),
    "two objects": (GOOD + b" " + GOOD, "several_objects", len(GOOD) + 2),
    "comma after the row": (GOOD + b",", "several_objects", len(GOOD) + 1),
    "prose": (b"Hello there", "bad_json", 1),
    "cut off inside a string": (b'{"question": "q', "truncated", 16),
    "cut off after a key": (b'{"question"', "truncated", 12),
    "cut off inside an escape": (b'{"question": "q\\u00', "truncated", 20),
    "spread over lines": (b'{"question":', "truncated", 13),
}


@pytest.mark.parametrize("row", PLACES)
def test_damage_in_a_line_is_reported_at_its_byte(tmp_path, row):
    content, cause, column = PLACES[row]
    before, bad, after = read(tmp_path, "x.jsonl", GOOD + b"\n" + content + b"\n" + GOOD + b"\n")
    assert isinstance(before, Chat) and isinstance(after, Chat) and after.line == 3
    assert (bad.cause, bad.line, bad.column) == (cause, 2, column)
    assert bad.where == f"x.jsonl:2:{column}"


def test_a_file_that_ends_inside_a_character_or_a_row_is_truncated(tmp_path):
    for end in (b'{"question": "\xf0\x9f', b'{"question": "q", "ans'):
        *rows, bad = read(tmp_path, "x.jsonl", GOOD + b"\n" + end)
        assert len(rows) == 1 and (bad.cause, bad.line) == ("truncated", 2)


def test_a_row_of_another_format_than_its_file_is_set_aside(tmp_path):
    rows = read(tmp_path, "x.jsonl", GOOD + b'\n{"prompt": "p", "completion": "c"}\n' + GOOD)
    assert [getattr(row, "cause", "good") for row in rows] == ["good", "mixed_format", "good"]


def test_what_a_row_is_called_does_not_depend_on_the_rows_before_it(tmp_path):
    for rows in ([GOOD, BOTH, b"{}"], [b"{}", BOTH, GOOD]):
        found = read(tmp_path, "x.jsonl", b"\n".join(rows))
        causes = {getattr(row, "cause", "good") for row in found}
        assert causes == {"good", "ambiguous_format", "unknown_format"}


def test_brackets_in_a_text_do_not_count_as_nesting(tmp_path):
    text = "[{" * 1000 + '"\\'
    (chat,) = read(tmp_path, "x.jsonl", messages(("user", text), ("assistant", "a")))
    assert said(chat)[0] == ("user", text)


@pytest.mark.parametrize(("depth", "kind"), [(json_rows.MAX_DEPTH, Chat), (json_rows.MAX_DEPTH + 1, BadRow)])
def test_unknown_keys_may_hold_anything_but_not_too_deep(tmp_path, depth, kind):
    deep = b"[" * (depth - 1) + b"]" * (depth - 1)
    (row,) = read(tmp_path, "x.jsonl", GOOD[:-1] + b', "n": ' + b"9" * 5000 + b', "meta": ' + deep + b"}")
    assert type(row) is kind


def test_a_fixed_format_is_demanded_of_every_row_and_settles_what_is_ambiguous(tmp_path):
    chat, bad = read(tmp_path, "x.jsonl", BOTH + b'\n{"question": "q"}', "question_answer")
    assert said(chat) == [("user", "q"), ("assistant", "a")]
    assert bad.cause == "missing_key" and "question/answer" in bad.message


def test_places_in_an_array_are_those_of_the_file(tmp_path):
    content = b'\n [\n  {"question": "q",\n   "answer": "a"}  ,  {"question": "q",\n "answer": "\xff"},\n'
    first, bad, last = read(tmp_path, "x.json", content + GOOD + b"]\n")
    assert (first.line, last.line) == (3, 6)
    assert (bad.cause, bad.where) == ("bad_utf8", "x.json:5:13")


@pytest.mark.parametrize(
    ("content", "good", "cause"),
    [
        (b"[" + GOOD + b",]", 1, "bad_json"),
        (b"[," + GOOD + b"]", 0, "bad_json"),
        (b"[" + GOOD + b",," + GOOD + b"]", 1, "bad_json"),
        (b"[" + GOOD + GOOD + b"]", 0, "several_objects"),
        (b"[" + GOOD, 0, "truncated"),
        (b"[", 0, "truncated"),
        (b"[" + GOOD + b",", 1, "truncated"),
        (b"[" + GOOD + b', {"question": "unclosed, "answer": "a"}, ' + GOOD + b"]", 1, "bad_json"),
        (b"[" + GOOD + b', {"question": "]', 1, "truncated"),
        (b"[" + GOOD + b"] []", 1, "several_objects"),
        (b"[" + GOOD + b"]" + b" " * 100 + b"x", 1, "several_objects"),
        (b"[" + GOOD + b', {"question": ]}, ' + GOOD + b"]", 1, "bad_json"),
        (b"[" + GOOD + b', {"question": 1]}, ' + GOOD + b"]", 1, "bad_json"),
        (b"[" + GOOD + b", " + GOOD + b"], " + GOOD + b"]", 2, "several_objects"),
        (b"[" + GOOD + b", {'question': 1}]", 1, "bad_json"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 2**18])
def test_an_array_that_is_no_json_is_refused_at_the_place_behind_which_rows_may_be_lost(
    tmp_path, monkeypatch, content, good, cause, chunk_bytes
):
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "x.json").write_bytes(content)
    rows: list[Chat | BadRow] = []
    with pytest.raises(Refused, match=rf"x\.json:1:\d+ .* \({cause}\)") as refusal:
        for row in read_chats([data_file(tmp_path / "x.json")], "question_answer"):
            rows.append(row)
    assert "JSON" in refusal.value.expected and "mend" in refusal.value.do
    assert [type(row) for row in rows] == [Chat] * good


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 2**18])
@pytest.mark.parametrize(
    ("content", "causes"),
    [
        (b"[]", []),
        (b"[" + GOOD + b"]", ["good"]),
        (
            b'[1, "],[", null, NaN, -Infinity, ' + GOOD + b"]",
            ["not_an_object"] * 3 + ["not_a_number"] * 2 + ["good"],
        ),
        (b'[true, false, -1.5E+3, "\\"", ' + GOOD + b"]", ["not_an_object"] * 4 + ["good"]),
    ],
)
def test_in_an_array_that_is_json_each_element_counts_for_itself(
    tmp_path, monkeypatch, content, causes, chunk_bytes
):
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    assert [getattr(row, "cause", "good") for row in read(tmp_path, "x.json", content)] == causes


def test_no_row_is_lost_behind_two_damaged_ones_or_in_one_above_the_cap(tmp_path):
    rows = [b'{"question": "q%d", "answer": "a"}' % n for n in range(100)]
    rows[20] = rows[20].replace(b'q20"', b"q20")
    rows[80] = rows[80].replace(b'"q80', b"q80")
    with pytest.raises(Refused, match=r"x\.json:21:"):
        read(tmp_path, "x.json", b"[" + b",\n".join(rows) + b"]")
    long = json.dumps({"question": "q", "answer": "a" * json_rows.MAX_ROW_BYTES}).encode()
    for between in (b"\n", b", q"):
        with pytest.raises(Refused, match=r"x\.json:[12]:"):
            read(tmp_path, "x.json", b"[" + GOOD + b",\n" + long + between + GOOD + b"]")


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
awkward_texts = (st.text(characters) | st.text('"\\,[]{}\n ue\u00e9')).filter(
    lambda text: any(category(character)[0] not in "CZ" for character in text)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    pairs=st.lists(st.tuples(awkward_texts, awkward_texts)),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    chunk_bytes=st.integers(1, 40),
)
def test_an_array_reads_the_same_however_it_is_laid_out(tmp_path, pairs, indent, ascii_only, chunk_bytes):
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
        chats_read = read(tmp_path, "x.json", content)
    assert [said(chat) for chat in chats_read] == [[("user", q), ("assistant", a)] for q, a in pairs]
    lines = json.dumps(rows, indent=1).split("\n")
    if indent == 1:
        assert [chat.line for chat in chats_read] == [n for n, line in enumerate(lines, 1) if line == " {"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_row_above_the_cap_is_set_aside_without_being_held_in_memory(tmp_path, name):
    path = tmp_path / name
    opening, between, closing = (b"", b"\n", b"") if name == "x.jsonl" else (b"[", b",\n", b"]")
    with path.open("wb") as stream:
        stream.write(opening + b'{"question": "')
        for _ in range(48):
            stream.write(b'a\\"b\\\\, ' * 2**17)
        stream.write(b'", "answer": "a"}' + between + GOOD + closing)
    tracemalloc.start()
    bad, good = read_chats([data_file(path)], "auto")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (bad.cause, bad.line) == ("too_long", 1) and len(bad.start) <= 200
    assert isinstance(good, Chat) and good.line == 2
    assert peak_bytes < 5 * json_rows.MAX_ROW_BYTES < path.stat().st_size


@pytest.mark.parametrize(("extra_bytes", "kind"), [(0, Chat), (1, BadRow)])
@pytest.mark.parametrize(("opening", "closing"), [("", ""), ("", "\n"), ("[", "]")])
def test_the_cap_counts_the_bytes_of_the_row_alone(tmp_path, opening, closing, extra_bytes, kind):
    row = json.dumps({"question": "q", "answer": ""})
    filler = "a" * (json_rows.MAX_ROW_BYTES - len(row) + extra_bytes)
    row = json.dumps({"question": "q", "answer": filler})
    (read_row,) = read(tmp_path, "x.json" if opening else "x.jsonl", f"{opening}{row}{closing}".encode())
    assert type(read_row) is kind


@pytest.mark.parametrize("content", [b'[{"q": "' + b'\\"' * 2**21, b"[" + b'"' * 2**21, b"[" + b"\\" * 2**21])
def test_hostile_quotes_do_not_make_reading_slower_than_linear(tmp_path, content):
    with pytest.raises(Refused, match=r"x\.json:1:"):
        read(tmp_path, "x.json", content)


OTHER_KINDS = {
    "preference pairs": ("x.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "r"}', "preference DPO"),
    "pairs of chats": ("x.json", b'[{"conversations": [], "chosen": 1, "rejected": 2}]', "preference chosen"),
    "graded answers": ("x.jsonl", b'{"prompt": "p", "completion": "c", "label": false}', "preference KTO"),
    "graded chats": ("x.jsonl", b'{"messages": [], "kto_tag": true}', "preference KTO"),
    "plain text": ("x.jsonl", b'{"text": "Once upon a time"}', "plain completion"),
    "function calls": (
        "x.jsonl",
        b'{"conversations": [{"from": "human", "value": "h"}, {"from": "function_call", "value": "{}"}]}',
        "function_call 2 tool template",
    ),
    "observations": ("x.jsonl", b'{"conversations": [{"from": "observation", "value": "1"}]}', "observation"),
    "tool results": ("x.jsonl", b'{"messages": [{"role": "tool", "content": "4"}]}', "role tool"),
    "tool calls": ("x.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "calls tool"),
    "tools on offer": ("x.jsonl", b'{"messages": [], "tools": [{"name": "f"}]}', "tool"),
    "UTF-8 with a mark": ("x.jsonl", b"\xef\xbb\xbf" + GOOD, "x.jsonl:1:1 mark UTF-8 tail"),
    "UTF-16": ("x.jsonl", GOOD.decode().encode("utf-16"), "UTF-16 iconv"),
    "an array named jsonl": ("x.jsonl", b"\n [" + GOOD + b"]", "array .json"),
    "lines named json": ("x.json", GOOD + b"\n" + GOOD, "'{' .jsonl"),
    "rows below a key": ("x.json", b'{"data": [' + GOOD + b"]}", "array below key"),
    "an empty json file": ("x.json", b" \n", "empty"),
    "a document": ("x.txt", b"Who? Me.", "x.txt convert"),
    "capitals": ("x.JSONL", GOOD, "rename .jsonl"),
    "newline-delimited JSON": ("x.ndjson.GZ", GOOD, "rename .jsonl.gz"),
    "a mark in what is packed": ("x.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + GOOD), "gzip -dc tail"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_refused_with_what_it_is_and_what_to_do(tmp_path, kind):
    name, content, words = OTHER_KINDS[kind]
    with pytest.raises(Refused) as refusal:
        read(tmp_path, name, content)
    assert name in refusal.value.found and refusal.value.expected and refusal.value.do
    for word in words.split():
        assert word in str(refusal.value)


def test_a_tool_transcript_is_refused_wherever_in_the_file_it_stands(tmp_path):
    with pytest.raises(Refused, match=r"x\.jsonl:3 "):
        read(tmp_path, "x.jsonl", turns("ua") + b"\n\n" + messages(("tool", "t")))


def test_an_empty_file_has_no_rows(tmp_path):
    assert read(tmp_path, "x.jsonl", b"") == []


def test_a_file_that_has_gone_is_unavailable(tmp_path):
    gone = DataFile(relpath="x.jsonl", path=tmp_path / "x.jsonl", size=1, md5="0" * 32)
    with pytest.raises(Unavailable, match="cannot be read"):
        list(read_chats([gone], "auto"))


turn_keys = ["role", "content", "from", "value", "system", "input", "tools", "type", "text"]
known_keys = st.sampled_from(turn_keys + [key for known in FORMATS for key in known.keys])
json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_keys, inner, max_size=4),
    max_leaves=20,
)
pieces = st.sampled_from([b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\n", b"a", GOOD])
any_bytes = (
    st.binary(max_size=200)
    | st.lists(pieces, max_size=60).map(b"".join)
    | st.lists(json_like.map(lambda value: json.dumps(value).encode()), max_size=4).map(b"\n".join)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(content=any_bytes, is_array=st.booleans(), chunk_bytes=st.sampled_from([1, 3, 2**18]))
def test_whatever_the_bytes_a_row_is_read_set_aside_or_refused(tmp_path, content, is_array, chunk_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
        try:
            rows = read(tmp_path, *(("x.json", b"[" + content) if is_array else ("x.jsonl", content)))
        except Refused as refusal:
            assert refusal.do
            return
    for row in rows:
        assert 1 <= row.line <= content.count(b"\n") + 1
        if isinstance(row, BadRow):
            json.dumps([row.start, row.message, row.cause]).encode()
            assert (row.start + row.message).encode("utf-8")
        else:
            assert said(row)[-1][0] == "assistant"


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, {"context": None}, ["q", "a"]),
        ({"question": "q", "answer": "a", "input": "i", "context": "c"}, {"context": None}, ["q\n\ni", "a"]),
        ({"question": "q", "answer": "a", "passage": "c"}, {"context": "passage"}, ["q\n\nc", "a"]),
        ({"context": "q", "answer": "a"}, {"question": "context"}, ["q", "a"]),
        (
            {"question": "q", "answer": "a", "system_prompt": "s"},
            {"system": "system_prompt"},
            ["s", "q", "a"],
        ),
        ({"question": "q", "answer": "a", "system_prompt": "s"}, {"system_prompt": None}, ["q", "a"]),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, {"tools": None}, ["Hi", "Hello"]),
    ],
)
def test_params_say_by_which_name_a_key_is_read_and_which_is_not(tmp_path, row, columns, expected):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (chat,) = read_chats([data_file(tmp_path / "x.jsonl")], "auto", columns)
    assert [text for _, text in said(chat)] == expected


def test_only_what_would_be_read_can_be_passed_over(tmp_path):
    with pytest.raises(Refused, match="'category' to null"):
        list(read_chats([], "auto", {"category": None}))


def test_two_formats_of_one_name_are_told_apart_by_their_keys(tmp_path):
    (bad,) = read(tmp_path, "x.jsonl", b'{"prompt": "p", "completion": "c", "response": "r"}')
    assert "(prompt/completion) and prompt_completion (prompt/response): drop keys" in bad.message
    assert "prepare.format" not in bad.message

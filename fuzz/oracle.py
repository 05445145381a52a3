"""A second opinion on what the reader accepts, as strict as the first and written another way.

The reader scans bytes; this takes whole files, cut at line ends, and the standard library's own parsers. It knows
nothing of `retuner`. What it refuses must not have been accepted, and what was accepted must mean the same here.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

MAX_DEPTH = 64
PROMPTS = ("instruction", "prompt", "question")
ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response"),
    "question": ("answer",),
}
SPEAKERS = {"human": "user", "user": "user", "system": "system", "assistant": "assistant"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard"), "assistant"
)
Said = list[tuple[str, str]]


class No(Exception):
    """This is no chat, or not JSON; says why."""


def need(holds: Any, why: str) -> None:
    if not holds:
        raise No(why)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    need(sorted(keys) == sorted(set(keys)), "a key stands twice")
    return dict(pairs)


def _not_a_number(word: str) -> None:
    raise No(word)


_decoder = json.JSONDecoder(
    strict=True, object_pairs_hook=_unique, parse_constant=_not_a_number, parse_int=str, parse_float=str
)


def json_row(line: bytes) -> Any:
    """One strict JSON value, alone on its line. Errors: No."""
    try:
        text = line.decode("utf-8", "strict")
        need("\0" not in text and not text.startswith("\ufeff"), "NUL or a mark")
        return _decoder.decode(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise No(str(error)) from None


def said(row: Any) -> list[Said]:
    """What a row may mean: the roles and texts, for each format whose keys it has. Errors: No when it is no chat."""
    need(isinstance(row, dict), "not an object")
    need(not {"chosen", "rejected"} <= row.keys(), "preferences")
    need(not isinstance(row.get("label"), bool) and not isinstance(row.get("kto_tag"), bool), "marks")
    system = row.get("system") if isinstance(row.get("system"), str) and row["system"].strip() else None
    meanings = []
    for key, role, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(row.get(key), list) and all(isinstance(turn, dict) for turn in row[key]):
            turns = [(turn.get(role), turn.get(text)) for turn in row[key]]
            known = SPEAKERS if key == "conversations" else {name: name for name in SPEAKERS.values()}
            named = [
                (known.get(who) if isinstance(who, str) else None, said_text(what)) for who, what in turns
            ]
            lead = [("system", system)] if system and named[:1] != [("system", system)] else []
            meanings.append(lead + named)
    for asks in PROMPTS:
        for answers in ANSWERS[asks]:
            if asks in row and answers in row:
                question = said_text(row[asks])
                materials = [said_text(row.get(key)) for key in ("input", "context")]
                materials = [more for more in materials if isinstance(more, str) and more.strip()]
                need(len(materials) < 2, "both input and context")
                if materials:
                    question = f"{question}\n\n{materials[0]}"
                pair = [("user", question), ("assistant", said_text(row[answers]))]
                lead = [("system", system)] if system else []
                meanings.append(lead + pair)
                if asks == "prompt" and not materials:
                    turns = _said_turns(row[asks], "user") + _said_turns(row[answers], "assistant")
                    meanings.append(turns if turns[:1] == lead else lead + turns)
    proper = [meaning for meaning in meanings if is_chat(meaning)]
    need(proper, "no chat")
    return proper


def _said_turns(value: Any, role: str) -> Said:
    """Of TRL's conversational prompts and completions; a text is a turn of `role`."""
    if isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return [(turn["role"], said_text(turn.get("content"))) for turn in value]
    return [(role, said_text(value))]


def said_text(value: Any) -> Any:
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in value
    ):
        return "".join(str(part.get("text")) for part in value)
    return value


def is_chat(turns: Sequence[tuple[Any, Any]]) -> bool:
    """(system) user assistant ... assistant, all of it text with something in it, and no pair said twice running."""
    letters = "".join(str(role)[:1] for role, _ in turns)
    body = letters[1:] if letters.startswith("s") else letters
    texts = [text for _, text in turns]
    if not body or body != "ua" * (len(body) // 2) or not all(isinstance(text, str) for text in texts):
        return False
    if any(
        not text.strip() or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text) for text in texts
    ):
        return False
    pairs = list(
        zip(texts[len(letters) - len(body) :: 2], texts[len(letters) - len(body) + 1 :: 2], strict=True)
    )
    return all(first != second for first, second in pairwise(pairs))


def depth(value: Any) -> int:
    """How deep lists and objects nest, counted without recursion."""
    deepest, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        deepest += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest


def check_row(row: Any, messages: Sequence[Mapping[str, str]]) -> None:
    """Errors: No when an accepted row is no chat, or means something else."""
    need(depth(row) <= MAX_DEPTH, "nested too deep")
    told = [(message["role"], message["content"]) for message in messages]
    need(told in said(row), f"{told} is not what the row says")


def check_lines(content: bytes, accepted: Iterable[tuple[int, Sequence[Mapping[str, str]]]]) -> None:
    """Every accepted row (line, messages) of a `.jsonl` file. Errors: No."""
    lines = content.split(b"\n")
    for number, messages in accepted:
        check_row(json_row(lines[number - 1]), messages)


def rows_in_lines(content: bytes) -> int:
    return sum(1 for line in content.split(b"\n") if line.strip(b" \t\r\n"))


def check_array(content: bytes, accepted: Sequence[tuple[int, Sequence[Mapping[str, str]]]]) -> None:
    """Every accepted row of a `.json` array: an object that begins in its line, and in order. Errors: No."""
    try:
        whole = json_row(content)
    except No:
        whole = None
    if isinstance(whole, list) and depth(whole) <= MAX_DEPTH:
        rows = iter(whole)
        for _, messages in accepted:
            need(any(_fits(row, messages) for row in rows), "accepted, but not in the array")
        return
    starts = [0]
    for line in content.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for number, messages in accepted:
        line = content[starts[number - 1] : starts[number] - 1]
        need(
            any(
                _fits_at(content, starts[number - 1] + at, messages)
                for at, byte in enumerate(line)
                if byte == 0x7B
            ),
            f"no such object begins in line {number}",
        )


def _fits_at(content: bytes, at: int, messages: Sequence[Mapping[str, str]]) -> bool:
    text = content[at:].decode("utf-8", "surrogateescape")
    try:
        row, _ = _decoder.raw_decode(text)
    except (No, json.JSONDecodeError, RecursionError):
        return False
    return _fits(row, messages)


def _fits(row: Any, messages: Sequence[Mapping[str, str]]) -> bool:
    try:
        check_row(row, messages)
    except No:
        return False
    return True


def check_csv(content: bytes, accepted: Sequence[tuple[int, Sequence[Mapping[str, str]]]]) -> None:
    """Every accepted record of a `.csv` file, by the line where the standard library finds it. Errors: No."""
    text = content.decode("utf-8", "surrogateescape")
    csv.field_size_limit(2**31 - 1)
    # Ends only at \n: what else breaks a line is inside a field, or an error.
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    records: dict[int, list[str]] = {}
    begins = 1
    try:
        for fields in reader:
            if fields:
                records[begins] = fields
            begins = reader.line_num + 1
    except csv.Error:
        pass  # the reader refuses the file there, after the rows before
    header = next(iter(records.values()), [])
    need(not accepted or (len(set(header)) == len(header) and "" not in header), "no proper header")
    for number, messages in accepted:
        need(
            number in records and len(records[number]) == len(header),
            f"no whole record begins in line {number}",
        )
        check_row(dict(zip(header, records[number], strict=True)), messages)

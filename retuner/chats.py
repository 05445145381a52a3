"""Conversations out of files, strictly: every row becomes a `Chat`, or a `BadRow` that says why not.

Files are read as bytes, one row in memory at a time: a line of `.jsonl`, an element of a `.json` array. Texts
are not changed. A file of another kind (preferences, tool transcripts, plain text, another encoding) is
`Refused` whole, because setting its rows aside one by one would only hide what it is.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from retuner.dataset import DataFile
from retuner.errors import Refused, Unavailable

MAX_ROW_BYTES = 4 * 2**20
MAX_DEPTH = 64
TOO_LONG = ("too_long", f"the row is longer than {MAX_ROW_BYTES:,} bytes")
SHOWN_BYTES = 200
CHUNK_BYTES = 2**18
WHITE = b" \t\r\n"
FORMATS = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("prompt_completion", ("prompt", "response")),
    ("question_answer", ("question", "answer")),
)
"""Formats and the keys by which a row is known to be of one."""
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md and OpenAI's chat API.
TOOL_ROLES = {"function_call", "observation", "tool", "function", "function_response", "tool_call", "ipython"}

# A string that the end of the bytes cuts off matches too, so that scanning stays linear on any bytes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+("|\\?\Z)', re.DOTALL)
_TOKEN = re.compile(_STRING.pattern + rb"|[\[\]{},]", re.DOTALL)
CLOSES = {b"]": ord("["), b"}": ord("{")}

Turn = tuple[str, Any, str]  # role, content as found, what to call its place


@dataclass(frozen=True, slots=True)
class Chat:
    """Optional system, then user and assistant in turn, ending in assistant; its row starts at `line`."""

    messages: tuple[dict[str, str], ...]
    file: str
    line: int
    format: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. Lines and columns count from 1, columns in bytes."""

    file: str
    line: int
    column: int | None
    cause: str
    """A stable word, such as `duplicate_key`, to count by."""
    message: str
    start: str
    """The first bytes of the row; what is not UTF-8 is spelled `\\xNN`."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


class _Problem(Exception):
    """Why a row is bad; `offset` is the byte of the row where it shows."""

    def __init__(self, cause: str, message: str, offset: int | None = None):
        super().__init__(message)
        self.cause, self.message, self.offset = cause, message, offset


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    column: int
    raw: bytes
    problem: _Problem | None = None


def read_chats(files: Iterable[DataFile], format: str) -> Iterator[Chat | BadRow]:
    """Every row of `files`, in order. `format` is one of `FORMATS`, or `auto`: each file's first row decides.

    Errors: Refused for a file of another kind, Unavailable for one that cannot be read.
    """
    for file in files:
        try:
            with file.path.open("rb") as stream:
                yield from _read_file(file.relpath, stream, format)
        except OSError as error:
            raise Unavailable(f"{file.relpath} cannot be read: {error.strerror}") from error


def _read_file(relpath: str, stream: BinaryIO, format: str) -> Iterator[Chat | BadRow]:
    found = None if format == "auto" else format
    for row in _rows(relpath, stream):
        try:
            value = _parse(row)
            found, keys = _format(value, format, found)
            yield Chat(_conversation(_turns(value, found, keys)), relpath, row.line, found)
        except _Problem as problem:
            line, column = row.line, None
            if problem.offset is not None:
                line, column = _advance((row.line, row.column), row.raw[: problem.offset])
            start = row.raw[:SHOWN_BYTES].decode("utf-8", "backslashreplace").rstrip("\r\n")
            yield BadRow(relpath, line, column, problem.cause, problem.message, start)
        except Refused as kind:
            raise Refused(f"{relpath}:{row.line} {kind.found}", kind.expected, kind.do) from None


def _rows(relpath: str, stream: BinaryIO) -> Iterator[_Row]:
    """The rows of a file, as bytes. Errors: Refused where the name and the first bytes do not fit."""
    head = stream.read(CHUNK_BYTES)
    lead = len(head) - len(head.lstrip(WHITE))
    first = head[lead : lead + 1]
    if head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-8" if head[0] == 0xEF else "UTF-16"
        do = "tail -c +4" if head[0] == 0xEF else "iconv -f UTF-16 -t UTF-8"
        found = f"{relpath}:1:1 starts with the byte order mark of {encoding}"
        raise Refused(found, "UTF-8 without a byte order mark", f"write it anew: {do} {relpath} > clean")
    if relpath.endswith(".jsonl") and first != b"[":
        stream.seek(0)
        return _lines(stream)
    if relpath.endswith(".json") and first == b"[":
        stream.seek(lead + 1)
        return _elements(stream, _advance((1, 1), head[: lead + 1]))
    found, do = "is no JSON file", "convert it, or make prepare.files match only the files with chats"
    if relpath.endswith(".jsonl"):
        found, do = "starts with '[', as a JSON array does", "rename it to .json if it is one"
    elif relpath.endswith(".json"):
        found = f"starts with {chr(first[0])!r}, not with '['" if first else "is empty"
        do = "rename it to .jsonl if each line is an object; keep only the array if it lies below a key"
    raise Refused(f"{relpath} {found}", "a chat a line in .jsonl, or an array of chats in .json", do)


def _lines(stream: BinaryIO) -> Iterator[_Row]:
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (rest := stream.readline(CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _Row(line, 1, raw[:SHOWN_BYTES], _Problem(*TOO_LONG))
        elif raw.strip(WHITE):
            yield _Row(line, 1, raw)


def _elements(stream: BinaryIO, at: tuple[int, int]) -> Iterator[_Row]:
    """The elements of an array whose '[' has been read, `at` being the place of the next byte.

    Only quotes, brackets and commas are looked at, so a broken element seldom hides the one after it.
    """
    row, row_at, row_bytes, rows, depth = bytearray(), at, 0, 0, 0
    closed = False
    opener = b""  # what a chunk that starts inside a string has lost: its quote, perhaps a backslash

    def take(piece: bytes) -> None:
        nonlocal at, row_at, row_bytes
        if not row:
            bare = piece.lstrip(WHITE)
            at = row_at = _advance(at, piece[: len(piece) - len(bare)])
            piece = bare
        at, row_bytes = _advance(at, piece), row_bytes + len(piece)
        row.extend(piece[: MAX_ROW_BYTES + 1 - len(row)])

    def taken(problem: _Problem | None = None) -> _Row:
        too_long = _Problem(*TOO_LONG) if row_bytes > MAX_ROW_BYTES else None
        return _Row(*row_at, bytes(row), problem or too_long)

    while chunk := stream.read(CHUNK_BYTES):
        begin, chunk = len(opener), opener + chunk
        for token in () if closed else _TOKEN.finditer(chunk):
            byte = token[0][:1]
            if byte == b'"':
                opener = b"" if token[1] == b'"' else byte + token[1]
            elif byte in b"[{":
                depth += 1
            elif depth:
                depth -= byte in b"]}"
            elif byte in b",]":
                take(chunk[begin : token.start()])
                closed = byte == b"]"
                if row or rows or not closed:
                    yield taken(None if row else _Problem("bad_json", "there is no row beside a comma", 0))
                row.clear()
                at, row_bytes, rows, begin = _advance(at, byte), 0, rows + 1, token.end()
                if closed:
                    break
        take(chunk[begin:])
    if not closed:
        yield taken(_Problem("truncated", "the file ends before the ']' that closes the array"))
    elif row:
        yield taken(_Problem("several_objects", "there is something after the ']' that closes the array"))


def _advance(at: tuple[int, int], passed: bytes) -> tuple[int, int]:
    """The line and column of the byte after `passed`, which starts at `at`."""
    newlines = passed.count(b"\n")
    column = len(passed) - passed.rfind(b"\n") if newlines else at[1] + len(passed)
    return at[0] + newlines, column


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Problem("duplicate_key", f"the key {ascii(twice)[:40]} stands twice in one object")
    return value


def _no_constant(word: str) -> None:
    raise _Problem("not_a_number", f"{word} is not JSON")


# Integers as floats: no number is used, and int() refuses long ones.
_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_int=float).decode


def _parse(row: _Row) -> dict[str, Any]:
    raw = row.raw
    if row.problem:
        raise row.problem
    if (nul := raw.find(b"\0")) >= 0:
        raise _Problem("nul", "a NUL byte: the file is damaged, or not UTF-8", nul)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise _Problem("byte_order_mark", "a byte order mark inside the file: remove these three bytes", 0)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise _Problem("truncated", "the file ends inside a character", error.start) from None
        raise _Problem("bad_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8", error.start) from None
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _nesting(raw)[0] > MAX_DEPTH:
        raise _Problem("too_deep", f"brackets are nested more than {MAX_DEPTH} deep")
    try:
        value = _decode(text)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        if error.msg == "Extra data":
            raise _Problem("several_objects", "there is more after the row's object", offset) from None
        if _nesting(raw)[1] > 0:
            message = "the row ends inside an object: it was cut off, or is spread over several lines"
            raise _Problem("truncated", message, len(raw.rstrip(WHITE))) from None
        raise _Problem("bad_json", f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}", offset) from None
    if not isinstance(value, dict):
        raise _Problem("not_an_object", f"the row is {_kind(value)}, not an object with keys")
    return value


def _nesting(raw: bytes) -> tuple[int, int]:
    """How deep brackets outside strings nest (counting ends above MAX_DEPTH), and how many are left open."""
    stack, deepest = bytearray(), 0
    for bracket in re.findall(rb"[\[\]{}]", _STRING.sub(b"", raw)):
        if bracket in b"[{":
            stack += bracket
            deepest = max(deepest, len(stack))
        elif not stack or stack.pop() != CLOSES[bracket]:
            return deepest, 0
        if deepest > MAX_DEPTH:
            break
    return deepest, len(stack)


def _format(row: dict[str, Any], asked: str, found: str | None) -> tuple[str, tuple[str, ...]]:
    """The row's format, `found` where that is known, and the keys that show it. Errors: _Problem, Refused."""
    # TRL's and LLaMA-Factory's marks of good and bad answers: training would teach the bad ones too.
    marked = isinstance(row.get("label", row.get("kto_tag")), bool)
    if marked or ("chosen" in row and "rejected" in row):
        raise Refused(
            f"{'grades its answer' if marked else 'has chosen and rejected'}: this is preference data",
            "chats with one good answer each, for supervised training (preferences are for DPO and KTO)",
            "leave the file out of prepare.files, or write rows with the good answers alone",
        )
    fits = [(name, keys) for name, keys in FORMATS if all(key in row for key in keys)]
    if not fits and isinstance(row.get("text"), str):
        raise Refused(
            "has text and nothing that answers it: this is plain text",
            "chats, where it is known which words are the assistant's",
            "leave the file out of prepare.files, or write each text as a prompt and its completion",
        )
    candidates = [fit for fit in fits if asked in ("auto", fit[0])]
    if len(candidates) == 1 and found in (None, candidates[0][0]):
        return candidates[0]
    names, shown = " and ".join(name for name, _ in fits), _shown(row)
    if len(candidates) > 1:
        raise _Problem("ambiguous_format", f"the keys {shown} fit {names}: set prepare.format or drop keys")
    if fits:
        raise _Problem("mixed_format", f"the row is {names}, but its file is read as {found}")
    known = "; ".join(f"{name}: {'/'.join(keys)}" for name, keys in FORMATS if asked in ("auto", name))
    cause = "unknown_format" if asked == "auto" else "missing_key"
    raise _Problem(cause, f"the keys {shown} are not those of {known}")


def _turns(row: dict[str, Any], format: str, keys: tuple[str, ...]) -> list[Turn]:
    """The turns of a row, their contents not yet looked at. Errors: _Problem, Refused."""
    if format == "messages":
        return _listed(row, keys[0], "role", "content", ROLES)
    system = [] if _blank(row.get("system")) else [("system", row["system"], "system")]
    if format == "sharegpt":
        return system + _listed(row, keys[0], "from", "value", SHAREGPT_ROLES)
    asks, answers = keys
    question = row[asks]
    if format == "alpaca" and not _blank(row.get("input")):
        question = _text(question, asks) + "\n\n" + _text(row["input"], "input")
    if format == "alpaca" and row.get("history"):
        raise _Problem("history", "earlier turns under history are not read: use the messages format")
    return [*system, ("user", question, asks), ("assistant", row[answers], answers)]


def _listed(row: dict[str, Any], key: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Turn]:
    if row.get("tools") not in (None, "", "[]", []):
        raise _tool_transcript("offers tools")
    if not isinstance(row[key], list):
        raise _Problem("not_a_list", f"{key} is {_kind(row[key])}, not a list of turns")
    turns = []
    for number, turn in enumerate(row[key], 1):
        if not isinstance(turn, dict):
            raise _Problem("not_an_object", f"turn {number} is {_kind(turn)}, not an object")
        role = turn.get(role_key)
        if isinstance(role, str) and role in TOOL_ROLES:
            raise _tool_transcript(f"has the role {role} in turn {number}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise _tool_transcript(f"calls a tool in turn {number}")
        if role_key not in turn or text_key not in turn:
            raise _Problem(
                "missing_key", f"turn {number} needs {role_key} and {text_key}, has {_shown(turn)}"
            )
        if not isinstance(role, str) or role not in roles:
            raise _Problem("wrong_role", f"turn {number} is {ascii(role)[:40]}, not {' or '.join(roles)}")
        turns.append((roles[role], turn[text_key], f"turn {number}"))
    return turns


def _tool_transcript(found: str) -> Refused:
    return Refused(
        f"{found}: this is a tool transcript",
        "system, user and assistant turns; the chat template would drop tool turns without a word",
        "leave the file out of prepare.files, or write calls and results as text in assistant and user turns",
    )


def _conversation(turns: list[Turn]) -> tuple[dict[str, str], ...]:
    """(system) user assistant user assistant ... assistant. Errors: _Problem."""
    messages: list[dict[str, str]] = []
    expected = "user"
    for role, said, place in turns:
        if role != expected and (role != "system" or messages):
            raise _Problem("wrong_order", f"{place} is {role}, where {expected} should speak")
        messages.append({"role": role, "content": _text(said, place)})
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant":
        raise _Problem("wrong_order", "the last turn is user: there is no answer to learn")
    if not messages or messages[-1]["role"] == "system":
        raise _Problem("no_turns", "the conversation has no turns")
    return tuple(messages)


def _text(value: Any, place: str) -> str:
    """`value` unchanged, or its text parts joined. Errors: _Problem."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) != len(value):
            raise _Problem("not_text", f"{place} has a part that is not text")
        value = "".join(texts)
    if not isinstance(value, str):
        raise _Problem("not_text", f"{place} is {_kind(value)}, not text")
    if _blank(value):
        raise _Problem("empty_turn", f"{place} is empty")
    if "\0" in value:
        raise _Problem("nul", f"{place} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _Problem("lone_surrogate", f"{place} has {half}, half of a character") from None
    return value


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _shown(row: dict[str, Any]) -> str:
    return ", ".join(ascii(key)[:40] for key in sorted(row)[:8]) or "none"


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")

"""Rows out of JSON, as bytes: the lines of `.jsonl`, the elements of a `.json` array, each parsed strictly.

One row is in memory at a time, and of a row above the limit only its first bytes. Whatever the bytes, every row
comes out once: as an object, or with the `Problem` that says why it is none. Where a line ends is never in doubt; where
an element that is no JSON ends is, so behind such a one nobody can say how many rows there are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic_core import from_json

MAX_ROW_BYTES = 4 * 2**20
MAX_DEPTH = 64
TOO_LONG = ("too_long", f"the row is longer than {MAX_ROW_BYTES:,} bytes")
SHOWN_BYTES = 200
CHUNK_BYTES = 2**18
WHITE = b" \t\r\n"

# A string that the end of the bytes cuts off matches too, so that scanning stays linear on any bytes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+("|\\?\Z)', re.DOTALL)
_TOKEN = re.compile(_STRING.pattern + rb"|[\[\]{},]", re.DOTALL)
# Besides, what may stand outside of strings in no JSON; NaN and Infinity are known words.
_TOKEN_OR_STRANGER = re.compile(
    _TOKEN.pattern + rb"|[^ \t\r\n:0-9.+\-a-zA-Z]|[bcdghjkmopqvwxzA-DF-HJ-MO-Z]", re.DOTALL
)
_END_OF_KEY = re.compile(rb'"[ \t\r\n]*:')
STRANGER = "nothing like this stands outside of quotes in JSON: a quote is missing, or one too many"
CLOSES = {b"]": ord("["), b"}": ord("{")}


class Problem(Exception):
    """Why a row is bad; `offset` is the byte of the row where it shows."""

    def __init__(self, cause: str, message: str, offset: int | None = None):
        super().__init__(message)
        self.cause, self.message, self.offset = cause, message, offset


@dataclass(slots=True)
class RawRow:
    """A row as it lies in its file, where it begins, and what is already known to be wrong with it."""

    line: int
    column: int
    raw: bytes
    problem: Problem | None = None
    value: dict[str, Any] | None = None
    """The row itself, where its file keeps it as columns and not as JSON."""
    in_array: bool = False
    """Whether it ends at a comma or bracket, which is in doubt where it is no JSON."""


def lines(stream: BinaryIO) -> Iterator[RawRow]:
    """Every line that holds more than white space; the first one is line 1."""
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (rest := stream.readline(CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield RawRow(line, 1, raw[:SHOWN_BYTES], Problem(*TOO_LONG))
        elif raw.strip(WHITE):
            yield RawRow(line, 1, raw)


def elements(stream: BinaryIO, at: tuple[int, int]) -> Iterator[RawRow]:
    """The elements of an array whose '[' has been read, `at` being the place of the next byte.

    Only quotes, brackets and commas are looked at, and whether anything else cannot be JSON.
    """
    row, row_at, row_bytes, rows, depth = bytearray(), at, 0, 0, 0
    begun = 0  # lists and objects side by side in the element, between which a comma is missing
    closed = False
    opener = b""  # what a chunk that starts inside a string has lost: its quote, perhaps a backslash

    def take(piece: bytes) -> None:
        nonlocal at, row_at, row_bytes
        if not row:
            bare = piece.lstrip(WHITE)
            at = row_at = advance(at, piece[: len(piece) - len(bare)])
            piece = bare
        at, row_bytes = advance(at, piece), row_bytes + len(piece)
        row.extend(piece[: MAX_ROW_BYTES + 1 - len(row)])

    def taken(problem: Problem | None = None) -> RawRow:
        if not problem and row_bytes > MAX_ROW_BYTES:
            several = Problem("several_objects", "a comma is missing behind an object that begins here", 0)
            problem = Problem(*TOO_LONG) if begun < 2 else several
        return RawRow(*row_at, bytes(row), problem, in_array=True)

    while chunk := stream.read(CHUNK_BYTES):
        begin, chunk = len(opener), opener + chunk
        for token in () if closed else _TOKEN_OR_STRANGER.finditer(chunk):
            byte = token[0][:1]
            if byte == b'"':
                opener = b"" if token[1] == b'"' else byte + token[1]
            elif byte in b"[{":
                begun += not depth
                depth += 1
            elif byte not in b"]},":
                take(chunk[begin : token.start()])
                begins = f"what it belongs to begins at {row_at[0]}:{row_at[1]}"
                yield RawRow(*at, byte, Problem("bad_json", f"{STRANGER}; {begins}", 0), in_array=True)
                return
            elif depth:
                depth -= byte != b","
            elif byte != b"}":
                take(chunk[begin : token.start()])
                closed = byte == b"]"
                if row or rows or not closed:
                    yield taken(None if row else Problem("bad_json", "there is no row beside a comma", 0))
                row.clear()
                at, row_bytes, rows, begin, begun = advance(at, byte), 0, rows + 1, token.end(), 0
                if closed:
                    break
        take(chunk[begin:])
    if not closed:
        unclosed = "the file ends within what begins here: it was cut off, or a quote or bracket is missing"
        yield taken(Problem("truncated", unclosed if row else "the file ends before the ']' of its array", 0))
    elif row:
        yield taken(Problem("several_objects", "there is something after the ']' that closes the array", 0))


def advance(at: tuple[int, int], passed: bytes) -> tuple[int, int]:
    """The line and column of the byte after `passed`, which starts at `at`."""
    newlines = passed.count(b"\n")
    column = len(passed) - passed.rfind(b"\n") if newlines else at[1] + len(passed)
    return at[0] + newlines, column


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Errors: Problem where a key stands twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Problem("duplicate_key", f"the key {ascii(twice)[:40]} stands twice in one object")
    return value


class _Constant(Exception):
    """NaN, Infinity or -Infinity."""


def _no_constant(word: str) -> None:
    raise _Constant(word)


# Integers as floats: no number is used, and int() refuses long ones.
_decode = json.JSONDecoder(object_pairs_hook=object_of, parse_constant=_no_constant, parse_int=float).decode


def parse(row: RawRow) -> dict[str, Any]:
    """The row's object. Errors: Problem."""
    if row.problem:
        raise row.problem
    if row.value is not None:
        return row.value
    raw = row.raw
    if (quickly := _nothing_wrong(raw)) is not None:
        return quickly
    value = json_value(raw)
    if not isinstance(value, dict):
        raise Problem("not_an_object", f"the row is {kind_of(value)}, not an object with keys")
    return value


def json_value(raw: bytes) -> Any:
    """The one value, of any kind, that `raw` spells. Errors: Problem."""
    text = strict_text(raw)
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and (too_deep := _nesting(raw)[0]) is not None:
        raise Problem("too_deep", f"brackets are nested more than {MAX_DEPTH} deep", too_deep)
    try:
        return _decode(text)
    except Problem as twice:
        raise Problem(twice.cause, twice.message, _key_that_stands_twice(raw)) from None
    except _Constant as constant:
        word = str(constant)
        bare = _STRING.sub(lambda string: b'"' * len(string[0]), raw)
        raise Problem("not_a_number", f"{word} is not JSON", bare.find(word.encode())) from None
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        if error.msg == "Extra data":
            raise Problem("several_objects", "there is more behind the first value", offset) from None
        if _nesting(raw)[1] > 0:
            message = "the row ends inside an object: it was cut off, or is spread over several lines"
            raise Problem("truncated", message, len(raw.rstrip(WHITE))) from None
        told = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        raise Problem("bad_json", f"not JSON: {told}", offset) from None


def _nothing_wrong(raw: bytes) -> dict[str, Any] | None:
    """The object of a row of which it is quickly shown that nothing is wrong with it; None of most others.

    A key ends with a quote, white space or none, and a colon. Each key that is spelled gives one such place, and text
    may give more. So when there are as many as the object and the objects in its lists have keys, no key stands twice,
    and below these are no objects but empty ones: three may lie within one another, besides lists.
    """
    if raw.count(b"[") > MAX_DEPTH - 3:
        return None
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError:
        return None
    if type(value) is not dict:
        return None
    keys = len(value)
    for inner in value.values():
        if type(inner) is list:
            keys += sum([len(turn) for turn in inner if type(turn) is dict])
    return value if len(_END_OF_KEY.findall(raw)) == keys else None


def strict_text(raw: bytes) -> str:
    """Errors: Problem where `raw` is not UTF-8, or holds what no text needs."""
    if (nul := raw.find(b"\0")) >= 0:
        raise Problem("nul", "a NUL byte: the file is damaged, or not UTF-8", nul)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise Problem("byte_order_mark", "a byte order mark inside the file: remove these three bytes", 0)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise Problem("truncated", "the file ends inside a character", error.start) from None
        raise Problem("bad_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8", error.start) from None


def _key_that_stands_twice(raw: bytes) -> int | None:
    """Where the first key stands that an object has already."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(raw):
        byte = token[0][:1]
        if byte in b"[{":
            keys.append(set())
        elif byte in b"]}" and keys:
            keys.pop()
        elif byte == b'"' and keys and raw[token.end() : token.end() + 64].lstrip(WHITE).startswith(b":"):
            key = json.loads(token[0])
            if key in keys[-1]:
                return token.start()
            keys[-1].add(key)
    return None


def _nesting(raw: bytes) -> tuple[int | None, int]:
    """Where brackets outside strings first nest deeper than MAX_DEPTH, and how many are left open at the end."""
    stack = bytearray()
    for token in _TOKEN.finditer(raw):
        byte = token[0][:1]
        if byte in b"[{":
            stack += byte
            if len(stack) > MAX_DEPTH:
                return token.start(), len(stack)
        elif byte in b"]}" and (not stack or stack.pop() != CLOSES[byte]):
            return None, 0
    return None, len(stack)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        float: "a number",
        int: "a number",
    }
    if value is None:
        return "null"
    return names.get(type(value)) or str(value)

"""What must hold of the reader for any bytes, checked for one file under one name."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz import oracle
from retuner import chats, json_rows, table_rows
from retuner.chats import BadRow, Chat, blocks, format_of_file, read_block, read_chats
from retuner.dataset import DataFile
from retuner.dvc_file import md5_of
from retuner.errors import Refused

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
SMALL_LIMITS: tuple[tuple[Any, str, int], ...] = (
    *((module, "MAX_ROW_BYTES", 1000) for module in (json_rows, table_rows, chats)),
    (chats, "MIN_BLOCK_BYTES", 64),
    (chats, "MEAN_BLOCK_BYTES", 256),
    (chats, "MAX_BLOCK_BYTES", 1024),
)
"""So that small files come to every limit."""


@dataclass(frozen=True)
class Outcome:
    rows: tuple[Chat | BadRow, ...]
    refused: Refused | None


def data_file(path: Path) -> DataFile:
    with path.open("rb") as stream:
        md5 = hashlib.file_digest(stream, md5_of).hexdigest()
    return DataFile(relpath=path.name, path=path, size=path.stat().st_size, md5=md5)


def read_whole(path: Path) -> Outcome:
    rows: list[Chat | BadRow] = []
    try:
        for row in read_chats([data_file(path)], "auto"):
            rows.append(row)
    except Refused as refused:
        return Outcome(tuple(rows), refused)
    return Outcome(tuple(rows), None)


def read_in_blocks(path: Path) -> Outcome:
    """The rows of a file block by block, with the lines that they have in the file."""
    rows: list[Chat | BadRow] = []
    file = data_file(path)
    try:
        found = format_of_file(file, "auto")
    except Refused:
        found = None  # reading comes to the same refusal, after the rows before it
    try:
        for block in blocks(file):
            for row in read_block(block, "auto", None, found):
                rows.append(replace(row, line=row.line + block.first_line - 1))
    except Refused as refused:
        return Outcome(tuple(rows), refused)
    return Outcome(tuple(rows), None)


def check(path: Path, content: bytes) -> Outcome:
    """Read `content`, which lies at `path`, in every way there is. Errors: AssertionError, oracle.No."""
    whole = read_whole(path)
    _check_rows(whole)
    plain = unpacked(content) if path.name.endswith(".gz") else content
    if plain is not None:
        accepted = [(row.line, row.messages) for row in whole.rows if isinstance(row, Chat)]
        _check_accepted(path, plain, accepted)
        if whole.refused is None and ".jsonl" in path.name:
            assert len(whole.rows) == oracle.rows_in_lines(plain), "a row is lost, or read twice"
    assert _told(read_in_blocks(path)) == _told(whole), "by blocks it reads otherwise"
    return whole


def check_packed(path: Path, content: bytes, plain: Outcome, plain_name: str) -> None:
    """The gzip of the same bytes, in two members, gives the same."""
    half = len(content) // 2
    path.write_bytes(gzip.compress(content[:half], 1, mtime=0) + gzip.compress(content[half:], 1, mtime=0))
    packed = read_whole(path)
    assert [replace(row, file=plain_name) for row in packed.rows] == list(plain.rows), (
        "gzip of it reads otherwise"
    )
    assert (packed.refused is None) == (plain.refused is None), "gzip of it is refused otherwise"


def unpacked(content: bytes) -> bytes | None:
    """What is in a whole gzip file; None when it is none."""
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(content)).read()
    except (OSError, EOFError, zlib.error):
        return None


def _check_rows(whole: Outcome) -> None:
    if whole.refused is not None:
        assert whole.refused.found and whole.refused.expected and whole.refused.do
    places = [row.line for row in whole.rows]
    assert places == sorted(places) and all(line >= 1 for line in places)
    for row in whole.rows:
        if isinstance(row, BadRow):
            assert row.cause.replace("_", "").isalnum() and row.message
            assert row.column is None or row.column >= 1
            (row.start + row.message).encode("utf-8")


def _check_accepted(
    path: Path, plain: bytes, accepted: Sequence[tuple[int, tuple[dict[str, str], ...]]]
) -> None:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        oracle.check_lines(plain, accepted)
    elif name.endswith(".json"):
        oracle.check_array(plain, accepted)
    elif name.endswith(".csv"):
        oracle.check_csv(plain, accepted)


def _told(outcome: Outcome) -> tuple[tuple[Chat | BadRow, ...], str | None]:
    return outcome.rows, outcome.refused and str(outcome.refused)

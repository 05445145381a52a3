"""Conversations out of files, strictly: every row becomes a `Chat`, or a `BadRow` that says why not.

Files are streamed, one row in memory at a time: a line of `.jsonl`, an element of a `.json` array, a record of
`.csv`, all three also compressed as `.gz` or `.zst`, and a row of `.parquet`. Texts are not changed. A file of
another kind (preferences, tool transcripts, plain text, another encoding) is `Refused` whole, because setting its
rows aside one by one would only hide what it is; so is one behind whose damage rows may be lost uncounted.
"""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from retuner.checked import Checked
from retuner.compressed import CODECS, MAGIC, Damaged, unpacked
from retuner.dataset import DataFile
from retuner.errors import Refused, Unavailable
from retuner.formats import Wanted
from retuner.json_rows import (
    CHUNK_BYTES,
    MAX_ROW_BYTES,
    SHOWN_BYTES,
    WHITE,
    Problem,
    RawRow,
    advance,
    elements,
    lines,
    parse,
)
from retuner.preferences import pair_of
from retuner.table_rows import csv_rows, parquet_rows

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_USUAL_ENDING = re.compile(r"\.(jsonl|json|csv)(\.gz|\.zst)?$|\.parquet$")
MARKS = (
    (b"\xef\xbb\xbf", "UTF-8", "tail -c +4"),
    (b"\xff\xfe\0\0", "UTF-32", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
)
OTHER_CONTENT = {
    MAGIC["gzip"]: ("gzip data", "rename it to end in .gz"),
    MAGIC["zstd"]: ("zstd data", "rename it to end in .zst"),
    b"PAR1": ("a Parquet file", "rename it to .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
}
NO_JSON = ("bad_json", "several_objects", "truncated")
"""Causes for which it is in doubt where an element of an array ends."""
MIN_BLOCK_BYTES = 2**16
MEAN_BLOCK_BYTES = 2**18
MAX_BLOCK_BYTES = 2**20


@dataclass(slots=True)
class Chat:
    """Optional system, then user and assistant in turn, ending in assistant; its row starts at `line`.

    Of a preference pair the last answer is the chosen one."""

    messages: tuple[dict[str, str], ...]
    file: str
    line: int
    format: str
    rejected: str | None = None
    """The other answer of a preference pair."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. Lines and columns count from 1, columns in bytes; of Parquet, lines are rows."""

    file: str
    line: int
    column: int | None
    cause: str
    """A stable word, such as `duplicate_key`, to count by."""
    message: str
    start: str
    """The first bytes of the row; what is not UTF-8 is spelled `\\xNN`. `prepare` empties it where params redact
    anything: of a row that cannot be read nobody knows what in it to redact."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True, slots=True)
class Block:
    """A run of whole lines of a plain `.jsonl` file; of any other kind of file the whole."""

    file: DataFile
    first_line: int
    sha256: str
    """Of the bytes and the kind of file, which together decide what the rows of the block are."""
    data: bytes | None = field(repr=False)
    """None for a whole file, which is read where it lies, and checked to be still the same. Of a line above the row
    limit only the first bytes."""


def read_chats(
    files: Iterable[DataFile], format: str, columns: Mapping[str, str | None] | None = None
) -> Iterator[Chat | BadRow]:
    """Every row of `files`, in order. `format` is the name of a format, or `auto` or `preference`: each
    file's first row decides.

    `columns` gives the data's own names for keys of a format, e.g. {"prompt": "question_text"}.
    Errors: Refused for a file of another kind, for one that has changed, behind its rows, and for a mapping that fits
    no format; Unavailable for a file that cannot be read.
    """
    wanted = Wanted(format, columns)
    for file in files:
        yield from _chats(file, _rows(file, wanted), wanted, None)


def blocks(file: DataFile) -> Iterator[Block]:
    """The file cut into runs of about 256 KiB, in order; what it holds decides where, so new lines change few.

    Errors: Refused for a file that is not what its name says, or has changed, behind its blocks; Unavailable.
    """
    kind, codec = _kind(file)
    try:
        if (kind, codec) == (".jsonl", None):
            _check_head(file, kind, codec)
            with Checked(file) as stream:
                yield from _cut(file, stream)
                stream.check()
        else:
            with Checked(file) as stream:
                digest = hashlib.sha256(f"{kind}{codec}\0".encode())
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                stream.check()
            yield Block(file, 1, digest.hexdigest(), None)
    except OSError as error:
        raise _unreadable(file, error) from error


def format_of_file(
    file: DataFile, format: str, columns: Mapping[str, str | None] | None = None
) -> str | None:
    """The format that `read_chats` would find for the rows of a file: None when no row shows one. Errors: as there."""
    wanted = Wanted(format, columns)
    if wanted.fixed:
        return wanted.fixed
    for row in _rows(file, wanted):
        try:
            return wanted.recognise(parse(row), None).name
        except Problem:
            continue
        except Refused as kind:
            raise _placed(file, row.line, kind) from None
    return None


def read_block(
    block: Block, format: str, columns: Mapping[str, str | None] | None = None, found: str | None = None
) -> Iterator[Chat | BadRow]:
    """What `read_chats` gives for the rows of a block, their lines counted from the block's first line as 1.

    `found` is the format of the block's file. Errors: as `read_chats`, with the lines of the file.
    """
    wanted = Wanted(format, columns)
    rows = _rows(block.file, wanted) if block.data is None else lines(io.BytesIO(block.data))
    return _chats(block.file, rows, wanted, found, block.first_line - 1)


def _chats(
    file: DataFile, rows: Iterator[RawRow], wanted: Wanted, found: str | None, lines_before: int = 0
) -> Iterator[Chat | BadRow]:
    found = wanted.fixed or found
    for row in rows:
        try:
            value = parse(row)
            format = wanted.recognise(value, found)
            found = format.name
            if format.is_pairs:
                messages, rejected = pair_of(value, format, wanted)
                yield Chat(messages, file.relpath, row.line, found, rejected)
            else:
                yield Chat(wanted.conversation(value, format), file.relpath, row.line, found)
        except Problem as problem:
            line, column = row.line, None
            if problem.offset is not None:
                line, column = advance((row.line, row.column), row.raw[: problem.offset])
            if row.in_array and problem.cause in NO_JSON:
                raise Refused(
                    f"{file.relpath}:{line}:{column} {problem.message} ({problem.cause})",
                    "an array that is JSON from end to end: behind a damaged row nobody can say what is one",
                    "mend it there, or write it as .jsonl, where a damaged line costs only itself",
                ) from None
            raw = (
                row.raw
                if row.value is None
                else json.dumps(row.value, ensure_ascii=False, default=str).encode(
                    "utf-8", "backslashreplace"
                )
            )
            start = raw[:SHOWN_BYTES].decode("utf-8", "backslashreplace").rstrip("\r\n")
            yield BadRow(file.relpath, line, column, problem.cause, problem.message, start)
        except Refused as kind:
            raise _placed(file, lines_before + row.line, kind) from None


def _placed(file: DataFile, line: int, kind: Refused) -> Refused:
    return Refused(f"{file.relpath}:{line} {kind.found}", kind.expected, kind.do)


def _unreadable(file: DataFile, error: OSError) -> Unavailable:
    return Unavailable(f"{file.relpath} cannot be read: {error.strerror}", "a readable file")


# --- kinds of files


def _rows(file: DataFile, wanted: Wanted) -> Iterator[RawRow]:
    """The rows of a file. Errors: Refused where its name and its bytes do not fit, or it has changed; Unavailable."""
    kind, codec = _kind(file)
    line = 0
    try:
        at = _check_head(file, kind, codec)
        if kind == ".parquet":
            yield from parquet_rows(file.relpath, file.path, wanted)
            with Checked(file) as whole:  # read here and there before, so hashed behind it
                whole.check()
            return
        with Checked(file) as packed, unpacked(packed, codec) as stream:
            if kind == ".csv":
                rows = csv_rows(file.relpath, stream, wanted)
            elif kind == ".json":
                lead = stream.read(at)
                rows = elements(stream, advance((1, 1), lead))
            else:
                rows = lines(stream)
            for row in rows:
                line = row.line
                yield row
            packed.check()
    except Damaged as damage:
        behind = f", behind line {line}" if line else ""
        raise Refused(
            f"{file.relpath} {damage}{behind}",
            "a whole file, so that no row is lost uncounted",
            "write or copy it anew, or name it as what it is",
        ) from None
    except OSError as error:
        raise _unreadable(file, error) from error


def _kind(file: DataFile) -> tuple[str, str | None]:
    """What the name says: the kind of rows, and how they are compressed. Errors: Refused."""
    name, codec = file.relpath, None
    for suffix, packs in CODECS.items():
        if name.endswith(suffix):
            name, codec = name.removesuffix(suffix), packs
    for kind in KINDS:
        if name.endswith(kind) and not (kind == ".parquet" and codec):
            return kind, codec
    if name.endswith(".parquet"):
        raise Refused(
            f"{file.relpath} is Parquet inside of {codec}",
            "a .parquet file, which compresses itself",
            "unpack it",
        )
    do = "convert it, or make prepare.files match only the files with chats"
    if ending := _USUAL_ENDING.search(re.sub(r"\.(ndjson|jsonlines)\b", ".jsonl", file.relpath.lower())):
        do = f"rename it to end in {ending[0]}"
    raise Refused(
        f"{file.relpath} is none of {', '.join(KINDS)}",
        "a chat a line in .jsonl, an array of chats in .json, either or .csv with .gz or .zst behind it, or .parquet",
        do,
    )


def _check_head(file: DataFile, kind: str, codec: str | None) -> int:
    """How many bytes stand before the first row. Errors: Refused where the first bytes do not fit the name, Damaged."""
    with file.path.open("rb") as packed, unpacked(packed, codec) as stream:
        head = stream.read(CHUNK_BYTES)
    bare = head.lstrip(WHITE)
    first = bare[:1]
    for mark, encoding, do in MARKS:
        if head.startswith(mark):
            raise Refused(
                f"{file.relpath}:1:1 starts with the byte order mark of {encoding}",
                "UTF-8 without a byte order mark",
                f"write it anew: {f'{codec} -dc {file.path} | {do}' if codec else f'{do} {file.path}'} > clean",
            )
    found = do = ""
    for magic, told in OTHER_CONTENT.items():
        if head.startswith(magic) and (kind, magic) != (".parquet", b"PAR1"):
            found, do = f"is {told[0]}, not what its name says", told[1]
    if not found and kind == ".jsonl" and first == b"[":
        found, do = "starts with '[', as a JSON array does", "rename it to .json if it is one"
    elif not found and kind == ".json" and first != b"[":
        found = f"starts with {first.decode('latin-1')!r}, not with '['" if first else "is empty"
        if len(head) == CHUNK_BYTES and not first:
            found = f"starts with {CHUNK_BYTES:,} bytes of white space"
        do = "rename it to .jsonl if each line is an object; keep only the array if it lies below a key"
    if found:
        raise Refused(f"{file.relpath} {found}", "a chat a line in .jsonl, or an array of chats in .json", do)
    return len(head) - len(bare) + 1 if kind == ".json" else 0


# --- blocks


def _cut(file: DataFile, stream: BinaryIO) -> Iterator[Block]:
    pieces: list[bytes] = []
    size, line, first_line = 0, 0, 1
    # Behind the smallest size each byte is as likely as any other to be in the line that ends a block.
    often = 2**32 / (MEAN_BLOCK_BYTES - MIN_BLOCK_BYTES)

    def block(last: bytes = b"", rest: Iterable[bytes] = ()) -> Block:
        digest = hashlib.sha256(b".jsonl\0")
        data = last or b"".join(pieces)
        digest.update(data)
        for chunk in rest:
            digest.update(chunk)
        return Block(file, first_line, digest.hexdigest(), data)

    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            if pieces:
                yield block()
            first_line = line
            yield block(raw, _rest_of_line(stream))
        else:
            pieces.append(raw)
            size += len(raw)
            if size < MIN_BLOCK_BYTES or (size < MAX_BLOCK_BYTES and zlib.crc32(raw) > often * len(raw)):
                continue
            yield block()
        pieces, size, first_line = [], 0, line + 1
    if pieces:
        yield block()


def _rest_of_line(stream: BinaryIO) -> Iterator[bytes]:
    while rest := stream.readline(CHUNK_BYTES):
        yield rest
        if rest.endswith(b"\n"):
            return

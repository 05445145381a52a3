"""Rows out of tables: Parquet by batches, CSV record by record. A row is an object whose keys are the columns."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from retuner.errors import Refused
from retuner.formats import Wanted
from retuner.json_rows import (
    CHUNK_BYTES,
    MAX_DEPTH,
    MAX_ROW_BYTES,
    TOO_LONG,
    WHITE,
    Problem,
    RawRow,
    json_value,
    object_of,
    strict_text,
)

BATCH_ROWS = 64
BOOLEANS = {"true": True, "false": False}
QUOTING = "quotes doubled inside fields, and fields with quotes, commas or line breaks in quotes (RFC 4180)"

# --- CSV


def csv_rows(relpath: str, stream: BinaryIO, wanted: Wanted) -> Iterator[RawRow]:
    """The records behind a header; `line` is where one begins. Blank lines are passed over.

    Errors: Refused for a header without the columns of a format, and where a quote makes it unknown in which line
    the next record begins.
    """
    # A setting of the whole process; it is only ever raised, and a record is held to the same limit before.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    header: list[str] | None = None
    for line, raw, too_long in _records(relpath, stream):
        problem = Problem(*TOO_LONG) if too_long else None
        fields: list[str] = []
        if not problem:
            # Before anything else: where the quotes are astray, so is the place where the record was cut.
            fields = _fields(f"{relpath}:{line}", raw.decode("utf-8", "surrogateescape"))
            try:
                strict_text(raw)
            except Problem as found:
                problem = found
        if header is None:
            if problem:
                raise Refused(
                    f"{relpath}:{line} the header cannot be read: {problem.message}",
                    "the names of the columns in the first line, in UTF-8",
                    "write the header anew",
                )
            header = _header(relpath, line, fields, wanted)
            continue
        if not problem and len(fields) != len(header):
            message = f"the row has {len(fields)} fields where the header has {len(header)}"
            problem = Problem("ragged_row", message)
        yield RawRow(
            line, 1, raw, problem, None if problem else _typed(dict(zip(header, fields, strict=True)))
        )
    if header is None:
        raise Refused(
            f"{relpath} has no header",
            "the names of the columns in the first line",
            "write one, such as: prompt,completion",
        )


def _records(relpath: str, stream: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """First line, bytes (of a record above the limit only the first) and whether it is above the limit.

    A line break ends a record when the quotes before it are even in number, which in RFC 4180 is always so.
    """
    line, first, record, quotes, returns, size, before = 0, 1, bytearray(), 0, 0, 0, b""
    while piece := stream.readline(CHUNK_BYTES):
        record += piece[: MAX_ROW_BYTES + 1 - len(record)]
        quotes, size = quotes + piece.count(b'"'), size + len(piece)
        returns += piece.count(b"\r") - (before + piece[-2:]).endswith(b"\r\n")
        before = piece[-1:]
        if not piece.endswith(b"\n"):
            continue
        line += 1
        if quotes % 2 == 0:
            yield from _record(relpath, first, record, size, quotes or returns)
            first, quotes, returns, size = line + 1, 0, 0, 0
            record.clear()
    if quotes % 2:
        raise Refused(
            f"{relpath}:{first} a quote is opened in the row that begins here, and never closed",
            QUOTING,
            "close it, or write the file anew with a CSV library",
        )
    yield from _record(relpath, first, record, size, quotes or returns)


def _record(
    relpath: str, line: int, record: bytearray, size: int, doubtful: int
) -> Iterator[tuple[int, bytes, bool]]:
    """`doubtful`: how many quotes, or carriage returns that end no line, the record has."""
    too_long = size > MAX_ROW_BYTES
    if too_long and doubtful:
        raise Refused(
            f"{relpath}:{line} a row with quotes or carriage returns is longer than {MAX_ROW_BYTES:,} bytes, so that "
            "it cannot be told whether it ends where it seems to",
            "rows of fewer bytes",
            "take it out, or shorten it",
        )
    if too_long or record.strip(WHITE):
        yield line, bytes(record), too_long


def _fields(where: str, text: str) -> list[str]:
    """The fields of one record. Errors: Refused when it is none, or more than one."""
    why = "a quote stands where none may"
    try:
        records = list(csv.reader([text], strict=True))
        if len(records) == 1:
            return records[0]
    except csv.Error as error:
        why = "a line break stands outside of quotes" if "new-line" in str(error) else str(error)
    raise Refused(f"{where} the row is not CSV: {why}", QUOTING, "write the file anew with a CSV library")


def _header(relpath: str, line: int, names: list[str], wanted: Wanted) -> list[str]:
    where = f"{relpath}:{line}"
    if len(names) == 1 and (marks := [mark for mark in ";\t|" if mark in names[0]]):
        raise Refused(
            f"{where} the header is one column that holds {marks[0]!r}",
            "columns separated by commas",
            "write the file anew with commas",
        )
    if "" in names:
        raise Refused(
            f"{where} column {names.index('') + 1} has no name",
            "a name for each column",
            "name it, or drop it",
        )
    _check_columns(where, names, wanted)
    lists = [wanted.own(key) for key in ("messages", "conversations")]
    if found := [name for name in lists if name in names]:
        raise Refused(
            f"{where} has the column {found[0]}, whose turns a CSV field cannot hold",
            "one prompt and one answer a row, in columns of text",
            "write chats of several turns as .jsonl or .parquet",
        )
    return names


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """The row with marks of good and bad answers as what they are, so that they are known again."""
    return {
        key: BOOLEANS.get(text.lower(), text) if key in ("label", "kto_tag") else text
        for key, text in row.items()
    }


# --- Parquet


Budget = list[int]
"""One number: the bytes that a row's texts may still take."""

Values = Callable[[int, Budget], Any]
"""Gives the value at a place. Errors: Problem, _TooLong, UnicodeDecodeError."""


def parquet_rows(relpath: str, path: Path, wanted: Wanted) -> Iterator[RawRow]:
    """The rows of a Parquet file; `line` is a row's number. Errors: Refused for damage and unfit columns, OSError."""
    import pyarrow

    number = 0
    try:
        for size, columns in _batches(relpath, path, wanted):
            for at in range(size):
                number += 1
                yield _parquet_row(number, columns, at)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk, and not what is on it
            raise
        behind = f", behind row {number}" if number else ""
        raise Refused(
            f"{relpath} cannot be read as Parquet{behind}: {' '.join(str(error).split())[:200]}",
            "a whole Parquet file",
            "write or copy it anew",
        ) from None


def _batches(relpath: str, path: Path, wanted: Wanted) -> Iterator[tuple[int, dict[str, Values]]]:
    """How many rows a batch has, and the values of its columns."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        schema, leaves = file.schema_arrow, [file.schema.column(at) for at in range(len(file.schema))]
    if max((leaf.path.count(".") for leaf in leaves), default=0) > MAX_DEPTH:
        raise Refused(
            f"{relpath} has a column nested more than {MAX_DEPTH} deep",
            "columns of texts, or of lists of turns",
            "flatten it, or drop the column",
        )
    _check_columns(relpath, schema.names, wanted)
    # As dictionaries, so that a long text which a few bytes repeat is in memory once, not once a row of the batch.
    # JSON can be only where it is read as plain text; which text is JSON stands in the schema.
    texts = [leaf.path for leaf in leaves if leaf.logical_type.type in ("STRING", "JSON")]
    columns = [name for name in schema.names if name in wanted.columns()]
    with parquet.ParquetFile(
        path, read_dictionary=texts, page_checksum_verification=True, arrow_extensions_enabled=False
    ) as file:
        # Each row group has dictionaries of its own, and pyarrow does not put two of them together inside of lists.
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
            ):
                yield (
                    batch.num_rows,
                    {name: _values(batch.column(name), schema.field(name).type) for name in columns},
                )


@dataclass(frozen=True, slots=True, repr=False)
class Unread:
    """Stands for a value of a type that no chat is made of."""

    type: str

    def __repr__(self) -> str:
        return f"a {self.type} value"


class _TooLong(Exception):
    """A row's texts take more than MAX_ROW_BYTES."""


def _parquet_row(number: int, columns: dict[str, Values], at: int) -> RawRow:
    left, row = [MAX_ROW_BYTES], {}
    try:
        for name, value_at in columns.items():
            row[name] = value_at(at, left)
    except Problem as problem:
        return RawRow(number, 1, b"", Problem(problem.cause, f"in {name}: {problem.message}"))
    except _TooLong:
        return RawRow(number, 1, b"", Problem(*TOO_LONG))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return RawRow(number, 1, b"", Problem("bad_utf8", f"a text holds 0x{byte:02x}, which is not UTF-8"))
    return RawRow(number, 1, b"", None, row)


def _values(array: Any, of: Any) -> Values:
    """The values of an Arrow array in Python's types; `of` is its type by the schema, which tells JSON from text.

    Each text is measured before it is copied: of a text that a few bytes repeat, as_py() would make every copy.
    """
    import numpy
    import pyarrow
    from pyarrow import types

    if isinstance(of, pyarrow.JsonType):
        return _made(_values(array, of.storage_type), lambda spelled: json_value(spelled.encode()))
    if isinstance(of, pyarrow.BaseExtensionType):
        of = of.storage_type
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if types.is_dictionary(array.type):
        indices, text_at = array.indices.to_pylist(), _values(array.dictionary, array.dictionary.type)
        return lambda at, left: None if indices[at] is None else text_at(indices[at], left)
    if types.is_string(array.type) or types.is_large_string(array.type):
        # Where the texts begin, as they lie in memory: a dictionary may hold far more texts than this batch has rows.
        width = numpy.int32 if types.is_string(array.type) else numpy.int64
        begins = numpy.frombuffer(array.buffers()[1] or b"", width)[array.offset :]
        missing = array.is_null().to_pylist() if array.null_count else None

        def text(at: int, left: Budget) -> str | None:
            if missing and missing[at]:
                return None
            _spend(left, int(begins[at + 1] - begins[at]))
            return array[at].as_py()

        return text
    there = array.is_valid().to_pylist()
    if types.is_struct(array.type):
        fields = [
            (field.name, _values(inner, field.type)) for field, inner in zip(of, array.flatten(), strict=True)
        ]
        return lambda at, left: (
            object_of([(name, value_at(at, left)) for name, value_at in fields]) if there[at] else None
        )
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    if types.is_map(of) and of.key_type in texts:
        key_at, item_at = _values(array.keys, of.key_type), _values(array.items, of.item_type)
        return _made(_lists(array, lambda at, left: (key_at(at, left), item_at(at, left))), object_of)
    if isinstance(
        of,
        pyarrow.ListType
        | pyarrow.LargeListType
        | pyarrow.FixedSizeListType
        | pyarrow.ListViewType
        | pyarrow.LargeListViewType,
    ):
        return _lists(array, _values(array.values, of.value_type))
    if types.is_null(of) or types.is_boolean(of) or types.is_integer(of) or types.is_floating(of):
        plain = array.to_pylist()
        return lambda at, left: plain[at]
    unread = Unread(str(of))
    return lambda at, left: unread if there[at] else None


def _lists(array: Any, value_at: Values) -> Values:
    """The lists of an Arrow array of any kind of them, `value_at` giving what is in them."""
    from pyarrow import types

    there = array.is_valid().to_pylist()
    if types.is_fixed_size_list(array.type):
        begins = [at * array.type.list_size for at in range(array.offset, array.offset + len(array) + 1)]
    else:
        begins = array.offsets.to_pylist()
    ends = begins[1:]
    if types.is_list_view(array.type) or types.is_large_list_view(array.type):
        ends = [begin + size for begin, size in zip(begins, array.sizes.to_pylist(), strict=True)]

    def listed(at: int, left: Budget) -> list[Any] | None:
        if not there[at]:
            return None
        _spend(left, ends[at] - begins[at])
        return [value_at(inner, left) for inner in range(begins[at], ends[at])]

    return listed


def _made(value_at: Values, make: Callable[[Any], Any]) -> Values:
    """What is made of the values; of a null, nothing."""
    return lambda at, left: None if (value := value_at(at, left)) is None else make(value)


def _spend(left: Budget, size: int) -> None:
    left[0] -= size
    if left[0] < 0:
        raise _TooLong


def _check_columns(where: str, names: list[str], wanted: Wanted) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Refused(
            f"{where} has the column {twice[0]!r} twice", "another name for each column", "rename or drop one"
        )
    try:
        wanted.check_header(names)
    except Refused as unfit:
        raise Refused(f"{where} {unfit.found}", unfit.expected, unfit.do) from None

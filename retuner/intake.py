"""Rows out of files, block by block: parsed, or remembered from when the very same bytes were parsed before."""

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import to_json

from retuner.chats import BadRow, Block, Chat, blocks, format_of_file, read_block, read_chats
from retuner.dataset import DataFile
from retuner.describe import Description, describe
from retuner.fingerprint import fingerprint
from retuner.memo import Memo
from retuner.naming import draw_of, folded, names_of
from retuner.preferences import SAME_ANSWERS, is_same, said_in
from retuner.redaction import redacted
from retuner.rows import HEAD, Batch
from retuner.sketch import sketches, word_hashes, words_in

if TYPE_CHECKING:
    from retuner.reading_ahead import ReadingAhead

SEGMENT_CHARACTERS = 2**18
SEGMENT_ROWS = 2**12
NOTES = struct.Struct("<QQQ")


@dataclass
class Counts:
    """What reading found. Of bad rows only as many are kept as a run may have, or a message shows."""

    kept_bad_rows: int
    bad_rows: list[BadRow] = field(default_factory=list)
    rows_by_file: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    description: Description = field(default_factory=Description)

    def add(self, file: str, line: int, notes: "Notes") -> None:
        self.rows_by_file[file] += notes.rows
        if notes.format:
            self.formats[file] = notes.format
        for bad in notes.bad_rows:
            self.rejected[bad["cause"]] += 1
            if len(self.bad_rows) < self.kept_bad_rows:
                self.bad_rows.append(BadRow(**bad | {"file": file, "line": bad["line"] + line - 1}))
        self.redacted.update(notes.redacted)
        self.description.merge(Description.from_spelled(notes.description))


@dataclass
class Notes:
    """What of some rows is not rows. Plain JSON values."""

    rows: int
    """Bad ones included."""
    format: str | None
    """Of the usable rows, None where there are none."""
    bad_rows: list[dict[str, Any]]
    redacted: dict[str, int]
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows of a block."""

    notes: Notes
    batch: Batch

    def packed(self) -> bytes:
        notes, batch = json.dumps(vars(self.notes)).encode(), self.batch
        heads = batch.heads.tobytes()
        sizes = NOTES.pack(len(notes), len(heads), len(batch.words))
        return b"".join([sizes, notes, heads, batch.words, batch.lines])

    @classmethod
    def unpacked(cls, data: bytes) -> "Segment":
        ends = np.cumsum([NOTES.size, *NOTES.unpack_from(data)]).tolist()
        notes, heads, words, lines = (
            memoryview(data)[begin:end] for begin, end in pairwise([*ends, len(data)])
        )
        batch = Batch(np.frombuffer(heads, HEAD), words, lines)
        return cls(Notes(**json.loads(bytes(notes))), batch)


@dataclass(frozen=True)
class Reading:
    """How files are read: the settings, and what is remembered."""

    format: str
    columns: dict[str, str | None] | None = None
    redact: Sequence[str] = ()
    memo: Memo | None = None
    salt: str = ""

    def segments(self, file: DataFile, ahead: "ReadingAhead | None" = None) -> Iterator[tuple[int, Segment]]:
        """The line of the file at which a block begins, with each segment of the block.

        Errors: Refused for a file of another kind, Unavailable for one that cannot be read.
        """
        found = format_of_file(file, self.format, self.columns)
        for block in ahead.of(blocks(file), found) if ahead else blocks(file):
            for segment in self._of_block(block, found):
                yield block.first_line, segment

    def stored(self, path: Path, digest: str) -> Iterator[Segment]:
        """The rows of a file of this sha256 that `prepare` once wrote, in order and all of them, each with its line as
        it lies there.

        They are named and sketched as redacted by the settings of today. Nothing of them is refused: marks and the
        spelling in JSON may have made of a good row one that no user's file may have.
        """
        settings = [list(self.redact), self.salt]
        name = fingerprint({"stored": digest, "settings": settings})
        return self._remembered(name, lambda: self._segments(_stored_rows(path)))

    def remembers(self, block: Block, found: str | None) -> bool:
        """Whether the memo has the block, of a file of the format `found`."""
        return self.memo is not None and self.memo.has(self._name(block, found))

    def remember(self, block: Block, found: str | None) -> None:
        """Put the block into the memo. Errors: Refused."""
        for _ in self._of_block(block, found):
            pass

    def _name(self, block: Block, found: str | None) -> str:
        settings = [self.format, self.columns, list(self.redact), self.salt]
        return fingerprint({"bytes": block.sha256, "format": found, "settings": settings})

    def _of_block(self, block: Block, found: str | None) -> Iterator[Segment]:
        return self._remembered(self._name(block, found), lambda: self._parsed(block, found))

    def _remembered(self, name: str, read: Callable[[], Iterator[Segment]]) -> Iterator[Segment]:
        if self.memo is None:
            yield from read()
            return
        if pieces := self.memo.read(name):
            yield from map(Segment.unpacked, pieces)
            return
        with self.memo.write(name) as remember:
            for segment in read():
                remember(segment.packed())
                yield segment

    def _parsed(self, block: Block, found: str | None) -> Iterator[Segment]:
        rows = read_block(block, self.format, self.columns, found)
        return self._segments((row, None) for row in rows)

    def _segments(self, rows: Iterable[tuple[Chat | BadRow, bytes | None]]) -> Iterator[Segment]:
        making = _Making(self.redact, self.salt)
        for row, line in rows:
            making.add(row, line)
            if making.is_full():
                yield making.made()
                making = _Making(self.redact, self.salt)
        yield making.made()


def _stored_rows(path: Path) -> Iterator[tuple[Chat, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            yield Chat(tuple(row["messages"]), path.name, number, "messages", row.get("rejected")), line


def read_redacted(
    files: Iterable[DataFile], format: str, columns: Mapping[str, str | None] | None, redact: Sequence[str]
) -> Iterator[Chat | BadRow]:
    """The rows of `retuner.chats.read_chats`, as `prepare` takes them. Errors: as there."""
    for row in read_chats(files, format, columns):
        if isinstance(row, BadRow) or not redact:
            yield row
        else:
            chat, _ = _redacted(row, redact)
            yield _same_answers(chat) or chat


def _redacted(row: Chat, kinds: Sequence[str]) -> tuple[Chat, Counter[str]]:
    said, counts = redacted(said_in(row.messages, row.rejected), kinds)
    rejected = None if row.rejected is None else said[-1]["content"]
    return replace(row, messages=said[: len(row.messages)], rejected=rejected), counts


def _same_answers(row: Chat) -> BadRow | None:
    """What becomes of a pair whose answers redaction has made the same; None of any other row."""
    if row.rejected is None or not is_same(row.messages, row.rejected):
        return None
    return BadRow(row.file, row.line, None, SAME_ANSWERS, "redacted, chosen and rejected are the same", "")


class _Making:
    """A segment in the making."""

    def __init__(self, redact: Sequence[str], salt: str):
        self.redact, self.salt = redact, salt
        self.rows, self.characters = 0, 0
        self.bad_rows: list[dict[str, Any]] = []
        self.redacted: Counter[str] = Counter()
        self.chats: list[Chat] = []
        self.lines: list[bytes | None] = []

    def is_full(self) -> bool:
        return self.characters >= SEGMENT_CHARACTERS or self.rows >= SEGMENT_ROWS

    def add(self, row: Chat | BadRow, line: bytes | None) -> None:
        """`line` is that of a stored row, which stays as it is; None of one that has none yet."""
        self.rows += 1
        if isinstance(row, BadRow):
            self.bad_rows.append(asdict(replace(row, start="") if self.redact else row))
            self.characters += len(row.start)
            return
        if self.redact:
            row, counts = _redacted(row, self.redact)
            self.redacted.update(counts)
            if line is None and (bad := _same_answers(row)):
                self.bad_rows.append(asdict(bad))
                return
        self.chats.append(row)
        self.lines.append(line)
        self.characters += sum([len(turn["content"]) for turn in row.messages]) + len(row.rejected or "")

    def made(self) -> Segment:
        said = [said_in(chat.messages, chat.rejected) for chat in self.chats]
        contents = folded([turn["content"] for turns in said for turn in turns])
        names: list[bytes] = []
        lines: list[bytes] = []
        spoken: list[bytes] = []
        messages: list[int] = []
        at = 0
        for chat, turns, line in zip(self.chats, said, self.lines, strict=True):
            mine = contents[at : at + len(turns)]
            at += len(mine)
            name = names_of(chat.messages, chat.rejected, mine)
            group = name.group.hex()
            lines.append(line or spelled_row(group, name.id.hex(), chat.messages, chat.rejected))
            names += [name.group, name.id, name.key, name.prompt[:8], name.talk[:8]]
            names.append(draw_of(group, self.salt)[:8])
            # A system prompt is shared by many rows: what resembles what is decided by what the others say.
            others = mine[1:] if chat.messages[0]["role"] == "system" else mine
            spoken += others
            messages.append(len(others))
        hashes, by_text = word_hashes(words_in(spoken))
        begins = np.cumsum(messages, dtype=np.int64) - np.array(messages, np.int64)
        counts: Any = np.add.reduceat(by_text, begins) if messages else by_text
        heads: Any = np.zeros(len(lines), HEAD)
        numbers = np.frombuffer(b"".join(names), ">u8").reshape(len(heads), 9)
        for place, kind in enumerate(("group", "id", "key")):
            heads[kind] = numbers[:, 2 * place : 2 * place + 2]
        heads["prompt"], heads["talk"], heads["draw"] = numbers[:, 6], numbers[:, 7], numbers[:, 8]
        heads["words"], heads["asked"] = counts, by_text[begins]
        heads["line"] = [len(line) for line in lines]
        heads["bands"] = sketches(hashes, counts)
        notes = Notes(
            self.rows,
            self.chats[-1].format if self.chats else None,
            self.bad_rows,
            dict(sorted(self.redacted.items())),
            describe(said).spelled(),
        )
        return Segment(notes, Batch(heads, hashes.astype("<u4").tobytes(), b"".join(lines)))


def spelled_row(
    group: str, id: str, messages: Iterable[dict[str, str]], rejected: str | None = None
) -> bytes:
    """A line of train.jsonl or held_out.jsonl: what json.dumps makes with sorted keys and no escapes, but faster."""
    turns = b", ".join([b'{"content": ' + to_json(m["content"]) + _ENDS[m["role"]] for m in messages])
    other = b"" if rejected is None else b', "rejected": ' + to_json(rejected)
    return b'{"group": "%b", "id": "%b", "messages": [%b]%b}\n' % (group.encode(), id.encode(), turns, other)


_ENDS = {role: f', "role": "{role}"}}'.encode() for role in ("system", "user", "assistant")}

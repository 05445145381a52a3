"""What changed between two states of the data: conversations that came, went or were answered anew, and how the
whole shifted in length, in roles and in words."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from retuner.chats import BadRow, Chat
from retuner.dataset import DataFile
from retuner.describe import Description
from retuner.errors import Refused
from retuner.naming import names_of
from retuner.preferences import said_in
from retuner.sketch import SPACED_WORD, UNSPACED_WORD

SHOWN = 5
SHOWN_WORDS = 12
DESCRIBED_AT_ONCE = 256
START_CHARACTERS = 160
COMBINED_CHARACTERS = 16
"""No character of a living language, and no emoji, is spelled with more."""
JOINER = "\u200d"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
WORD = re.compile(f"{UNSPACED_WORD}|{SPACED_WORD}(?:['’]{SPACED_WORD})*")
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "longest": 1.0}

Side = Callable[[str], str]
"""Group to `train` or `held_out`."""
Read = Callable[[Iterable[DataFile]], Iterator[Chat | BadRow]]
"""`retuner.intake.read_redacted` as params say."""


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowChange(Told):
    id: str
    prompt: str
    answer: str
    side: str | None = None


class AnswerChange(Told):
    """A prompt that was answered in one way and is now in another."""

    prompt: str
    before: str
    after: str
    side: str | None = None


class WordShift(Told):
    word: str
    a: int
    """How often it stands in A."""
    b: int


class State(Told):
    """One of the two."""

    name: str
    md5: str
    files: int
    rows: int
    """Usable ones, duplicates among them."""
    rejected: dict[str, int]
    """Rows that cannot be used, by cause."""
    characters: dict[str, int]
    """Quantiles of the characters of a conversation."""
    roles: dict[str, dict[str, int]]
    """Messages by role, their characters, and the median of these."""
    words: int
    distinct_words: int


class DataDiff(Told):
    a: State
    b: State
    files_added: tuple[str, ...]
    files_removed: tuple[str, ...]
    files_changed: tuple[str, ...]
    kept: int
    """Conversations in both, each as often as in both."""
    added: int
    removed: int
    changed: int
    """Of those that came and went, the pairs with the same prompt: these are not in `added` and `removed`."""
    moved: int | None
    """Prompts in both that changed sides; None when no params say how the data is split."""
    added_by_side: dict[str, int]
    removed_by_side: dict[str, int]
    vocabulary_shift: float
    """Jensen-Shannon divergence of the two word distributions, in bits: what one word drawn from either tells about
    which it was drawn from. 0: nothing, they are the same; 1: everything, they share no word."""
    words_came: tuple[WordShift, ...]
    """In B alone, the most frequent first."""
    words_went: tuple[WordShift, ...]
    words_shifted: tuple[WordShift, ...]
    """In both, those that make most of the shift."""
    examples_added: tuple[RowChange, ...]
    examples_removed: tuple[RowChange, ...]
    examples_changed: tuple[AnswerChange, ...]


class Row(NamedTuple):
    group: bytes
    id: bytes


@dataclass
class Reading:
    """What a run over some files found."""

    description: Description = field(default_factory=Description)
    words: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    rows: Counter[Row] = field(default_factory=Counter)

    def merge(self, other: "Reading") -> None:
        self.description.merge(other.description)
        for name in ("words", "rejected", "rows"):
            getattr(self, name).update(getattr(other, name))


@dataclass(frozen=True)
class Source:
    """One state of the data: its name, DVC's digest, the files that params choose, and how they are split."""

    name: str
    md5: str
    files: tuple[DataFile, ...]
    side: Side | None = None


def diff(a: Source, b: Source, read: Read) -> DataDiff:
    """Compare two states, both read by `read`.

    A file that is the same in both is read once. Memory grows with the conversations, by some 300 bytes each.
    Errors: Refused when a file is of another kind, Unavailable when one cannot be read.
    """
    same = {(file.relpath, file.md5) for file in a.files} & {(file.relpath, file.md5) for file in b.files}
    both = _read(b.name, [file for file in b.files if (file.relpath, file.md5) in same], read)
    only = [_read(s.name, [f for f in s.files if (f.relpath, f.md5) not in same], read) for s in (a, b)]
    came, went = only[1].rows - only[0].rows, only[0].rows - only[1].rows
    changed = _changed(went, came)
    totals = []
    for reading in only:
        total = Reading()
        total.merge(both)
        total.merge(reading)
        totals.append(total)
    names = [{file.relpath: file.md5 for file in source.files} for source in (a, b)]
    words = [total.words for total in totals]
    shown = _Examples(_first(went, changed), _first(came, changed), set(list(changed)[:SHOWN]))
    if shown.wanted:
        shown.look(a, b, same, read)
    return DataDiff(
        a=_state(a, totals[0]),
        b=_state(b, totals[1]),
        files_added=tuple(sorted(names[1].keys() - names[0].keys())),
        files_removed=tuple(sorted(names[0].keys() - names[1].keys())),
        files_changed=tuple(
            sorted(n for n in names[0].keys() & names[1].keys() if names[0][n] != names[1][n])
        ),
        kept=(totals[0].rows & totals[1].rows).total(),
        added=came.total() - sum(changed.values()),
        removed=went.total() - sum(changed.values()),
        changed=sum(changed.values()),
        moved=_moved(a, b, totals[0].rows, totals[1].rows),
        added_by_side=_by_side(b, came, changed),
        removed_by_side=_by_side(a, went, changed),
        vocabulary_shift=jensen_shannon(*words),
        words_came=_words(words, lambda word: word not in words[0]),
        words_went=_words(words, lambda word: word not in words[1]),
        words_shifted=_shifted(*words),
        examples_added=tuple(shown.came),
        examples_removed=tuple(shown.went),
        examples_changed=tuple(shown.answers()),
    )


def jensen_shannon(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Bits, 0 to 1; 0 when one of them is empty and so says nothing."""
    return max(0.0, min(1.0, math.fsum(part for _, part in _parts(a, b))))


def _parts(a: Mapping[str, int], b: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    """Each word's part of the divergence: JS = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2."""
    all_a, all_b = sum(a.values()), sum(b.values())
    if not all_a or not all_b:
        return
    for word in a.keys() | b.keys():
        p, q = a.get(word, 0) / all_a, b.get(word, 0) / all_b
        middle = (p + q) / 2
        yield word, sum(x * math.log2(x / middle) for x in (p, q) if x) / 2


def _read(name: str, files: Iterable[DataFile], read: Read) -> Reading:
    found = Reading()
    described: list[Sequence[Mapping[str, str]]] = []
    for row in _rows(name, files, read):
        if isinstance(row, BadRow):
            found.rejected[row.cause] += 1
            continue
        messages = said_in(row.messages, row.rejected)
        described.append(messages)
        if len(described) == DESCRIBED_AT_ONCE:
            found.description.add_all(described)
            described = []
        found.rows[_row(row)] += 1
        for message in messages:
            found.words.update(WORD.findall(message["content"].casefold()))
    found.description.add_all(described)
    return found


def _rows(name: str, files: Iterable[DataFile], read: Read) -> Iterator[Chat | BadRow]:
    try:
        yield from read(sorted(files, key=lambda file: file.relpath))
    except Refused as refusal:
        raise Refused(f"{name}: {refusal.found}", refusal.expected, refusal.do) from None


def _row(chat: Chat) -> Row:
    names = names_of(chat.messages, chat.rejected)
    return Row(names.group, names.id)


def _changed(went: Counter[Row], came: Counter[Row]) -> dict[bytes, int]:
    """Group to how many of its conversations went while as many others came."""
    gone, new = Counter[bytes](), Counter[bytes]()
    for counted, rows in ((gone, went), (new, came)):
        for row, count in rows.items():
            counted[row.group] += count
    return dict(sorted((gone & new).items()))


def _moved(a: Source, b: Source, rows_a: Counter[Row], rows_b: Counter[Row]) -> int | None:
    if a.side is None or b.side is None:
        return None
    both = {row.group.hex() for row in rows_a} & {row.group.hex() for row in rows_b}
    return sum(a.side(group) != b.side(group) for group in both)


def _by_side(source: Source, rows: Counter[Row], changed: Mapping[bytes, int]) -> dict[str, int]:
    if source.side is None:
        return {}
    sides: Counter[str] = Counter(train=0, held_out=0)
    groups: Counter[bytes] = Counter()
    for row, count in rows.items():
        groups[row.group] += count
    for group, count in groups.items():
        sides[source.side(group.hex())] += count - changed.get(group, 0)
    return dict(sides)


def _first(rows: Counter[Row], changed: Mapping[bytes, int]) -> set[Row]:
    """A few that came or went, not in place of one another, with different prompts where there are any."""
    found = sorted(row for row in rows if row.group not in changed)
    of_group = {row.group: row for row in reversed(found)}
    return set([*sorted(of_group.values()), *found][:SHOWN])


@dataclass
class _Examples:
    """The texts of a few rows, found by a second look into the files that differ."""

    want_went: set[Row]
    want_came: set[Row]
    want_changed: set[bytes]
    went: list[RowChange] = field(default_factory=list)
    came: list[RowChange] = field(default_factory=list)
    before: dict[bytes, list[tuple[bytes, Chat, str | None]]] = field(default_factory=dict)
    after: dict[bytes, list[tuple[bytes, Chat, str | None]]] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        return bool(self.want_went or self.want_came or self.want_changed)

    def look(self, a: Source, b: Source, same: set[tuple[str, str]], read: Read) -> None:
        for source, wanted, rows, answers in (
            (a, self.want_went, self.went, self.before),
            (b, self.want_came, self.came, self.after),
        ):
            differing = [file for file in source.files if (file.relpath, file.md5) not in same]
            for chat in _rows(source.name, differing, read):
                if isinstance(chat, BadRow):
                    continue
                row = _row(chat)
                side = source.side(row.group.hex()) if source.side else None
                if row in wanted:
                    wanted.discard(row)
                    rows.append(
                        RowChange(id=row.id.hex(), prompt=_prompt(chat), answer=_answer(chat), side=side)
                    )
                elif row.group in self.want_changed:
                    answers.setdefault(row.group, []).append((row.id, chat, side))

    def answers(self) -> Iterator[AnswerChange]:
        for group in sorted(self.want_changed):
            ids = [{id for id, _, _ in each.get(group, ())} for each in (self.after, self.before)]
            before = [found for found in self.before.get(group, ()) if found[0] not in ids[0]]
            after = [found for found in self.after.get(group, ()) if found[0] not in ids[1]]
            if before and after:
                yield AnswerChange(
                    prompt=_prompt(after[0][1]),
                    before=_answer(before[0][1]),
                    after=_answer(after[0][1]),
                    side=after[0][2],
                )


def _prompt(chat: Chat) -> str:
    asked = next(message for message in chat.messages if message["role"] == "user")
    return _cut(_line(asked["content"]))


def _answer(chat: Chat) -> str:
    """All that follows the prompt, in short."""
    said = [m["content"] for m in said_in(chat.messages, chat.rejected) if m["role"] != "system"][1:]
    return _cut(_line(" / ".join(said)))


def _line(text: str) -> str:
    return " ".join(text.split())


def _cut(line: str) -> str:
    """The first characters of a line, with … where it goes on."""
    end = _border(line, START_CHARACTERS)
    return line[:end] + ("…" if end < len(line) else "")


def _border(line: str, at: int) -> int:
    """Where to cut at about `at`: not between a character and those that combine with it, unless there are many."""
    if not 0 < at < len(line):
        return max(0, min(at, len(line)))
    places = range(at, max(0, at - COMBINED_CHARACTERS), -1)
    return next((place for place in places if not _combine(line[place - 1], line[place])), at)


def _combine(left: str, right: str) -> bool:
    return unicodedata.category(right)[0] == "M" or JOINER in (left, right) or right in SKIN_TONES


def _words(words: list[Counter[str]], wanted: Callable[[str], bool]) -> tuple[WordShift, ...]:
    found = [word for word in words[0].keys() ^ words[1].keys() if wanted(word)]
    found.sort(key=lambda word: (-words[0][word] - words[1][word], word))
    return tuple(WordShift(word=word, a=words[0][word], b=words[1][word]) for word in found[:SHOWN_WORDS])


def _shifted(a: Counter[str], b: Counter[str]) -> tuple[WordShift, ...]:
    parts = sorted(
        ((part, word) for word, part in _parts(a, b) if word in a and word in b and part > 1e-6),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return tuple(WordShift(word=word, a=a[word], b=b[word]) for _, word in parts[:SHOWN_WORDS])


def _state(source: Source, total: Reading) -> State:
    described = total.description
    return State(
        name=source.name,
        md5=source.md5,
        files=len(source.files),
        rows=described.rows,
        rejected=dict(sorted(total.rejected.items())),
        characters={name: described.lengths["all"].quantile(share) for name, share in QUANTILES.items()},
        roles={
            role: {
                "messages": described.messages[role],
                "characters": described.characters[role],
                "median": described.lengths[role].quantile(0.5),
            }
            for role in sorted(described.messages)
        },
        words=total.words.total(),
        distinct_words=len(total.words),
    )

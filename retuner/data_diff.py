"""What changed between two states of the data: conversations that came, went, were answered anew or asked differently,
and how the whole shifted in length, in roles and in words."""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, TypeVar

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
LIKENED = 20
"""On either side, to find which became which."""
ASKING = ("system", "user")
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


T = TypeVar("T")


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowChange(Told):
    id: str
    prompt: str
    answer: str
    side: str | None = None


class Change(Told):
    """What a conversation says and what the one in its place says: where long, the stretch around the first difference.

    White space is as it is where nothing else differs, else each run of it is a space."""

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
    """Those in place of one with the same prompt but for case and white space, and with other answers. They are not in
    `added` and `removed`."""
    asked_differently: int
    """As `changed`, but with the very same answers: case or white space of the prompt, or a later question, differs."""
    moved: int | None
    """Prompts in both that changed sides; None when no params say how the data is split."""
    added_by_side: dict[str, int]
    removed_by_side: dict[str, int]
    vocabulary_shift: float | None
    """Jensen-Shannon divergence of the two word distributions, in bits: what one word drawn from either tells about
    which it was drawn from. 0: nothing, they are the same; 1: everything, they share no word. None where one has no
    words."""
    words_came: tuple[WordShift, ...]
    """In B alone, the most frequent first."""
    words_went: tuple[WordShift, ...]
    words_shifted: tuple[WordShift, ...]
    """In both, those that make most of the shift."""
    examples_added: tuple[RowChange, ...]
    examples_removed: tuple[RowChange, ...]
    examples_changed: tuple[Change, ...]
    """What follows the prompts."""
    examples_asked_differently: tuple[Change, ...]
    """Whole conversations."""


class Row(NamedTuple):
    group: bytes
    answers: bytes
    """Hash of the exact answers, the rejected one among them."""
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

    A file that is the same in both is read once. Memory grows with the conversations, by some 400 bytes each.
    Errors: Refused when a file is of another kind, Unavailable when one cannot be read.
    """
    same = {(file.relpath, file.md5) for file in a.files} & {(file.relpath, file.md5) for file in b.files}
    both = _read(b.name, [file for file in b.files if (file.relpath, file.md5) in same], read)
    only = [_read(s.name, [f for f in s.files if (f.relpath, f.md5) not in same], read) for s in (a, b)]
    came, went = only[1].rows - only[0].rows, only[0].rows - only[1].rows
    anew, differently = _replaced(went, came)
    totals = []
    for reading in only:
        total = Reading()
        total.merge(both)
        total.merge(reading)
        totals.append(total)
    names = [{file.relpath: file.md5 for file in source.files} for source in (a, b)]
    words = [total.words for total in totals]
    first = [_first(rows, anew + differently) for rows in (went, came)]
    pairs = [_candidates(went, came, anew, False), _candidates(went, came, differently, True)]
    chats = [
        _chats(source, first[at].union(*(pair[at] for each in pairs for pair in each)), same, read)
        for at, source in enumerate((a, b))
    ]
    return DataDiff(
        a=_state(a, totals[0]),
        b=_state(b, totals[1]),
        files_added=tuple(sorted(names[1].keys() - names[0].keys())),
        files_removed=tuple(sorted(names[0].keys() - names[1].keys())),
        files_changed=tuple(
            sorted(n for n in names[0].keys() & names[1].keys() if names[0][n] != names[1][n])
        ),
        kept=(totals[0].rows & totals[1].rows).total(),
        added=came.total() - anew.total() - differently.total(),
        removed=went.total() - anew.total() - differently.total(),
        changed=anew.total(),
        asked_differently=differently.total(),
        moved=_moved(a, b, totals[0].rows, totals[1].rows),
        added_by_side=_by_side(b, came, anew + differently),
        removed_by_side=_by_side(a, went, anew + differently),
        vocabulary_shift=jensen_shannon(*words) if all(words) else None,
        words_came=_words(words, lambda word: word not in words[0]),
        words_went=_words(words, lambda word: word not in words[1]),
        words_shifted=_shifted(*words),
        examples_added=tuple(_row_change(b, row, chat) for row, chat in chats[1].items() if row in first[1]),
        examples_removed=tuple(
            _row_change(a, row, chat) for row, chat in chats[0].items() if row in first[0]
        ),
        examples_changed=tuple(_change(b, pair, chats, _answers) for pair in pairs[0]),
        examples_asked_differently=tuple(_change(b, pair, chats, _whole) for pair in pairs[1]),
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
            found.words.update(_words_of(message["content"]))
    found.description.add_all(described)
    return found


def _rows(name: str, files: Iterable[DataFile], read: Read) -> Iterator[Chat | BadRow]:
    try:
        yield from read(sorted(files, key=lambda file: file.relpath))
    except Refused as refusal:
        raise Refused(f"{name}: {refusal.found}", refusal.expected, refusal.do) from None


def _row(chat: Chat) -> Row:
    names = names_of(chat.messages, chat.rejected)
    answers = [m["content"] for m in said_in(chat.messages, chat.rejected) if m["role"] not in ASKING]
    # NUL keeps them apart: no text of a chat holds one.
    return Row(names.group, hashlib.sha256("\0".join(answers).encode()).digest()[:16], names.id)


def _replaced(went: Counter[Row], came: Counter[Row]) -> tuple[Counter[bytes], Counter[bytes]]:
    """Of each group, how many conversations were answered anew, and how many only asked differently."""
    gone, new = (_counted((row.group, count) for row, count in rows.items()) for rows in (went, came))
    said_then, said_now = (_counted((row[:2], count) for row, count in rows.items()) for rows in (went, came))
    differently = _counted((group, count) for (group, _), count in (said_then & said_now).items())
    return (gone & new) - differently, differently


def _counted(pairs: Iterable[tuple[T, int]]) -> Counter[T]:
    found = Counter[T]()
    for what, count in pairs:
        found[what] += count
    return found


def _moved(a: Source, b: Source, rows_a: Counter[Row], rows_b: Counter[Row]) -> int | None:
    if a.side is None or b.side is None:
        return None
    both = {row.group.hex() for row in rows_a} & {row.group.hex() for row in rows_b}
    return sum(a.side(group) != b.side(group) for group in both)


def _by_side(source: Source, rows: Counter[Row], replaced: Counter[bytes]) -> dict[str, int]:
    if source.side is None:
        return {}
    sides: Counter[str] = Counter(train=0, held_out=0)
    for group, count in _counted((row.group, count) for row, count in rows.items()).items():
        sides[source.side(group.hex())] += count - replaced[group]
    return dict(sides)


def _first(rows: Counter[Row], replaced: Counter[bytes]) -> set[Row]:
    """A few that came or went, not in place of one another, with different prompts where there are any."""
    found = sorted(row for row in rows if row.group not in replaced)
    of_group = {row.group: row for row in reversed(found)}
    return set([*sorted(of_group.values()), *found][:SHOWN])


def _candidates(
    went: Counter[Row], came: Counter[Row], replaced: Counter[bytes], same_answers: bool
) -> list[tuple[list[Row], list[Row]]]:
    """Of each of a few groups, rows of which one went and one came in its place: with the same answers, or with answers
    that the other side has not, or not as often."""
    groups = sorted(replaced)[:SHOWN]
    found = []
    for gone, new in zip(_of(groups, went), _of(groups, came)):
        then, now = (_counted((row.answers, count) for row, count in rows.items()) for rows in (gone, new))
        wanted = [{min(then & now)}] * 2 if same_answers else [then - now, now - then]
        before, after = (
            sorted(row for row in rows if row.answers in answers)[:LIKENED]
            for rows, answers in zip((gone, new), wanted)
        )
        found.append((before, after))
    return found


def _of(groups: Sequence[bytes], rows: Counter[Row]) -> list[Counter[Row]]:
    found = {group: Counter[Row]() for group in groups}
    for row, count in rows.items():
        if row.group in found:
            found[row.group][row] = count
    return list(found.values())


def _chats(source: Source, wanted: set[Row], same: set[tuple[str, str]], read: Read) -> dict[Row, Chat]:
    """The texts of a few rows, by a second look into the files that differ."""
    found: dict[Row, Chat] = {}
    if not wanted:
        return found
    for chat in _rows(source.name, [f for f in source.files if (f.relpath, f.md5) not in same], read):
        if not isinstance(chat, BadRow) and (row := _row(chat)) in wanted:
            found.setdefault(row, chat)
    return found


def _row_change(source: Source, row: Row, chat: Chat) -> RowChange:
    return RowChange(
        id=row.id.hex(), prompt=_prompt(chat), answer=_cut(_line(_answers(chat))), side=_side(source, row)
    )


def _change(
    b: Source,
    candidates: tuple[list[Row], list[Row]],
    chats: Sequence[Mapping[Row, Chat]],
    text_of: Callable[[Chat], str],
) -> Change:
    """The two candidates that are most alike."""
    words = [
        {row: Counter(_words_of(_whole(found[row]))) for row in rows}
        for rows, found in zip(candidates, chats)
    ]

    def alike(pair: tuple[Row, Row]) -> float:
        then, now = words[0][pair[0]], words[1][pair[1]]
        return (then & now).total() / max(1, then.total() + now.total())

    gone, new = max(product(*candidates), key=alike)
    before, after = _around_the_difference(text_of(chats[0][gone]), text_of(chats[1][new]))
    return Change(prompt=_prompt(chats[1][new]), before=before, after=after, side=_side(b, new))


def _side(source: Source, row: Row) -> str | None:
    return source.side(row.group.hex()) if source.side else None


def _prompt(chat: Chat) -> str:
    asked = next(message for message in chat.messages if message["role"] == "user")
    return _cut(_line(asked["content"]))


def _answers(chat: Chat) -> str:
    """All that follows the prompt."""
    return " / ".join(
        [m["content"] for m in said_in(chat.messages, chat.rejected) if m["role"] != "system"][1:]
    )


def _whole(chat: Chat) -> str:
    return " / ".join(message["content"] for message in said_in(chat.messages, chat.rejected))


def _words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _line(text: str) -> str:
    return " ".join(text.split())


def _around_the_difference(before: str, after: str) -> tuple[str, str]:
    lines = [_line(before), _line(after)]
    if lines[0] == lines[1]:
        lines = [before, after]
    shorter = min(map(len, lines))
    differs_at = next((at for at in range(shorter) if lines[0][at] != lines[1][at]), shorter)
    start = differs_at - START_CHARACTERS // 2
    return _cut(lines[0], start), _cut(lines[1], start)


def _cut(line: str, start: int = 0) -> str:
    """So many characters of a line, with … where it goes on."""
    begin = _border(line, start)
    end = _border(line, max(0, start) + START_CHARACTERS)
    return ("…" if begin else "") + line[begin:end] + ("…" if end < len(line) else "")


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

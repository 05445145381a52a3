"""What conversations are like, counted: roles, turns, lengths, scripts. Cheap, exact where it can be, and mergeable,
so that a description of appended data costs only the new rows."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

BIN_BITS = 6
ROLES = ("system", "user", "assistant", "rejected")
"""In the order in which people are told of them; `rejected` is the other answer of a preference pair."""
_IS_LETTER = bytes(byte < 128 and chr(byte).isalpha() for byte in range(256))
_ASCII = bytes(range(128))
# The word by which Unicode's names begin, where that is not the script's own name.
_SCRIPT_OF_WORD = {
    "Cjk": "Han",
    "Hangzhou": "Han",
    "Ideographic": "Han",
    "Feminine": "Latin",
    "Masculine": "Latin",
}
_NO_SCRIPT = {
    *(
        "",
        "Modifier",
        "Mathematical",
        "Double-Struck",
        "Script",
        "Black-Letter",
        "Micro",
        "Katakana-Hiragana",
    ),
    *("Alef", "Bet", "Gimel", "Dalet"),  # the mathematicians' ℵ and its like
}


Bin = tuple[int, int, int]
"""`(low, high, count)` of lengths; `high` is not in it."""


def quantile(bins: Iterable[Bin], share: float) -> int:
    """The length that `share` of them reach at most: the greatest of its bin, so that this is true. Of bins of
    `Lengths` it is high by 1/32 at most, and never above the longest. 0 when there is none."""
    known = list(bins)
    wanted, seen = share * sum(count for _, _, count in known), 0
    for _, high, count in known:
        seen += count
        if seen >= wanted:
            return high - 1
    return 0


@dataclass
class Lengths:
    """How many of each length: exact below 64, then in bins whose ends are at most 1/32 apart."""

    bins: Counter[int] = field(default_factory=Counter)
    """The least length of a bin to how many are in it."""
    longest: int = 0

    def add(self, length: int, times: int = 1) -> None:
        self.bins[_bin_of(length)] += times
        self.longest = max(self.longest, length)

    def add_all(self, lengths: Sequence[int]) -> None:
        self.bins.update(map(_bin_of, lengths))
        self.longest = max(self.longest, *lengths)

    def merge(self, other: "Lengths") -> None:
        self.bins.update(other.bins)
        self.longest = max(self.longest, other.longest)

    def quantile(self, share: float) -> int:
        """See `quantile`."""
        return quantile(self.ranges(), share)

    def ranges(self) -> Iterator[Bin]:
        """Of each bin, shortest first. The last one ends with the longest."""
        for low, count in sorted(self.bins.items()):
            high = low + (1 << max(0, low.bit_length() - BIN_BITS))
            yield low, min(high, self.longest + 1), count

    def spelled(self) -> dict[str, Any]:
        bins = {str(low): count for low, count in sorted(self.bins.items())}
        return {"longest": self.longest, "bins": bins}

    @classmethod
    def from_spelled(cls, spelled: Mapping[str, Any]) -> "Lengths":
        return cls(Counter({int(low): n for low, n in spelled["bins"].items()}), spelled["longest"])


def _bin_of(length: int) -> int:
    shift = length.bit_length() - BIN_BITS
    return length >> shift << shift if shift > 0 else length


@dataclass
class Description:
    """Of the conversations that were added. Equal to the merged descriptions of any parts of them."""

    rows: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    """By role."""
    characters: Counter[str] = field(default_factory=Counter)
    """By role."""
    turns: Counter[int] = field(default_factory=Counter)
    """How many conversations have so many answers."""
    lengths: dict[str, Lengths] = field(default_factory=lambda: {"all": Lengths()})
    """Characters: of messages by role, and of whole conversations under `all`."""
    letters: Counter[str] = field(default_factory=Counter)
    """By Unicode script. Digits, signs and emoji have none."""
    script_rows: Counter[str] = field(default_factory=Counter)
    """Conversations with any letter of the script."""

    def add_all(self, conversations: Iterable[Sequence[Mapping[str, str]]]) -> None:
        talks = list(conversations)
        texts = ["".join([message["content"] for message in talk]) for talk in talks]
        sizes: defaultdict[str, list[int]] = defaultdict(list)
        answers = []
        for talk in talks:
            roles = [message["role"] for message in talk]
            answers.append(roles.count("assistant"))
            for role, message in zip(roles, talk, strict=True):
                sizes[role].append(len(message["content"]))
        self.rows += len(talks)
        self.turns.update(answers)
        for role, lengths in sizes.items():
            self.messages[role] += len(lengths)
            self.characters[role] += sum(lengths)
            self.lengths.setdefault(role, Lengths()).add_all(lengths)
        if texts:
            self.lengths["all"].add_all(list(map(len, texts)))
            self._add_letters(texts)

    def _add_letters(self, texts: Sequence[str]) -> None:
        import numpy as np

        spelled = [text.encode("utf-8", "replace") for text in texts]
        is_letter = np.frombuffer(b" ".join([*spelled, b""]).translate(_IS_LETTER), np.bool_)
        begins = np.cumsum([0, *[len(text) + 1 for text in spelled[:-1]]])
        latin = np.add.reduceat(is_letter, begins, dtype=np.int64)
        for row, text in enumerate(texts):
            if text.isascii():
                continue
            for script, count in _scripts_beyond_ascii(text).items():
                if script == "Latin":
                    latin[row] += count
                else:
                    self.letters[script] += count
                    self.script_rows[script] += 1
        if latin.any():
            self.letters["Latin"] += int(latin.sum())
            self.script_rows["Latin"] += int((latin > 0).sum())

    def merge(self, other: "Description") -> None:
        self.rows += other.rows
        for name in ("messages", "characters", "turns", "letters", "script_rows"):
            getattr(self, name).update(getattr(other, name))
        for role, lengths in other.lengths.items():
            self.lengths.setdefault(role, Lengths()).merge(lengths)

    def spelled(self) -> dict[str, Any]:
        """Plain JSON values, the same for the same conversations in any order."""
        roles = {
            role: {
                "messages": self.messages[role],
                "characters": self.characters[role],
                "lengths": self.lengths[role].spelled(),
            }
            for role in sorted(self.messages)
        }
        scripts = {
            script: {"letters": count, "rows": self.script_rows[script]}
            for script, count in sorted(self.letters.items(), key=lambda pair: (-pair[1], pair[0]))
        }
        return {
            "rows": self.rows,
            "roles": roles,
            "turns": {str(answers): rows for answers, rows in sorted(self.turns.items())},
            "characters": self.lengths["all"].spelled(),
            "scripts": scripts,
        }

    @classmethod
    def from_spelled(cls, spelled: Mapping[str, Any]) -> "Description":
        roles, scripts = spelled["roles"], spelled["scripts"]
        return cls(
            rows=spelled["rows"],
            messages=Counter({role: said["messages"] for role, said in roles.items()}),
            characters=Counter({role: said["characters"] for role, said in roles.items()}),
            turns=Counter({int(answers): rows for answers, rows in spelled["turns"].items()}),
            lengths={
                "all": Lengths.from_spelled(spelled["characters"]),
                **{role: Lengths.from_spelled(said["lengths"]) for role, said in roles.items()},
            },
            letters=Counter({script: found["letters"] for script, found in scripts.items()}),
            script_rows=Counter({script: found["rows"] for script, found in scripts.items()}),
        )


def describe(conversations: Iterable[Sequence[Mapping[str, str]]]) -> Description:
    """The description of all of them."""
    made = Description()
    made.add_all(conversations)
    return made


def _scripts_beyond_ascii(text: str) -> dict[str, int]:
    """`{"Han": 3}` for the letters of a text that are not in ASCII."""
    found: dict[str, int] = {}
    others = text.encode("utf-8", "replace").translate(None, _ASCII).decode()
    for character, count in Counter(others).items():  # equal ones are looked up once
        if script := script_of(character):
            found[script] = found.get(script, 0) + count
    return found


@cache
def script_of(character: str) -> str | None:
    """`Latin`, `Cyrillic`, `Han`, ... for a letter, by its Unicode name; None for what is no letter of a script."""
    if unicodedata.category(character)[0] != "L":
        return None
    words = unicodedata.name(character, "").title().split()
    word = next(
        (word for word in words if word not in ("Fullwidth", "Halfwidth", "Superscript", "Subscript")), ""
    )
    word = _SCRIPT_OF_WORD.get(word, word)
    return None if word in _NO_SCRIPT else word

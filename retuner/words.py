"""Token ids of texts, with each distinct piece of text tokenised once, and exact.

Texts are cut into *units*: between two characters that no token can hold together. Where that is, is a theorem for
two kinds of tokenizer that are recognised; any other has whole texts as its units.

**BPE over text in which spaces are written as ▁** (Llama 2, Phi-3): no pre-tokenizer, and a normalizer that
replaces ` ` by `▁`, after putting one `▁` before the text or not. Such a tokenizer merges pairs of neighbours, the
pair of lowest rank first. The vocabulary holds the result of every merge. So where no piece of the vocabulary holds the
character x followed by y, no merge ever reaches over a place between x and y, and what happens on one side of it (which
pairs there are and which ranks they have) does not depend on the other side: cut there. Required is that this holds
for every y = ▁ that follows another character; for other y it is looked up for ASCII. Single characters without a
piece become bytes, all 256 of which have one, so no unknown token spans a cut; and no merge takes a byte's piece, so
that these characters merge with nothing. (A ▁ that stands in the text itself counts as white space here.) The ▁
before the text is a space before its first word.

**Byte-level BPE behind GPT-2's pattern**
`'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`
(SmolLM2, where `Digits` cut out every digit before): each match is white space only; or, after one space or
none, letters only, digits only or other signs only; or one of the contractions. So a match always begins at a space
behind a non-space, and, but for what follows an apostrophe, where letters, digits and other signs border on each other.
Left of such a place all matches as it would alone, because the one look-ahead asks what follows white space, and
there is none before the place; right of it too, because the pattern never looks back. BPE then works inside
single matches.

`tests/test_words.py` holds both against the tokenizers themselves, and so does every `Words` with the first texts that
it gets.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import TYPE_CHECKING, Any

from retuner.errors import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What `\s` and char::is_whitespace mean in Rust, where the tokenizer strips around control tokens. Python's
# str.strip() takes \x1c to \x1f too.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

SPACE = "▁"
UNSAFE_ASCII = [*range(0x21), 0x7F]
NOT_BEFORE_A_CUT = frozenset({*WHITE_SPACE, *map(chr, UNSAFE_ASCII), "\u180e", "\u200b", "\ufeff", SPACE})
"""A space behind one of these begins no unit: more than white space, what any engine might take for it."""
NO, YES, ASK = 0, 1, 2

CHECKED_TEXTS = 256
"""How many of the first texts are tokenised whole too, for comparison,"""
CHECKED_CHARACTERS = 2**17
"""up to so many characters: a tokenizer takes some hundred bytes for each token."""
MOST_UNITS = 200_000
MOST_UNIT_BYTES = 16 << 20
"""Above either, all units are forgotten before the next texts, so that memory is bounded."""


@dataclass(frozen=True)
class Rule:
    """How texts become units, and who tokenises those."""

    tokenizer: Any
    places: "NDArray[Any] | None" = None
    """(256, 256): whether there is a cut between two bytes: NO, YES, or ASK about the whole characters. Without
    them there are no cuts."""
    lead: str = ""
    """Goes before every text that is not empty."""

    @property
    def cuts(self) -> bool:
        return self.places is not None


def provable_rule(plain: Any) -> Rule:
    """The finest rule that is exact for `plain`, a tokenizers.Tokenizer without added tokens."""
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE

    whole = Rule(plain)
    model = plain.model
    if not isinstance(model, BPE) or model.dropout is not None:
        return whole
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return whole
    normalizer, pre_tokenizer = _spelled(plain.normalizer), _spelled(plain.pre_tokenizer)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    if normalizer == [] and pre_tokenizer in ([byte_level], [digits, byte_level]):
        return Rule(plain, _places_by_class(digits in pre_tokenizer))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre_tokenizer == [] and normalizer in ([replace], [prepend, replace]):
        vocabulary = plain.get_vocab()
        pieces = "\0".join(vocabulary)
        merged_bytes = re.search(r"[^\0]<0x[0-9A-F]{2}>|<0x[0-9A-F]{2}>[^\0]", pieces)
        reaches_over = re.search(rf"[^\0{SPACE}]{SPACE}", pieces)
        # With ignore_merges a text that is a piece as a whole is never merged, and a unit of it may be.
        complete = model.byte_fallback and {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys()
        if complete and not merged_bytes and not reaches_over and not model.ignore_merges:
            units = Tokenizer(model)
            units.normalizer = normalizers.Replace(" ", SPACE)
            return Rule(units, _places_by_pieces(pieces), lead=" " if prepend in normalizer else "")
    return whole


def _places_by_pieces(pieces: str) -> "NDArray[Any]":
    """Cuts between two characters of ASCII that no piece holds side by side, and before spaces. A NUL stands between
    the pieces."""
    import numpy as np

    places = _places_before_spaces()
    places[:128, :128] = YES
    letters = np.frombuffer(pieces.replace(SPACE, " ").encode(), np.uint8)
    left, right = letters[:-1], letters[1:]
    ascii = (left | right) < 128
    places[left[ascii], right[ascii]] = NO
    places[UNSAFE_ASCII, ord(" ")] = NO
    return places


def _places_by_class(lone_digits: bool) -> "NDArray[Any]":
    """Cuts where letters, digits and other signs of ASCII border on each other, not behind an apostrophe, and before
    spaces."""
    import numpy as np

    places = _places_before_spaces()
    signs = "".join(sorted({*string.punctuation} - {"'"}))
    classes = (string.ascii_letters, string.digits, signs)
    for left in classes:
        for right in (string.ascii_letters, string.digits, signs + "'"):
            within = left[0] in right and not (lone_digits and left == string.digits)
            places[np.ix_(list(left.encode()), list(right.encode()))] = NO if within else YES
    return places


def _places_before_spaces() -> "NDArray[Any]":
    import numpy as np

    places: Any = np.full((256, 256), NO, np.uint8)
    places[:, ord(" ")] = YES
    places[UNSAFE_ASCII, ord(" ")] = NO
    # The last bytes of what is no place for a cut, which other characters share.
    places[[char.encode()[-1] for char in NOT_BEFORE_A_CUT - set(map(chr, UNSAFE_ASCII))], ord(" ")] = ASK
    return places


def _spelled(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps, less what only concerns offsets."""
    if part is None:
        return []
    spelled = json.loads(part.__getstate__())
    steps = spelled.get("normalizers" if "normalizers" in spelled else "pretokenizers", [spelled])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


class Words:
    """Every distinct unit's ids, kept once. A *code* stands for a unit or a control token until the next `codes`."""

    def __init__(self, plain: Any, controls: Mapping[int, str], rule: Rule | None = None):
        """`controls`: the texts of the added tokens by id; no text ever gets one of these ids."""
        self.plain = plain
        self.rule = rule or provable_rule(plain)
        self.controls = dict(sorted(controls.items()))
        self._to_check = CHECKED_TEXTS if self.rule.cuts else 0
        self.forget()

    def forget(self) -> None:
        """All units, which may take tens of megabytes."""
        import numpy as np

        self._code_of: dict[bytes, int] = {}
        self._unit_bytes = 0
        self._ids = np.array(list(self.controls), np.int32)
        self._starts = np.arange(len(self.controls))
        self._lengths: Any = np.ones(len(self.controls), np.int64)

    def control_codes(self, ids: "NDArray[Any]") -> "NDArray[Any]":
        """The codes of control tokens."""
        import numpy as np

        return np.searchsorted(self._ids[: len(self.controls)], ids)

    def codes(self, texts: Sequence[str]) -> tuple["NDArray[Any]", "NDArray[Any]"]:
        """The units of all texts in order, as codes, and how many there are of each text.

        Errors: Refused when a text has a character that becomes a control token; UnicodeEncodeError for half a
        character.
        """
        import numpy as np

        if len(self._code_of) > MOST_UNITS or self._unit_bytes > MOST_UNIT_BYTES:
            self.forget()
        codes, counts = self._look_up(texts)
        if self._to_check:
            checked = [text[:CHECKED_CHARACTERS] for text in texts[: self._to_check]]
            self._to_check -= len(checked)
            whole = self.plain.encode_batch_fast(checked, add_special_tokens=False)
            ids = list(chain.from_iterable(encoding.ids for encoding in whole))
            if not np.array_equal(self.tokens(self._look_up(checked)[0])[0], ids):
                self.rule, self._to_check = Rule(self.plain), 0
                self.forget()
                return self._look_up(texts)
        return codes, counts

    def tokens(self, codes: "NDArray[Any]") -> tuple["NDArray[Any]", "NDArray[Any]"]:
        """The tokens of all units, one after the other, int32; and where those of each begin, and the last ones end."""
        import numpy as np

        lengths = self._lengths[codes]
        bounds: Any = np.zeros(len(codes) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        places: Any = np.repeat(self._starts[codes] - bounds[:-1], lengths)
        places += np.arange(len(places))
        return self._ids[places], bounds

    def _look_up(self, texts: Sequence[str]) -> tuple["NDArray[Any]", "NDArray[Any]"]:
        import numpy as np
        import pyarrow as pa

        lead = self.rule.lead
        # Not pa.array, to_pylist and to_numpy: they import pandas.
        spelled = [(lead + text).encode() if text else b"" for text in texts]
        offsets = np.cumsum([0, *map(len, spelled)])
        data = np.frombuffer(b"".join(spelled), np.uint8)
        if not len(data):
            return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
        starts = self._unit_starts(data, offsets)
        bounds: Any = np.append(starts, len(data))
        buffers = [None, pa.py_buffer(bounds), pa.py_buffer(data)]
        distinct = pa.Array.from_buffers(pa.large_binary(), len(starts), buffers).dictionary_encode()
        _, bounds, letters = distinct.dictionary.buffers()
        ends, letters = np.frombuffer(bounds, np.int64).tolist(), letters.to_pybytes()
        units = [letters[start:end] for start, end in pairwise(ends[: len(distinct.dictionary) + 1])]
        indices = np.frombuffer(distinct.indices.buffers()[1], np.int32)[: len(starts)]
        return self._codes_of(units)[indices], np.diff(np.searchsorted(starts, offsets))

    def _unit_starts(self, data: "NDArray[Any]", offsets: "NDArray[Any]") -> "NDArray[Any]":
        import numpy as np

        text_starts = offsets[:-1][offsets[:-1] < offsets[1:]]
        if self.rule.places is None:
            return text_starts
        pairs = data[:-1].astype(np.uint16) << 8 | data[1:]
        kinds = self.rule.places.ravel()[pairs]
        starts: Any = np.zeros(len(data), np.bool_)
        starts[1:] = kinds == YES
        asked: Any = np.flatnonzero(kinds == ASK) + 1
        starts[asked] = _may_cut(data, asked)
        starts[text_starts] = True
        return np.flatnonzero(starts)

    def _codes_of(self, units: list[bytes]) -> "NDArray[Any]":
        import numpy as np

        codes = np.fromiter(map(self._code_of.get, units, repeat(-1)), np.int64, len(units))
        places = np.flatnonzero(codes < 0)
        if len(places):
            new = [units[place] for place in places.tolist()]
            texts = [unit.decode() for unit in new]
            encodings = self.rule.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            flat = np.fromiter(chain.from_iterable(ids), np.int32)
            if (found := np.isin(flat, list(self.controls))).any():
                control = int(flat[found][0])
                text = next(text for text, its in zip(texts, ids, strict=True) if control in its)
                raise Refused(
                    f"the tokenizer turns plain text into its control token {self.controls[control]!r}: {text[:60]!r}",
                    "a tokenizer with a token for every character, as byte-level and byte-fallback ones have",
                    "take the characters out that it does not know, or use another base",
                )
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            first = len(self._lengths)
            self._starts = np.append(self._starts, len(self._ids) + np.cumsum(lengths) - lengths)
            self._lengths = np.append(self._lengths, lengths)
            self._ids = np.append(self._ids, flat)
            codes[places] = range(first, first + len(new))
            self._code_of.update(zip(new, range(first, first + len(new)), strict=True))
            self._unit_bytes += sum(map(len, new))
        return codes


def _may_cut(data: "NDArray[Any]", spaces: "NDArray[Any]") -> "NDArray[Any]":
    """Whether the character before each space, of more than one byte, is none of NOT_BEFORE_A_CUT."""
    import numpy as np

    codes = [int.from_bytes(char.encode(), "big") for char in NOT_BEFORE_A_CUT]
    one, two, three = (data[np.maximum(spaces - back, 0)].astype(np.int64) for back in (1, 2, 3))
    pair = two << 8 | one
    return ~(np.isin(pair, codes) | np.isin(three << 16 | pair, codes))

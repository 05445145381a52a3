"""The word cache gives the ids of the tokenizer itself, whatever the text."""

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retuner import smollm2
from retuner.base import load_tokenizer
from retuner.errors import Refused, Unavailable
from retuner.rendering import Renderer
from retuner.tiny_phi3 import write_tiny_phi3
from retuner.words import NOT_BEFORE_A_CUT, Rule, Words, provable_rule

PHI3 = Path(__file__).parents[2] / "shared" / "phi3-tokenizer"


def smollm2_tokenizer(folder: Path) -> None:
    """Its tokenizer files alone: the weights take ten seconds."""
    try:
        gguf = smollm2.find_gguf()
    except Unavailable:
        pytest.skip(f"not installed: {smollm2.INSTALL}")
    from gguf import GGUFReader

    said = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    smollm2._write_tokenizer(folder, said)
    (folder / "config.json").write_text('{"model_type": "phi3"}')


@pytest.fixture(scope="module", params=["tiny", "smollm2", "phi3"])
def words(request, tmp_path_factory) -> Words:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        write_tiny_phi3(folder, seed=0)
    elif request.param == "smollm2":
        smollm2_tokenizer(folder)
    elif not PHI3.exists():
        pytest.skip("Phi-3's tokenizer is not beside the project")
    return Renderer(load_tokenizer(folder if request.param != "phi3" else PHI3)).encoder.words


def whole(words: Words, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in words.plain.encode_batch_fast(texts, add_special_tokens=False)]


def pieced(words: Words, texts: list[str]) -> list[list[int]]:
    codes, counts = words.codes(texts)
    rows, start = [], 0
    for count in counts.tolist():
        ids, bounds = words.tokens(codes[start : start + count])
        assert len(bounds) == count + 1 and bounds[-1] == len(ids)
        rows.append(ids.tolist())
        start += count
    assert start == len(codes)
    assert words.tokens(codes)[0].tolist() == list(chain.from_iterable(rows))
    return rows


ODD = (
    *sorted(NOT_BEFORE_A_CUT),
    *("  ", "   ", " \n", "\r\n", "\n ", "\xa0 ", "\u3000 ", " \u2028", "▁▁", " ▁"),
    *("the", "The", "don't", "we'll", "'s", "I'VE", "a", "Zz", "<s>", "<|end|>", "<0x0A>", "_", "Ġ", "Ċ"),
    *("7", "42", "٣", "Ⅷ", "½", "1,000.50", "-", "...", "!?", "{}", "\\n", '"', "#" * 20),
    *("'t", "x'tis1", "5's", "!'s", "a's't", "(see", "end.", "end.)", "1st", "v2.0", "a_b-c/d"),
    *("é", "e\u0301", "\u0301", "🙂", "👩\u200d🚀", "🇫🇷", "\ufe0f", "ﷺ", "שלום", "مرحبا", "привет", "р"),
    *(
        "中文",
        "日本語",
        "한국어",
        "ไทย",
        "\ufffd",
        "\U0010ffff",
        "\ue000",
        "\x00",
        "à",
        "Ā",
        "Š",
        "\u0080",
        "〠",
        "ꀀ",
    ),
)
TEXTS = st.lists(
    st.one_of(st.lists(st.sampled_from((*ODD, " ", " ")), max_size=12).map("".join), st.text(max_size=20)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
@example([" ", "  ", "", "\n", "a", " a", "a ", " a ", "  a  b  "])
@example(["a\xa0 b", "a\u3000 b", "a\u2009 b", "a▁ b", "a ▁b", "▁", "\u200b x", "\x1c x", "р х"])
def test_word_by_word_gives_the_ids_of_the_whole_text(words, texts):
    assert words.rule.cuts
    assert pieced(words, texts) == whole(words, texts)


def test_every_character_before_a_space_gives_the_ids_of_the_whole_text(words):
    """Each one below U+3100, and some of every block above."""
    points = [*range(1, 0x3100), *range(0x3100, 0xD800, 97), *range(0xE000, 0x110000, 997)]
    texts = [f"a{chr(point)} b{chr(point)}  c {chr(point)} {chr(point)}" for point in points]
    assert pieced(words, texts) == whole(words, texts)


def test_every_two_ascii_characters_side_by_side_give_the_ids_of_the_whole_text(words):
    ascii = [chr(point) for point in range(1, 128)]
    texts = [
        f"{before}{left}{right}{behind}"
        for left in ascii
        for right in ascii
        for before, behind in (("a", "b"), (" ", "'"), ("'", "s 1"), ("", ""))
    ]
    assert pieced(words, texts) == whole(words, texts)


def test_real_words_are_tokenised_once(words):
    # With the numbers in words: some tokenizers hold no two digits together.
    texts = [f"the cat number {number} sat on the mat and said number {number}" for number in range(500)]
    before = len(words._code_of)
    assert pieced(words, texts) == whole(words, texts)
    assert len(words._code_of) - before < 520


def test_units_are_forgotten_when_they_are_many_and_nothing_changes(words, monkeypatch):
    monkeypatch.setattr("retuner.words.MOST_UNITS", 50)
    for start in range(0, 600, 100):
        texts = [f"w{number} x{number}y" for number in range(start, start + 100)]
        assert pieced(words, texts) == whole(words, texts)
        assert len(words._code_of) <= 50 + 300
    controls = list(words.controls)
    assert words.tokens(words.control_codes(controls))[0].tolist() == controls


def tokenizer(merges=(), pieces=(), **settings):
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE

    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcde"]
    vocabulary = {piece: number for number, piece in enumerate([*letters, *pieces])}
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **settings}
    made = Tokenizer(BPE(vocabulary, list(merges), **model))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def normalised(made, *steps):
    from tokenizers import normalizers

    made.normalizer = normalizers.Sequence(list(steps))
    return made


def split_before(made, part):
    made.pre_tokenizer = part
    return made


def unprovable():
    from tokenizers import normalizers as n
    from tokenizers import pre_tokenizers as p

    byte_level = tokenizer()
    byte_level.normalizer = n.NFC()
    byte_level.pre_tokenizer = p.ByteLevel(add_prefix_space=False)
    return {
        "a piece spans a space": tokenizer([("a", "▁"), ("a▁", "b")], ["a▁", "a▁b"]),
        "bytes merge": tokenizer([("<0xC3>", "<0xA9>")], ["<0xC3><0xA9>"]),
        "a byte has no piece": tokenizer(byte_fallback=False),
        "whole texts may be pieces": tokenizer([("▁", "a")], ["▁a"], ignore_merges=True),
        "dropout": tokenizer(dropout=0.1),
        "ends of words are marked": tokenizer(end_of_word_suffix="</w>"),
        "lower case": normalised(tokenizer(), n.Lowercase(), n.Prepend("▁"), n.Replace(" ", "▁")),
        "white space is stripped": normalised(tokenizer(), n.Strip()),
        "a pattern of its own": split_before(tokenizer(), p.Split(" ", "isolated")),
        "byte level after NFC": byte_level,
        "byte level with a space before": split_before(
            normalised(tokenizer()), p.ByteLevel(add_prefix_space=True)
        ),
    }


@pytest.mark.parametrize("reason", unprovable())
def test_where_it_cannot_be_proved_whole_texts_are_tokenised(reason):
    words = Words(unprovable()[reason], {})
    assert not words.rule.cuts
    if reason != "dropout":
        texts = ["a b", "ab  c", "", " a", "a ba b"]
        assert pieced(words, texts) == whole(words, texts)


def test_a_rule_that_does_not_hold_is_dropped_when_the_first_texts_show_it():
    spans = tokenizer([("a", "▁"), ("a▁", "b")], ["a▁", "a▁b"])
    words = Words(spans, {}, Rule(spans, provable_rule(tokenizer()).places))
    assert pieced(words, ["c d", "a b"]) == whole(words, ["c d", "a b"])
    assert not words.rule.cuts
    assert pieced(words, ["e a b"]) == whole(words, ["e a b"])


def test_text_that_becomes_a_control_token_is_refused(words):
    ids = whole(words, ["a word"])[0]
    guarded = Words(words.plain, {ids[-1]: "<|stop|>"})
    with pytest.raises(Refused, match="control token '<|stop|>'".replace("|", r"\|")):
        guarded.codes(["harmless", "a word"])


def test_half_a_character_is_an_error(words):
    with pytest.raises(UnicodeEncodeError):
        words.codes(["half \ud83d"])

"""Descriptions of conversations: exact, mergeable, and cheap to keep for each part of the data."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retuner.describe import Description, Lengths, describe, script_of

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")), "content": st.text()}),
    min_size=1,
    max_size=5,
)


@given(st.lists(messages, max_size=8), st.integers(0, 8))
def test_the_description_of_a_whole_is_that_of_its_parts_merged_and_survives_json(conversations, cut):
    whole = describe(conversations)
    parts = [describe(conversations[cut:]), describe(conversations[:cut])]
    merged = Description()
    for part in parts:
        merged.merge(Description.from_spelled(json.loads(json.dumps(part.spelled()))))
    assert merged.spelled() == whole.spelled()
    assert Description.from_spelled(whole.spelled()) == whole
    shuffled = random.Random(cut).sample(conversations, len(conversations))
    assert json.dumps(describe(shuffled).spelled()) == json.dumps(whole.spelled())


def test_roles_turns_and_characters_are_counted():
    told = describe(
        [
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
            ],
            [
                {"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes"},
            ],
        ]
    ).spelled()
    assert told["rows"] == 2
    assert {role: said["messages"] for role, said in told["roles"].items()} == {
        "assistant": 3,
        "system": 1,
        "user": 3,
    }
    assert told["roles"]["assistant"]["characters"] == len("Hello!") + len("4") + len("Yes")
    assert told["turns"] == {"1": 1, "2": 1}
    assert told["characters"] == {"longest": 17, "bins": {"15": 1, "17": 1}}


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_a_quantile_is_high_by_a_thirty_second_at_most_and_never_above_the_longest(lengths, share):
    held = Lengths()
    for length in lengths:
        held.add(length)
    exact = sorted(lengths)[max(0, -int(-share * len(lengths) // 1) - 1)]
    assert exact <= held.quantile(share) <= min(exact * 33 / 32, max(lengths))
    assert held.quantile(1.0) == max(lengths)
    for low, high, _ in held.ranges():
        assert any(low <= length < high for length in lengths)


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("plain words, 123!", {"Latin": 10}),
        ("Größe naïve", {"Latin": 10}),
        ("Привет, мир 🙂", {"Cyrillic": 9}),
        ("数据 kana ひらカタ", {"Han": 2, "Latin": 4, "Hiragana": 2, "Katakana": 2}),
        ("שלום عربي हिन्दी 한국어 ไทย", {"Hebrew": 4, "Arabic": 4, "Devanagari": 3, "Hangul": 3, "Thai": 3}),
        ("Ａｌｐｈａ ﬁ ª", {"Latin": 7}),
        ("1 + 2 = 3 … 🙂 µ ℂ ℵ ー", {}),
        ("", {}),
    ],
)
def test_letters_are_counted_by_the_script_they_belong_to(text, scripts):
    around = [[{"role": "user", "content": other}] for other in ("", "abc", text, "", "дом")]
    told = describe(around)
    expected = Counter(scripts) + Counter(Latin=3, Cyrillic=3)
    assert told.letters == expected
    assert told.script_rows == Counter(list(scripts)) + Counter(["Latin", "Cyrillic"])


def test_text_that_is_not_whole_characters_is_described_all_the_same():
    assert describe([[{"role": "user", "content": "a\ud800b"}]]).letters == {"Latin": 2}
    assert script_of("\ud800") is None

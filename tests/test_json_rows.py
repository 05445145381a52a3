"""Rows of JSON are objects in which no key stands twice, however they are spelled."""

import json
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retuner.json_rows import Problem, RawRow, parse

WHITE = st.sampled_from(["", "", " ", "\t", " \r"])
# Spellings among which one key has two, and texts that look like keys or end in what escapes a quote.
KEYS = st.sampled_from(['"a"', '"\\u0061"', '"b"', '"b\\\\"', '"b\\":"', '""'])
TEXTS = st.sampled_from(
    ['""', '"x"', '"a\\":"', '"\\\\"', '"{\\"a\\": 1}"', '":"', '"é\\ud83d\\ude00"', '"a" :']
)
SCALARS = st.sampled_from(["1", "-0", "1.5e3", "123456789012", "true", "null", "NaN", "01"]) | TEXTS


@st.composite
def joined(draw, opening: str, items: st.SearchStrategy[str], closing: str) -> str:
    parts = draw(st.lists(items, max_size=4))
    return opening + ",".join(draw(WHITE) + part + draw(WHITE) for part in parts) + closing


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return joined("{", st.tuples(KEYS, WHITE, st.just(":"), WHITE, values).map("".join), "}")


ROWS = objects(
    st.recursive(SCALARS, lambda inner: joined("[", inner, "]") | objects(inner), max_leaves=8)
    | joined("[", objects(SCALARS), "]")
)


def strictly(text: str):
    """The value, or None where it is no JSON; raises KeyError where a key stands twice."""

    def once(pairs):
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise KeyError(twice)
        return dict(pairs)

    def never(word):
        raise ValueError(word)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=never)
    except ValueError:
        return None


@given(ROWS)
@example('{"a": 1, "a" : 2, "b\\\\": 3}')
@example('{"a": [{"a": [{"b": 1, "b": 2}]}]}')
@example('{"a": "\\":", "b": 1, "b": 2}')
@example('{"a": [[{"b": 1, "b": 2}]]}')
@example('{"a":[{"b":' + 58 * "[" + "{}" + 58 * "]" + "}]}")
def test_a_row_is_what_a_strict_reader_makes_of_it(text):
    row = RawRow(1, 1, text.encode())
    try:
        value = strictly(text)
    except KeyError:
        with pytest.raises(Problem) as problem:
            parse(row)
        # What else is wrong behind it may be told first.
        assert problem.value.cause in ("duplicate_key", "bad_json", "not_a_number", "several_objects")
        return
    if value is None:
        with pytest.raises(Problem):
            parse(row)
    else:
        assert parse(row) == value


@pytest.mark.parametrize("depth", [62, 63, 64, 65, 300])
@pytest.mark.parametrize("inner", ["[{}]", '{{"a": {}}}'])
@pytest.mark.parametrize("around", ["{}", '[{{"b": {}}}]'])
@pytest.mark.parametrize("inmost", ["1", "{}", "[]"])
def test_brackets_nest_64_deep_at_most(inmost, around, inner, depth):
    text = inmost
    for _ in range(depth - 1 - around.count("[") - around.count("{{") - (inmost != "1")):
        text = inner.format(text)
    row = RawRow(1, 1, f'{{"a": {around.format(text)}}}'.encode())
    if depth <= 64:
        assert list(parse(row)) == ["a"]
    else:
        with pytest.raises(Problem, match="64 deep"):
            parse(row)

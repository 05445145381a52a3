"""Texts but for case and white space are the same ones, whether they come alone or many at a time."""

from hypothesis import example, given
from hypothesis import strategies as st

from retuner.naming import WORTH_CHARACTERS, folded

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(" \t\n\x1c\xa0ẞA"),
    max_size=12,
)


@given(st.lists(texts, min_size=1, max_size=30))
@example(["", " ", "  a  b  ", "\n", "Straße  ", "  \x1f x"])
def test_many_texts_fold_as_each_alone(some):
    alone = [" ".join(text.casefold().split()).encode() for text in some]
    assert folded(some) == alone
    long = "Word \n" * WORTH_CHARACTERS
    assert folded([*some, long, *some]) == [*alone, long.lower().replace(" \n", " ").strip().encode(), *alone]

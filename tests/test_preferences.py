"""Preference pairs: the forms in which people have them, and what is refused for which cause."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_stage import Stage

from fuzz.reading import data_file
from retuner.chats import BadRow, read_chats
from retuner.errors import Refused
from retuner.intake import SEGMENT_CHARACTERS, Reading

HELLO = [{"role": "user", "content": "Hi"}]
YES, NO = [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "No."}]
LONGER = [*HELLO, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Well?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}]


def read(tmp_path: Path, *rows, format="preference", columns=None, name="x.jsonl") -> list:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_chats([data_file(path)], format, columns))


def said(pair) -> list[str]:
    assert not isinstance(pair, BadRow), pair
    return [f"{turn['role']}: {turn['content']}" for turn in pair.messages] + [f"not: {pair.rejected}"]


SIMPLE = ["user: Hi", "assistant: Yes.", "not: No."]
DIALOGUE = ["user: Hi", "assistant: Hi!", "user: Well?", "assistant: Yes.", "not: No."]

FORMS = {
    "texts": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, SIMPLE),
    "texts and a system prompt": (
        {"system": "Be kind.", "question": "Hi", "chosen": "Yes.", "rejected": "No."},
        ["system: Be kind.", *SIMPLE],
    ),
    "alpaca": (
        {"instruction": "Say", "input": "hi", "chosen": "Yes.", "rejected": "No."},
        ["user: Say\n\nhi", *SIMPLE[1:]],
    ),
    "messages": ({"prompt": LONGER, "chosen": YES, "rejected": NO}, DIALOGUE),
    "messages with a prompt as text (UltraFeedback)": (
        {"prompt": "Hi", "chosen": HELLO + YES, "rejected": HELLO + NO, "messages": HELLO + YES, "score_chosen": 7.5},
        SIMPLE,
    ),
    "messages with a system prompt beside the turns": (
        {"system": "Be kind.", "prompt": "Hi", "chosen": HELLO + YES, "rejected": HELLO + NO},
        ["system: Be kind.", *SIMPLE],
    ),
    "a question and its context": (
        {"question": "Say", "context": "hi", "chosen": "Yes.", "rejected": "No."},
        ["user: Say\n\nhi", *SIMPLE[1:]],
    ),
    "implicit prompt and a system prompt beside the turns": (
        {"system": "Be kind.", "chosen": HELLO + YES, "rejected": HELLO + NO},
        ["system: Be kind.", *SIMPLE],
    ),
    "hh-rlhf and a system prompt": (
        {"system": "Be kind.", "prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
        ["system: Be kind.", *SIMPLE],
    ),
    "implicit prompt": ({"chosen": LONGER + YES, "rejected": LONGER + NO}, DIALOGUE),
    "implicit prompt and system": (
        {"chosen": SYSTEM + HELLO + YES, "rejected": SYSTEM + HELLO + NO},
        ["system: Be kind.", *SIMPLE],
    ),
    "one text (hh-rlhf)": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hi!\n\nHuman: Well?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hi!\n\nHuman: Well?\n\nAssistant: No.",
        },
        DIALOGUE,
    ),
    "hh-rlhf with its prompt apart": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
        SIMPLE,
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        ["system: Be kind.", *SIMPLE],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_pair_is_read_in_the_forms_people_have(tmp_path, name):
    row, expected = FORMS[name]
    assert said(*read(tmp_path, row)) == expected


def test_own_names_for_columns(tmp_path):
    row = {"asked": "Hi", "good": "Yes.", "bad": "No.", "rejected": 3}
    columns = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    assert said(*read(tmp_path, row, columns=columns)) == SIMPLE


def test_a_table_of_pairs_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nHi,Yes.,No.\n")
    pq.write_table(pa.table({"chosen": [LONGER + YES], "rejected": [LONGER + NO]}), tmp_path / "x.parquet")
    for name, expected in (("x.csv", SIMPLE), ("x.parquet", DIALOGUE)):
        path = tmp_path / name
        assert said(*read_chats([data_file(path)], "preference")) == expected


BROKEN = {
    "two system prompts": (
        {"system": "Be bold.", "chosen": SYSTEM + HELLO + YES, "rejected": SYSTEM + HELLO + NO},
        "two_systems",
    ),
    "a context beside turns": (
        {"context": "c", "prompt": HELLO, "chosen": YES, "rejected": NO},
        "unread_key",
    ),
    "images": ({"images": ["x"], "prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, "unread_key"),
    "same answers": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes."}, "same_answers"),
    "same but for an edge": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes. \n"}, "same_answers"),
    "other prompts": (
        {"chosen": HELLO + YES, "rejected": [{"role": "user", "content": "Hey"}, *NO]},
        "other_prompt",
    ),
    "other length of prompt": ({"chosen": HELLO + YES, "rejected": LONGER + NO}, "other_prompt"),
    "prompt beside says other": (
        {"prompt": "Hey", "chosen": HELLO + YES, "rejected": HELLO + NO},
        "other_prompt",
    ),
    "other transcripts": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hey\n\nAssistant: No."},
        "other_prompt",
    ),
    "no prompt": ({"chosen": YES, "rejected": NO}, "no_prompt"),
    "texts without prompt": ({"chosen": "Yes.", "rejected": "No."}, "no_prompt"),
    "empty answer": ({"prompt": "Hi", "chosen": "Yes.", "rejected": " "}, "empty_turn"),
    "empty prompt": ({"prompt": "", "chosen": "Yes.", "rejected": "No."}, "empty_turn"),
    "answer by the user": ({"chosen": HELLO + YES, "rejected": HELLO + HELLO}, "wrong_role"),
    "prompt ends with an answer": ({"prompt": HELLO + YES, "chosen": YES, "rejected": NO}, "wrong_order"),
    "two kinds of answers": ({"prompt": HELLO, "chosen": YES, "rejected": 7}, "not_text"),
    "an empty list": ({"chosen": [], "rejected": HELLO + NO}, "no_turns"),
    "unknown role": (
        {"chosen": HELLO + YES, "rejected": [*HELLO, {"role": "bot", "content": "No."}]},
        "wrong_role",
    ),
    "half a pair": ({"prompt": "Hi", "chosen": "Yes."}, "unknown_format"),
    "NUL": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "N\0"}, "nul"),
    "half a character": ({"prompt": "Hi", "chosen": "Yes.", "rejected": "\ud800"}, "lone_surrogate"),
    "another form than the file's": ({"question": "Hi", "chosen": "Yes.", "rejected": "No."}, "mixed_format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pair_is_a_bad_row_with_its_cause(tmp_path, name):
    row, cause = BROKEN[name]
    rows = [row]
    if name == "another form than the file's":
        rows = [FORMS["texts"][0], row]
    bad = read(tmp_path, *rows)[-1]
    assert isinstance(bad, BadRow) and bad.cause == cause and bad.line == len(rows)


def test_broken_bytes_of_a_pairs_file_are_bad_rows_too(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}\n{"prompt": "\xff"}\n{"prompt"'
    )
    found = list(read_chats([data_file(path)], "preference"))
    assert [bad.cause for bad in found] == ["duplicate_key", "bad_utf8", "truncated"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": HELLO + YES}, ["messages", "train.recipe: sft", "prepare.format: auto"]),
        ({"prompt": "Hi", "completion": "Yes."}, ["prompt_completion", "train.recipe: sft"]),
        ({"prompt": "Hi", "completion": "Yes.", "label": True}, ["grade", "rejected answer"]),
        ({"text": "Hi"}, ["plain text"]),
        ({"prompt": HELLO, "chosen": YES, "rejected": NO, "tools": [1]}, ["tool transcript"]),
    ],
    ids=["conversation", "completion", "graded", "text", "tools"],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is_and_who_takes_it(tmp_path, row, told):
    with pytest.raises(Refused) as refusal:
        read(tmp_path, row)
    assert all(part in str(refusal.value) for part in ["x.jsonl:1", *told])


def test_pairs_under_a_recipe_for_single_answers_are_refused_and_the_other_recipe_is_named(tmp_path):
    with pytest.raises(Refused) as refusal:
        read(tmp_path, FORMS["texts"][0], format="auto")
    told = str(refusal.value)
    assert "preference data" in told and "train.recipe: dpo" in told and "prepare.format: preference" in told


KEYS = st.sampled_from(
    ["prompt", "question", "instruction", "input", "conversations", "system", "chosen", "rejected"]
)
TEXTS = st.sampled_from(
    ["", " ", "Hi", "Yes.", "No.", "\n\nHuman: Hi\n\nAssistant:", "\n\nAssistant: a", "\0", "\ud800"]
)
TURNS = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value"]),
    TEXTS
    | st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"])
    | st.none()
    | st.integers(),
    max_size=4,
)
VALUES = TEXTS | TURNS | st.lists(TURNS | TEXTS, max_size=4) | st.none() | st.booleans()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(KEYS, VALUES, max_size=5), both=VALUES, other=VALUES)
def test_any_row_is_a_pair_that_can_be_learned_from_or_says_why_not(tmp_path, row, both, other):
    try:
        (found,) = read(tmp_path, row | {"chosen": both, "rejected": other})
    except Refused as refusal:
        assert refusal.found and refusal.do
        return
    if isinstance(found, BadRow):
        assert found.cause.replace("_", "").isalpha() and found.message
        return
    roles = [turn["role"] for turn in found.messages]
    assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
    assert all(turn["content"].strip() for turn in found.messages)
    assert found.rejected.strip() and found.rejected.strip() != found.messages[-1]["content"].strip()


# --- prepare


def some_pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"Not {n}."} for n in range(count)
    ]


def test_pairs_are_split_by_their_prompt_as_conversations_are(tmp_path):
    pairs, chats = Stage(tmp_path / "a"), Stage(tmp_path / "b")
    facts = pairs({"x.jsonl": some_pairs(60)}, format="preference")
    chats({"x.jsonl": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in some_pairs(60)]})
    assert facts.pairs and facts.formats == {"x.jsonl": "preference_prompt"}
    for side in ("train", "held_out"):
        assert [row["group"] for row in pairs.rows(side)] == [row["group"] for row in chats.rows(side)]
        assert all(row["rejected"].startswith("Not") for row in pairs.rows(side))


def test_another_rejected_answer_is_another_pair_and_the_same_pair_counts_once(tmp_path):
    pair = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}
    rows = [*some_pairs(30), pair, pair, pair | {"rejected": "no."}, pair | {"rejected": "Never."}]
    facts = (stage := Stage(tmp_path))({"x.jsonl": rows}, format="preference")
    assert (facts.duplicates["exact"], facts.duplicates["folded"]) == (1, 1)
    kept = [row["rejected"] for side in ("train", "held_out") for row in stage.rows(side)]
    assert len(kept) == 32 and "Never." in kept
    assert stage.report["description"]["roles"]["rejected"]["messages"] == 34


def test_broken_pairs_are_set_aside_or_refuse_the_run(tmp_path):
    rows = [*some_pairs(30), BROKEN["same answers"][0]]
    with pytest.raises(Refused, match="same_answers"):
        Stage(tmp_path / "a")({"x.jsonl": rows}, format="preference")
    stage = Stage(tmp_path / "b")
    facts = stage({"x.jsonl": rows}, format="preference", max_bad_rows=1)
    assert facts.rejected == {"same_answers": 1}
    assert [bad["line"] for bad in stage.quarantine()] == [31]


def test_marks_are_set_in_both_answers_and_may_leave_nothing_to_prefer(tmp_path):
    mail = {"prompt": "Where?", "chosen": "Write to a@example.org", "rejected": "Write to b@example.org"}
    other = {"prompt": "Whom?", "chosen": "Ask c@example.org", "rejected": "Do not ask d@example.org"}
    stage = Stage(tmp_path)
    rows = [*some_pairs(30), mail, other]
    facts = stage({"x.jsonl": rows}, format="preference", redact=["email"], max_bad_rows=1)
    assert facts.rejected == {"same_answers": 1}
    (kept,) = [
        r for side in ("train", "held_out") for r in stage.rows(side) if "Whom" in r["messages"][0]["content"]
    ]
    assert kept["messages"][-1]["content"] == "Ask [EMAIL]" and kept["rejected"] == "Do not ask [EMAIL]"


def test_long_rejected_answers_come_few_at_a_time_out_of_a_file_read_whole(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    pairs = [{"prompt": f"p{n}", "chosen": "yes", "rejected": f"{n} " + "no " * 30_000} for n in range(40)]
    path.write_bytes(gzip.compress(b"".join(json.dumps(pair).encode() + b"\n" for pair in pairs)))
    segments = [segment for _, segment in Reading("preference").segments(data_file(path))]
    assert sum(len(segment.batch.heads) for segment in segments) == len(pairs)
    assert max(len(segment.batch.lines) for segment in segments) < SEGMENT_CHARACTERS + 100_000


def test_a_tool_transcript_among_pairs_is_told_as_what_it_is(tmp_path):
    calls = {"conversations": [{"from": "human", "value": "h"}, {"from": "function_call", "value": "{}"}]}
    with pytest.raises(Refused, match="tool transcript") as refusal:
        read(tmp_path, calls)
    assert "format: auto" not in refusal.value.do


@pytest.mark.parametrize(
    ("row", "advised"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, True),
        ({"prompt": "p", "chosen": YES, "rejected": NO}, False),
        ({"question": "p", "chosen": "c", "rejected": "r"}, False),
        ({"prompt": "p", "completion": "d", "chosen": "c", "rejected": "r"}, False),
    ],
)
def test_the_chosen_answer_alone_is_advised_only_where_that_can_be_read(tmp_path, row, advised):
    with pytest.raises(Refused, match="preference data") as refusal:
        read(tmp_path, row, format="auto")
    assert ("{completion: chosen}" in refusal.value.do) == advised
    if advised:
        (chat,) = read(tmp_path, row, format="auto", columns={"completion": "chosen"})
        assert [turn["content"] for turn in chat.messages] == ["p", "c"]

"""What `prepare` promises of its two sides, its counts and its refusals."""

import json
import random

import pytest
from prepare_stage import REAL_DATA, Stage, real_data, some_rows

from retuner.errors import Refused
from retuner.naming import chat_id, group_of, is_held_out


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_rows_are_written_with_id_group_and_messages_in_order_of_group_and_id(stage):
    facts = stage({"x.jsonl": some_rows(50, answers=3)})
    for side in ("train", "held_out"):
        rows = stage.rows(side)
        assert [(row["group"], row["id"]) for row in rows] == sorted(
            (row["group"], row["id"]) for row in rows
        )
        for row in rows:
            assert set(row) == {"id", "group", "messages"}
            assert row["id"] == chat_id(row["messages"]) and row["group"] == group_of(row["messages"])
            assert len(row["id"]) == len(row["group"]) == 32
    assert facts.train_rows + facts.held_out_rows == facts.rows_read == 150
    assert facts.train_groups + facts.held_out_groups == 50


def test_no_row_ever_changes_sides_while_data_grows_tenfold_by_tenths(stage):
    rows = some_rows(300, answers=2)
    sides: dict[str, str] = {}
    for tenths in range(1, 11):
        stage({"x.jsonl": rows[: len(rows) * tenths // 10]})
        now = {row["id"]: side for side in ("train", "held_out") for row in stage.rows(side)}
        assert sides.items() <= now.items()
        sides = now
    assert len(sides) == 600


def test_shuffled_renamed_and_divided_input_gives_the_same_bytes(stage):
    rows = some_rows(60, answers=2)
    rows += [{"prompt": row["prompt"].upper() + " ", "completion": row["completion"]} for row in rows[:20]]
    stage({"x.jsonl": rows})
    expected = stage.bytes()
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        array = json.dumps(rows[:50], indent=2).encode()
        stage({"b.json": array, "deep/er/a.jsonl": rows[50:]})
        assert stage.bytes() == expected


def test_a_group_never_straddles_the_sides_whatever_its_case_and_space(stage):
    rows = some_rows(80)
    spelled = [
        {"prompt": f"  {row['prompt'].upper()}\n", "completion": row["completion"] + "!"} for row in rows
    ]
    facts = stage({"x.jsonl": rows + spelled})
    groups = [{row["group"] for row in stage.rows(side)} for side in ("train", "held_out")]
    assert not groups[0] & groups[1]
    assert facts.train_rows == 2 * facts.train_groups and facts.held_out_rows == 2 * facts.held_out_groups


def test_a_group_is_all_before_the_first_answer():
    def chat(*texts, system=None):
        turns = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(texts)]
        return ([{"role": "system", "content": system}] if system else []) + turns

    assert group_of(chat("Hi  there", "a")) == group_of(chat("hi there", "b", "more", "c"))
    assert group_of(chat("hi", "a")) != group_of(chat("hi", "a", system="s"))
    assert group_of(chat("hi", "a", system="s")) != group_of(chat("ho", "a", system="s"))
    assert group_of(chat("STRASSE", "a")) == group_of(chat("straße", "a"))
    assert chat_id(chat("hi", "a")) != chat_id(chat("Hi", "a"))


def test_the_held_out_share_is_about_the_fraction_and_grows_without_giving_rows_back(stage):
    rows = some_rows(2000)
    held_out: set[str] = set()
    for fraction in (0.05, 0.1, 0.3, 0.5):
        facts = stage({"x.jsonl": rows}, held_out_fraction=fraction)
        assert facts.held_out_groups == pytest.approx(2000 * fraction, rel=0.25)
        now = {row["id"] for row in stage.rows("held_out")}
        assert held_out <= now
        held_out = now


def test_the_side_is_that_of_the_group_alone(stage):
    stage({"x.jsonl": some_rows(300)})
    for side in ("train", "held_out"):
        assert all(is_held_out(row["group"], "salt", 0.2) is (side == "held_out") for row in stage.rows(side))


def test_another_salt_is_another_split(stage):
    rows = some_rows(100)
    stage({"x.jsonl": rows})
    first = stage.bytes()
    stage({"x.jsonl": rows}, split_salt="other")
    assert stage.bytes() != first


def test_duplicates_but_for_case_and_space_are_dropped_counted_and_the_same_one_stays(stage):
    rows = some_rows(20)
    copies = [{"prompt": row["prompt"] + "  ", "completion": row["completion"].upper()} for row in rows]
    facts = stage({"x.jsonl": rows + copies + rows})
    assert facts.duplicates == {"exact": 20, "folded": 20, "near": 0}
    assert facts.train_rows + facts.held_out_rows == 20
    expected = stage.bytes()
    stage({"x.jsonl": copies + rows})
    assert stage.bytes() == expected


def test_texts_with_line_separators_of_unicode_stay_on_one_line(stage):
    rows = [{"prompt": f"{n}\u2028\u0085\n\v", "completion": "\r" + "x\u2029"} for n in range(30)]
    stage({"x.jsonl": rows})
    written = stage.rows("train") + stage.rows("held_out")
    assert sorted(row["messages"][0]["content"] for row in written) == sorted(row["prompt"] for row in rows)


def test_bad_rows_within_the_limit_are_set_aside_and_counted_by_cause(stage):
    bad = b'{"prompt": "\xff"}\n{"prompt": "p", "completion": ""}\n' + b"\x80" * 900 + b"\n" + b"{}\n" * 7
    facts = stage({"a.jsonl": some_rows(30), "b.jsonl": bad}, max_bad_rows=10)
    assert facts.rejected == {"bad_utf8": 2, "empty_turn": 1, "unknown_format": 7} and facts.rows_read == 40
    quarantine = stage.quarantine()
    causes = ["bad_utf8", "empty_turn", "bad_utf8"] + ["unknown_format"] * 7
    assert [(row["file"], row["line"], row["cause"]) for row in quarantine] == [
        ("b.jsonl", line, cause) for line, cause in enumerate(causes, 1)
    ]
    assert quarantine[0]["start"] == '{"prompt": "\\xff"}' and quarantine[0]["column"] == 13
    assert all(row["message"] and len(row["start"]) <= 800 for row in quarantine)
    assert stage.report["rows_by_file"] == {"a.jsonl": 30, "b.jsonl": 10}


def test_what_is_set_aside_does_not_touch_the_split(stage):
    rows = some_rows(30)
    stage({"a.jsonl": rows})
    expected = stage.bytes()
    stage({"a.jsonl": rows, "b.jsonl": b"{}\n"}, max_bad_rows=1)
    assert stage.bytes() == expected


def test_more_bad_rows_than_allowed_are_refused_with_the_first_places_and_all_causes(stage):
    with pytest.raises(Refused) as refusal:
        stage({"a.jsonl": some_rows(30), "b.jsonl": b'{"prompt": NaN}\n' * 4 + b"oops\n" * 4}, max_bad_rows=7)
    message = str(refusal.value)
    assert "8 of 38 rows" in message and "b.jsonl:1:12 not_a_number" in message and "and 3 more" in message
    assert "bad_json 4" in message and "not_a_number 4" in message
    assert "at most 7" in refusal.value.expected and "max_bad_rows to 8" in refusal.value.do


def test_no_matching_file_is_refused_with_the_files_there_are(stage):
    with pytest.raises(Refused, match="matches none of the 1 files of data") as refusal:
        stage({"chats.jsonl": some_rows(9)}, files="*.parquet")
    assert "chats.jsonl" in str(refusal.value)


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.jsonl", {"a.jsonl"}),
        ("**/*.jsonl", {"a.jsonl", "x/b.jsonl", "x/y/c.jsonl"}),
        ("x/*.jsonl", {"x/b.jsonl"}),
        ("x/**", {"x/b.jsonl", "x/y/c.jsonl"}),
        ("a.jsonl", {"a.jsonl"}),
    ],
)
def test_files_is_a_glob_of_whole_relative_paths(stage, glob, found):
    files = {name: some_rows(20, seed=n) for n, name in enumerate(("a.jsonl", "x/b.jsonl", "x/y/c.jsonl"))}
    assert set(stage(files, files=glob).formats) == found


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no usable row"),
        (some_rows(1), "one usable row"),
        (some_rows(1, answers=9), "9 usable rows, all with the same prompt"),
        (some_rows(1) * 20, "one usable row: 20 read, 19 duplicates dropped"),
    ],
)
def test_data_that_cannot_have_two_sides_is_refused(stage, rows, words):
    with pytest.raises(Refused, match=words) as refusal:
        stage({"x.jsonl": rows})
    assert "two different prompts" in str(refusal.value)


def test_rows_that_were_set_aside_are_told_when_too_few_are_left(stage):
    bad = b"oops\n" * 30 + b"{}\n" * 20
    with pytest.raises(Refused) as refusal:
        stage({"a.jsonl": bad, "b.jsonl": some_rows(1)}, max_bad_rows=50)
    told = r"one usable row: 51 read, 50 set aside (bad_json 30, unknown_format 20; the first at a.jsonl:1"
    assert told in refusal.value.found and "prepare.format" in refusal.value.do
    with pytest.raises(Refused, match="no usable row: 50 read, 50 set aside .bad_json 30"):
        stage({"a.jsonl": bad}, max_bad_rows=50)


def test_a_greater_limit_is_no_advice_when_every_row_is_bad(stage):
    with pytest.raises(Refused) as refusal:
        stage({"a.jsonl": b"{}\n" * 3 + b"oops\n"}, max_bad_rows=2)
    assert "4 of 4 rows" in refusal.value.found and "3 times it is unknown_format" in refusal.value.do
    assert "prepare.format" in refusal.value.do and "max_bad_rows" not in refusal.value.do


@pytest.mark.parametrize(("held_out", "words"), [(False, "held out"), (True, "left to train on")])
def test_a_split_with_an_empty_side_is_refused(stage, held_out, words):
    rows = some_rows(3)
    groups = [group_of([{"role": "user", "content": row["prompt"]}]) for row in rows]
    salts = map(str, range(1000))
    salt = next(salt for salt in salts if all(is_held_out(group, salt, 0.5) is held_out for group in groups))
    with pytest.raises(Refused, match=f"of 3 rows with 3 different prompts none is {words}") as refusal:
        stage({"x.jsonl": rows}, held_out_fraction=0.5, split_salt=salt)
    assert "held_out_fraction" in refusal.value.do


def test_every_file_of_another_kind_is_named_at_once(stage):
    pair = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    with pytest.raises(Refused) as refusal:
        stage({"a.jsonl": pair, "b.jsonl": some_rows(9), "c.jsonl": [{"text": "once"}]})
    message = str(refusal.value)
    assert (
        "2 files" in message
        and "a.jsonl:1" in message
        and "c.jsonl:1" in message
        and "b.jsonl" not in message
    )


@real_data
@pytest.mark.parametrize(
    ("folder", "rows", "duplicates", "format"),
    [
        ("gsm8k", 7473 + 1319, 0, "question_answer"),
        ("alpaca", 999, 14, "alpaca"),
        ("sharegpt", 500, 0, "sharegpt"),
    ],
)
def test_real_chats_are_read_whole(stage, folder, rows, duplicates, format):
    facts = stage.over(REAL_DATA / folder)
    assert (facts.rows_read, facts.duplicates["exact"], facts.rejected) == (rows, duplicates, {})
    assert set(facts.formats.values()) == {format} and facts.duplicates["folded"] == 0
    assert facts.train_rows + facts.held_out_rows == rows - duplicates


@real_data
@pytest.mark.parametrize(
    ("folder", "word"), [("tools", "tool transcript"), ("preference", "preference data")]
)
def test_real_files_of_another_kind_are_refused(stage, folder, word):
    with pytest.raises(Refused, match=word) as refusal:
        stage.over(REAL_DATA / folder)
    assert "leave the file out of prepare.files" in refusal.value.do


@real_data
def test_real_restaurant_prompts_with_many_answers_stay_on_one_side(stage):
    facts = stage.over(REAL_DATA / "e2e")
    prompts = [
        {row["messages"][0]["content"].casefold() for row in stage.rows(side)}
        for side in ("train", "held_out")
    ]
    assert facts.rows_read == 9365 and facts.train_rows > 5 * facts.train_groups
    assert not prompts[0] & prompts[1]

"""What train shares with held-out rows: found by kind, and dealt with as params say."""

import json
import random
from collections import Counter
from dataclasses import replace
from textwrap import shorten

import pytest
from prepare_stage import REAL_DATA, Stage, real_data, some_rows

from retuner import leaks as leaks_module
from retuner import rows as rows_module
from retuner.errors import Refused, Unavailable
from retuner.files import sha256_file
from retuner.held_out import EarlierSet, FrozenSet
from retuner.naming import group_of

KINDS = ("exact", "same_prompt", "near", "ngram_13", "ngram_8")
REPORT, REMOVE, REFUSE = (
    {**dict.fromkeys(KINDS, policy), "stock_phrase": 10} for policy in ("report", "remove", "refuse")
)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def chat(prompt: str, answer: str, system: str | None = None) -> dict:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def frozen(*rows: dict) -> FrozenSet:
    return FrozenSet("fixed", frozenset(group_of(row["messages"]) for row in rows), "")


def earlier_set(name: str, stage: Stage) -> EarlierSet:
    path = stage.out / "held_out.jsonl"
    return EarlierSet(name, sha256_file(path), path)


def words(count: int, seed: int) -> str:
    numbers = random.Random(seed)
    return " ".join(f"w{numbers.randrange(10**6)}" for _ in range(count))


def real_chats(name: str = "gsm8k", count: int = 2000) -> list[dict]:
    lines = (REAL_DATA / name / "train.jsonl").read_text("utf-8").split("\n")[:count]
    return [chat(*list(json.loads(line).values())[:2]) for line in lines]


@real_data
def test_every_planted_exact_and_same_prompt_leak_in_real_data_is_found_and_removed(stage):
    rows = real_chats()
    tested = rows[:150]
    held = frozen(*tested)
    # Under another system prompt, in capitals: another group, so the split alone does not keep them apart.
    exact = [
        chat(*(turn["content"].upper() for turn in row["messages"]), system="Be brief.") for row in tested
    ]
    prompts = [
        chat(row["messages"][0]["content"] + " \n", f"no idea {n}", "Guess.") for n, row in enumerate(tested)
    ]
    facts = stage({"x.jsonl": rows + exact + prompts}, leaks=REPORT, frozen=held)
    assert facts.held_out_rows == 150 and facts.train_rows == 2150
    assert facts.leaks["exact"] == 150 and facts.leaks["same_prompt"] == 300
    told = stage.report["leaks"]["exact"]
    assert told["rows"] == 150 and told["removed"] == 0 and len(told["examples"]) == 5
    ids = {side: {row["id"] for row in stage.rows(side)} for side in ("train", "held_out")}
    for example in told["examples"]:
        assert example["train"] in ids["train"] and example["held_out"] in ids["held_out"]
        assert example["against"] == "held-out" and example["start"].isupper()
        assert example["held_out_start"].casefold() == example["start"].casefold()
    facts = stage({"x.jsonl": rows + exact + prompts}, leaks=REPORT | {"exact": "remove"}, frozen=held)
    assert facts.train_rows == 2000 and facts.removed["exact"] == 150 and facts.leaks["same_prompt"] == 150
    facts = stage({"x.jsonl": rows + exact + prompts}, leaks=REMOVE | {"ngram_8": "report"}, frozen=held)
    assert {row["messages"][0]["role"] for row in stage.rows("train")} == {"user"}
    assert facts.held_out_rows == 150 and facts.held_out_groups == 150


def test_a_short_prompt_under_more_than_ten_system_prompts_is_a_stock_phrase_and_told_of(stage):
    others = [chat(words(9, n), "x") for n in range(40)]
    seven = "Tell me what you can do here."

    def leaks(prompt: str, count: int, **settings) -> tuple[int, int]:
        rows = [chat(prompt, f"answer {n}", f"Task number {n}") for n in range(count + 1)]
        facts = stage({"x.jsonl": rows + others}, frozen=frozen(rows[0]), leaks=REMOVE | settings)
        told = stage.report["leaks"]["same_prompt"]
        assert facts.removed["same_prompt"] == told["rows"]
        assert len(told["stock_phrases"]["examples"]) == min(5, told["stock_phrases"]["rows"])
        return told["rows"], told["stock_phrases"]["rows"]

    assert leaks(seven, 10) == (10, 0)
    assert leaks(seven, 11) == (0, 11)
    assert leaks(seven, 11, stock_phrase=11) == leaks(seven, 11, stock_phrase=None) == (11, 0)
    assert leaks(f"{seven[:-1]} today.", 11) == (11, 0)


@pytest.mark.parametrize("prompt", ["Hi.", words(40, 1)])
def test_no_held_out_conversation_is_a_stock_phrase_under_however_many_system_prompts(stage, prompt):
    rows = [chat(f"{prompt} {n}", f"answer {n}", f"Task number {m}") for n in range(10) for m in range(20)]
    facts = stage({"x.jsonl": rows}, frozen=frozen(*rows[::20][:5]), leaks=REMOVE | {"near": "report"})
    assert facts.removed["exact"] == 95 and facts.leaks["exact"] == 95
    assert facts.held_out_rows == 5 and facts.train_rows == 100


@pytest.mark.parametrize(("size", "kind"), [(13, "ngram_13"), (8, "ngram_8")])
def test_a_run_of_words_is_found_at_its_length_and_not_one_word_shorter(stage, size, kind):
    tested = [chat(words(40, n), words(20, 1000 + n)) for n in range(30)]
    rows = [chat(words(40, 2000 + n), words(20, 3000 + n)) for n in range(60)]

    def shares(count: int) -> list[dict]:
        # Punctuation and case do not hide a run, and it may lie anywhere.
        pieces = [" ".join(row["messages"][0]["content"].upper().split()[5 : 5 + count]) for row in tested]
        return [
            chat(f"{words(n, n + 50)} {piece.replace(' ', ', ')}!", "x y") for n, piece in enumerate(pieces)
        ]

    held = frozen(*tested)
    facts = stage({"x.jsonl": tested + rows + shares(size)}, leaks=REPORT, frozen=held)
    assert facts.leaks[kind] == 30
    facts = stage({"x.jsonl": tested + rows + shares(size - 1)}, leaks=REPORT, frozen=held)
    assert facts.leaks[kind] == 0


def test_a_run_that_stands_in_more_than_ten_train_rows_is_a_stock_phrase_and_told_of(stage):
    run = words(20, 1)
    tested = [chat(f"{run} {words(20, 2)}", "x")]

    def leaks(count: int, **settings) -> set[tuple[int, int]]:
        rows = [
            chat(f"{words(15, 10 + n)} {run} {run} {words(15, 90 + n)}", words(15, 200 + n))
            for n in range(count)
        ]
        stage({"x.jsonl": tested + rows}, leaks=REPORT | settings, frozen=frozen(*tested))
        told = [stage.report["leaks"][kind] for kind in ("ngram_13", "ngram_8")]
        for example in [*told[0]["examples"], *told[0]["stock_phrases"]["examples"]]:
            assert example["shared"] == shorten(run, 120, placeholder=" …")
        return {(each["rows"], each["stock_phrases"]["rows"]) for each in told}

    assert leaks(10) == {(10, 0)}
    assert leaks(11) == {(0, 11)}
    assert leaks(11, stock_phrase=11) == leaks(11, stock_phrase=None) == {(11, 0)}


def test_a_row_counts_once_though_it_shares_stock_phrases_too(stage):
    run = words(20, 1)
    tested = [chat(f"{run} {words(20, 2)}", words(20, 3))]
    rows = [chat(f"{words(15, 10 + n)} {run}", words(15, 200 + n)) for n in range(20)]
    leak = chat(f"{words(15, 50)} {run}", words(20, 3))
    stage({"x.jsonl": [*tested, *rows, leak]}, leaks=REPORT, frozen=frozen(*tested))
    told = stage.report["leaks"]["ngram_13"]
    assert (told["rows"], told["stock_phrases"]["rows"]) == (1, 20)


@pytest.mark.parametrize("at_once", ["all", "some", "one part"])
@pytest.mark.parametrize("seed", range(2))
def test_runs_are_found_as_by_looking_at_every_run_of_every_row(stage, seed, at_once, monkeypatch):
    if at_once != "all":
        monkeypatch.setattr(rows_module, "CHUNK_WORDS", 500)
        monkeypatch.setattr(rows_module, "WAITING_BYTES", 5000)
        monkeypatch.setattr(leaks_module, "MATCHED_BYTES", 1 if at_once == "one part" else 20_000)
    draw = random.Random(seed)
    texts = [" ".join(draw.choices("abc", k=draw.randrange(1, 30))) for _ in range(40)]

    def said() -> str:
        return " ".join(draw.choices(texts, k=draw.randrange(1, 4)))

    rows = [{"prompt": f"p{number} {said()}", "completion": said()} for number in range(300)]
    facts = stage({"x.jsonl": rows}, leaks=REPORT, held_out_fraction=0.1)
    for size, kind in ((8, "ngram_8"), (13, "ngram_13")):
        train, held_out = (
            [(row["id"], runs_of(row, size)) for row in stage.rows(side)] for side in ("train", "held_out")
        )
        counts = Counter(run for _, runs in train for run in runs)
        sharing = []
        for id, runs in train:
            rare = {run for run in runs if counts[run] <= 10}
            if others := [other for other, its in held_out if its & rare]:
                sharing.append({"train": id, "held_out": others[0]})
        assert 0 < len(sharing) < len(train)
        assert facts.leaks[kind] == len(sharing)
        examples = stage.report["leaks"][kind]["examples"]
        assert [{key: each[key] for key in ("train", "held_out")} for each in examples] == sharing[:5]


def runs_of(row: dict, size: int) -> set[tuple[str, ...]]:
    words = " ".join(turn["content"] for turn in row["messages"]).split()
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_both_answers_of_preference_pairs_are_searched_for_leaks(stage):
    held_out = [pair(f"Tested {n}", words(20, 10 + n), words(20, 30 + n)) for n in range(4)]
    of_chosen = [pair(f"Q {n}", words(20, 50 + n), row["chosen"]) for n, row in enumerate(held_out)]
    of_rejected = [pair(f"R {n}", row["rejected"], words(20, 70 + n)) for n, row in enumerate(held_out)]
    others = [pair(f"S {n}", words(20, 90 + n), words(20, 120 + n)) for n in range(9)]
    held = frozen(*(chat(row["prompt"], "") for row in held_out))
    facts = stage(
        {"x.jsonl": held_out + of_chosen + of_rejected + others},
        format="preference",
        frozen=held,
        leaks=REPORT,
    )
    assert facts.leaks["ngram_13"] == facts.leaks["ngram_8"] == 8
    assert len({example["shared"] for example in stage.report["leaks"]["ngram_13"]["examples"]}) > 1


def test_rows_that_only_a_removed_leak_held_together_are_no_near_duplicates(stage):
    text = words(140, 1).split()
    run = words(8, 2)
    # Neighbours resemble one another, the first and the last do not.
    alike = [text[:100], [*text[20:120], run], text[40:]]
    rows = [chat(" ".join(said[:50]), " ".join(said[50:])) for said in alike]
    tested = chat(words(9, 3), run)
    remove = {"similarity": 0.5, "policy": "remove"}
    for policy, left in (("report", 1), ("remove", 2)):
        leaks = REPORT | {"ngram_8": policy}
        facts = stage(
            {"x.jsonl": [tested, *rows]}, leaks=leaks, frozen=frozen(tested), near_duplicates=remove
        )
        assert facts.leaks["ngram_8"] == 1 and facts.leaks["near"] == 0
        assert facts.train_rows == left


def test_what_only_a_system_prompt_shares_is_no_run(stage):
    system = words(30, 1)
    rows = [chat(words(12, 10 + n), "x", system) for n in range(8)]
    assert not any(stage({"x.jsonl": rows}, leaks=REPORT, frozen=frozen(rows[0])).leaks.values())


def test_leaks_to_be_refused_are_named_all_at_once_with_examples(stage):
    rows = [chat(words(30, n), words(5, 500 + n)) for n in range(40)]
    leaks = [chat(row["messages"][0]["content"], "other", "System.") for row in rows[:3]]
    with pytest.raises(Refused) as refusal:
        stage({"x.jsonl": rows + leaks}, leaks=REFUSE, frozen=frozen(*rows[:9]))
    message = str(refusal.value)
    assert "same_prompt: 3 train rows" in message and "near: 3 train rows" in message
    assert "exact" not in refusal.value.found and "w" in message and "remove" in refusal.value.do
    start = rows[0]["messages"][0]["content"][:40]
    assert start in message


def test_train_is_kept_apart_from_what_earlier_versions_held_out(stage, tmp_path):
    rows = some_rows(200)
    stage({"x.jsonl": rows}, split_salt="old")
    old = {row["id"] for row in stage.rows("held_out")}
    earlier = earlier_set("support version 3", stage)
    facts = stage({"x.jsonl": rows}, split_salt="new", earlier=(earlier,))
    train, held_out = ({row["id"] for row in stage.rows(side)} for side in ("train", "held_out"))
    assert not train & old and facts.removed["exact"] == len(old - held_out) > 20
    examples = stage.report["leaks"]["exact"]["examples"]
    assert {example["against"] for example in examples} == {"support version 3"}
    assert all(example["held_out_start"] == example["start"] for example in examples)
    expected = stage.bytes()
    damaged = replace(earlier, digest="0" * 64)
    with pytest.raises(Unavailable, match="support version 3 is damaged"):
        stage({"x.jsonl": rows}, split_salt="new", earlier=(damaged,))
    stage({"x.jsonl": rows}, split_salt="new")
    assert stage.bytes()[1] == expected[1] and stage.bytes()[0] != expected[0]


def turns(*texts: str) -> dict:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}


def test_an_earlier_held_out_set_is_read_as_prepare_wrote_it(stage):
    """Redaction may have made two turns the same, and the spelling in JSON a row longer than a user's may be."""
    alike = [
        turns(f"Mail a{n}@x.org?", "yes", f"Mail b{n}@x.org?", "yes", f"Then {n}?", "no") for n in range(6)
    ]
    others = [turns(f"Question {n}: {words(9, n)}?", words(5, n)) for n in range(40)]
    backslashes = "\\" * 3 * 2**20
    files = {"x.jsonl": alike + others, "y.csv": f"prompt,completion\n{backslashes},fine\n".encode()}
    settings = {"files": "**/*", "redact": ["email"]}
    held = frozen(turns("Mail [EMAIL]?"), turns(backslashes), *others[:20])
    stage(files, **settings, frozen=held)
    old = {row["id"]: row["messages"][0]["content"] for row in stage.rows("held_out")}
    assert len(old) == 6 + 1 + 20
    facts = stage(
        files, **settings, frozen=frozen(*others[20:30]), earlier=(earlier_set("m version 1", stage),)
    )
    assert facts.removed["exact"] == len(old) and facts.train_rows == 10
    for example in stage.report["leaks"]["exact"]["examples"]:
        assert example["held_out_start"] == old[example["held_out"]][:120]


def test_what_an_earlier_version_held_out_unredacted_is_known_again_redacted(stage):
    rows = [chat(f"I am u{n}@x.org: {words(9, n)}", words(9, 100 + n)) for n in range(40)]
    stage({"x.jsonl": rows}, split_salt="old")
    old = len(stage.rows("held_out"))
    earlier = (earlier_set("m version 1", stage),)
    other = [chat(f"Question {n}", "yes") for n in range(40)]
    held = frozen(*other[:20])
    facts = stage({"x.jsonl": rows + other}, frozen=held, redact=["email"], earlier=earlier)
    assert facts.removed["exact"] == old > 3 and facts.train_rows == 60 - old
    example = stage.report["leaks"]["exact"]["examples"][0]
    assert example["held_out_start"] == example["start"] and "I am [EMAIL]:" in example["start"]


def test_a_prompt_that_an_earlier_version_held_out_is_a_leak_however_often_it_stands_in_train(stage):
    rows = some_rows(60) + [{"prompt": "again and again", "completion": str(n)} for n in range(30)]
    held = FrozenSet("one", frozenset([group_of([{"role": "user", "content": "again and again"}])]), "")
    stage({"x.jsonl": rows}, frozen=held)
    earlier = earlier_set("m version 1", stage)
    other = FrozenSet(
        "two", frozenset(group_of([{"role": "user", "content": row["prompt"]}]) for row in rows[:9]), ""
    )
    facts = stage({"x.jsonl": rows}, frozen=other, earlier=(earlier,))
    assert facts.removed["exact"] + facts.removed["same_prompt"] == 30


def test_a_frozen_set_alone_decides_what_is_held_out(stage):
    rows = some_rows(100, answers=2)
    groups = frozenset(group_of([{"role": "user", "content": row["prompt"]}]) for row in rows[:20])
    facts = stage({"x.jsonl": rows}, frozen=FrozenSet("fixed", groups, ""), held_out_fraction=0.5)
    assert {row["group"] for row in stage.rows("held_out")} == groups
    assert (facts.held_out_rows, facts.train_rows) == (20, 180)
    assert stage.report["held_out"] == {"rows": 20, "groups": 10, "set": "fixed"}
    with pytest.raises(Refused, match="none is held out"):
        stage({"x.jsonl": rows[50:]}, frozen=FrozenSet("fixed", groups, ""), held_out_set="fixed")


def test_when_nothing_is_left_to_train_on_the_causes_are_said(stage):
    tested = chat(words(30, 1), "x")
    rows = [chat(tested["messages"][0]["content"], "y", f"system {n}") for n in range(3)]
    with pytest.raises(Refused, match="all 3 rows to train on were removed: same_prompt 3"):
        stage({"x.jsonl": [tested, *rows]}, frozen=frozen(tested))


@pytest.mark.parametrize("with_frozen", [False, True])
def test_what_is_held_out_stays_held_out_while_data_grows_tenfold_whatever_is_removed(stage, with_frozen):
    numbers = random.Random(3)
    texts = [words(30, n) for n in range(250)]
    rows = [chat(text, words(6, n)) for n, text in enumerate(texts)]
    # Leaks and near duplicates among them, at any time.
    rows += [chat(text, "other", "System.") for text in texts[:60]]
    rows += [chat(f"{text} more", words(6, n)) for n, text in enumerate(texts[:90])]
    numbers.shuffle(rows)
    held = frozen(*rows[:20]) if with_frozen else None
    policies = {"leaks": REMOVE, "near_duplicates": {"similarity": 0.5, "policy": "remove"}}
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for tenths in range(1, 11):
        facts = stage({"x.jsonl": rows[: len(rows) * tenths // 10]}, frozen=held, **policies)
        now = {side: {row["group"] for row in stage.rows(side)} for side in sides}
        assert sides["held_out"] <= now["held_out"]
        assert not sides["train"] & now["held_out"] and not sides["held_out"] & now["train"]
        sides = {side: sides[side] | now[side] for side in sides}
    assert sum(facts.removed.values()) > 50

"""Near duplicates and near leaks, on real texts with planted ones."""

import json
import random

import pytest
from prepare_stage import REAL_DATA, Stage, real_data, some_rows

from retuner.naming import chat_id, folded
from retuner.sketch import words_in


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def real_rows(name: str) -> list[dict[str, str]]:
    if name == "alpaca":
        rows = json.loads((REAL_DATA / "alpaca" / "alpaca_en_demo.json").read_text())
        pairs = [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]
    else:
        lines = (REAL_DATA / name / "train.jsonl").read_text("utf-8").split("\n")[:-1]
        pairs = [tuple(json.loads(line).values())[:2] for line in lines]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in dict.fromkeys(pairs)]


def reworded(text: str, vocabulary: list[str], numbers: random.Random) -> str:
    """One word of each twelve is another."""
    words = text.split()
    for begin in range(0, len(words), 12):
        end = min(begin + 12, len(words))
        if end - begin == 12 or begin == 0 or numbers.random() < (end - begin) / 12:
            words[numbers.randrange(begin, end)] = numbers.choice(vocabulary)
    return " ".join(words)


def id_of(row: dict[str, str]) -> str:
    return chat_id(
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    )


REMOVING = {
    "near_duplicates": {"similarity": 0.5, "policy": "remove"},
    "leaks": {
        "exact": "report",
        "same_prompt": "report",
        "near": "remove",
        "ngram_13": "report",
        "ngram_8": "report",
        "stock_phrase": 10,
    },
}


@real_data
@pytest.mark.parametrize("name", ["gsm8k", "e2e", "alpaca"])
def test_planted_near_duplicates_and_near_leaks_in_real_data_are_found(stage, name):
    rows = real_rows(name)[:3000]
    numbers = random.Random(11)
    vocabulary = sorted({word for row in rows for word in row["prompt"].split()})
    sources = numbers.sample(rows, 600)
    copies = [{key: reworded(text, vocabulary, numbers) for key, text in row.items()} for row in sources]
    pairs = {(id_of(source), id_of(copy)) for source, copy in zip(sources, copies)}
    stage({"x.jsonl": rows + copies}, held_out_fraction=0.3)
    train, held_out = ({row["id"] for row in stage.rows(side)} for side in ("train", "held_out"))
    stage({"x.jsonl": rows + copies}, held_out_fraction=0.3, **REMOVING)
    left = {row["id"] for row in stage.rows("train")}
    within = [pair for pair in pairs if train.issuperset(pair)]
    across = [pair for pair in pairs if len(train & set(pair)) == len(held_out & set(pair)) == 1]
    assert len(within) > 200 and len(across) > 200
    assert sum(not left.issuperset(pair) for pair in within) >= 0.95 * len(within)
    assert sum(not left & set(pair) for pair in across) >= 0.95 * len(across)
    assert {row["id"] for row in stage.rows("held_out")} == held_out


def test_preference_pairs_with_other_rejected_answers_are_no_near_duplicates(stage):
    numbers = random.Random(1)

    def said(count: int) -> str:
        return " ".join(str(numbers.randrange(10**9)) for _ in range(count))

    prompt, chosen = said(10), said(20)
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": said(60)} for _ in range(9)]
    rows += [{"prompt": f"Other {n}", "chosen": said(9), "rejected": said(9)} for n in range(30)]
    rows.append({**rows[0], "rejected": rows[0]["rejected"] + " more"})
    stage({"x.jsonl": rows}, format="preference", **REMOVING)
    assert stage.report["duplicates"]["near"] == 1


@real_data
def test_false_alarms_on_gsm8k_are_below_one_percent_of_its_rows(stage):
    facts = stage.over(REAL_DATA / "gsm8k", files="*.jsonl", held_out_fraction=0.15)
    assert facts.rows_read == 8792 and 1000 < facts.held_out_rows < 1600
    assert facts.leaks["near"] <= 0.01 * facts.train_rows
    assert facts.duplicates["near"] <= 0.01 * facts.train_rows


def sentence(numbers: random.Random, words: int = 30) -> str:
    return " ".join(f"w{numbers.randrange(100_000)}" for _ in range(words))


def changed(text: str, share: float) -> str:
    words = text.split()
    step = round(1 / share)
    return " ".join(f"x{place}" if place % step == 0 else word for place, word in enumerate(words))


def test_a_cluster_keeps_its_least_id_and_the_report_shows_it(stage):
    numbers = random.Random(4)
    rows = [{"prompt": sentence(numbers), "completion": "yes"} for _ in range(60)]
    texts = [sentence(numbers) for _ in range(3)]
    family = [
        {"prompt": changed(text, 0.1) + f" {n}", "completion": "no"} for text in texts for n in range(6)
    ]
    stage({"x.jsonl": rows + family}, held_out_fraction=0.01, split_salt="3")
    clusters = stage.report["duplicates"]["clusters"]
    all_rows = {row["id"]: row["messages"] for row in stage.rows("train")}
    facts = stage(
        {"x.jsonl": rows + family},
        held_out_fraction=0.01,
        split_salt="3",
        near_duplicates={"similarity": 0.5, "policy": "remove"},
    )
    left = {row["id"] for row in stage.rows("train")}
    assert facts.removed["near_duplicate"] == len(all_rows) - len(left) == facts.duplicates["near"] > 12
    assert [cluster["size"] for cluster in clusters] == sorted((c["size"] for c in clusters), reverse=True)
    for cluster in clusters:
        ids = [shown["id"] for shown in cluster["rows"]]
        assert len(ids) == min(5, cluster["size"]) and ids == sorted(ids)
        assert left & set(ids) == {ids[0]}
        assert all(
            all_rows[shown["id"]][0]["content"].startswith(shown["start"]) for shown in cluster["rows"]
        )


def test_rows_in_another_order_are_the_same_clusters(stage):
    numbers = random.Random(5)
    text = sentence(numbers, 40)
    # One pattern, many fillings: buckets larger than the window of comparison.
    rows = [{"prompt": f"{text} {sentence(numbers, 8)}", "completion": "ok"} for _ in range(300)] + some_rows(
        60
    )
    removed = {"near_duplicates": {"similarity": 0.5, "policy": "remove"}}
    facts = stage({"x.jsonl": rows}, **removed)
    expected, report = stage.bytes(), stage.report
    assert facts.duplicates["near"] > 200
    random.Random(6).shuffle(rows)
    stage({"a.jsonl": rows[:100], "b.jsonl": rows[100:]}, **removed)
    assert stage.bytes() == expected and stage.report["duplicates"] == report["duplicates"]


def test_near_leaks_among_rows_of_one_pattern_are_found(stage):
    numbers = random.Random(9)
    pattern = sentence(numbers, 30)
    # They resemble each other less than is looked for, and yet share many buckets.
    rows = [f"{pattern} {sentence(numbers, 12)}" for _ in range(300)]
    copies = [" ".join([*row.split()[:-1], f"z{place}"]) for place, row in enumerate(rows)]
    both = [{"prompt": text, "completion": "yes"} for text in rows + copies]
    stage({"x.jsonl": both}, held_out_fraction=0.5)
    held_out = {row["messages"][0]["content"] for row in stage.rows("held_out")}
    apart = sum((one in held_out) != (other in held_out) for one, other in zip(rows, copies))
    params = {"near_duplicates": {"similarity": 0.8, "policy": "report"}}
    facts = stage({"x.jsonl": both}, held_out_fraction=0.5, **params)
    assert apart > 100 and facts.leaks["near"] >= 0.95 * apart


def test_near_duplicates_among_rows_of_one_pattern_are_found(stage):
    numbers = random.Random(10)
    pattern = sentence(numbers, 30)
    rows = [f"{pattern} {sentence(numbers, 12)}" for _ in range(300)]
    rows += [" ".join([*row.split()[:-1], f"z{place}"]) for place, row in enumerate(rows)]
    params = {"near_duplicates": {"similarity": 0.8, "policy": "report"}, "split_salt": "1"}
    facts = stage(
        {"x.jsonl": [{"prompt": text, "completion": "yes"} for text in rows]},
        held_out_fraction=0.01,
        **params,
    )
    assert facts.duplicates["near"] >= 0.95 * 290


def test_without_a_similarity_nothing_near_is_looked_for(stage):
    rows = [{"prompt": f"{'the same long text again ' * 9}{n}", "completion": "ok"} for n in range(50)]
    facts = stage({"x.jsonl": rows}, near_duplicates={"similarity": None, "policy": "remove"})
    assert facts.duplicates["near"] == facts.leaks["near"] == 0


def test_texts_that_only_share_a_system_prompt_are_not_near(stage):
    numbers = random.Random(7)
    system = sentence(numbers, 80)
    rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": sentence(numbers, 12)},
                {"role": "assistant", "content": sentence(numbers, 5)},
            ]
        }
        for _ in range(60)
    ]
    facts = stage({"x.jsonl": rows})
    assert facts.duplicates["near"] == 0 and set(facts.leaks.values()) == {0}


def test_the_same_resemblance_in_scripts_without_spaces(stage):
    numbers = random.Random(8)
    signs = [chr(numbers.randrange(0x4E00, 0x9FA5)) for _ in range(400)]
    rows = [{"prompt": "".join(numbers.sample(signs, 40)), "completion": "好"} for _ in range(60)]
    copies = [{**row, "prompt": row["prompt"][:20] + "甲" + row["prompt"][21:]} for row in rows]
    facts = stage({"x.jsonl": rows + copies}, held_out_fraction=0.01, split_salt="1")
    assert facts.duplicates["near"] + facts.leaks["near"] >= 58


def test_words_are_letters_and_digits_whatever_the_path_they_take():
    def words(text):
        return words_in(folded([text]))[0].decode().split()

    plain = "It's 3.5 x_1 (Yes!)"
    assert words(plain) == ["it", "s", "3", "5", "x_1", "yes"]
    assert words(plain + " é") == [*words(plain), "é"]
    assert words("(a’b)Ça-c") == ["a", "b", "ça", "c"] and words("Straße…STRASSE") == ["strasse"] * 2
    assert words("我们 go") == ["我", "们", "go"] and words("…") == words(" !") == []

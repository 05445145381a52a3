import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from retuner import support_email_pairs
from retuner.dataset import open_dataset
from retuner.naming import group_of, is_held_out
from retuner.params_file import load
from retuner.support_email_texts import KEYS
from retuner.support_emails import FILE_NAME, ROWS, SEED, conversations, write

ROOT = Path(__file__).parents[1]


def test_the_data_that_data_dvc_names_is_what_the_generator_writes(tmp_path):
    dataset = open_dataset(ROOT / "data.dvc")
    assert [file.relpath for file in dataset.files] == [FILE_NAME]
    assert write(tmp_path).read_bytes() == dataset.files[0].path.read_bytes()


def test_the_same_bytes_under_another_hash_seed(tmp_path):
    written = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "retuner.support_emails", str(tmp_path / seed)]
        subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}, check=True
        )
        written.append((tmp_path / seed / FILE_NAME).read_bytes())
    assert written[0] == written[1]


def test_there_are_enough_conversations_and_no_prompt_twice():
    rows = conversations(ROWS, SEED)
    assert len(rows) >= 1200
    assert len({json.dumps(row["messages"][:-1]) for row in rows}) == len(rows)


def test_every_answer_is_one_line_of_strict_json_in_the_order_of_keys():
    for row in conversations(300, SEED):
        for message in row["messages"]:
            if message["role"] == "assistant":
                answer = json.loads(message["content"])
                assert tuple(answer) == KEYS
                assert message["content"] == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def test_what_an_answer_copies_stands_in_the_email_and_null_stands_for_what_does_not():
    for row in conversations(300, SEED):
        said = " ".join(message["content"] for message in row["messages"] if message["role"] == "user")
        answer = json.loads(row["messages"][-1]["content"])
        assert answer["product"] in said.lower()
        if answer["order_number"]:
            assert answer["order_number"] in said
        else:
            assert not re.search(r"[A-Z]{2}-[0-9]{5}", said)
        if answer["name"]:
            assert answer["name"].lower() in said.lower()
        else:
            assert "no name" in said


def test_the_rows_vary_as_people_do():
    rows = conversations(ROWS, SEED)
    shapes = Counter(tuple(message["role"] for message in row["messages"]) for row in rows)
    assert shapes["system", "user", "assistant"] > 300
    assert shapes["user", "assistant"] > 300
    assert sum(count for shape, count in shapes.items() if len(shape) > 3) > 50
    answers = [json.loads(row["messages"][-1]["content"]) for row in rows]
    for key in ("order_number", "name"):
        nulls = sum(answer[key] is None for answer in answers) / len(rows)
        assert 0.05 < nulls < 0.4
    assert {answer["priority"] for answer in answers} == {"high", "normal", "low"}
    assert len({answer["category"] for answer in answers}) == 6


# --- preference pairs


def test_the_pairs_that_preferences_dvc_names_are_what_the_generator_writes(tmp_path):
    dataset = open_dataset(ROOT / "preferences.dvc")
    assert [file.relpath for file in dataset.files] == [support_email_pairs.FILE_NAME]
    assert support_email_pairs.write(tmp_path).read_bytes() == dataset.files[0].path.read_bytes()


def test_a_pair_answers_an_email_of_the_quickstart_rightly_and_with_a_mistake():
    answers = {json.dumps(row["messages"][:-1]): row["messages"][-1] for row in conversations(ROWS, SEED)}
    for pair in support_email_pairs.pairs():
        assert [answers[json.dumps(pair["prompt"])]] == pair["chosen"]
        right, (rejected,) = json.loads(pair["chosen"][0]["content"]), pair["rejected"]
        try:
            wrong = json.loads(rejected["content"])
        except ValueError:
            assert rejected["content"].endswith(pair["chosen"][0]["content"])
        else:
            assert sum(wrong[key] != right[key] for key in KEYS) == 1


def test_all_that_the_quickstart_holds_out_has_its_pair():
    params = load(ROOT / "params" / "quickstart.yaml").prepare
    groups = {group_of(pair["prompt"]) for pair in support_email_pairs.pairs()}
    for row in conversations(ROWS, SEED):
        group = group_of(row["messages"])
        if is_held_out(group, params.split_salt, params.held_out_fraction):
            assert group in groups

"""The sample data: fixed bytes, strict answers, and labels that the e-mails leave no doubt about."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retuner import support_email_texts as texts
from retuner.dataset import open_dataset
from retuner.support_emails import ACTIONS_BY_CATEGORY, FILE_NAME, ROWS, SEED, conversations, write

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "category": set(texts.PROBLEMS),
    "priority": set(texts.PRIORITIES),
    "action": set(texts.ACTIONS),
}


@pytest.fixture(scope="module")
def rows() -> list[list[dict]]:
    return [row["messages"] for row in conversations(ROWS, SEED)]


def _expanded(text: str) -> set[str]:
    """Every text that the choices of `text` allow."""
    parts = re.split(r"\[([^]]*)\]", text)
    return {"".join(chosen) for chosen in itertools.product(*(part.split("|") for part in parts))}


def test_the_generator_writes_the_bytes_that_data_dvc_names(tmp_path):
    write(tmp_path / "data")
    shutil.copy(ROOT / "data.dvc", tmp_path)
    assert [file.relpath for file in open_dataset(tmp_path / "data.dvc").files] == [FILE_NAME]


def test_the_hash_seed_moves_no_byte(tmp_path):
    written = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-m", "retuner.support_emails", str(folder)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        written.append((folder / FILE_NAME).read_bytes())
    assert written[0] == written[1]


def test_no_prompt_is_there_twice(rows):
    prompts = [json.dumps(messages[:-1]) for messages in rows]
    assert len(set(prompts)) == len(prompts) >= 1200


def test_turns_alternate_and_end_with_the_assistant(rows):
    shapes = {tuple(turn["role"] for turn in messages) for messages in rows}
    once, twice = ("user", "assistant"), ("user", "assistant") * 2
    assert shapes == {once, twice, ("system", *once), ("system", *twice)}


def test_every_answer_is_one_strict_line_with_known_values(rows):
    for messages in rows:
        for turn in messages:
            if turn["role"] == "assistant":
                labels = json.loads(turn["content"])
                assert turn["content"] == json.dumps(labels, separators=(",", ":"), ensure_ascii=False)
                assert tuple(labels) == texts.KEYS
                assert all(labels[key] in allowed for key, allowed in ALLOWED.items())


def test_every_value_occurs_often_enough_to_be_learned(rows):
    answers = [json.loads(messages[-1]["content"]) for messages in rows]
    for key, allowed in ALLOWED.items():
        for value in allowed:
            assert sum(answer[key] == value for answer in answers) > ROWS / 20, (key, value)
    for key in ("product", "order_number", "name"):
        assert sum(answer[key] is None for answer in answers) > ROWS / 20, key


def test_copied_labels_stand_in_the_email_letter_for_letter_and_are_absent_when_null(rows):
    for messages in rows:
        if len(messages) > 3:
            continue
        email = messages[-2]["content"]
        for instruction in texts.INSTRUCTIONS:
            email = email.replace(instruction, "")
        labels = json.loads(messages[-1]["content"])
        number, name, product = labels["order_number"], labels["name"], labels["product"]
        if number:
            assert re.search(rf"(?<![\w-]){number}\b", email), email
        else:
            assert not re.search(r"\d{5}", email), email
        if name:
            assert re.search(rf"(^|\W){name}($|\W)", email), email
        if product:
            assert product in email.lower()
        else:
            assert not [other for other in texts.PRODUCTS if re.search(rf"\b{other}\b", email.lower())], email


def test_an_email_says_what_its_labels_say_and_nothing_else(rows):
    """Read by the texts of each label. A misspelt text is not found, but never one of another label."""
    said = {"category": texts.PROBLEMS, "priority": texts.PRIORITIES, "action": texts.ACTIONS}
    readers = {
        (key, label): re.compile("|".join(map(_pattern, set().union(*map(_expanded, choices)) - {""})))
        for key, by_label in said.items()
        for label, choices in by_label.items()
        if choices != ("",)
    }
    unread = 0
    for messages in rows:
        if len(messages) > 3:
            continue
        email, labels = messages[-2]["content"].lower(), json.loads(messages[-1]["content"])
        found = {(key, label) for (key, label), reader in readers.items() if reader.search(email)}
        expected = {(key, labels[key]) for key in said} - {("priority", "normal"), ("action", None)}
        assert found <= expected, (email, found - expected)
        unread += found != expected
    assert unread < 0.25 * len(rows)


def _pattern(text: str) -> str:
    """Finds `text` with anything in its places, in any case, however it is punctuated."""
    return re.sub(r"\\{\w\\}", r"[\\w -]+?", re.escape(text.lower().rstrip(".!?"))) + r"(?!\w)"


def test_a_follow_up_changes_exactly_one_value(rows):
    corrections = [messages for messages in rows if len(messages) > 3]
    assert len(corrections) > ROWS / 20
    for messages in corrections:
        before, after = json.loads(messages[-3]["content"]), json.loads(messages[-1]["content"])
        changed = [key for key in texts.KEYS if before[key] != after[key]]
        assert len(changed) == 1
        if changed[0] in ("product", "order_number", "name"):
            assert after[changed[0]] in messages[-2]["content"]


def test_nobody_asks_for_what_makes_no_sense(rows):
    for messages in rows:
        labels = json.loads(messages[2 if messages[0]["role"] == "system" else 1]["content"])
        assert labels["action"] in ACTIONS_BY_CATEGORY[labels["category"]]

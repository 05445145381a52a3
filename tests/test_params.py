import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from retuner.errors import Refused
from retuner.params_file import load

PARAMS = Path(__file__).parents[1] / "params"
QUICKSTART = PARAMS / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_params_file_describes_a_run(path):
    load(path)


def test_everything_wrong_is_said_at_once_with_what_was_found(tmp_path):
    settings = YAML(typ="safe", pure=True).load(QUICKSTART.read_text())
    settings["train"]["seed"] = "0"
    settings["train"]["lora"]["rank"] = 0
    settings["prepare"]["split_sat"] = settings["prepare"].pop("split_salt")
    del settings["evaluate"]["max_new_tokens"]
    broken = tmp_path / "broken.yaml"
    broken.write_text(json.dumps(settings))  # JSON is YAML
    with pytest.raises(Refused) as refused:
        load(broken)
    said = str(refused.value)
    assert "train.seed: expected a valid integer, found '0'" in said
    assert "prepare.split_sat: not a setting; did you mean split_salt?" in said
    assert "prepare.split_salt: missing" in said
    assert "train.lora.rank: expected greater than or equal to 1, found 0" in said
    assert "evaluate.max_new_tokens: missing" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lora.rnk=3", "train.lora.rnk: not a setting; did you mean rank?"),
        ("trian.seed=3", "did you mean train?"),
        ("train.seed", "KEY=VALUE"),
        ("base.source=smolm2", "base.source: expected one of smollm2, hub, local, tiny"),
        ("train.epochs=2", "exactly one of max_steps and epochs"),
        (
            "template.max_tokens=5000",
            "template: pack_tokens is 512 but max_tokens is 5000: rows are never split",
        ),
        ("evaluate.metrics=[bleu]", "which evaluate.metrics does not name"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        (
            "train.gradient_checkpointing=maybe",
            "train.gradient_checkpointing: expected a valid boolean or 'auto', found 'maybe'",
        ),
    ],
)
def test_an_override_is_checked_like_the_file(override, said):
    with pytest.raises(Refused, match=said.replace("?", r"\?").replace(".", r"\.")):
        load(QUICKSTART, (override,))


def test_an_override_is_told_from_the_file_by_who_is_at_fault(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(QUICKSTART.read_text().replace("split_salt:", "split_sat:"))
    overrides = ("train.max_steps=7", "train.lora.rank=0", "base.source=hub", "trian.seed=3", "train.seed=[")
    with pytest.raises(Refused) as refused:
        load(broken, overrides)
    said = re.findall(r"^(?:\S.*:|  - .*)$", str(refused.value), re.MULTILINE)
    at = {line: said[index + 1] for index, line in enumerate(said[:-1]) if not line.startswith("  ")}
    assert "prepare.split_salt: missing" in at[f"{broken} does not describe a run:"]
    assert "train.lora.rank: expected" in at[f"--set train.lora.rank=0 does not fit {broken}:"]
    assert "base." in at[f"--set base.source=hub does not fit {broken}:"]
    assert "did you mean train?" in at[f"--set trian.seed=3 does not fit {broken}:"]
    assert "[ is not YAML" in at[f"--set train.seed=[ does not fit {broken}:"]
    assert len(at) == 5


def test_an_override_that_mends_the_file_is_at_fault_for_nothing(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(re.sub(r"rank: \d+", "rank: 0", QUICKSTART.read_text()))
    assert load(broken, ("train.lora.rank=3",)).train.lora.rank == 3


@pytest.mark.parametrize("text", ["*.json", "**/*.jsonl", "&a", "!x", "%.csv", "@x", "`x`"])
def test_an_override_that_begins_like_no_yaml_value_is_text(text):
    assert load(QUICKSTART, (f"prepare.files={text}",)).prepare.files == text


def test_numbers_are_yaml_1_2_numbers():
    assert load(QUICKSTART, ("train.learning_rate=1e-4",)).train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "a: 1\na: 2\n", "\x00", "{[a]: 1}", "a: &a [*a]"])
def test_what_is_not_a_mapping_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(Refused):
        load(tmp_path / "p.yaml")


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe")
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "p.yaml", "is not UTF-8")):
        with pytest.raises(Refused, match=said):
            load(path)


def test_a_branch_is_not_a_pin():
    with pytest.raises(Refused, match=r"base\.commit"):
        load(PARAMS / "phi3_mini_lora.yaml", ("base.commit=main",))

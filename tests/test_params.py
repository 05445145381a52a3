import json
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


def test_numbers_are_yaml_1_2_numbers():
    assert load(QUICKSTART, ("train.learning_rate=1e-4",)).train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "a: 1\na: 2\n", "\x00"])
def test_what_is_not_a_mapping_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(Refused):
        load(tmp_path / "p.yaml")


def test_a_branch_is_not_a_pin():
    with pytest.raises(Refused, match=r"base\.commit"):
        load(PARAMS / "phi3_mini_lora.yaml", ("base.commit=main",))

"""Preference tuning through all six stages, on top of an adapter in production: scored, judged, registered, cached."""

import json
import math
from statistics import fmean

import pytest
from projects import COLOURS, ROOT, add_to_dvc, make_project, retrain, states

from retuner import registry_reads
from retuner.compare import compare
from retuner.errors import Refused
from retuner.params_file import load

SHIPPED = ROOT / "params" / "quickstart_dpo.yaml"
LOG_2 = round(math.log(2), 6)
ON = (
    "data=pairs.dvc",
    "base={source: tiny, seed: 0}",
    "prepare.held_out_fraction=0.2",
    "train.max_steps=8",
    "train.learning_rate=1e-2",
    "train.checkpoint_every_steps=3",
    "train.lora.rank=4",
    "train.lora.alpha=8",
    "evaluate.max_prompts=4",
    "evaluate.max_new_tokens=8",
    "evaluate.metrics=[exact_match]",
    "register.model_name=smoke",
    "register.promote=when_gate_passes",
    "register.gate.rules=[{metric: preference_margin, against: production, min_gain: 1.0}, "
    "{metric: dpo_loss, against: base, min_gain: 0.0}, "
    "{metric: preference_accuracy, against: production, max_regression: 0.0}]",
)


def pairs(rows: int = 40) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Colour of item {row}?"}],
            "chosen": [{"role": "assistant", "content": COLOURS[row % len(COLOURS)]}],
            "rejected": [{"role": "assistant", "content": f"I WOULD SAY {row}"}],
        }
        for row in range(rows)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project with chats and pairs whose chats have been learned and are in production; runs work in its folder."""
    place = tmp_path_factory.mktemp("dpo")
    project = make_project(place / "project")
    (project / "pairs").mkdir()
    (project / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    add_to_dvc(project, "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        retrain(("register.promote=when_gate_passes",), home=place / "home")
        yield place / "home"


@pytest.fixture(scope="module")
def tuned(home):
    return retrain(ON, SHIPPED, home=home)


def result(context, stage):
    name = {record.name: record.fingerprint for record in context.records}[stage]
    return context.store.folder(name), context.store.manifest(name)


def test_it_learns_on_from_production_and_is_held_against_it(tuned):
    first = registry_reads.read_version(tuned.runtime, "smoke", 1)["adapter_sha256"]
    train = result(tuned, "train")[1]
    assert train["identity"]["inputs"]["warm_start"] == first
    assert train["facts"]["preference"] == {"beta": 0.1, "reference": first}
    scores = result(tuned, "evaluate")[1]["facts"]["scores"]
    assert scores.keys() == {"base", "production", "candidate"}
    assert scores["production"]["dpo_loss"] == LOG_2
    assert scores["candidate"]["dpo_loss"] < LOG_2
    assert scores["candidate"]["preference_margin"] > scores["production"]["preference_margin"] + 1
    assert {"loss", "perplexity", "exact_match"} <= scores["candidate"].keys()


def test_it_was_planned(tuned):
    folder, manifest = result(tuned, "train")
    told = json.loads((folder / "aside" / "plan.json").read_bytes())
    assert told["predicted"]["trainable_parameters"] == manifest["facts"]["trainable_parameters"]
    assert told["predicted"]["steps"] == 8 and told["predicted"]["reference_seconds"] > 0
    assert told["outcome"]["tokens_per_second"] > 0


def test_the_scores_are_means_of_what_is_kept_of_each_pair(tuned):
    folder, manifest = result(tuned, "evaluate")
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == manifest["facts"]["rows"] > 1
    for model, scores in manifest["facts"]["scores"].items():
        for metric in ("preference_accuracy", "preference_margin", "dpo_loss"):
            each = [line["preference"][model][metric] for line in lines]
            assert scores[metric] == pytest.approx(fmean(each), rel=1e-5)
    for line in lines:
        theirs, ours = (line["preference"][model] for model in ("production", "candidate"))
        gained = 0.1 * (ours["preference_margin"] - theirs["preference_margin"])
        assert ours["dpo_loss"] == pytest.approx(math.log1p(math.exp(-gained)), rel=1e-3)
        assert ours["preference_accuracy"] == float(ours["preference_margin"] > 0)


def test_a_margin_is_the_difference_of_the_logarithms_of_probabilities(tuned):
    """Token by token, by hand, under the base."""
    import pyarrow as pa
    import torch

    from retuner.generation import load as load_base

    model, _ = load_base(result(tuned, "fetch_base")[0], "float32", "sdpa", "cpu")
    with pa.memory_map(str(result(tuned, "template")[0] / "held_out.arrow")) as source:
        (pair, *_) = pa.ipc.open_stream(source).read_all().to_pylist()

    def log_probability(answer):
        ids = torch.tensor([pair["prompt_ids"] + answer])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.log_softmax(-1)[0]
        return sum(
            logs[place - 1, ids[0, place]].item() for place in range(len(pair["prompt_ids"]), ids.shape[1])
        )

    line = json.loads((result(tuned, "evaluate")[0] / "losses.jsonl").read_text().splitlines()[0])
    expected = log_probability(pair["chosen_ids"]) - log_probability(pair["rejected_ids"])
    assert line["id"] == pair["id"]
    assert line["preference"]["base"]["preference_margin"] == pytest.approx(expected, abs=1e-3)


def test_gate_and_registration_are_as_for_any_other(tuned):
    decision = result(tuned, "register")[1]["facts"]["decision"]
    assert decision["passed"] and [verdict["metric"] for verdict in decision["verdicts"]] == [
        "preference_margin", "dpo_loss", "preference_accuracy",
    ]  # fmt: skip
    assert registry_reads.read_alias(tuned.runtime, "smoke", "production") == 2
    steps = (result(tuned, "train")[0] / "aside" / "metrics.jsonl").read_text().splitlines()
    assert "rewards/margins" in json.loads(steps[-1])["metrics"]


def test_the_second_run_is_cached_although_its_own_adapter_is_in_production_now(tuned, home):
    assert set(states(retrain(ON, SHIPPED, home=home)).values()) == {"cached"}


def test_another_beta_is_another_training_of_the_same_pairs_and_a_gate_that_says_no_still_registers(
    tuned, home
):
    rule = "register.gate.rules=[{metric: preference_margin, against: base, min_gain: 1e6}]"
    again = retrain((*ON, rule, "train.dpo.beta=0.2"), SHIPPED, home=home)
    computed = [name for name, state in states(again).items() if state == "computed"]
    assert computed == ["train", "evaluate", "register"]
    facts = result(again, "register")[1]["facts"]
    assert not facts["decision"]["passed"] and facts["model_version"] == 3
    assert registry_reads.read_alias(again.runtime, "smoke", "production") == 2
    compared = compare(result(tuned, "evaluate")[0], result(again, "evaluate")[0])
    assert {row.metric for row in compared.metrics} >= {"preference_margin", "dpo_loss", "loss"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.recipe=kto", "train.recipe: expected one of sft, dpo"),
        ("prepare.format=auto", "dpo learns from preference"),
        ("template.pack_tokens=512", "pairs are neither packed nor cut"),
        ("template.too_long=truncate", "pairs are neither packed nor cut"),
        ("train.noise_alpha=5", "train.noise_alpha: not a setting"),
        ("train.dpo.bate=0.1", "train.dpo.bate: not a setting"),
        ("train.dpo.loss_type=robust", "robust needs a share above 0"),
    ],
)
def test_params_that_do_not_fit_a_recipe_are_refused(override, told):
    with pytest.raises(Refused) as refusal:
        load(SHIPPED, (override,))
    assert told in str(refusal.value)


def test_a_gate_of_single_answers_cannot_ask_for_preferences():
    rule = "register.gate.rules=[{metric: preference_margin, against: base, min_gain: 0.0}]"
    with pytest.raises(Refused, match="which only train.recipe dpo has"):
        load(ROOT / "params" / "smoke.yaml", (rule,))

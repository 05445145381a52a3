"""A plan says what a training takes before it happens, and refuses what the machine cannot hold."""

import json
import shutil
from dataclasses import replace

import pytest
from projects import make_project, retrain, retuner, states
from training_job import Heard, base_of, chats_of, make_inputs, params, random_rows, run

from retuner import checkpoints, planner
from retuner.errors import Refused, Unavailable
from retuner.layer_probe import layer_cost
from retuner.planner import make_plan, record_outcome

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def plan(folder, speeds=None, **asked):
    return make_plan(
        chats_of(folder), base_of(folder), params(**asked), "cpu", speeds or folder / "none.json"
    )


def test_what_is_counted_is_what_training_finds(inputs):
    planned = plan(inputs)
    facts = run(inputs, params(max_steps=1), out="counted", work="counted-work")
    assert planned.trainable_parameters == facts.trainable_parameters
    assert planned.total_parameters == facts.total_parameters
    rows = random_rows()
    assert (planned.rows, planned.tokens) == (len(rows), sum(len(ids) for ids, _ in rows))
    assert planned.weight_bytes == 4 * (facts.total_parameters - facts.trainable_parameters)
    # Weights, gradients and Adam's two moments, all of float32.
    assert planned.adapter_bytes == 16 * facts.trainable_parameters


def test_a_plan_loads_no_weights(tmp_path):
    folder = make_inputs(tmp_path)
    (folder / "base" / "model.safetensors").unlink()
    assert plan(folder).tokens_per_second > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_of_activations_is_what_autograd_keeps(inputs, precision):
    """The layers' share of a real forward pass over real rows."""
    import torch
    from test_row_attention import packed

    from retuner.base import load_model
    from retuner.lora import put_adapter_on
    from retuner.row_attention import ROW_ATTENTION, attend_by_row
    from retuner.skeleton import read_skeleton
    from retuner.targets import choose_targets

    asked = params(precision=precision)
    base = load_model(inputs / "base", precision, "sdpa", "cpu")
    attend_by_row(base)
    lora = asked.lora
    model = put_adapter_on(base, lora, choose_targets(lora, read_skeleton(inputs / "base"))).train()
    batch = packed(ROW_ATTENTION, [list(range(40))] * 12)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        output = model.get_base_model().base_model(
            **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
        )
    layer = layer_cost(inputs / "base", params(precision=precision).model_dump_json(), "cpu", 40, 12)
    assert output and sum(kept.values()) == pytest.approx(2 * 480 * layer.saved_bytes, rel=0.1)


def test_checkpointed_activations_take_less(inputs):
    with_them, without = plan(inputs, gradient_checkpointing=True), plan(inputs)
    assert with_them.activation_bytes == without.other_activation_bytes < without.activation_bytes
    assert with_them.peak_bytes < without.peak_bytes


@pytest.mark.parametrize("asked", [{"optimizer": "sgd"}, {"precision": "bfloat16"}, {"batch_size": 1}])
def test_what_saves_memory_is_planned_to(inputs, asked):
    mine, other = (
        planned.peak_bytes - planned.process_bytes for planned in (plan(inputs, **asked), plan(inputs))
    )
    assert mine < other


@pytest.mark.parametrize(
    "asked", [{"label_smoothing": 0.1}, {"lora": {"modules_to_save": ("lm_head",)}}, {}], ids=str
)
def test_logits_are_planned_on_a_gpu_where_training_makes_them(inputs, monkeypatch, asked):
    """The counting is that of a GPU; what would be measured there is measured here."""

    def here(of):
        return lambda *given: of(*("cpu" if each == "cuda" else each for each in given))

    for name in ("layer_cost", "head_seconds", "machine_name", "_memory"):
        monkeypatch.setattr(planner, name, here(getattr(planner, name)))
    counts = planner.count_rows(planner.read_rows(inputs / "chats" / "train.arrow"))
    places = (chats_of(inputs), base_of(inputs), params(**asked), "cuda", inputs / "none.json")
    assert planner._plan(counts, *places).logit_bytes == (plan(inputs, **asked).logit_bytes if asked else 0)


def test_what_cannot_fit_is_refused_with_what_to_change(inputs):
    planned = replace(plan(inputs), process_bytes=0, activation_bytes=9 * GIB, other_activation_bytes=GIB)
    fits = replace(planned, memory_bytes=10 * GIB)
    fits.refuse_what_cannot_fit()
    assert not fits.must_checkpoint
    short = replace(planned, memory_bytes=4 * GIB)
    assert short.must_checkpoint
    with pytest.raises(Refused, match="train.gradient_checkpointing: true") as refusal:
        short.refuse_what_cannot_fit()
    assert "4.0 GiB" in refusal.value.expected
    with pytest.raises(Refused, match="train.batch_size"):
        replace(planned, memory_bytes=GIB // 2).refuse_what_cannot_fit()


def test_the_speed_of_an_earlier_run_is_the_next_plan(tmp_path):
    folder, speeds = make_inputs(tmp_path), tmp_path / "speeds.json"
    first = plan(folder, speeds)
    assert first.speed_from == "a probe"
    run(folder, params(), Heard())
    record_outcome(folder / "out" / "aside", first, speeds)
    told = json.loads((folder / "out" / "aside" / "plan.json").read_text())
    assert told["predicted"]["peak_bytes"] == first.peak_bytes
    assert told["outcome"].keys() == {"peak_bytes", "seconds", "tokens_per_second"}
    again = plan(folder, speeds, seed=5)
    assert again.speed_from == "an earlier run"
    assert again.tokens_per_second == told["outcome"]["tokens_per_second"]
    # 12 steps of 2 x 2 sequences of one row: these chats do not say that they are packed.
    assert again.seconds == pytest.approx(12 * 4 * first.tokens / first.rows / again.tokens_per_second)
    assert plan(folder, speeds, precision="bfloat16").speed_from == "a probe"


def test_the_speed_of_another_machine_is_not_that_of_this_one(tmp_path):
    """It did the first steps, at a millionth of the speed and with a million times the memory."""
    folder, speeds = make_inputs(tmp_path), tmp_path / "speeds.json"
    first = plan(folder, speeds)
    with pytest.raises(KeyboardInterrupt):
        run(folder, observer=Heard(die_after=9), out="died")
    sealed = folder / "work" / "sealed" / "step-8"
    state = json.loads((sealed / "trainer_state.json").read_bytes())
    for entry in state["log_history"]:
        entry["seconds"] *= 1e6
        entry["memory_mb"] *= 1e6
    (sealed / "trainer_state.json").write_text(json.dumps(state))
    (sealed / "manifest.json").unlink()
    shutil.move(sealed, tmp_path / "staged")
    checkpoints.seal(folder / "work", tmp_path / "staged", 8)
    run(folder)
    record_outcome(folder / "out" / "aside", first, speeds)
    outcome = json.loads((folder / "out" / "aside" / "plan.json").read_text())["outcome"]
    assert outcome["peak_bytes"] < 1e12
    assert plan(folder, speeds).tokens_per_second > 1


def test_what_cannot_be_trained_at_all_is_refused_as_training_does(inputs):
    with pytest.raises(Refused, match="query"):
        plan(inputs, lora={"targets": ("query",)})


@pytest.mark.parametrize("layers", ["1-1", "all"])
@pytest.mark.parametrize(
    "lora", [{"dora": True}, {"init": "pissa"}, {"targets": ("layers.1.mlp.down_proj",)}]
)
def test_any_adapter_can_be_planned(inputs, lora, layers):
    planned = plan(inputs, lora={**lora, "layers": layers})
    assert 0 < planned.trainable_parameters < planned.total_parameters


def test_the_generators_are_left_as_they_are(inputs):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    layer_cost.cache_clear()
    plan(inputs)
    assert torch.rand(4).equal(expected)


def test_the_plan_and_what_it_came_to_lie_beside_the_adapter_and_not_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    context = retrain()
    assert states(context)["train"] == "computed"
    train = next(record.fingerprint for record in context.records if record.name == "train")
    manifest = context.store.manifest(train)
    told = json.loads((context.store.root / "objects" / train / "aside" / "plan.json").read_text())
    assert told["predicted"]["steps"] == 4
    assert "plan" not in json.dumps(manifest["identity"]) and "plan" not in json.dumps(manifest["facts"])

    def too_large(*arguments):
        return replace(plan_of(*arguments), memory_bytes=1)

    plan_of = planner.make_plan
    monkeypatch.setattr(planner, "make_plan", too_large)
    with pytest.raises(Refused, match="GiB"):
        retrain(("train.seed=9",))


def test_the_command_says_it_and_trains_nothing(tmp_path):
    project = make_project(tmp_path / "project")
    done = retuner(project, tmp_path / "home", "plan", "params.yaml", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 4 and told["peak_bytes"] > told["weight_bytes"] > 0
    assert {"packing_fill", "rows_cut", "left_out", "must_checkpoint", "seconds"} <= told.keys()
    assert not list((tmp_path / "home").glob("mlflow/*"))
    again = retuner(project, tmp_path / "home", "plan", "params.yaml")
    assert again.returncode == 0 and "4 steps at" in again.stdout


def test_a_device_that_is_not_there_is_said(inputs):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Unavailable, match="RETUNER_DEVICE"):
        make_plan(chats_of(inputs), base_of(inputs), params(), "cuda", inputs / "none.json")


def test_a_plan_says_nothing_but_itself(inputs, recwarn, capfd):
    plan(inputs)
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]
    assert capfd.readouterr() == ("", "")

"""A plan says what a training takes before it happens, and refuses what the machine cannot hold."""

import json
import random
import shutil
from dataclasses import replace

import pair_job
import pytest
from projects import make_project, retrain, retuner, states
from safetensors.numpy import load_file
from test_row_attention import packed
from training_job import PACK_TOKENS, Heard, base_of, chats_of, make_inputs, params, random_rows, run

from retuner import checkpoints, layer_probe, planner, planning_aside
from retuner.artifacts import PacksFacts
from retuner.base import load_model
from retuner.dpo import count_pairs
from retuner.errors import Refused, Unavailable
from retuner.layer_probe import layer_cost
from retuner.lora import put_adapter_on
from retuner.packing import PAD_ID
from retuner.planner import make_plan, record_outcome
from retuner.planning_aside import plan_aside
from retuner.row_attention import ROW_ATTENTION, attend_by_row, attends_by_row
from retuner.skeleton import read_skeleton
from retuner.step_load import step_load
from retuner.targets import choose_targets

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def plan(folder, speeds=None, several=(), **asked):
    return make_plan(
        *(chats_of(folder), base_of(folder), params(**asked), "cpu", speeds or folder / "none.json"), *several
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
    asked = params(precision=precision)
    kept = kept_by(inputs, asked, packed(ROW_ATTENTION, [list(range(40))] * 12))
    layer = layer_cost(inputs / "base", asked, "cpu", 40, 12, end_to_end=True)
    assert kept == pytest.approx(2 * 480 * layer.saved_bytes, rel=0.1)


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
    load = step_load(chats_of(inputs), params(**asked), at_once=2, by_row=True)
    places = (chats_of(inputs), base_of(inputs), params(**asked), "cuda", inputs / "none.json", 1, "ddp")
    assert planner._plan(load, *places).logit_bytes == (plan(inputs, **asked).logit_bytes if asked else 0)


def test_what_cannot_fit_is_refused_with_what_to_change(inputs):
    planned = replace(
        plan(inputs),
        process_bytes=0,
        activation_bytes=8 * GIB,
        other_activation_bytes=GIB,
        logit_bytes=GIB,
        batch_size=4,
        step_sequences=8,
    )
    fits = replace(planned, memory_bytes=10 * GIB)
    fits.refuse_what_cannot_fit()
    assert not fits.must_checkpoint
    assert fits.largest_batch_size == 4
    assert replace(planned, memory_bytes=19 * GIB).largest_batch_size == 8
    short = replace(planned, memory_bytes=5 * GIB)
    assert short.must_checkpoint
    with pytest.raises(Refused, match="train.gradient_checkpointing: auto") as refusal:
        short.refuse_what_cannot_fit()
    assert "5.0 GiB" in refusal.value.expected
    # An 8 GiB batch of four with 1 GiB of logits is 4.5 GiB of two.
    checkpointed = replace(short, gradient_checkpointing=True)
    assert checkpointed.largest_batch_size == 2
    with pytest.raises(Refused, match="batch_size: 2 and train.gradient_accumulation: 4.* 4.5 GiB"):
        checkpointed.refuse_what_cannot_fit()
    nothing = replace(planned, memory_bytes=GIB)
    assert nothing.largest_batch_size is None and not nothing.must_checkpoint
    assert any("fit neither way" in line for line in nothing.lines())
    with pytest.raises(Refused, match="max_tokens") as refusal:
        nothing.refuse_what_cannot_fit()
    assert "precision: bfloat16" in str(refusal.value) and "fsdp" not in str(refusal.value)
    for strategy, advised in (("ddp", True), ("fsdp", False)):
        several = replace(plan(inputs, several=(2, strategy)), memory_bytes=1)
        with pytest.raises(Refused, match="for each of 2 processes") as refusal:
            several.refuse_what_cannot_fit()
        assert ("--strategy fsdp" in refusal.value.do) is advised
        assert "fewer processes" in refusal.value.do


def test_what_is_set_already_is_not_advised(inputs):
    saving = plan(inputs, gradient_checkpointing="auto", precision="bfloat16")
    assert not any("bfloat16" in each or "gradient_checkpointing" in each for each in saving.savings)
    assert any("gradient_checkpointing: auto" in each for each in plan(inputs).savings)


def test_the_plan_decides_whether_to_checkpoint_activations(inputs, monkeypatch):
    kept, checkpointed = plan(inputs), plan(inputs, gradient_checkpointing=True)
    roomy = plan(inputs, gradient_checkpointing="auto")
    assert (roomy.decided, roomy.gradient_checkpointing) == (True, False)
    assert roomy.activation_bytes == kept.activation_bytes
    assert (kept.decided, checkpointed.decided) == (False, False)
    monkeypatch.setattr(planner, "_held", lambda device: 0)
    # Closer than a plan is right to.
    monkeypatch.setattr(planner, "_memory", lambda *asked: round(plan_bytes(kept) * 1.05))
    short = plan(inputs, gradient_checkpointing="auto")
    assert (short.decided, short.gradient_checkpointing) == (True, True)
    assert short.activation_bytes == checkpointed.activation_bytes
    assert "activations checkpointed" in short.summary()
    assert any("too little room" in line for line in short.lines())
    assert not plan(inputs).gradient_checkpointing
    monkeypatch.setattr(planner, "_memory", lambda *asked: round(plan_bytes(kept) * 1.2))
    assert not plan(inputs, gradient_checkpointing="auto").gradient_checkpointing


def plan_bytes(planned):
    return planned.peak_bytes - planned.process_bytes


def test_speeds_with_checkpoints_and_without_are_told_apart(inputs):
    kept, checkpointed, auto = (plan(inputs, gradient_checkpointing=asked) for asked in (False, True, "auto"))
    assert auto.speed_key == kept.speed_key != checkpointed.speed_key


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_padding_is_counted_as_batches_have_it(tmp_path, at_once):
    from retuner.packing import collator

    folder, rows = make_inputs(tmp_path, pack_tokens=None), random_rows()
    load = step_load(chats_of(folder), params(), at_once, by_row=True)
    assert load.batch_tokens == at_once * max(len(ids) for ids, _ in rows)
    assert not load.end_to_end
    draw, collate, computed, tokens = random.Random(0), collator(False, "sdpa"), 0, 0
    for _ in range(2000):
        batch = [dict(zip(("input_ids", "labels"), rows[draw.randrange(len(rows))])) for _ in range(at_once)]
        computed += collate(batch)["input_ids"].numel()
        tokens += sum(len(row["input_ids"]) for row in batch)
    assert load.padded == pytest.approx(computed / tokens, rel=0.02)
    assert (load.padded < 1.001) == (at_once == 1)


def packed_chats(folder, packs, pack_tokens):
    """They say that they are packed, into so many packs."""
    chats = chats_of(folder)
    fill = sum(len(ids) for ids, _ in random_rows()) / (packs * pack_tokens)
    facts = chats.facts.model_copy(update={"packs": PacksFacts(count=packs, fill=fill, rows_too_long=0)})
    return chats.model_copy(update={"facts": facts})


def test_packs_are_padded_where_attention_is_not_told_where_rows_end(inputs):
    chats = packed_chats(inputs, 14, PACK_TOKENS)
    told, not_told = (step_load(chats, params(), 2, by_row) for by_row in (True, False))
    assert told.end_to_end and told.padded == 1
    assert not not_told.end_to_end
    assert not_told.padded == pytest.approx(14 * PACK_TOKENS / told.counts.tokens)
    assert not_told.row_tokens == PACK_TOKENS > told.row_tokens
    assert told.batch_tokens == not_told.batch_tokens == 2 * PACK_TOKENS


@pytest.mark.parametrize(
    ("attention", "model_type", "told"),
    [
        ("sdpa", "phi3", True),
        ("sdpa", "llama", False),
        ("eager", "phi3", False),
        ("flash_attention_2", "llama", True),
    ],
)
def test_who_is_told_where_rows_end(tmp_path, attention, model_type, told):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert attends_by_row(tmp_path, attention) is told


def kept_by(folder, asked, batch):
    """Bytes that a real forward pass keeps for the backward pass, weights aside."""
    import torch

    base = load_model(folder / "base", asked.precision, asked.attention, "cpu")
    if asked.attention == "sdpa":
        attend_by_row(base)
    targets = choose_targets(asked.lora, read_skeleton(folder / "base"))
    model = put_adapter_on(base, asked.lora, targets).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=asked.precision == "bfloat16"),
    ):
        output = model.get_base_model().base_model(
            **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
        )
    assert output
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packs_keep_what_is_planned_whichever_attention(inputs, attention):
    """Eager attention keeps a number for every two tokens of a pack, of whatever rows."""
    rows = [list(range(16))] * 32
    asked = params(attention=attention, batch_size=1)
    planned = make_plan(
        packed_chats(inputs, 2, 512), base_of(inputs), asked, "cpu", inputs / "none.json"
    ).activation_bytes
    kept = kept_by(inputs, asked, packed(ROW_ATTENTION if attention == "sdpa" else "", rows))
    assert planned == pytest.approx(kept, rel=0.15)


def test_layers_below_the_first_that_learns_keep_nothing(inputs):
    rows = [list(range(40))] * 12
    batch = packed(ROW_ATTENTION, rows)
    all_of_them, last = (kept_by(inputs, params({"layers": layers}), batch) for layers in ("all", "1-1"))
    assert last < 0.6 * all_of_them
    planned = [plan(inputs, lora={"layers": layers}).activation_bytes for layers in ("all", "1-1")]
    assert planned[1] / planned[0] == pytest.approx(last / all_of_them, rel=0.1)
    # Gradients of what comes before all layers go through all.
    embeddings = plan(inputs, lora={"layers": "1-1", "modules_to_save": ("embed_tokens",)})
    assert embeddings.activation_bytes == pytest.approx(planned[0], rel=0.05)


def test_a_batch_has_no_more_than_there_is(inputs):
    """Thirty rows."""
    many, all_of_them = plan(inputs, batch_size=64), plan(inputs, batch_size=30)
    assert many.activation_bytes == all_of_them.activation_bytes
    epochs = plan(inputs, batch_size=8, gradient_accumulation=1, max_steps=None, epochs=3.0)
    assert epochs.steps == 12
    assert epochs.seconds * epochs.tokens_per_second == pytest.approx(3 * epochs.tokens)


def test_checkpoints_are_not_wanted_where_they_save_nothing(inputs):
    """Loading what will be rounded to float8 can take more than training."""
    kept = plan(inputs)
    short = replace(kept, memory_bytes=kept.peak_bytes)
    assert short.wants_checkpoints
    loading = replace(short, loading_bytes=kept.peak_bytes)
    assert not loading.wants_checkpoints
    assert not replace(kept, memory_bytes=2 * kept.peak_bytes).wants_checkpoints


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pair_job.make_inputs(tmp_path_factory.mktemp("pairs"))


def test_preference_pairs_are_planned_as_they_are_trained(pairs, tmp_path):
    asked, speeds = pair_job.params(max_steps=2), tmp_path / "speeds.json"
    planned = make_plan(chats_of(pairs), base_of(pairs), asked, "cpu", speeds)
    facts = pair_job.run(pairs, asked)
    counts = count_pairs(pairs / "chats")
    assert (planned.rows, planned.tokens, planned.steps) == (counts.rows, counts.tokens, 2)
    assert planned.trainable_parameters == facts.trainable_parameters
    assert planned.packing_fill == pytest.approx(facts.packing_fill)
    assert planned.reference_seconds > 0
    assert "for the reference" in planned.lines()[-1]
    record_outcome(pairs / "out" / "aside", planned, speeds)
    again = make_plan(chats_of(pairs), base_of(pairs), asked, "cpu", speeds)
    assert again.speed_from == "an earlier run"


def test_a_batch_of_pairs_is_as_long_as_its_longest_conversation(pairs):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    kinds = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(kinds, pair)) for pair in pair_job.random_pairs()]
    draw, collate, computed, tokens = random.Random(0), DataCollatorForPreference(PAD_ID), 0, 0
    load = step_load(chats_of(pairs), pair_job.params(), at_once=3, by_row=True)
    for _ in range(2000):
        batch = [rows[draw.randrange(len(rows))] for _ in range(3)]
        made = collate(batch)
        assert made["input_ids"].numel() <= load.batch_tokens
        computed += made["input_ids"].numel()
        tokens += int(made["attention_mask"].sum())
    assert load.padded == pytest.approx(computed / tokens, rel=0.02)


def test_pairs_are_not_planned_for_several_processes(pairs):
    with pytest.raises(Refused, match="one process"):
        make_plan(chats_of(pairs), base_of(pairs), pair_job.params(), "cpu", pairs / "none.json", 2)


def test_what_a_process_of_several_takes_is_its_share(inputs):
    """Of four sequences a step, two at a time."""
    alone, ddp, fsdp = plan(inputs), plan(inputs, several=(2, "ddp")), plan(inputs, several=(2, "fsdp"))
    assert [each.memory_bytes for each in (ddp, fsdp)] == [alone.memory_bytes // 2] * 2
    assert fsdp.adapter_bytes == alone.adapter_bytes // 2
    # On a CPU each loads the whole base.
    assert fsdp.loading_bytes == alone.weight_bytes > ddp.loading_bytes == 0
    assert [(each.batch_size, each.step_sequences) for each in (alone, ddp)] == [(2, 4), (2, 4)]
    four = plan(inputs, several=(4, "ddp"))
    assert (four.batch_size, four.step_sequences, four.steps) == (1, 4, alone.steps)
    assert four.activation_bytes == pytest.approx(alone.activation_bytes / 2, rel=0.01)
    assert four.weight_bytes == ddp.weight_bytes == alone.weight_bytes
    # Of two layers a quarter of each, and one whole; embedding, head and last norm stay.
    weights = load_file(inputs / "base" / "model.safetensors")
    layers = sum(each.nbytes for name, each in weights.items() if ".layers." in name)
    rest = sum(each.nbytes for name, each in weights.items() if ".layers." not in name)
    assert plan(inputs, several=(4, "fsdp")).weight_bytes == pytest.approx(layers * (1 / 4 + 1 / 2) + rest)
    assert len({each.speed_key for each in (alone, ddp, fsdp, four)}) == 4


@pytest.mark.parametrize(
    ("several", "asked", "said"),
    [
        ((3, "ddp"), {}, "3 processes"),
        ((2, "fsdp"), {"optimizer": "adafactor"}, "train.optimizer adafactor"),
    ],
)
def test_what_several_processes_cannot_train_is_not_planned(inputs, several, asked, said):
    for make in (make_plan, plan_aside):
        given = (chats_of(inputs), base_of(inputs), params(**asked), "cpu", inputs / "none.json", *several)
        with pytest.raises(Refused, match=said):
            make(*given)


def test_a_process_of_its_own_plans_for_several_as_this_one_would(inputs):
    given = (chats_of(inputs), base_of(inputs), params(), "cpu", inputs / "none.json", 2, "ddp")
    here, aside = make_plan(*given), plan_aside(*given)
    measured = {"tokens_per_second": 0.0, "seconds": 0.0, "process_bytes": 0}
    assert replace(here, **measured) == replace(aside, **measured)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning_aside.HelperProcess, "answer", lambda self: self.kill())
        assert replace(plan_aside(*given), **measured) == replace(here, **measured)
    empty = make_inputs(inputs / "empty", rows=[])
    with pytest.raises(Refused, match="no rows"):
        plan_aside(chats_of(empty), base_of(empty), *given[2:])


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
    # 12 steps of 2 x 2 rows, for these chats do not say that they are packed; 30 rows are 8 steps, the last of two.
    assert again.seconds == pytest.approx(12 * first.tokens / 8 / again.tokens_per_second)
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
    layer_probe._measured.cache_clear()
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

    plan_of = planning_aside.make_plan
    monkeypatch.setattr(planning_aside, "make_plan", too_large)
    with pytest.raises(Refused, match="GiB"):
        retrain(("train.seed=9",))


def test_what_the_plan_decides_is_in_the_facts_and_not_in_the_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    made = {}
    for name, safe in (("kept", 0.9), ("checkpointed", 0.0)):
        monkeypatch.setattr("retuner.plan.SAFE", safe)
        context = retrain(("train.gradient_checkpointing=auto",), home=tmp_path / name)
        train = next(record.fingerprint for record in context.records if record.name == "train")
        facts = context.store.manifest(train)["facts"]
        made[name] = (train, facts["sha256"])
        assert facts["effective"]["gradient_checkpointing"] == str(name == "checkpointed")
    assert made["kept"] == made["checkpointed"]


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

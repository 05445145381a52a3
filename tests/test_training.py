"""An adapter learns what its rows say, the same bytes every time, killed on the way or not."""

import json

import pytest
from training_job import STEPS, Heard, killed_thrice, make_inputs, params, random_rows, run, trainings

from retuner.errors import Refused, RetunerError, Unavailable
from retuner.files import sha256_file
from retuner.lora import WEIGHTS
from retuner.training import planned_steps


@pytest.fixture(scope="module")
def job():
    with trainings() as start:
        yield start


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder, facts and listener of one training that nothing happened to."""
    folder, heard = make_inputs(tmp_path_factory.mktemp("undisturbed")), Heard()
    facts = run(folder, observer=heard)
    return folder, facts, heard


def adapted_tiny(folder, attention="sdpa", dropout=0.0):
    """A tiny model with an adapter that does something."""
    import torch

    from retuner.base import load_model
    from retuner.lora import put_adapter_on
    from retuner.skeleton import read_skeleton
    from retuner.targets import choose_targets

    asked = params(lora={"dropout": dropout}).lora
    targets = choose_targets(asked, read_skeleton(folder / "base"))
    torch.manual_seed(0)
    model = put_adapter_on(load_model(folder / "base", "float32", attention, "cpu"), asked, targets)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def sequences_of(folder):
    from retuner.packing import lay_out, read_rows

    chats = folder / "chats"
    return lay_out(read_rows(chats / "train.arrow"), chats / "packs.arrow", folder / "packed.arrow")[0]


def packed_batch(folder):
    """All rows, packed, as one batch; and the packs it is made of."""
    from retuner.packing import collate_packed

    packs = sequences_of(folder).to_list()
    return collate_packed(packs), packs


def rows_of(packs):
    import torch

    for pack in packs:
        ends = [sum(pack["seq_lengths"][: n + 1]) for n in range(len(pack["seq_lengths"]))]
        for start, end in zip([0, *ends], ends, strict=False):
            yield torch.tensor([pack["input_ids"][start:end]]), torch.tensor([pack["labels"][start:end]])


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# --- what is learned


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(inputs, attention):
    """Logits and gradients of packed rows equal those of the rows one by one."""
    import torch

    from retuner.row_trainer import supervised_loss

    batch, packs = packed_batch(inputs)
    tokens = batch.pop("tokens")
    assert sum(len(pack["seq_lengths"]) for pack in packs) > 2 * len(packs), "nothing was packed"
    assert batch["input_ids"].numel() > tokens, "no padding, so its effect would not show"
    model = adapted_tiny(inputs, attention)

    places = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        packed = model(**places, use_cache=False).logits
        alone = [model(input_ids=ids, use_cache=False).logits[0] for ids, _ in rows_of(packs)]
    found = [packed[line, : len(pack["input_ids"])] for line, pack in enumerate(packs)]
    torch.testing.assert_close(torch.cat(found), torch.cat(alone), atol=1e-5, rtol=0)

    supervised_loss(model.get_base_model(), dict(batch), items=100).backward()
    together = gradients(model)
    model.zero_grad()
    for ids, labels in rows_of(packs):
        supervised_loss(model.get_base_model(), {"input_ids": ids, "labels": labels}, items=100).backward()
    one_by_one = gradients(model)
    assert together.keys() == one_by_one.keys()
    for name in together:
        torch.testing.assert_close(together[name], one_by_one[name], atol=1e-5, rtol=0)


def test_rows_are_packed_whole_and_none_is_lost(inputs):
    from retuner.packing import NO_LOSS

    _, packs = packed_batch(inputs)
    found = sorted((ids[0].tolist(), labels[0].tolist()) for ids, labels in rows_of(packs))
    assert found == sorted(random_rows())
    assert max(len(pack["input_ids"]) for pack in packs) <= 64
    batch, _ = packed_batch(inputs)
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == NO_LOSS).all()


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_that_of_trl(inputs, packed):
    """TRL makes logits for every position; ours only where there is loss."""
    import torch

    from retuner.packing import read_rows
    from retuner.row_trainer import row_trainer, supervised_loss
    from retuner.step_log import StepLog

    rows = sequences_of(inputs) if packed else read_rows(inputs / "chats" / "train.arrow")
    model = adapted_tiny(inputs)
    asked, log = params(batch_size=4), StepLog(1, 1, Heard())
    trainer = row_trainer(model, rows, packed, asked, 1, "cpu", inputs, log)
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("tokens", None)
    items = torch.tensor(50)
    theirs = super(type(trainer), trainer).compute_loss(model, dict(batch), num_items_in_batch=items)
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    ours = supervised_loss(model.get_base_model(), dict(batch), items)
    ours.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0)


def test_packing_changes_the_speed_and_not_what_is_learned(tmp_path):
    """One step over all rows, packed and padded."""
    from safetensors.torch import load_file
    from torch.testing import assert_close

    one_step = {
        "max_steps": 1,
        "batch_size": 30,
        "gradient_accumulation": 1,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "warmup_fraction": 0.0,
        "lora": {"dropout": 0.0},
    }
    weights = []
    for name, pack_tokens in (("packed", 64), ("padded", None)):
        folder = make_inputs(tmp_path / name, pack_tokens=pack_tokens)
        run(folder, params(**one_step))
        weights.append(load_file(folder / "out" / WEIGHTS))
    assert_close(*weights, atol=1e-6, rtol=0)


def test_the_loss_falls(undisturbed):
    _, facts, heard = undisturbed
    losses = [values["loss"] for _, values in heard.points]
    assert losses[-1] < losses[0] - 0.5
    assert facts.final_loss == losses[-1]


@pytest.mark.parametrize(
    "sequences,changed,expected",
    [
        (10, {"max_steps": 7, "epochs": None}, 7),
        (10, {"max_steps": None, "epochs": 1.0}, 3),
        (10, {"max_steps": None, "epochs": 2.5}, 8),
        (1, {"max_steps": None, "epochs": 0.1}, 1),
    ],
)
def test_epochs_are_counted_in_steps_of_batch_times_accumulation(sequences, changed, expected):
    assert planned_steps(sequences, params(batch_size=2, gradient_accumulation=2, **changed)) == expected


def test_epochs_train_every_row_that_often(tmp_path):
    heard = Heard()
    asked = params(max_steps=None, epochs=2.0, batch_size=4, gradient_accumulation=2)
    facts = run(make_inputs(tmp_path, pack_tokens=None), asked, heard)
    assert facts.trained_steps == heard.steps[-1] == 8
    assert heard.steps == list(range(1, 9))


def test_warm_up_takes_its_share_of_the_steps(inputs):
    heard = Heard()
    asked = params(max_steps=4, schedule="constant_with_warmup", warmup_fraction=0.5, log_every_steps=1)
    run(inputs, asked, heard)
    assert [values["learning_rate"] for _, values in heard.points] == pytest.approx([0.0, 0.005, 0.01, 0.01])


# --- the same bytes


def test_another_process_folder_and_hash_seed_give_the_same_bytes(undisturbed, job, tmp_path):
    folder = make_inputs(tmp_path / "elsewhere" / "deep")
    assert job(folder).wait() == 0
    (out,) = folder.glob("out-*")
    for name in (WEIGHTS, "adapter_config.json"):
        assert sha256_file(out / name) == sha256_file(undisturbed[0] / "out" / name)


def test_a_training_killed_thrice_ends_in_the_same_bytes(undisturbed, job, inputs):
    done = killed_thrice(inputs, job, (2, 6, 8))
    assert any("going on after step-" in line for line in done["lines"])
    assert done["sha256"] == undisturbed[1].sha256


def test_a_damaged_checkpoint_is_told_and_costs_steps_not_the_result(undisturbed, inputs):
    _, facts, first = undisturbed
    with pytest.raises(KeyboardInterrupt):
        run(inputs, observer=Heard(die_after=9), out="died")
    (inputs / "work" / "sealed" / "step-8" / "optimizer.pt").write_bytes(b"")
    heard = Heard()
    again = run(inputs, observer=heard)
    assert any("step-8 is not used" in line and "optimizer.pt" in line for line in heard.lines)
    assert any("going on after step-6" in line for line in heard.lines)
    assert heard.steps == list(range(7, STEPS + 1))
    assert again.sha256 == facts.sha256
    assert again.final_loss == facts.final_loss

    def told(folder):
        lines = (folder / "out" / "aside" / "metrics.jsonl").read_text().splitlines()
        points = [json.loads(line) for line in lines]
        same = ("loss", "learning_rate", "grad_norm")
        return [(point["step"], [point["metrics"][name] for name in same]) for point in points]

    assert told(inputs) == told(undisturbed[0])
    assert [step for step, _ in told(inputs)] == [5, 10, 12] == [step for step, _ in first.points]


def test_gradient_checkpointing_saves_memory_and_changes_nothing(undisturbed, inputs):
    assert run(inputs, params(gradient_checkpointing=True)).sha256 == undisturbed[1].sha256


@pytest.mark.parametrize(
    "asked",
    [
        {"attention": "eager"},
        {"quantization": {"kind": "float8", "double": False}, "precision": "bfloat16"},
        {"stop_early": {"every_steps": 4, "patience": 2, "min_improvement": 0.0}},
    ],
    ids=["eager", "float8", "stop_early"],
)
def test_gradient_checkpointing_changes_nothing_whatever_else_is_asked(tmp_path, asked):
    folder, asked = make_inputs(tmp_path), {**asked, "max_steps": 6}
    kept, checkpointed = (
        run(folder, params(gradient_checkpointing=each, **asked), out=f"out-{each}", work=f"work-{each}")
        for each in (False, True)
    )
    assert kept.sha256 == checkpointed.sha256
    assert [each.effective["gradient_checkpointing"] for each in (kept, checkpointed)] == ["False", "True"]


def test_another_seed_is_another_adapter(undisturbed, inputs):
    assert run(inputs, params(seed=2)).sha256 != undisturbed[1].sha256


# --- what is written and said


def test_what_is_published_names_no_place_of_this_machine(undisturbed):
    folder, facts, _ = undisturbed
    out = folder / "out"
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "adapter_config.json",
        WEIGHTS,
        "aside/effective.json",
        "aside/metrics.jsonl",
    ]
    assert facts.sha256 == sha256_file(out / WEIGHTS)
    for path in out.glob("adapter_*"):
        assert path.stat().st_mode & 0o777 == 0o644
        assert str(folder).encode() not in path.read_bytes()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_the_chats_folder_is_left_as_it_was(undisturbed):
    names = sorted(path.name for path in (undisturbed[0] / "chats").iterdir())
    assert names == ["held_out.arrow", "packs.arrow", "train.arrow"]


def test_it_says_how_much_learns_how_much_carries_loss_and_how_full_the_packs_are(undisturbed):
    folder, facts, heard = undisturbed
    rows = random_rows()
    tokens = sum(len(ids) for ids, _ in rows)
    supervised = sum(label != -100 for _, labels in rows for label in labels)
    _, packs = packed_batch(folder)
    assert facts.packing_fill == pytest.approx(tokens / (len(packs) * 64))
    assert facts.adapted_modules == {"down_proj": 2, "gate_up_proj": 2, "o_proj": 2, "qkv_proj": 2}
    # Rank 4 times inputs plus outputs of each layer.
    assert facts.trainable_parameters == 2 * 4 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))
    (line,) = heard.lines
    assert f"{facts.trainable_parameters:,} of {facts.total_parameters:,} parameters learn" in line
    assert f"{100 * supervised / tokens:.0f} % of {tokens:,} tokens carry loss" in line
    assert f"packing fills {100 * facts.packing_fill:.1f} %" in line


def test_it_says_what_it_really_ran_with(undisturbed, inputs):
    expected = {"attention": "sdpa", "dtype": "float32", "use_cache": "False", "device": "cpu"}
    assert expected.items() <= undisturbed[1].effective.items()
    other = run(inputs, params(attention="eager", precision="bfloat16", max_steps=1))
    assert {"attention": "eager", "dtype": "bfloat16"}.items() <= other.effective.items()


def test_a_bfloat16_run_keeps_the_adapter_in_float32(inputs):
    from safetensors.torch import load_file

    run(inputs, params(precision="bfloat16", max_steps=2))
    assert {str(weight.dtype) for weight in load_file(inputs / "out" / WEIGHTS).values()} == {"torch.float32"}


def test_after_a_bfloat16_run_a_float32_run_of_the_same_process_is_float32(undisturbed, inputs):
    run(inputs, params(precision="bfloat16", max_steps=1), out="other", work="other-work")
    assert run(inputs).sha256 == undisturbed[1].sha256


def test_progress_comes_every_step_and_metrics_as_often_as_asked(undisturbed):
    _, _, heard = undisturbed
    assert heard.steps == list(range(1, STEPS + 1))
    assert [step for step, _ in heard.points] == [5, 10, 12]
    named = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mb"}
    assert all(values.keys() == named for _, values in heard.points)


def test_nothing_is_printed(inputs, capfd):
    run(inputs, params(max_steps=2))
    assert capfd.readouterr().out == ""


# --- what is refused


@pytest.mark.parametrize(
    "changed,error,told",
    [
        ({"lora": {"targets": ("query",)}}, Refused, "query"),
        ({"attention": "flash_attention_2"}, Refused, "sdpa"),
        ({"schedule": "constant"}, Refused, "constant_with_warmup"),
        ({"device": "cuda"}, Unavailable, "RETUNER_DEVICE"),
    ],
    ids=["target", "attention", "warm-up", "device"],
)
def test_what_cannot_work_is_refused_before_the_weights_are_loaded(inputs, changed, error, told):
    import torch

    device = changed.get("device", "cpu")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (inputs / "base" / "model.safetensors").unlink()
    asked = {name: value for name, value in changed.items() if name != "device"}
    with pytest.raises(error) as refusal:
        run(inputs, params(**asked), device=device)
    assert told in str(refusal.value)
    assert list((inputs / "out").iterdir()) == []


@pytest.mark.parametrize(
    "rows,told", [([], "no rows"), ([([1, 2, 3], [-100, -100, -100])], "none of 3 tokens")]
)
def test_nothing_to_learn_is_refused(tmp_path, rows, told):
    with pytest.raises(Refused, match=told):
        run(make_inputs(tmp_path, rows))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_a_training_that_diverges_stops_within_a_step_and_leaves_nothing(inputs, optimizer):
    heard = Heard()
    asked = params(learning_rate=1e30, optimizer=optimizer, warmup_fraction=0.0, checkpoint_every_steps=1)
    with pytest.raises(RetunerError, match="step") as error:
        run(inputs, asked, heard)
    assert error.value.exit_code == 1
    assert len(heard.steps) <= 2
    assert list((inputs / "out").iterdir()) == []


def test_weights_that_stop_being_finite_in_the_last_step_are_not_written(inputs):
    # Gradients of more than one times the largest float.
    step = {"learning_rate": 3e38, "optimizer": "sgd", "warmup_fraction": 0.0, "max_grad_norm": 1e9}
    asked = params(max_steps=1, **step, lora={"alpha": 1e6})
    with pytest.raises(RetunerError, match="not finite"):
        run(inputs, asked)
    assert list((inputs / "out").iterdir()) == []

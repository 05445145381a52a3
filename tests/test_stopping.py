"""Training stops when the held-out loss does, keeps the best step, and decides alike however often it is killed."""

import json

import pytest
from training_job import Heard, killed_thrice, make_inputs, params, run, trainings

from retuner.base import load_model


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


@pytest.fixture(scope="module")
def job():
    with trainings() as start:
        yield start


STOPPING = {"schedule": "constant", "warmup_fraction": 0.0, "checkpoint_every_steps": 3}


def stopping(lora=None, **changed):
    early = {"every_steps": 2, "patience": 2, "min_improvement": 0.0}
    return params(lora, **{**STOPPING, "max_steps": 40, "stop_early": early, **changed})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Random rows teach nothing about others, so the held-out loss soon rises."""
    folder, heard = make_inputs(tmp_path_factory.mktemp("stopped")), Heard()
    return folder, run(folder, stopping(), heard), heard


def held_out(points):
    return {step: values["held_out_loss"] for step, values in points if "held_out_loss" in values}


def test_training_stops_when_the_held_out_loss_stops_falling(stopped, inputs):
    _, facts, heard = stopped
    losses = held_out(heard.points)
    best = min(losses, key=losses.get)
    assert sorted(losses) == list(range(2, best + 5, 2)), "every second step, until twice nothing was gained"
    assert facts.trained_steps == best
    assert heard.steps[-1] == best + 4
    # The best step is not where the run ended, and measuring draws nothing: as if it had been told to end there.
    assert run(inputs, params(**STOPPING, max_steps=best)).sha256 == facts.sha256


def test_the_measured_loss_is_that_of_the_report(stopped):
    from retuner.evaluation import read_held_out, row_losses
    from retuner.generation import adapter_on

    folder, facts, heard = stopped
    rows = read_held_out(folder / "chats" / "held_out.arrow")
    model = load_model(folder / "base", "float32", "sdpa", "cpu")
    with adapter_on(model, folder / "out"):
        losses = row_losses(model, rows, 3, lambda done, total: None)
    tokens = [row["tokens"] for row in rows]
    mean = sum(loss * count for loss, count in zip(losses, tokens)) / sum(tokens)
    assert held_out(heard.points)[facts.trained_steps] == pytest.approx(mean, abs=1e-5)


def test_it_says_that_held_out_rows_chose_the_step(stopped):
    folder, facts, heard = stopped
    told = f"step {facts.trained_steps} of {heard.steps[-1]} done and 40 planned: the lowest loss of 6 held-out rows"
    assert facts.effective["chosen"].startswith(told)
    assert "better than new rows' would be" in facts.effective["chosen"]
    assert any(told in line for line in heard.lines)
    lines = map(json.loads, (folder / "out" / "aside" / "metrics.jsonl").read_text().splitlines())
    assert held_out((line["step"], line["metrics"]) for line in lines) == held_out(heard.points)


@pytest.mark.parametrize("die_after", [3, "best", "best + 3"])
def test_patience_and_the_best_step_survive_a_kill(stopped, inputs, die_after):
    _, facts, first = stopped
    step = eval(str(die_after), {"best": facts.trained_steps})
    with pytest.raises(KeyboardInterrupt):
        run(inputs, stopping(), Heard(die_after=step), out="died")
    heard = Heard()
    again = run(inputs, stopping(), heard)
    assert (again.sha256, again.trained_steps) == (facts.sha256, facts.trained_steps)
    assert heard.steps[-1] == first.steps[-1]
    assert again.effective["chosen"] == facts.effective["chosen"]


def test_a_run_that_lost_its_best_step_finds_it_again(stopped, inputs):
    _, facts, _ = stopped
    best = facts.trained_steps
    with pytest.raises(KeyboardInterrupt):
        run(inputs, stopping(), Heard(die_after=best + 4), out="died")
    (inputs / "work" / "sealed" / f"step-{best}" / "adapter_model.safetensors").write_bytes(b"")
    heard = Heard()
    assert run(inputs, stopping(), heard).sha256 == facts.sha256
    assert any(f"step-{best}, which it needs" in line for line in heard.lines)


def test_an_improvement_below_the_smallest_that_counts_is_none(inputs):
    early = {"every_steps": 1, "patience": 3, "min_improvement": 100.0}
    heard = Heard()
    run(inputs, stopping(stop_early=early), heard)
    assert heard.steps[-1] == 4, "the first measurement, and three that improved it too little"


EVERYTHING = stopping(
    {
        "targets": ("q_proj", "v_proj", "o_proj"),
        "modules_to_save": ("norm",),
        "dropout": 0.2,
        "learning_rate_ratio": 4.0,
    },
    noise_alpha=5.0,
    label_smoothing=0.1,
    gradient_checkpointing=True,
    learning_rate=3e-3,
)
OTHERS = {
    "pissa, dora": stopping({"init": "pissa_fast", "dora": True, "dropout": 0.2}),
    "embeddings": stopping({"targets": ("embed_tokens", "o_proj"), "dropout": 0.2}, optimizer="adafactor"),
}


def test_everything_at_once_killed_thrice_ends_in_the_same_bytes(inputs, job, tmp_path):
    undisturbed = run(make_inputs(tmp_path / "elsewhere"), EVERYTHING)
    (inputs / "asked.json").write_text(EVERYTHING.model_dump_json())
    done = killed_thrice(inputs, job, (2, 4, 6))
    assert any("going on after step-" in line for line in done["lines"])
    assert done["sha256"] == undisturbed.sha256


@pytest.mark.parametrize("asked", OTHERS.values(), ids=OTHERS)
def test_other_kinds_go_on_after_a_kill_too(inputs, asked):
    expected = run(inputs, asked, out="undisturbed", work="other-work")
    with pytest.raises(KeyboardInterrupt):
        run(inputs, asked, Heard(die_after=5), out="died")
    heard = Heard()
    assert run(inputs, asked, heard).sha256 == expected.sha256
    assert any("going on after" in line for line in heard.lines)

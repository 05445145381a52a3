"""Several processes learn what one does, and each goes on where the other was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from projects import ROOT
from safetensors.torch import load_file
from torch.testing import assert_close
from training_job import Heard, base_of, chats_of, make_inputs, params, run

from retuner.errors import Refused, RetunerError, Unavailable
from retuner.launch import train_in_processes
from retuner.lora import WEIGHTS
from retuner.ranks import EvenOrder, share
from retuner.runtime import Runtime

STEPS, TOLERANCE = 20, 1e-4
both = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


def asked(**changed):
    """Ten sequences at a time, five for each of two processes; the last step of an epoch has two."""
    sizes = {"max_steps": STEPS, "batch_size": 10, "gradient_accumulation": 1}
    chosen = {**sizes, "log_every_steps": 1, "checkpoint_every_steps": 3}
    return params({"dropout": 0.0}, **{**chosen, **changed})


def together(
    folder, wanted, observer=None, out="out", work="work", processes=2, device="cpu", strategy="ddp"
):
    (folder / out).mkdir()
    (folder / work).mkdir(exist_ok=True)
    places = folder / out, folder / work, chats_of(folder), base_of(folder)
    return train_in_processes(*places, wanted, device, observer or Heard(), None, processes, strategy)


def curve(heard):
    return {step: (values["loss"], values["grad_norm"]) for step, values in heard.points}


def assert_same_curve(found, expected):
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=TOLERANCE), step


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder and the listener of one process."""
    folder, heard = make_inputs(tmp_path_factory.mktemp("alone")), Heard()
    run(folder, asked(), heard)
    return folder, heard


class Ended(Exception):
    """What the handler that was there before makes of SIGTERM."""


@pytest.fixture
def ends_by_sigterm():
    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


class Interrupting(Heard):
    """Sends a signal to the process of a rank, or to this one, once it hears of a step."""

    def __init__(self, after, number, rank=None):
        super().__init__()
        self.after, self.number, self.rank = after, number, rank

    def progress(self, what, done, total, note=""):
        super().progress(what, done, total, note)
        if done == self.after:
            os.kill(os.getpid() if self.rank is None else pid_of(self.rank), self.number)


def ranks(parent=None):
    """Rank to process, of those that the launcher below this process or another has started."""
    found = {}
    for each in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended just now
            if "RANK" in (told := each.environ()):
                found[int(told["RANK"])] = each
    return found


def pid_of(rank):
    return ranks()[rank].pid


def tokens_a_step(folder):
    state = json.loads((folder / "work" / "sealed" / "step-18" / "trainer_state.json").read_bytes())
    return [entry["tokens"] for entry in state["log_history"]]


# --- the same training


def check_two_learn_what_one_does(alone, folder, strategy):
    heard = Heard()
    facts = together(make_inputs(folder), asked(), heard, strategy=strategy)
    assert_same_curve(curve(heard), curve(alone[1]))
    assert heard.steps == list(range(1, STEPS + 1))
    assert heard.lines == alone[1].lines
    learned = [load_file(place / "out" / WEIGHTS) for place in (folder, alone[0])]
    assert_close(*learned, atol=TOLERANCE, rtol=0)
    assert tokens_a_step(folder) == tokens_a_step(alone[0])
    # What it came to, not what was asked: accelerate's own FSDP on a CPU is DDP.
    assert (facts.effective["processes"], facts.effective["strategy"]) == ("2", strategy)


@pytest.mark.slow
def test_two_learn_beside_a_base_in_float8(tmp_path):
    float8 = {"quantization": {"kind": "float8", "double": False}, "precision": "bfloat16", "max_steps": 3}
    one, two = Heard(), Heard()
    run(make_inputs(tmp_path / "one"), asked(**float8), one)
    facts = together(make_inputs(tmp_path / "two"), asked(**float8), two)
    assert facts.effective["quantization"].startswith("float8, 8 layers")
    # Products in bfloat16 and float8 come out otherwise where a batch is cut otherwise.
    for step, (loss, norm) in curve(one).items():
        assert curve(two)[step] == pytest.approx((loss, norm), rel=0.02)


def test_two_processes_learn_what_one_does(alone, tmp_path):
    check_two_learn_what_one_does(alone, tmp_path, "ddp")


@pytest.mark.slow
@both
def test_checkpointed_activations_change_nothing(tmp_path, strategy):
    made = [
        together(
            make_inputs(tmp_path / name), asked(max_steps=3, gradient_checkpointing=each), strategy=strategy
        )
        for name, each in (("kept", False), ("checkpointed", True))
    ]
    assert made[0].sha256 == made[1].sha256
    assert [each.effective["gradient_checkpointing"] for each in made] == ["False", "True"]


@pytest.mark.slow
def test_two_processes_with_half_the_base_each_learn_what_one_does(alone, tmp_path):
    check_two_learn_what_one_does(alone, tmp_path, "fsdp")


def check_one_goes_on_where_two_died(alone, folder, strategy):
    heard = Interrupting(4, signal.SIGKILL, rank=1)
    with pytest.raises(RetunerError, match="2 processes that trained together died") as error:
        together(make_inputs(folder), asked(), heard, out="died", strategy=strategy)
    assert "SIGKILL" in str(error.value)
    assert heard.steps[-1] < STEPS
    assert ranks() == {}
    again = Heard()
    run(folder, asked(), again)
    assert any("going on after step-" in line and "which 2 made" in line for line in again.lines)
    assert_same_curve({**curve(heard), **curve(again)}, curve(alone[1]))


def test_a_killed_rank_ends_the_training_and_one_process_can_go_on(alone, tmp_path):
    check_one_goes_on_where_two_died(alone, tmp_path, "ddp")


@pytest.mark.slow
def test_one_process_can_go_on_from_a_checkpoint_of_a_base_in_parts(alone, tmp_path):
    check_one_goes_on_where_two_died(alone, tmp_path, "fsdp")


@pytest.mark.slow
@both
def test_what_one_process_began_two_can_finish(alone, tmp_path, strategy):
    folder, heard = make_inputs(tmp_path), Heard(die_after=7)
    with pytest.raises(KeyboardInterrupt):
        run(folder, asked(), heard, out="died")
    again = Heard()
    together(folder, asked(), again, strategy=strategy)
    assert any("going on after step-6 of 20, which 1 made; from here 2 train" in line for line in again.lines)
    assert again.steps == list(range(7, STEPS + 1))
    assert_same_curve({**curve(heard), **curve(again)}, curve(alone[1]))


# --- the same bytes, for the same number of processes

NOISY = params(noise_alpha=5.0, max_steps=30, batch_size=5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Strategy to what two processes end in, with dropout and noise."""
    return {
        strategy: together(make_inputs(tmp_path_factory.mktemp(strategy)), NOISY, strategy=strategy).sha256
        for strategy in ("ddp", "fsdp")
    }


@pytest.mark.slow
@both
@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_kill_of_a_rank_two_processes_end_in_the_same_bytes(undisturbed, tmp_path, rank, strategy):
    folder = make_inputs(tmp_path)
    with pytest.raises(RetunerError):
        together(folder, NOISY, Interrupting(9, signal.SIGKILL, rank), out="died", strategy=strategy)
    heard = Heard()
    assert together(folder, NOISY, heard, strategy=strategy).sha256 == undisturbed[strategy]
    assert any("going on after step-" in line and "made" not in line for line in heard.lines)


@pytest.mark.slow
@both
def test_sigterm_lets_all_ranks_finish_their_step(undisturbed, ends_by_sigterm, tmp_path, strategy):
    folder, heard = make_inputs(tmp_path), Interrupting(9, signal.SIGTERM)
    with pytest.raises(Ended):
        together(folder, NOISY, heard, out="terminated", strategy=strategy)
    step = heard.steps[-1]
    assert 9 < step < 30
    assert heard.lines[-1] == f"train: stopped by SIGTERM after step {step} of 30; run again to go on"
    again = Heard()
    assert together(folder, NOISY, again, strategy=strategy).sha256 == undisturbed[strategy]
    assert again.steps[0] == step + 1


@pytest.mark.slow
def test_sigterm_to_all_processes_of_the_machine_costs_no_step(ends_by_sigterm, tmp_path):
    """As systemd and Slurm stop what they started. A rank hears of it from its launcher and its parent as well."""

    class Cancelled(Heard):
        def progress(self, what, done, total, note=""):
            super().progress(what, done, total, note)
            if done == 5:
                below = [*ranks().values(), psutil.Process(pid_of(0)).parent()]
                os.kill(os.getpid(), signal.SIGTERM)
                for each in below * 2:
                    with suppress(psutil.NoSuchProcess):
                        each.send_signal(signal.SIGTERM)
                    time.sleep(0.01)

    # Long steps, so that it comes in the middle of one.
    wanted = asked(max_steps=20, batch_size=2, gradient_accumulation=40, checkpoint_every_steps=100)
    folder, heard = make_inputs(tmp_path), Cancelled()
    with pytest.raises(Ended):
        together(folder, wanted, heard)
    step = heard.steps[-1]
    assert 5 < step < 20
    assert heard.lines[-1] == f"train: stopped by SIGTERM after step {step} of 20; run again to go on"
    assert (folder / "work" / "sealed" / f"step-{step}" / "manifest.json").exists()
    assert ranks() == {}


def test_sigterm_while_the_launcher_starts_is_passed_on(ends_by_sigterm, tmp_path, monkeypatch):
    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    heard = Heard()
    with pytest.raises(Ended):
        together(make_inputs(tmp_path), asked(max_steps=100_000), heard)
    assert heard.steps == [] and ranks() == {}


@pytest.mark.slow
@both
def test_two_processes_learn_in_bfloat16(tmp_path, strategy):
    heard = Heard()
    together(make_inputs(tmp_path), asked(precision="bfloat16"), heard, strategy=strategy)
    losses = [values["loss"] for _, values in heard.points]
    assert losses[-1] < losses[0] - 0.5
    learned = load_file(tmp_path / "out" / WEIGHTS)
    assert {str(weight.dtype) for weight in learned.values()} == {"torch.float32"}


@pytest.mark.slow
def test_two_processes_stop_early_where_one_does(tmp_path):
    early = {"every_steps": 2, "patience": 2, "min_improvement": 0.0}
    wanted = asked(max_steps=40, schedule="constant", warmup_fraction=0.0, stop_early=early)
    one, two = make_inputs(tmp_path / "one"), make_inputs(tmp_path / "two")
    expected, found = run(one, wanted), together(two, wanted)
    assert found.trained_steps == expected.trained_steps < 40
    assert found.effective["chosen"] == expected.effective["chosen"]


@pytest.mark.slow
def test_ranks_do_not_outlive_who_asked_for_them(tmp_path):
    make_inputs(tmp_path)
    program = (
        "from pathlib import Path\n"
        "from test_processes import *\n"
        f"together(Path({str(tmp_path)!r}), asked(max_steps=100000))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    wait_until(lambda: list((tmp_path / "work").glob("sealed/step-*")))
    started = psutil.Process(parent.pid).children(recursive=True)
    assert len(started) >= 3, "a launcher and two ranks"
    parent.kill()
    parent.wait()
    wait_until(
        lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    )


def wait_until(ask, seconds=120):
    deadline = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- shares


@pytest.mark.parametrize(
    "batch_size,accumulation,processes,expected",
    [
        (4, 2, 1, (4, 2)),
        (4, 2, 2, (4, 1)),
        (8, 1, 4, (2, 1)),
        (3, 4, 6, (2, 1)),
        (5, 2, 2, (5, 1)),
        (1, 8, 2, (1, 4)),
    ],
)
def test_the_sequences_of_a_step_are_shared_out(batch_size, accumulation, processes, expected):
    wanted = params(batch_size=batch_size, gradient_accumulation=accumulation)
    assert share(wanted, processes) == expected


def test_another_batch_than_the_params_say_is_refused(tmp_path):
    with pytest.raises(Refused, match="4 sequences a step, for 3 processes"):
        together(make_inputs(tmp_path), params(), processes=3)


def test_more_processes_than_gpus_are_refused(tmp_path):
    import torch

    count = torch.cuda.device_count() + 1
    with pytest.raises(Unavailable, match="CUDA devices"):
        together(make_inputs(tmp_path), params(batch_size=count), processes=count, device="cuda")


def test_every_sequence_comes_once_an_epoch_and_batches_are_even():
    order = EvenOrder(12, seed=3, together=10)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        drawn = list(order)
        assert len(drawn) == len(order) == 20
        assert sorted(drawn[:12]) == list(range(12))
        assert drawn[12:] == [12] * 8
        epochs.append(drawn)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", ["0", "two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, processes):
    monkeypatch.setenv("RETUNER_PROCESSES", processes)
    with pytest.raises(Refused, match="RETUNER_PROCESSES"):
        Runtime()


@pytest.mark.parametrize(
    "changed,told",
    [
        ({"stop_early": {"every_steps": 2, "patience": 2, "min_improvement": 0.0}}, "train.stop_early"),
        ({"lora": {"init": "pissa"}}, "train.lora.init pissa"),
        ({"kernels": "liger"}, "train.kernels liger"),
        ({"lora": {"modules_to_save": ("norm",)}}, "train.lora.modules_to_save"),
        ({"lora": {"targets": ("q_proj",)}}, "parts of fused layers"),
    ],
)
def test_what_does_not_go_with_a_base_in_parts_is_refused(tmp_path, changed, told):
    with pytest.raises(Refused, match=told) as refusal:
        together(make_inputs(tmp_path), params(**changed), strategy="fsdp")
    assert "ddp" in str(refusal.value)


@pytest.mark.slow
def test_an_optimizer_that_keeps_nothing_goes_on_with_a_base_in_parts(tmp_path):
    wanted = asked(optimizer="sgd", max_steps=8)
    folder, heard = make_inputs(tmp_path), Interrupting(5, signal.SIGKILL, rank=1)
    with pytest.raises(RetunerError, match="SIGKILL"):
        together(folder, wanted, heard, out="died", strategy="fsdp")
    again = Heard()
    together(folder, wanted, again, strategy="fsdp")
    assert any("going on after step-" in line for line in again.lines)
    one = Heard()
    run(folder, wanted, one, out="alone", work="work-alone")
    assert_same_curve({**curve(heard), **curve(again)}, curve(one))

"""SIGTERM, as a preempted machine or a scheduler that cancels sends it, costs no step that was begun."""

import signal
import threading

import pair_job
import pytest
from training_job import STEPS, Heard, make_inputs, params, run

from retuner.errors import RetunerError
from retuner.termination import sigterm_held_back


class Ended(Exception):
    """What the handler that was there before makes of SIGTERM."""


@pytest.fixture(autouse=True)
def handler():
    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


class Terminated(Heard):
    """Sends this process SIGTERM, so many times, when it hears of a step; the next one is under way by then."""

    def __init__(self, after: int, times: int = 1):
        super().__init__()
        self.after, self.times = after, times

    def progress(self, what, done, total, note=""):
        super().progress(what, done, total, note)
        for _ in range(self.times if done == self.after else 0):
            signal.raise_signal(signal.SIGTERM)


EARLY = {"every_steps": 1, "patience": 4, "min_improvement": 0.0}
KINDS = {"packed": params(), "stopping early": params(stop_early=EARLY, checkpoint_every_steps=5)}


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("undisturbed"))
    return KINDS[request.param], run(folder, KINDS[request.param])


def test_the_step_under_way_is_finished_and_sealed_and_the_next_run_begins_after_it(
    undisturbed, handler, tmp_path
):
    asked, facts = undisturbed
    folder, heard = make_inputs(tmp_path), Terminated(after=2)
    with pytest.raises(Ended):
        run(folder, asked, heard, out="terminated")
    assert heard.steps == [1, 2, 3]
    assert heard.lines[-1] == f"train: stopped by SIGTERM after step 3 of {STEPS}; run again to go on"
    assert (folder / "work" / "sealed" / "step-3" / "manifest.json").exists()
    assert list((folder / "terminated").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler

    again = Heard()
    assert run(folder, asked, again).sha256 == facts.sha256
    assert any("going on after step-3" in line for line in again.lines)
    assert again.steps[0] == 4
    assert signal.getsignal(signal.SIGTERM) is handler


def test_before_the_first_step_nothing_is_held_back(tmp_path):
    """A reference is computed then, of preference pairs, which may take as long as many steps."""

    class AtReference(Heard):
        def progress(self, what, done, total, note=""):
            assert what == "reference"
            self.steps.append(done)
            signal.raise_signal(signal.SIGTERM)

    heard = AtReference()
    with pytest.raises(Ended):
        pair_job.run(pair_job.make_inputs(tmp_path), observer=heard)
    assert len(heard.steps) == 1
    assert not list((tmp_path / "work").glob("sealed/*"))


def test_a_second_sigterm_is_not_held_back(tmp_path):
    folder, heard = make_inputs(tmp_path), Terminated(after=4, times=2)
    with pytest.raises(Ended):
        run(folder, observer=heard, out="terminated")
    assert heard.steps[-1] == 4
    assert not (folder / "work" / "sealed" / "step-5").exists()
    assert not any("stopped" in line for line in heard.lines)


def test_a_sigterm_in_the_last_step_ends_what_comes_after_it(tmp_path):
    folder, heard = make_inputs(tmp_path), Terminated(after=STEPS - 1)
    with pytest.raises(Ended):
        run(folder, observer=heard, out="terminated")
    assert heard.steps[-1] == STEPS
    assert list((folder / "terminated").iterdir()) == []
    assert run(folder).sha256 == run(make_inputs(tmp_path / "elsewhere")).sha256


def test_a_handler_that_only_looks_does_not_make_half_a_training_a_whole_one(tmp_path):
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.raises(RetunerError, match="ended after step 3"):
        run(make_inputs(tmp_path), observer=Terminated(after=2))


def test_beside_the_main_thread_nothing_is_held_back(handler):
    found = []

    def look():
        with sigterm_held_back() as asked:
            found.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, handler)]

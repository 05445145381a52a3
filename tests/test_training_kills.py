"""A training that is stopped again and again, at any instant, ends in the bytes of one that never was."""

import contextlib
import json
import random
import signal
import time
from collections import Counter

import pytest
from training_job import STEPS, make_inputs, trainings

TRAININGS, MOST_STOPS, MOST_TRIES = 100, 3, 40


def told(folder):
    return json.loads((folder / "done.json").read_text())


def wait_for_step(folder, step):
    """Until the training that goes on there has done the step, or is at its end."""
    inside, seen = folder / "inside", False
    while inside.exists() or not seen:
        seen = seen or inside.exists()
        with contextlib.suppress(OSError, ValueError):
            if int(inside.read_text()) >= step:
                return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_hundred_trainings_stopped_at_random_instants_end_in_the_same_bytes(number, tmp_path):
    """Dropout is on. A stop counts when it met the fork between the first line of training and the last."""
    with trainings() as start:
        for name in ("first", "calm"):  # The first one is slower.
            calm, began = make_inputs(tmp_path / name), time.monotonic()
            assert start(calm).wait() == 0
            seconds, expected = time.monotonic() - began, told(calm)["sha256"]

        other, stopped_at, missed = [], Counter(), 0
        for seed in range(TRAININGS):
            draw, folder = random.Random(seed), make_inputs(tmp_path / str(seed))
            stops = draw.randint(1, MOST_STOPS)
            for _ in range(MOST_TRIES):
                (folder / "inside").unlink(missing_ok=True)
                training = start(folder, to_be_killed=True)
                if draw.random() < 0.3:  # Any instant; most of them are spent on loading.
                    time.sleep(draw.uniform(0, seconds))
                else:
                    wait_for_step(folder, draw.randrange(STEPS))
                    time.sleep(draw.uniform(0, 0.1))
                training.kill(number)
                assert training.wait() == -number
                if not (folder / "inside").exists():
                    missed += 1
                    continue
                stopped_at[int((folder / "inside").read_text() or 0)] += 1
                stops -= 1
                if not stops:
                    break
            assert not stops, f"training {seed} was missed too often"
            assert start(folder).wait() == 0
            if told(folder)["sha256"] != expected:
                other.append(seed)
    print(f"{stopped_at.total()} stops after steps {sorted(stopped_at.items())}; {missed} met no training")
    assert not other, f"of {TRAININGS} trainings these ended in other bytes: {other}"
    assert stopped_at.total() >= TRAININGS
    # Not only while the model was loaded, and not always in the same place.
    assert sum(count for step, count in stopped_at.items() if 0 < step < STEPS) >= TRAININGS / 2
    assert len(stopped_at) > STEPS / 2

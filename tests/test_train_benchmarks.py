"""The benchmarks of training run end to end at small size; what they measure there says nothing."""

import subprocess
import sys

import numpy as np
import pytest
from projects import ROOT


def run(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_all_sides_train_on_the_same_tokens(tmp_path):
    from benchmarks.training_rows import make_work
    from benchmarks.training_sides import ours, trl_defaults, tutorial
    from retuner.tiny_phi3 import write_tiny_phi3

    (tmp_path / "base").mkdir()
    write_tiny_phi3(tmp_path / "base", seed=0)
    work = make_work(tmp_path / "rows", tmp_path / "base", rows=10, held_out=3, longest=1024)
    packed = work.packed(tmp_path / "packs", 2048)
    made = {
        "ours": ours(packed, tmp_path / "ours", 2, "cpu"),
        "padded": trl_defaults(work, tmp_path / "padded", "cpu"),
        "wrapped": tutorial(work, tmp_path / "wrapped", "cpu", 1024, "wrapped", 2),
        "bfd": tutorial(work, tmp_path / "bfd", "cpu", 1024, "bfd", 2),
    }
    for name, trained in made.items():
        assert sum(trained.tokens) == work.tokens, name
        assert len(trained.tokens) == len(trained.seconds) == len(trained.grad_norms) > 1
        assert all(np.isfinite([*trained.grad_norms, trained.held_out_loss]))
    # Nothing that was learned in a few steps sets them apart.
    losses = [trained.held_out_loss for trained in made.values()]
    assert max(losses) / min(losses) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "command,told",
    [
        (("benchmarks.train_cpu", "--small"), ("goal 2 x", "goal 1.3 x", "MLflow: training waits")),
        (("benchmarks.train_gpu", "--small", "--device", "cpu"), ("of peak", "unsloth", "loss apart by")),
    ],
)
def test_a_benchmark_reports_to_its_end(command, told):
    said = run(*command)
    for each in told:
        assert each in said

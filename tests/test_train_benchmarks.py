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


def test_a_peer_that_is_not_installed_is_reported_with_its_own_last_line(tmp_path):
    from benchmarks.training_peers import PeerFailed, peer
    from benchmarks.training_rows import make_random_work
    from retuner.tiny_phi3 import write_tiny_phi3

    base = tmp_path / "base"
    base.mkdir()
    write_tiny_phi3(base, seed=0)
    work = make_random_work(tmp_path / "rows", base, rows=4, mean_tokens=20, longest=64)
    for name, module in (("LLaMA-Factory", "llamafactory"), ("Unsloth", "unsloth")):
        with pytest.raises(PeerFailed, match=f"^ModuleNotFoundError: No module named '{module}'$"):
            peer(name, sys.executable, work, base, tmp_path / name, "cpu", 64, 2)


def test_a_base_with_projections_apart_computes_the_same(tmp_path):
    import torch

    from benchmarks.training_peers import linear_layers, write_split_base
    from retuner.base import load_model
    from retuner.tiny_phi3 import write_tiny_phi3

    base, split = tmp_path / "base", tmp_path / "split"
    base.mkdir()
    write_tiny_phi3(base, seed=0)
    write_split_base(base, split, "cpu")
    ids = torch.arange(100, 150)[None]
    fused, apart = (load_model(folder, "float32", "sdpa", "cpu")(ids).logits for folder in (base, split))
    assert torch.allclose(fused, apart, atol=1e-4)
    assert linear_layers(base) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert linear_layers(split) == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command,told",
    [
        (("benchmarks.train_cpu", "--small"), ("goal 2 x", "goal 1.3 x", "MLflow: training waits")),
        (
            ("benchmarks.train_gpu", "--small", "--device", "cpu"),
            (
                "of peak",
                "LLaMA-Factory did not run: --llamafactory PYTHON gives an environment that has it",
                "Unsloth did not run: --unsloth PYTHON gives an environment that has it",
                "loss apart by",
            ),
        ),
        (
            (
                *("benchmarks.train_gpu", "--small", "--device", "cpu"),
                *("--llamafactory", sys.executable, "--unsloth", "no-such-python"),
            ),
            (
                "LLaMA-Factory did not run: ModuleNotFoundError: No module named 'llamafactory'",
                "Unsloth did not run: there is no program no-such-python",
                "ours is",
                "loss apart by",
            ),
        ),
    ],
)
def test_a_benchmark_reports_to_its_end(command, told):
    said = run(*command)
    for each in told:
        assert each in said

"""With Liger's kernels a model learns what it learns without, and nothing else in the process computes with them.

What needs the kernels runs once, in another process: Triton decides when it is imported whether it interprets.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from projects import ROOT
from test_setup import PYPROJECT
from training_job import make_inputs, params, run

from retuner import fused_kernels
from retuner.errors import Refused, Unavailable
from retuner.fused_kernels import refuse_what_cannot_be_fused, require_liger

CLOSE = 1e-5
LAYERS = 2
MISSING = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
kernels = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: make setup EXTRAS=liger, and triton"
)
LIGER = params(kernels="liger")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    job = Path(__file__).with_name("liger_job.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(job), str(folder)], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def assert_same(outcome, norms=2 * LAYERS + 1):
    assert outcome["counts"] == {"RMSNorm": norms, "RoPE": LAYERS, "SwiGLU": LAYERS}
    assert outcome["used"] == ["FusedLinearCrossEntropy", "RMSNorm", "Rope", "SiLUMul"]
    assert outcome["loss apart"] < CLOSE
    assert outcome["gradients apart"] and max(outcome["gradients apart"].values()) < CLOSE


@kernels
@pytest.mark.parametrize(
    "base", ["as it is", "a half of each head turns", "heads share keys, and see 5 tokens"]
)
def test_packed_rows_have_the_loss_and_gradients_of_torch(found, base):
    assert_same(found["bases"][base])


@kernels
@pytest.mark.parametrize(
    "asked", ["dora", "a norm that learns", "label smoothing", "checkpointed activations"]
)
def test_they_are_the_same_whatever_else_is_asked_for(found, asked):
    # What learns in full stands beside the one that does not.
    assert_same(found["asked"][asked], 2 * LAYERS + 1 + (asked == "a norm that learns"))


@kernels
def test_a_model_that_has_learned_computes_as_before_to_the_bit(found):
    assert all(outcome["put back"] for kind in ("bases", "asked") for outcome in found[kind].values())


@kernels
def test_a_whole_training_ends_where_one_without_does_and_says_what_ran(found):
    with_them, without = found["trained"]["liger"], found["trained"]["torch"]
    assert with_them["loss"] == pytest.approx(without["loss"], rel=CLOSE)
    assert found["trained"]["weights apart"] < 1e-5
    assert with_them["told"] == "liger-kernel 0.8.5: 5 RMSNorm, 2 RoPE, 2 SwiGLU, 1 head with loss"
    assert without["told"] is None


@kernels
def test_transformers_is_left_as_it_was(found):
    assert found["trained"]["transformers is as it was"]


@kernels
def test_preferences_are_learned_with_all_but_the_head(found):
    with_them, without = found["preferring"]["liger"], found["preferring"]["torch"]
    assert with_them["loss"] == pytest.approx(without["loss"], rel=CLOSE)
    assert with_them["told"] == "liger-kernel 0.8.5: 5 RMSNorm, 2 RoPE, 2 SwiGLU"


@kernels
def test_a_batch_without_a_supervised_token_teaches_nothing(found):
    assert found["blank"] == [0.0, 0.0]


@kernels
def test_the_planner_measures_the_layer_that_will_train(found):
    assert found["probed"]["liger"] < found["probed"]["torch"]


def test_on_a_processor_they_are_refused_before_the_base_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = make_inputs(tmp_path)
    (folder / "base" / "model.safetensors").unlink()
    with pytest.raises(Refused, match="train.kernels is liger, and training runs on cpu") as refusal:
        run(folder, LIGER)
    assert "set train.kernels to torch" in str(refusal.value)


@pytest.mark.parametrize(
    "changed", [{"model_type": "llama"}, {"hidden_act": "gelu"}], ids=["llama", "phi3 with gelu"]
)
def test_a_base_that_they_are_not_for_is_refused(tmp_path, monkeypatch, request, changed):
    monkeypatch.setattr(fused_kernels, "require_liger", lambda params: None)
    folder = make_inputs(tmp_path)
    config = folder / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(Refused, match=f"the base is a {request.node.callspec.id.split()[0]}"):
        refuse_what_cannot_be_fused(folder / "base", LIGER, "cuda")


@pytest.mark.skipif(not MISSING, reason="all of it is installed")
def test_where_they_are_not_installed_they_are_unavailable_and_it_says_how_to_get_them():
    with pytest.raises(Unavailable, match="make setup EXTRAS=liger"):
        require_liger(LIGER)


@kernels
def test_another_version_is_unavailable(monkeypatch):
    require_liger(LIGER)
    monkeypatch.setattr(fused_kernels, "version", lambda name: "0.8.4")
    with pytest.raises(Unavailable, match="needs liger-kernel 0.8.5, and 0.8.4 is installed"):
        require_liger(LIGER)


def test_the_version_that_is_asked_for_is_the_one_that_the_extra_brings():
    extra = PYPROJECT["project"]["optional-dependencies"]["liger"]
    assert extra == [f"liger-kernel=={fused_kernels.VERSION}"]

"""On a GPU: what only runs there learns what plain bfloat16 learns."""

from importlib.util import find_spec

import pytest
from training_job import make_inputs, params, run

FLOAT8 = {"kind": "float8", "double": False}


@pytest.mark.gpu
@pytest.mark.parametrize("changed", [{"kernels": "liger"}, {"quantization": FLOAT8}], ids=str)
def test_fused_kernels_and_float8_learn_what_bfloat16_learns(tmp_path, changed):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if "kernels" in changed and find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed: make setup EXTRAS=liger")
    if "quantization" in changed and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products in float8")
    losses = []
    for number, how in enumerate(({}, changed)):
        asked = params({"dropout": 0.0}, precision="bfloat16", **how)
        losses.append(run(make_inputs(tmp_path / str(number)), asked, device="cuda").final_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

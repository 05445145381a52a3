"""A base in float8: its products and gradients are those of its rounded weights, and an adapter learns beside it what
it would learn beside bfloat16."""

import weakref
from itertools import pairwise

import pytest
from pydantic import ValidationError
from training_job import Heard, base_of, chats_of, make_inputs, params, run

from retuner.errors import Refused

FLOAT8 = {"kind": "float8", "double": False}


def asked(lora=None, **changed):
    return params(lora, **{"quantization": FLOAT8, "precision": "bfloat16", "max_steps": 6, **changed})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("float8"))


@pytest.fixture(scope="module")
def learned(inputs):
    return run(inputs, asked(), out="float8", work="float8-work")


def adapted(folder, **lora):
    from retuner.base import load_model
    from retuner.lora import put_adapter_on
    from retuner.skeleton import read_skeleton
    from retuner.targets import choose_targets

    lora = params(lora).lora
    base = load_model(folder / "base", "bfloat16", "sdpa", "cpu")
    return put_adapter_on(base, lora, choose_targets(lora, read_skeleton(folder / "base")))


def test_each_row_of_a_weight_is_rounded_by_its_own_size():
    import torch

    from retuner.float8 import _layer

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.data[3] *= 1000
    held = _layer()(linear)
    # Three bits of mantissa; what is 2^15 times as small as the largest of its row may be lost.
    there = linear.weight.abs() > linear.weight.abs().amax(1, keepdim=True) / 2**14
    assert (held.weight.float() * held.scale / linear.weight.float() - 1)[there].abs().max() < 0.07


def test_products_and_their_gradients_are_those_of_the_rounded_weights():
    import torch

    from retuner.float8 import _layer

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    held = _layer()(linear)
    weight = held.weight.float() * held.scale
    inputs = torch.randn(2, 10, 96, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(2, 10, 64, dtype=torch.bfloat16)
    made = held(inputs)
    made.backward(gradient)
    assert made.shape == (2, 10, 64) and made.dtype == inputs.grad.dtype == torch.bfloat16
    for ours, exact in (
        (made, inputs.float() @ weight.t() + linear.bias.float()),
        (inputs.grad, gradient.float() @ weight),
    ):
        for row, expected in zip(ours.float().flatten(0, 1), exact.flatten(0, 1), strict=True):
            assert (row - expected).norm() < 0.06 * expected.norm()


def test_a_token_of_zeros_stays_zero_and_what_is_not_finite_stays_so():
    import torch

    from retuner.float8 import _layer

    held = _layer()(torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    inputs = torch.zeros(3, 32, dtype=torch.bfloat16)
    inputs[1, 5] = torch.inf
    made = held(inputs)
    assert not made[0].any() and not made[1].isfinite().any() and not made[2].any()


def test_what_is_held_is_each_frozen_linear_layer_but_the_head(inputs):
    import torch

    from retuner.float8 import hold_in_float8

    model = adapted(inputs)
    before = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    told = hold_in_float8(model)
    kept = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert told == "float8, 8 layers"
    assert all(module.weight.requires_grad or module is model.get_output_embeddings() for module in kept)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == learns
    after = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    rounded = sum(weight.numel() for weight in model.parameters() if weight.dtype == torch.float8_e4m3fn)
    assert before - after > 0.9 * rounded > 0


def test_an_adapter_learns_beside_it_and_the_run_says_what_it_cost(inputs, learned):
    beside_bfloat16 = run(inputs, asked(quantization=None), out="bfloat16", work="bfloat16-work")
    assert learned.final_loss == pytest.approx(beside_bfloat16.final_loss, rel=0.02)
    assert learned.trained_steps == 6
    told = learned.effective["quantization"]
    assert told.startswith("float8, 8 layers; loss of the first sequences ")
    assert told.endswith("%); evaluated and served on the base as it is")
    assert learned.effective["dtype"] == "bfloat16"


def test_killed_or_not_it_ends_in_the_same_bytes(inputs, learned):
    with pytest.raises(KeyboardInterrupt):
        run(inputs, asked(), Heard(die_after=5), out="died", work="killed")
    assert run(inputs, asked(), out="again", work="killed").sha256 == learned.sha256


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": True}, {"label_smoothing": 0.1}], ids=str)
def test_it_goes_with_other_settings(inputs, tmp_path, changed):
    losses = [
        run(
            inputs,
            asked(**changed, quantization=kind),
            out=tmp_path / f"out-{kind}",
            work=tmp_path / f"work-{kind}",
        ).final_loss
        for kind in (FLOAT8, None)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_each_layer_is_let_go_of_before_the_next_is_rounded(inputs, monkeypatch):
    import torch

    from retuner import float8

    model, left = adapted(inputs), []
    frozen = [weakref.ref(each) for each in model.modules() if type(each) is torch.nn.Linear]
    layer = float8._layer()

    def counting(linear):
        left.append(sum(each() is not None for each in frozen))
        return layer(linear)

    monkeypatch.setattr(float8, "_layer", lambda: counting)
    float8.hold_in_float8(model)
    assert [before - after for before, after in pairwise(left)] == [1] * (len(left) - 1)


def test_a_head_that_learns_in_full_stays_as_it_is(inputs):
    from retuner.float8 import hold_in_float8

    model = adapted(inputs, modules_to_save=("lm_head",))
    total = model.get_nb_trainable_parameters()
    assert hold_in_float8(model) == "float8, 8 layers"
    assert model.get_nb_trainable_parameters() == total


def test_a_bias_that_learns_leaves_the_type_of_what_comes_out():
    import torch

    from retuner.float8 import _layer

    linear = torch.nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    linear.bias.data = linear.bias.data.float()
    assert (
        _layer()(linear.requires_grad_(False))(torch.ones(1, 32, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )


def test_a_base_that_float8_changes_too_much_is_refused_before_training(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("retuner.float8.MOST_APART", 1e-9)
    heard = Heard()
    with pytest.raises(Refused, match="float8 changes what this base says") as refusal:
        run(inputs, asked(), heard, out=tmp_path / "out", work=tmp_path / "work")
    assert "train.quantization to null" in refusal.value.do
    assert not heard.steps


@pytest.mark.parametrize(
    "changed,said",
    [
        ({"precision": "float32"}, "float8 products come out in bfloat16"),
        ({"quantization": {"kind": "float8", "double": True}}, "set double to false"),
        ({"lora": {"dora": True}}, "no float8 with it"),
        ({"lora": {"init": "pissa"}}, "use init default"),
    ],
    ids=str,
)
def test_params_that_do_not_go_together_are_refused(changed, said):
    with pytest.raises(ValidationError, match=said):
        asked(**changed)


def test_layers_whose_sides_gpus_do_not_take_are_refused(inputs, monkeypatch):
    monkeypatch.setattr("retuner.float8.MULTIPLE", 7)
    with pytest.raises(Refused, match="layers whose sides are multiples of 7") as refusal:
        run(inputs, asked(), out="never", work="never-work")
    assert "qkv_proj" in refusal.value.found or "o_proj" in refusal.value.found


def test_its_plan_counts_a_byte_a_weight(inputs):
    from retuner.planner import make_plan

    whole, held = (
        make_plan(chats_of(inputs), base_of(inputs), asked(quantization=kind), "cpu", inputs / "speeds.json")
        for kind in (None, FLOAT8)
    )
    assert held.weight_bytes < 0.8 * whole.weight_bytes
    # They are loaded as bfloat16, and rounded then.
    assert held.loading_bytes == whole.weight_bytes

"""LoRA without extra passes computes what PEFT's own layers compute, and keeps less for the backward pass."""

import pytest
from training_job import make_inputs, params


def adapted(folder, precision="float32", **lora):
    """A tiny Phi-3 with an adapter that does something."""
    import torch

    from retuner.base import load_model
    from retuner.lora import put_adapter_on
    from retuner.skeleton import read_skeleton
    from retuner.targets import choose_targets

    asked = params(lora=lora).lora
    targets = choose_targets(asked, read_skeleton(folder / "base"))
    torch.manual_seed(0)
    model = put_adapter_on(load_model(folder / "base", precision, "sdpa", "cpu"), asked, targets)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def as_peft_has_it(model):
    """The model with PEFT's own layers from here on."""
    from peft.tuners import lora

    layers = [module for module in model.modules() if type(module).__name__ == "LoraLinear"]
    assert layers
    for layer in layers:
        layer.__class__ = lora.Linear
    model.zero_grad()
    return model


def passes(model, precision, autocast=True):
    """Logits, gradients by name, and the bytes that the forward pass kept."""
    import torch

    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(3, 131).reshape(2, 64)
    torch.manual_seed(1)
    enabled = autocast and precision == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=enabled),
    ):
        logits = model(input_ids=ids).logits.float()
    logits.square().mean().backward()
    learned = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return logits.detach(), learned, sum(kept.values())


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"dropout": 0.2},
        {"rslora": True, "rank_pattern": {"down_proj": 2}},
        {"targets": ("qkv_proj.q", "qkv_proj.v", "down_proj")},
        {"dora": True},
        {"targets": ("qkv_proj", "embed_tokens")},
        {"targets": ("o_proj",), "modules_to_save": ("norm",)},
    ],
    ids=lambda lora: "-".join(lora) or "plain",
)
def test_logits_and_gradients_are_those_of_peft(tmp_path, lora):
    model = adapted(make_inputs(tmp_path), **lora).train()
    logits, gradients, _ = passes(model, "float32")
    their_logits, their_gradients, _ = passes(as_peft_has_it(model), "float32")
    assert logits.sub(their_logits).abs().max() < 1e-5
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.sub(their_gradients[name]).abs().max() < 1e-5, name
        assert gradient.dtype == their_gradients[name].dtype


@pytest.mark.parametrize("autocast", [True, False])
def test_so_they_are_on_a_base_in_bfloat16_with_an_adapter_in_float32(tmp_path, autocast):
    model = adapted(make_inputs(tmp_path), "bfloat16").train()
    logits, gradients, kept = passes(model, "bfloat16", autocast)
    their_logits, their_gradients, their_kept = passes(as_peft_has_it(model), "bfloat16", autocast)
    # Logits spread over some ±10, of which bfloat16 keeps three digits.
    assert logits.sub(their_logits).abs().mean() < 0.03
    for name, gradient in gradients.items():
        cosine = (gradient * their_gradients[name]).sum() / gradient.norm() / their_gradients[name].norm()
        assert cosine > 0.999, name
    assert kept < 0.9 * their_kept if autocast else kept == their_kept


def test_disabled_the_adapter_says_nothing(tmp_path):
    import torch

    from retuner.base import load_model

    folder = make_inputs(tmp_path)
    model, ids = adapted(folder).eval(), torch.arange(3, 19)[None]
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=ids).logits
        base = load_model(folder / "base", "float32", "sdpa", "cpu")(input_ids=ids).logits
        assert without.equal(base)
    with torch.no_grad():
        assert not model(input_ids=ids).logits.equal(base)

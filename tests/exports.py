"""Adapters on the tiny base, and how far two models are apart."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from retuner.base import load_model
from retuner.export_source import Source
from retuner.params import TinyBase

TINY = TinyBase(source="tiny", seed=7)
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"o_proj": 2, r"layers\.1\.self_attn\.qkv_proj": 6},
    "alpha_pattern": {"down_proj": 3, "qkv_proj": 9},
}
SHAPES = ("merged", "split", "loralib", "gguf")


def adapter_on_base(base: Path, folder: Path, seed: int = 1, **lora) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False, **lora}
    )
    adapted = get_peft_model(load_model(base, "float32", "sdpa", "cpu"), config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save.default" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    # Without the embedding's own weights, which PEFT would put in.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def source(base, adapter: Path) -> Source:
    folder, facts = base
    prompts = [[{"role": "user", "content": text}] for text in ("hello there", "what is this?", "a b c")]
    return Source("test version 1", adapter, folder, {}, facts.stop_token_ids, 12, prompts, "this test")


def ids():
    torch.manual_seed(5)
    return torch.randint(3, 300, (2, 40))


def logits(model):
    with torch.no_grad():
        return model.eval()(ids()).logits


def together(base: Path, adapter: Path):
    """Base and adapter as PEFT itself has them."""
    return PeftModel.from_pretrained(load_model(base, "float32", "sdpa", "cpu"), str(adapter))


def difference(one, other):
    """The largest, as a share of the largest logit."""
    ours, theirs = logits(one), logits(other)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def put_loralib(model, path, kind, **options):
    """Replace a linear layer by loralib's."""
    old = model.get_submodule(path)
    layer = kind(old.in_features, old.out_features, bias=False, **options)
    layer.load_state_dict(old.state_dict(), strict=False)
    model.get_submodule(path.rpartition(".")[0]).add_module(path.rpartition(".")[2], layer)
    return layer

"""PEFT's LoRA layer without the passes over its inputs and outputs that one plain adapter does not need.

PEFT computes `base(x) + B(A(x)) * scale`: where the base is in bfloat16 it copies x to float32 and autocast copies that
back, which is kept for the backward pass, and what comes out of B is scaled, added and converted, each over as many
numbers as the layer has outputs: 16,384 for each token in Phi-3's gate_up_proj. Here x is taken as it is, the scale
goes on the few numbers between A and B, and the product with B is added up in one go with what the base made.
"""

from functools import cache
from typing import Any


def without_extra_passes(adapted: Any) -> None:
    """Let the plain LoRA layers of a PeftModel compute so. Results are PEFT's but for rounding."""
    from peft.tuners import lora

    for module in adapted.modules():
        if type(module) is lora.Linear:
            module.__class__ = _layer()


@cache
def _layer() -> type:
    import torch
    from peft.tuners import lora

    class LoraLinear(lora.Linear):
        def forward(self, x, *args, **kwargs):
            if not self._is_plain(x) or args or kwargs:
                return super().forward(x, *args, **kwargs)
            name = self.active_adapters[0]
            made = self.base_layer(x)
            inner = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            b = self.lora_B[name].weight
            return torch.addmm(made.flatten(0, -2), inner.flatten(0, -2), b.t()).view_as(made)

        def _is_plain(self, x):
            """One adapter, no DoRA, on, and of x's type or in an autocast that sees to that."""
            if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1:
                return False
            same = x.dtype == self.lora_A[self.active_adapters[0]].weight.dtype
            return same or torch.is_autocast_enabled(x.device.type)

    return LoraLinear

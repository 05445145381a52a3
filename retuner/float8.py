"""A base whose linear layers are held and computed in float8 while an adapter learns beside them.

Half the memory of bfloat16, and on GPUs with such products (compute capability 8.9 and newer) up to twice their speed.
Weights are rounded once to e4m3 with a scale for each of their rows; activations, and on the way back gradients, token
by token as they come. Micikevicius et al., "FP8 formats for deep learning" (2022), describe the format; a scale a row
keeps gradients within e4m3's range too, so e5m2 is not needed. There are no gradients of the weights: they are frozen.
The head, embeddings, norms and the adapter stay as they are, and evaluation and serving take the base as it is.

What float8 costs is measured, not assumed: the loss of the first sequences with and without it is compared before
training begins, and one that is further apart than `MOST_APART` is refused.

The same products run on a processor, which has none of the speed: that is how this is tested. A GPU has not run it yet.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.skeleton import read_skeleton
from retuner.train_params import TrainParams

MOST_APART = 0.01
"""Of the loss in bfloat16."""
COMPARED_SEQUENCES = 4
MULTIPLE = 16
"""GPUs take products whose sides are multiples of this."""
CAPABILITY = (8, 9)
TINY = 1e-12
"""The least of what a scale is made from: rows of zeros have one too."""


def uses_float8(params: TrainParams) -> bool:
    return params.quantization is not None and params.quantization.kind == "float8"


def refuse_what_cannot_be_float8(base: Path, params: TrainParams, device: str) -> None:
    """`base` is the folder of a model. Errors: Refused."""
    import torch

    if not uses_float8(params):
        return
    other = "set train.quantization to null, or to {kind: nf4, double: true}"
    if device == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        raise Refused(
            f"train.quantization.kind is float8, and {torch.cuda.get_device_name()} has no such products",
            "a GPU of compute capability 8.9 or more, such as an L4, an H100 or newer",
            other,
        )
    for path, sides in read_skeleton(base).linear.items():
        if any(side % MULTIPLE for side in sides):
            raise Refused(
                f"train.quantization.kind is float8, and {path} is {sides[1]} by {sides[0]}",
                f"layers whose sides are multiples of {MULTIPLE}",
                other,
            )


def hold_in_float8(adapted: Any, loss: Callable[[], float] | None = None) -> str:
    """Round the frozen linear layers of a PeftModel, one after another. Returns what to say of it.

    `loss` measures the model as it is. Errors: Refused when float8 moves it by more than `MOST_APART` of it.
    """
    import torch

    before = loss() if loss else None
    head = set(adapted.get_base_model().get_output_embeddings().modules())
    layers = [
        (path, name)
        for path, module in adapted.named_modules()
        for name, child in module.named_children()
        if type(child) is torch.nn.Linear and child not in head and not child.weight.requires_grad
    ]
    for path, name in layers:  # and by their names, so that each is let go of before the next is rounded
        parent = adapted.get_submodule(path)
        setattr(parent, name, _layer()(getattr(parent, name)))
    # Each process has rounded the same weights, and gloo sends no float8.
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        adapted, [".".join(filter(None, (*layer, kind))) for layer in layers for kind in ("weight", "scale")]
    )
    told = f"float8, {len(layers)} layers"
    if loss is None or before is None:
        return told
    after = loss()
    apart = after / before - 1
    told += f"; loss of the first sequences {after:.4f}, in bfloat16 {before:.4f} ({apart:+.2%})"
    if not abs(apart) <= MOST_APART:
        raise Refused(
            f"float8 changes what this base says: {told}",
            f"at most {MOST_APART:.0%} of difference",
            "set train.quantization to null, or to {kind: nf4, double: true}",
        )
    return told


@cache
def _layer() -> type:
    import torch
    from torch.nn.functional import ScalingType, scaled_mm

    float8 = torch.float8_e4m3fn
    largest = torch.finfo(float8).max

    def rounded(rows: Any) -> tuple[Any, Any]:
        """(R, K) as float8, and (R, 1) what each row is to be multiplied with."""
        scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=TINY) / largest
        return (rows.float() / scale).to(float8).contiguous(), scale

    def product(one: Any, other: Any, scale: Any, other_scale: Any) -> Any:
        by_row = ScalingType.RowWise
        return scaled_mm(one, other, scale, by_row, other_scale, by_row, output_dtype=torch.bfloat16)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, weight, scale):
            ctx.save_for_backward(weight, scale)
            values, by_token = rounded(inputs)
            return product(values, weight.t(), by_token, scale.t())

        @staticmethod
        def backward(ctx, gradient):
            weight, scale = ctx.saved_tensors
            # The weight's scales lie along what is summed here, so the gradient takes them on before it is rounded.
            values, by_token = rounded(gradient * scale.t())
            columns = weight.t().contiguous().t()
            return product(values, columns, by_token, scale.new_ones(1, weight.shape[1])), None, None

    class Float8Linear(torch.nn.Module):
        def __init__(self, linear: Any):
            super().__init__()
            weight, scale = rounded(linear.weight.detach())
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.register_buffer("scale", scale, persistent=False)  # no parameter of the model's
            self.bias = linear.bias
            self.in_features, self.out_features = linear.in_features, linear.out_features

        def forward(self, inputs):
            made = Product.apply(inputs.flatten(0, -2), self.weight, self.scale)
            made = made.unflatten(0, inputs.shape[:-1])
            return made if self.bias is None else made + self.bias.to(made.dtype)

    return Float8Linear

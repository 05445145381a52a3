"""QLoRA: the base's linear layers in 4 bits while training, through bitsandbytes, which is an extra.

The adapter is float32 all the same, and evaluation and serving put it on the base as it is, so what is
measured is what is served.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from retuner.errors import Unavailable
from retuner.train_params import QuantizationParams, TrainParams


def in_4_bits(params: TrainParams) -> bool:
    return params.quantization is not None and params.quantization.kind != "float8"


def needs_bitsandbytes(params: TrainParams) -> bool:
    return in_4_bits(params) or params.optimizer.startswith("paged_")


def require_bitsandbytes(params: TrainParams) -> None:
    """Errors: Unavailable when these params need it and it is not installed."""
    if needs_bitsandbytes(params) and find_spec("bitsandbytes") is None:
        asked = "train.quantization" if in_4_bits(params) else f"train.optimizer {params.optimizer}"
        raise Unavailable(
            f"{asked} needs bitsandbytes, which is not installed",
            "the extra qlora, which the usual set-up leaves out",
            "run `make setup EXTRAS=qlora` (with -B where .venv is set up already)",
        )


def bits_and_bytes(params: QuantizationParams, precision: str) -> Any:
    """How transformers loads a base in 4 bits: products in `precision`."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=params.kind,
        bnb_4bit_use_double_quant=params.double,
        bnb_4bit_compute_dtype=getattr(torch, precision),
    )


def keep_differentiable(model: Any) -> None:
    """Where a processor has AVX512-BF16, bitsandbytes repacks a weight the first time it is used outside of
    training, for products in bfloat16 that have no gradient; a measurement in between would end all learning."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def adapter_stays_float32(adapted: Any) -> Iterator[None]:
    """SFTTrainer rounds the adapter of a 4-bit base to bfloat16, in whose eight bits steps of 1e-4 are lost."""
    base = adapted.get_base_model()
    if not getattr(base, "is_loaded_in_4bit", False):
        yield
        return
    base.is_loaded_in_4bit = False
    try:
        yield
    finally:
        base.is_loaded_in_4bit = True

"""What cannot be trained, said before any weight is loaded."""

from pathlib import Path

from retuner.errors import Refused, Unavailable
from retuner.float8 import refuse_what_cannot_be_float8
from retuner.fused_kernels import refuse_what_cannot_be_fused
from retuner.packing import RowCounts
from retuner.quantized import require_bitsandbytes
from retuner.ranks import share
from retuner.sharded import refuse_what_cannot_be_sharded
from retuner.skeleton import read_skeleton
from retuner.targets import choose_targets
from retuner.train_params import DpoParams, SftParams, TrainParams


def device_of(asked: str) -> str:
    """`cpu` or `cuda`, for `auto` what there is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def refuse_what_cannot_be_shared(
    params: TrainParams, base: Path, device: str, processes: int, strategy: str
) -> None:
    """What several processes cannot train together. Errors: Refused or Unavailable."""
    import torch

    if isinstance(params, DpoParams) and processes > 1:
        raise Refused(
            f"train.recipe is dpo, and {processes} processes were asked for",
            "one process: preference pairs are not shared out",
            "unset RETUNER_PROCESSES, or leave out --processes",
        )
    share(params, processes)
    if device == "cuda" and torch.cuda.device_count() < processes:
        raise Unavailable(
            f"{processes} processes were asked for, and there are {torch.cuda.device_count()} CUDA devices",
            "a device for each",
            "lower RETUNER_PROCESSES or --processes, or set RETUNER_DEVICE to cpu",
        )
    if isinstance(params, SftParams) and processes > 1 and strategy == "fsdp":
        refuse_what_cannot_be_sharded(params, choose_targets(params.lora, read_skeleton(base)))


def refuse_what_cannot_work(counts: RowCounts, params: TrainParams, device: str, base: Path) -> None:
    """`base` is the folder of the model. Errors: Refused or Unavailable."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    if not counts.rows:
        raise Refused("there are no rows to train on", "at least one", "add chats")
    if not counts.supervised_tokens:
        raise Refused(
            f"none of {counts.tokens:,} tokens carries loss",
            "answers to learn from",
            "look at the sample page of the template stage",
        )
    if params.schedule == "constant" and params.warmup_fraction:
        raise Refused(
            f"train.warmup_fraction is {params.warmup_fraction}, and the schedule constant has no warm-up",
            "train.schedule constant_with_warmup, or no warm-up",
            "correct one of the two",
        )
    require_bitsandbytes(params)
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "there is no CUDA device", "one that PyTorch can use", "set RETUNER_DEVICE to cpu or auto"
        )
    refuse_what_cannot_be_fused(base, params, device)
    refuse_what_cannot_be_float8(base, params, device)
    if params.attention == "flash_attention_2":
        if device != "cuda" or params.precision != "bfloat16":
            raise Refused(
                f"train.attention is flash_attention_2 with {params.precision} on {device}",
                "bfloat16 on a CUDA device",
                "set train.attention to sdpa",
            )
        if not is_flash_attn_2_available():
            raise Unavailable(
                "flash_attention_2 is not installed",
                "the package flash-attn",
                "install it or set train.attention to sdpa",
            )
    if (
        params.precision == "bfloat16"
        and device == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise Refused(
            f"{torch.cuda.get_device_name()} has no bfloat16",
            "an Ampere GPU or newer",
            "set train.precision to float32",
        )

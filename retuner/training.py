"""`train`: a LoRA adapter, by TRL's SFTTrainer over rows that are token ids already.

The same params, chats, base and machine type give the same bytes, whether or not the process was killed on the way.

`bfloat16` means: base weights and matrix products in bfloat16; the adapter's weights, their gradients and what the
optimizer keeps of them in float32, because steps of 1e-4 are lost in bfloat16's eight bits.
"""

import gc
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retuner import checkpoints
from retuner.artifacts import AdapterFacts, Base, Chats
from retuner.base import load_model
from retuner.errors import Refused, RetunerError, Unavailable
from retuner.files import sha256_file
from retuner.lora import (
    WEIGHTS,
    choose_targets,
    count_adapted,
    linear_layers,
    put_adapter_on,
    refuse_not_finite,
    write_adapter,
)
from retuner.observe import Observer
from retuner.packing import RowCounts, count_rows, lay_out, read_rows
from retuner.params import TrainParams
from retuner.row_trainer import row_trainer
from retuner.step_log import StepLog


def train(
    out: Path, work: Path, chats: Chats, base: Base, params: TrainParams, device: str, observer: Observer
) -> AdapterFacts:
    """Write adapter_model.safetensors, adapter_config.json and what people can look at into `out`.

    `work` survives a kill: a later call with the same params goes on from its newest whole checkpoint.
    Errors: Refused or Unavailable, before any weight is loaded, when this cannot work; RetunerError when
    the numbers stop being finite.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    staging = checkpoints.clear_staging(work)
    with _reproducible(), _quiet():
        rows = read_rows(chats.path / "train.arrow")
        counts = count_rows(rows)
        _refuse_what_cannot_work(counts, params, device)
        targets, translated = choose_targets(params.lora.targets, linear_layers(base.path))
        if translated:
            names = ", ".join(f"{llama} is in {fused}" for llama, fused in translated.items())
            observer.say(f"train: adapting {', '.join(targets)}; in this base {names}")

        packs = chats.path / "packs.arrow"
        packed = packs.exists()
        if packed:
            sequences, sequence_tokens = lay_out(rows, packs, work / "packed.arrow")
        else:
            sequences, sequence_tokens = rows, counts.longest_tokens
        slots = len(sequences) * sequence_tokens
        steps = planned_steps(len(sequences), params)
        model = load_model(base.path, params.precision, params.attention, device, use_cache=False)
        torch.manual_seed(params.seed)  # For the adapter's first weights; the Trainer seeds itself again.
        model = put_adapter_on(model, params.lora, targets)
        trainable, total = model.get_nb_trainable_parameters()
        adapted = count_adapted(model)
        observer.say(
            f"train: {trainable:,} of {total:,} parameters learn ({100 * trainable / total:.2f} %), in "
            f"{', '.join(f'{count} {kind}' for kind, count in adapted.items())}; "
            f"{100 * counts.supervised_tokens / counts.tokens:.0f} % of {counts.tokens:,} tokens carry loss; "
            f"{'packing fills' if packed else 'not packed, rows fill'} {100 * counts.tokens / slots:.1f} %"
        )

        log = StepLog(params.log_every_steps, steps, observer)
        trainer = row_trainer(model, sequences, packed, params, steps, device, staging, log)
        resumed = checkpoints.newest_whole(work, observer.say)
        if resumed:
            observer.say(f"train: going on after {resumed.name} of {steps}")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if trainer.state.global_step != steps:
            raise RetunerError(f"training ended after step {trainer.state.global_step}", f"{steps} steps")
        refuse_not_finite(model, steps)
        write_adapter(out, model, base.facts.source)

        effective = _effective(model, device, params)
        points = log.points()
        _write_aside(out / "aside", points, log.entries, effective, resumed)
        del trainer, model
        if device == "cuda":
            gc.collect()  # The Trainer and its model point at each other.
            torch.cuda.empty_cache()
    return AdapterFacts(
        sha256=sha256_file(out / WEIGHTS),
        trained_steps=steps,
        final_loss=points[-1][1]["loss"],
        trainable_parameters=trainable,
        total_parameters=total,
        adapted_modules=adapted,
        packing_fill=counts.tokens / slots,
        effective=effective,
    )


def planned_steps(sequences: int, params: TrainParams) -> int:
    """Optimizer steps; the last step of an epoch may have fewer batches."""
    if params.max_steps is not None:
        return params.max_steps
    a_step = params.batch_size * params.gradient_accumulation
    return math.ceil(math.ceil(sequences / a_step) * params.epochs)  # type: ignore[operator]  # one is set


def _effective(model: Any, device: str, params: TrainParams) -> dict[str, str]:
    """What it came to, as the model says it, and beside it what was asked for."""
    import torch

    return {
        "attention": str(model.config._attn_implementation),
        "dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": str(model.config.use_cache),
        "requested_attention": params.attention,
        "requested_dtype": params.precision,
        "requested_use_cache": "False",
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": str(torch.get_num_threads()),
    }


def _refuse_what_cannot_work(counts: RowCounts, params: TrainParams, device: str) -> None:
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
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "there is no CUDA device", "one that PyTorch can use", "set RETUNER_DEVICE to cpu or auto"
        )
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


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic algorithms, and as many threads as there are cores to use: sums of floats depend on both."""
    import psutil
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs that costs time
    if "OMP_NUM_THREADS" not in os.environ:
        usable = len(os.sched_getaffinity(0))
        torch.set_num_threads(min(psutil.cpu_count(logical=False) or usable, usable))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.set_num_threads(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and advice from transformers and datasets; errors pass."""
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 sets it by the name that transformers 5.23 has just renamed.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _write_aside(
    aside: Path,
    points: list[tuple[int, dict[str, float]]],
    entries: list[dict[str, float]],
    effective: dict[str, str],
    resumed: Path | None,
) -> None:
    aside.mkdir()
    lines = (
        json.dumps({"step": step, "metrics": metrics}, sort_keys=True) + "\n" for step, metrics in points
    )
    (aside / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    seconds = sum(entry["seconds"] for entry in entries)
    story = {
        **effective,
        "step_seconds": round(seconds, 3),
        "tokens_per_second": round(sum(entry["tokens"] for entry in entries) / seconds, 1),
        "resumed_after": resumed.name if resumed else None,
    }
    (aside / "effective.json").write_text(
        json.dumps(story, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )

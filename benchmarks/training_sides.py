"""The same training by ours and by others: each side as its own users run it, timed step by step in one way.

What decides what is learned is the same on all sides: rows, labels, LoRA, learning rate, optimizer, one epoch. What
decides how fast is each side's own: layout, precision, attention, activation checkpointing, loss.
"""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.training_rows import Work
from retuner.determinism import quiet
from retuner.evaluation import read_held_out, row_losses
from retuner.fused_kernels import VERSION
from retuner.observe import Observer, Silent, Tee
from retuner.packing import read_rows
from retuner.params_file import load
from retuner.train_params import TrainParams
from retuner.training import learned

PARAMS = Path(__file__).parents[1] / "params" / "phi3_mini_lora.yaml"
LEARNING_RATE, RANK, ALPHA, DROPOUT = 5e-4, 16, 32, 0.05
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Trained:
    """One epoch of one side, a number a step. Tokens are those that are no padding."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    """Of all threads of this process: less at the mercy of what else the machine does."""
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    held_out_loss: float
    """Mean nats over the supervised tokens of all held-out rows."""
    peak_bytes: int
    """Of the GPU; 0 without one."""

    @property
    def tokens_per_second(self) -> float:
        """Without the first step, in which libraries warm up."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])

    @property
    def tokens_per_processor_second(self) -> float:
        return sum(self.tokens[1:]) / sum(self.processor_seconds[1:])


class Clock(Silent):
    """Notes the processor time at the end of each step."""

    def __init__(self) -> None:
        self.marks = [time.process_time()]

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == "train":
            self.marks.append(time.process_time())

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in pairwise(self.marks))


def has_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are the hardware's own."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def has_liger(device: str) -> bool:
    """Whether the version is there that both sides can use."""
    there = device == "cuda" and find_spec("liger_kernel") is not None
    return there and version("liger-kernel") == VERSION


def ours_params(batch_size: int, device: str) -> TrainParams:
    """params/phi3_mini_lora.yaml with the recipe that all sides share, and Liger's kernels as tuned TRL has them."""
    precision = "bfloat16" if has_bfloat16(device) else "float32"
    kernels = "liger" if has_liger(device) else "torch"
    return load(
        PARAMS,
        (
            f"train.precision={precision}",
            f"train.kernels={kernels}",
            f"train.batch_size={batch_size}",
            "train.gradient_accumulation=1",
            "train.gradient_checkpointing=false",
            f"train.learning_rate={LEARNING_RATE}",
            "train.schedule=linear",
            "train.warmup_fraction=0.0",
            "train.checkpoint_every_steps=1000000",
            "train.log_every_steps=1",
            f"train.lora.rank={RANK}",
            f"train.lora.alpha={ALPHA}",
            f"train.lora.dropout={DROPOUT}",
        ),
    ).train


def ours(
    work: Work, folder: Path, batch_size: int, device: str, observer: Observer | None = None, seed: int = 0
) -> Trained:
    """`retuner.training`; packs as `work` plans them."""
    folder.mkdir(parents=True)
    params, clock = ours_params(batch_size, device).model_copy(update={"seed": seed}), Clock()
    listener = Tee(clock, observer or Silent())
    with (
        _peak(device) as peak,
        learned(folder, work.chats, work.base, params, device, listener) as result,
    ):
        entries = result.log.entries
        return Trained(
            tokens=tuple(int(entry["tokens"]) for entry in entries),
            seconds=tuple(entry["seconds"] for entry in entries),
            processor_seconds=clock.seconds,
            losses=tuple(entry["loss"] for entry in entries),
            grad_norms=tuple(entry["grad_norm"] for entry in entries),
            peak_bytes=peak(),
            held_out_loss=held_out_loss(result.model, work),
        )


def trl_defaults(work: Work, folder: Path, device: str, seed: int = 0) -> Trained:
    """SFTTrainer as it comes: rows padded, 8 to a step, checkpointed activations, weights in float32 and products in
    bfloat16 where the processor has it."""
    return trl(work, folder, device, model_init_kwargs=None, seed=seed)


def tutorial(
    work: Work,
    folder: Path,
    device: str,
    pack_tokens: int,
    strategy: str,
    batch_size: int = 4,
    seed: int = 0,
) -> Trained:
    """The settings of Microsoft's sample_finetune.py in today's names: weights in bfloat16, packing, 4 sequences a
    step, checkpointed activations (not re-entrant). Its flash attention is sdpa where flash-attn is not installed.

    strategy: `wrapped` is what packing was then (rows are cut and see one another), `bfd` what it is by default now.
    """
    from transformers.utils import is_flash_attn_2_available

    dtype = "bfloat16" if has_bfloat16(device) else "float32"
    flash = device == "cuda" and is_flash_attn_2_available()
    return trl(
        work,
        folder,
        device,
        model_init_kwargs={
            "dtype": dtype,
            "attn_implementation": "flash_attention_2" if flash else "sdpa",
            "use_cache": False,
        },
        packing=True,
        packing_strategy=strategy,
        max_length=pack_tokens,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=seed,
    )


def trl(work: Work, folder: Path, device: str, **settings: Any) -> Trained:
    """One epoch by TRL's SFTTrainer over the same token ids and labels."""
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):
        """What `retuner.step_log` notes, at the same moment of a step."""

        entries: list[dict[str, float]] = []  # noqa: RUF012  # one Watch a training
        since = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.since = time.monotonic()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                now = time.monotonic()
                self.entries.append({**logs, "seconds": now - self.since})
                self.since = now
                clock.progress("train", state.global_step, state.max_steps)

    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=has_bfloat16(device),
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    rows = read_rows(work.chats.path / "train.arrow")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules="all-linear",
        bias="none",
    )
    watch, clock = Watch(), Clock()
    with quiet(), _peak(device) as peak:
        trainer = SFTTrainer(
            model=str(work.base.path), args=arguments, train_dataset=rows, peft_config=lora, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        peaked = peak()
        trainer.model.gradient_checkpointing_disable()
        seen = [0, *(int(entry["num_tokens"]) for entry in watch.entries)]
        trained = Trained(
            tokens=tuple(after - before for before, after in pairwise(seen)),
            seconds=tuple(entry["seconds"] for entry in watch.entries),
            processor_seconds=clock.seconds,
            losses=tuple(float(entry["loss"]) for entry in watch.entries),
            grad_norms=tuple(float(entry["grad_norm"]) for entry in watch.entries),
            held_out_loss=held_out_loss(trainer.model, work),
            peak_bytes=peaked,
        )
        trainer.model = trainer.model_wrapped = None
        return trained


def held_out_loss(model: Any, work: Work) -> float:
    rows = read_held_out(work.chats.path / "held_out.arrow")
    model.eval()
    losses = row_losses(model, rows, ROWS_AT_ONCE, lambda done, total: None)
    tokens = [row["tokens"] for row in rows]
    return math.fsum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens)


@contextmanager
def _peak(device: str) -> Iterator[Any]:
    """Inside, a call says the most GPU memory since the beginning; afterwards it is given back."""
    import torch

    gc.collect()
    if device != "cuda":
        yield lambda: 0
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.max_memory_allocated
    gc.collect()
    torch.cuda.empty_cache()

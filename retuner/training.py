"""`train`: a LoRA adapter, by TRL's SFTTrainer (`retuner.dpo`: DPOTrainer) over rows that are token ids already.

The same params, chats, base and machine type give the same bytes, whether or not the process was killed on the way; on
a GPU they may differ, see `retuner.determinism`.

`bfloat16` means: base weights and matrix products in bfloat16; the adapter's weights, their gradients and what the
optimizer keeps of them in float32, because steps of 1e-4 are lost in bfloat16's eight bits.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner import checkpoints
from retuner.artifacts import AdapterFacts, Base, Chats
from retuner.base import load_model
from retuner.determinism import quiet, reproducible
from retuner.errors import RetunerError
from retuner.feasible import device_of, refuse_what_cannot_work
from retuner.files import sha256_file
from retuner.float8 import COMPARED_SEQUENCES, hold_in_float8, uses_float8
from retuner.fused_kernels import VERSION, fuse, has_fused_head, unfuse, uses_liger
from retuner.lora import (
    WEIGHTS,
    begin_weights,
    count_adapted,
    count_trainable,
    describe_trainable,
    load_weights,
    put_adapter_on,
    refuse_not_finite,
    write_adapter,
)
from retuner.observe import Observer
from retuner.packing import RowCounts, count_rows, lay_out, read_rows
from retuner.quantized import bits_and_bytes, in_4_bits, keep_differentiable
from retuner.ranks import ALONE, Rank, agreed
from retuner.row_attention import ROW_ATTENTION, attend_by_row
from retuner.row_trainer import mean_loss, row_trainer, stop_when
from retuner.sharded import is_sharded
from retuner.skeleton import read_skeleton
from retuner.step_log import StepLog
from retuner.stopping import HELD_OUT_LOSS, Stopping, needed_by
from retuner.targets import Targets, choose_targets
from retuner.termination import sigterm_held_back
from retuner.train_params import SftParams, TrainParams
from retuner.warm_start import read_start


@dataclass(frozen=True)
class Recipe:
    """What a way of learning has of its own."""

    count: Callable[[Path], RowCounts]
    """Of the folder of the chats."""
    lay_out: Callable[[Path, Path], tuple[Any, int]]
    """Of the folder of the chats and a file to write on the way: the datasets.Dataset that the trainer takes, and of
    how many tokens one of its rows may be."""
    trainer: Callable[..., Any]
    """As `row_trainer`."""
    logged: tuple[str, ...] = ()
    """What its trainer logs besides the loss."""


def _rows_of(chats: Path) -> RowCounts:
    return count_rows(read_rows(chats / "train.arrow"))


def _laid_out(chats: Path, cache: Path) -> tuple[Any, int]:
    rows, packs = read_rows(chats / "train.arrow"), chats / "packs.arrow"
    if packs.exists():
        return lay_out(rows, packs, cache)
    return rows, count_rows(rows).longest_tokens


SFT = Recipe(_rows_of, _laid_out, row_trainer)


@dataclass
class Learned:
    """A model with its trained adapter still on it."""

    model: Any
    begun: dict[str, Any]
    """See `retuner.lora.begin_weights`."""
    targets: Targets
    steps: int
    """Those that the adapter has learned from."""
    log: StepLog
    stopping: Stopping | None
    resumed: Path | None
    packing_fill: float
    rank: Rank
    by_row: bool
    """Packed rows were attended to one by one, see `retuner.row_attention`."""
    fused: dict[str, int]
    """How many modules were computed by which of Liger's kernels, see `retuner.fused_kernels`."""
    float8: str | None
    """What is to say of it, see `retuner.float8`."""


def train(
    out: Path,
    work: Path,
    chats: Chats,
    base: Base,
    params: TrainParams,
    device: str,
    observer: Observer,
    start: Path | None = None,
    recipe: Recipe = SFT,
) -> AdapterFacts:
    """Write adapter_model.safetensors, adapter_config.json and what people can look at into `out`.

    `work` survives a kill: a later call with the same params goes on from its newest whole checkpoint. SIGTERM waits
    until the step under way is done and sealed. `start` is a folder with the adapter to begin as, for a warm start.
    Errors: Refused or Unavailable, before any weight is loaded, when this cannot work; RetunerError when
    the numbers stop being finite.
    """
    with learned(work, chats, base, params, device, observer, start, recipe) as result:
        return write_learned(out, result, base, params)


def write_learned(out: Path, result: Learned, base: Base, params: TrainParams) -> AdapterFacts:
    """The files of the adapter, into `out`. Errors: RetunerError when they are not what was learned."""
    write_adapter(out, result.model, base.facts.source, result.begun)
    effective = _effective(result, params)
    points = result.log.points()
    _write_aside(out / "aside", result, points, effective)
    trainable = count_trainable(result.model, result.targets)
    return AdapterFacts(
        sha256=sha256_file(out / WEIGHTS),
        trained_steps=result.steps,
        final_loss=points[-1][1]["loss"],
        trainable_parameters=sum(trainable.values()),
        total_parameters=result.model.get_nb_trainable_parameters()[1],
        adapted_modules=count_adapted(result.model),
        trainable_by_module=trainable,
        packing_fill=result.packing_fill,
        effective=effective,
    )


@contextmanager
def learned(
    work: Path,
    chats: Chats,
    base: Base,
    params: TrainParams,
    device: str,
    observer: Observer,
    start: Path | None = None,
    recipe: Recipe = SFT,
    rank: Rank = ALONE,
) -> Iterator[Learned]:
    """As `train`, before anything is written. Afterwards the model is let go of.

    Of several processes each does this, with the same `work`.
    """
    import torch

    device = device_of(device)
    with reproducible(), quiet():
        result = _learn(work, chats, base, params, device, observer, start, recipe, rank)
        yield result
        result.model = None
        if device == "cuda":
            gc.collect()  # The Trainer and its model point at each other.
            torch.cuda.empty_cache()


def _learn(
    work: Path,
    chats: Chats,
    base: Base,
    params: TrainParams,
    device: str,
    observer: Observer,
    start: Path | None,
    recipe: Recipe,
    rank: Rank,
) -> Learned:
    import torch

    staging = checkpoints.clear_staging(work) if rank.leads else work / "staging"
    counts = recipe.count(chats.path)
    refuse_what_cannot_work(counts, params, device, base.path)
    targets = choose_targets(params.lora, read_skeleton(base.path), quantized=params.quantization is not None)
    if targets.told:
        observer.say(f"train: adapting {', '.join(targets.names)}; in this base {', '.join(targets.told)}")
    weights = read_start(start, base.path, params.lora, targets) if start else None

    packed = (chats.path / "packs.arrow").exists()
    sequences, sequence_tokens = recipe.lay_out(chats.path, work / f"laid-out-{rank.number}.arrow")
    fill = counts.tokens / (len(sequences) * sequence_tokens)
    steps = planned_steps(len(sequences), params)
    stopping = None
    if isinstance(params, SftParams) and params.stop_early:
        stopping = Stopping(params.stop_early, chats.path / "held_out.arrow", steps, observer)
    bits = None
    if params.quantization and in_4_bits(params):
        bits = bits_and_bytes(params.quantization, params.precision)
    # What is cut into parts is never whole on a GPU.
    place = "cpu" if rank.strategy == "fsdp" else device
    model = load_model(
        base.path, params.precision, params.attention, place, use_cache=False, quantization=bits
    )
    keep_differentiable(model)
    if packed and params.attention == "sdpa":
        attend_by_row(model)
    torch.manual_seed(params.seed)  # For the adapter's first weights; the Trainer seeds itself again.
    model = put_adapter_on(model, params.lora, targets)
    begun = begin_weights(model, params.lora)
    if weights:
        load_weights(model, weights)
    float8 = None
    if uses_float8(params):
        first = sequences.select(range(min(COMPARED_SEQUENCES, len(sequences))))
        float8 = hold_in_float8(model, lambda: mean_loss(model, first, packed))
        observer.say(f"train: {float8}")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what is recorded is training's, not loading's
    fused = fuse(model) if uses_liger(params) else {}
    if isinstance(params, SftParams) and has_fused_head(model, params):
        fused["head with loss"] = 1
    _say_what_learns(model, targets, counts, packed, fill, observer)

    log = StepLog(params.log_every_steps, steps, observer, recipe.logged)
    trainer = recipe.trainer(model, sequences, packed, params, steps, device, staging, log, stopping, rank)
    resumed = agreed(rank, lambda: checkpoints.newest_whole(work, observer.say, needed_by))
    if resumed:
        observer.say(f"train: going on after {resumed.name} of {steps}{_other_layout(resumed, rank)}")
    # What stops all processes of a machine reaches a rank by itself, from torch's launcher and from who asked for both.
    with sigterm_held_back(repeats=rank.of > 1) as asked_to_stop:
        stop_when(trainer, asked_to_stop, steps, rank)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        finished = trainer.state.global_step
        if asked_to_stop() and finished < log.steps:
            observer.say(
                f"train: stopped by SIGTERM after step {finished} of {log.steps}; run again to go on"
            )
    if finished != log.steps:
        raise RetunerError(f"training ended after step {finished}", f"{log.steps} steps")
    refuse_not_finite(model, finished)
    by_row = model.config._attn_implementation == ROW_ATTENTION
    if by_row:  # From here on nobody says where rows end.
        model.get_base_model().set_attn_implementation(params.attention)
    if fused:
        unfuse(model)
    if stopping:
        observer.say(f"train: the adapter is that of {stopping.story(finished)}")
        if stopping.best_step != finished:
            load_weights(model, checkpoints.read_weights(work, stopping.best_step))
    return Learned(
        model=model,
        begun=begun,
        targets=targets,
        steps=stopping.best_step if stopping else finished,
        log=log,
        stopping=stopping,
        resumed=resumed,
        packing_fill=fill,
        rank=rank,
        by_row=by_row,
        fused=fused,
        float8=float8,
    )


def _other_layout(resumed: Path, rank: Rank) -> str:
    made_by = checkpoints.processes(resumed)
    told = f", which {made_by} made; from here {rank.of} train, and chance is drawn anew"
    return told if made_by != rank.of else ""


def _say_what_learns(
    model: Any, targets: Targets, counts: RowCounts, packed: bool, fill: float, observer: Observer
) -> None:
    trainable, total = sum(count_trainable(model, targets).values()), model.get_nb_trainable_parameters()[1]
    observer.say(
        f"train: {trainable:,} of {total:,} parameters learn ({100 * trainable / total:.2f} %), in "
        f"{describe_trainable(model, targets)}; "
        f"{100 * counts.supervised_tokens / counts.tokens:.0f} % of {counts.tokens:,} tokens carry loss; "
        f"{'packing fills' if packed else 'not packed, rows fill'} {100 * fill:.1f} %"
    )


def planned_steps(sequences: int, params: TrainParams) -> int:
    """Optimizer steps; the last step of an epoch may have fewer batches."""
    if params.max_steps is not None:
        return params.max_steps
    a_step = params.batch_size * params.gradient_accumulation
    return math.ceil(math.ceil(sequences / a_step) * params.epochs)  # type: ignore[operator]  # one is set


def _effective(result: Learned, params: TrainParams) -> dict[str, str]:
    """What it came to, as the model says it, and beside it what was asked for."""
    import torch

    config, device = result.model.config, result.model.device
    told = {
        "attention": str(config._attn_implementation),
        "dtype": str(result.model.dtype).removeprefix("torch."),
        "use_cache": str(config.use_cache),
        "gradient_checkpointing": str(result.model.is_activation_checkpointing),
        "requested_attention": params.attention,
        "requested_dtype": params.precision,
        "requested_use_cache": "False",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "processes": str(result.rank.of),
    }
    if result.by_row:
        told["packed_rows"] = "end to end, each attended by itself"
    if result.fused:
        counts = ", ".join(f"{count} {kernel}" for kernel, count in result.fused.items())
        told["kernels"] = f"liger-kernel {VERSION}: {counts}"
    if result.rank.of > 1:
        told["strategy"] = "fsdp" if is_sharded(result.model) else "ddp"
    if result.float8:
        told["quantization"] = f"{result.float8}; evaluated and served on the base as it is"
    if packed := getattr(config, "quantization_config", None):
        told["quantization"] = (
            f"{packed.bnb_4bit_quant_type}{', double' if packed.bnb_4bit_use_double_quant else ''}, computes in "
            f"{str(packed.bnb_4bit_compute_dtype).removeprefix('torch.')}; evaluated and served on the base as it is"
        )
    if result.begun:
        told["written_as"] = f"plain LoRA of twice the rank, for the base as it is ({params.lora.init})"
    if result.stopping:
        told["chosen"] = result.stopping.story(result.log.steps)
    return told


def _write_aside(
    aside: Path, result: Learned, points: list[tuple[int, dict[str, float]]], effective: dict[str, str]
) -> None:
    aside.mkdir()
    measured = result.stopping.measured if result.stopping else []
    points = [*points, *((int(each["step"]), {HELD_OUT_LOSS: each[HELD_OUT_LOSS]}) for each in measured)]
    lines = (
        json.dumps({"step": step, "metrics": metrics}, sort_keys=True) + "\n"
        for step, metrics in sorted(points, key=lambda point: point[0])
    )
    (aside / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    entries = result.log.entries
    resumed = checkpoints.step_of(result.resumed.name) if result.resumed else 0
    # Those before may be of another machine.
    mine = [entry for entry in entries if entry["step"] > resumed]
    speed = sum(entry["tokens"] for entry in mine) / sum(entry["seconds"] for entry in mine)
    story = {
        **effective,
        "step_seconds": round(sum(entry["seconds"] for entry in entries), 3),
        "tokens_per_second": round(speed, 1),
        "memory_mb": round(max(entry["memory_mb"] for entry in mine), 1),
        "resumed_after": result.resumed.name if result.resumed else None,
    }
    (aside / "effective.json").write_text(
        json.dumps(story, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )

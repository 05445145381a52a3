"""What a training will take, said before its weights are loaded: memory, speed, time; and what it came to.

The params decide how large a batch is, because that decides the result. A plan only says what they lead to, and
refuses what the machine cannot hold. What depends on the machine stands beside results, never in them.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retuner.artifacts import Base, Chats
from retuner.determinism import quiet
from retuner.errors import Refused
from retuner.feasible import refuse_what_cannot_work
from retuner.files import write_whole
from retuner.fingerprint import fingerprint
from retuner.float8 import uses_float8
from retuner.layer_probe import head_seconds, layer_cost
from retuner.lora import count_trainable, put_adapter_on
from retuner.packing import RowCounts, count_rows, read_rows
from retuner.row_trainer import makes_logits
from retuner.skeleton import empty_model, skeleton_of
from retuner.targets import choose_targets
from retuner.train_params import SftParams
from retuner.training import planned_steps

OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 1, "paged_adamw_8bit": 2}
"""Kept beside each number that learns; 8 for the others, two moments of float32."""
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0}
QUANTIZED_BYTES = {True: 0.52, False: 0.57}
"""A 4-bit weight with its share of the scales, which are quantised themselves or not."""
FLOAT8_BYTES = 1.0
LOGIT_BYTES = 16
"""Of one logit: itself in the base's precision, in float32, its logarithm of the softmax, its gradient."""
PROBE_TOKENS, MOST_PROBE_TOKENS = 512, 16_384
"""A processor computes a few hundred tokens as fast as many; a GPU is given as many as a step will have."""
GIB = 2**30
SPEEDS = "speeds.json"
"""Below Runtime.home: what runs reached on this machine, tokens a second by `Plan.speed_key`."""


@dataclass(frozen=True)
class Plan:
    machine: str
    rows: int
    tokens: int
    left_out: dict[str, int]
    """Rows that are not trained on, by cause."""
    rows_cut: int
    """Rows that lost their end."""
    packing_fill: float
    steps: int
    trainable_parameters: int
    total_parameters: int
    weight_bytes: int
    loading_bytes: int
    """What weights take at the most before training begins; float8's are rounded where they were loaded."""
    adapter_bytes: int
    """With gradients and what the optimizer keeps."""
    activation_bytes: int
    """As params say, with or without checkpoints."""
    other_activation_bytes: int
    """The other way."""
    logit_bytes: int
    process_bytes: int
    """What the process holds already."""
    memory_bytes: int
    """What there is."""
    gradient_checkpointing: bool
    tokens_per_second: float
    speed_from: str
    """`an earlier run` or `a probe`."""
    seconds: float
    speed_key: str

    @property
    def peak_bytes(self) -> int:
        return self._peak(self.activation_bytes)

    @property
    def other_peak_bytes(self) -> int:
        """With `gradient_checkpointing` the other way."""
        return self._peak(self.other_activation_bytes)

    @property
    def must_checkpoint(self) -> bool:
        """Whether only checkpointed activations fit."""
        without = self.other_peak_bytes if self.gradient_checkpointing else self.peak_bytes
        return without > self.memory_bytes

    def _peak(self, activations: int) -> int:
        training = self.weight_bytes + self.adapter_bytes + activations + self.logit_bytes
        return self.process_bytes + max(self.loading_bytes, training)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "peak_bytes": self.peak_bytes,
            "other_peak_bytes": self.other_peak_bytes,
            "must_checkpoint": self.must_checkpoint,
        }

    def lines(self) -> list[str]:
        left = ", ".join(f"{count:,} {cause}" for cause, count in self.left_out.items()) or "none"
        advice = "activations need not be checkpointed to fit"
        if self.must_checkpoint:
            advice = "activations must be checkpointed to fit"
        elif self.gradient_checkpointing:
            advice += f": without, {self.other_peak_bytes / GIB:.1f} GiB, and faster"
        return [
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters learn",
            f"{self.rows:,} rows of {self.tokens:,} tokens, {self.rows_cut:,} cut short, left out: {left}; "
            f"sequences are {100 * self.packing_fill:.1f} % full",
            f"{self.peak_bytes / GIB:.1f} of {self.memory_bytes / GIB:.1f} GiB at the most: weights "
            f"{self.weight_bytes / GIB:.1f}, adapter {self.adapter_bytes / GIB:.2f}, activations "
            f"{self.activation_bytes / GIB:.1f}, logits {self.logit_bytes / GIB:.1f}; {advice}",
            f"{self.steps:,} steps at {self.tokens_per_second:,.0f} tokens/s, by {self.speed_from}: "
            f"{_duration(self.seconds)} on {self.machine}",
        ]

    def summary(self) -> str:
        return (
            f"{_duration(self.seconds)} for {self.steps:,} steps at {self.tokens_per_second:,.0f} tokens/s, by "
            f"{self.speed_from}, and {self.peak_bytes / GIB:.1f} of {self.memory_bytes / GIB:.1f} GiB"
        )

    def refuse_what_cannot_fit(self) -> None:
        """Errors: Refused."""
        if self.peak_bytes <= self.memory_bytes:
            return
        if not self.gradient_checkpointing and self.other_peak_bytes <= self.memory_bytes:
            do = "set train.gradient_checkpointing: true"
        else:
            do = (
                "halve train.batch_size and double train.gradient_accumulation: the same step in less memory; or set "
                "train.gradient_checkpointing: true, train.precision: bfloat16, or train.quantization"
            )
        raise Refused(
            f"this training would need {self.peak_bytes / GIB:.1f} GiB",
            f"at most the {self.memory_bytes / GIB:.1f} GiB of {self.machine}",
            do,
        )


def make_plan(chats: Chats, base: Base, params: SftParams, device: str, speeds: Path) -> Plan:
    """`speeds` is a file of what earlier runs reached on this machine.

    Errors: Refused or Unavailable for what cannot be trained at all; not for what cannot fit.
    """
    with quiet():
        return _make_plan(chats, base, params, device, speeds)


def _make_plan(chats: Chats, base: Base, params: SftParams, device: str, speeds: Path) -> Plan:
    import torch

    counts = count_rows(read_rows(chats.path / "train.arrow"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    refuse_what_cannot_work(counts, params, device, base.path)
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        return _plan(counts, chats, base, params, device, speeds)


def _plan(counts: RowCounts, chats: Chats, base: Base, params: SftParams, device: str, speeds: Path) -> Plan:
    model = empty_model(base.path)
    total, config = sum(weight.numel() for weight in model.parameters()), model.config
    skeleton = skeleton_of(model)
    targets = choose_targets(params.lora, skeleton, quantized=params.quantization is not None)
    linear = sum(inputs * outputs for inputs, outputs in skeleton.linear.values())
    lora = params.lora.model_copy(update={"init": "default"})  # the others look at the weights
    model = put_adapter_on(model, lora, targets)
    trainable = sum(count_trainable(model, targets).values())
    logits = makes_logits(model, params, device)

    packs = chats.facts.packs
    sequences = packs.count if packs else counts.rows
    row_tokens = max(1, round(counts.tokens / counts.rows))
    # A step holds at the most so many sequences, of so many tokens each.
    batch_tokens = params.batch_size * (
        round(counts.tokens / sequences / packs.fill) if packs else counts.longest_tokens
    )
    fill = packs.fill if packs else counts.tokens / (counts.rows * counts.longest_tokens)
    share = counts.supervised_tokens / counts.tokens
    probed = PROBE_TOKENS if device == "cpu" else min(batch_tokens, MOST_PROBE_TOKENS)
    layer = layer_cost(base.path, params.model_dump_json(), device, row_tokens, max(1, probed // row_tokens))
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    width = WEIGHT_BYTES[params.precision]
    kept = batch_tokens * layer.saved_bytes
    activations = {False: kept * layers, True: kept + batch_tokens * layers * config.hidden_size * width}
    weights = total * width
    if params.quantization:
        weights = (total - linear) * width + linear * (
            FLOAT8_BYTES if uses_float8(params) else QUANTIZED_BYTES[params.quantization.double]
        )

    machine = machine_name(device)
    key = fingerprint(
        {
            "machine": machine,
            "base": base.facts.weights_sha256,
            "layers": layers,
            "params": params.model_dump(
                mode="json", exclude={"seed", "max_steps", "epochs", "learning_rate"}
            ),
            "row_tokens": row_tokens,
            "batch_tokens": batch_tokens,
        }
    )
    speed, told = _read_speeds(speeds).get(key), "an earlier run"
    if speed is None:
        again = layer.forward_seconds if params.gradient_checkpointing else 0.0
        head = head_seconds(config.hidden_size, vocabulary, params.precision, device, min(row_tokens, 128))
        speed, told = 1 / (layers * (layer.seconds + again) + share * head), "a probe"
    steps = planned_steps(sequences, params)
    tokens_a_step = counts.tokens / sequences * params.batch_size * params.gradient_accumulation
    return Plan(
        machine=machine,
        rows=counts.rows,
        tokens=counts.tokens,
        left_out=dict(chats.facts.left_out),
        rows_cut=_rows_cut(chats),
        packing_fill=fill,
        steps=steps,
        trainable_parameters=trainable,
        total_parameters=total + trainable,
        weight_bytes=round(weights),
        loading_bytes=round(total * width) if uses_float8(params) else 0,
        adapter_bytes=trainable * (8 + OPTIMIZER_BYTES.get(params.optimizer, 8)),
        activation_bytes=round(activations[params.gradient_checkpointing]),
        other_activation_bytes=round(activations[not params.gradient_checkpointing]),
        logit_bytes=round(batch_tokens * share * vocabulary * LOGIT_BYTES) if logits else 0,
        process_bytes=_held(device),
        memory_bytes=_memory(device),
        gradient_checkpointing=params.gradient_checkpointing,
        tokens_per_second=speed,
        speed_from=told,
        seconds=steps * tokens_a_step / speed,
        speed_key=key,
    )


def record_outcome(aside: Path, plan: Plan, speeds: Path) -> None:
    """plan.json beside the adapter: prediction and outcome. The speed that was reached is the next plan's."""
    reached = json.loads((aside / "effective.json").read_bytes())
    outcome = {
        "peak_bytes": round(reached["memory_mb"] * 1e6),
        "seconds": reached["step_seconds"],
        "tokens_per_second": reached["tokens_per_second"],
    }
    text = json.dumps({"predicted": plan.as_json(), "outcome": outcome}, indent=2, sort_keys=True)
    (aside / "plan.json").write_text(text + "\n", encoding="utf-8")
    known = _read_speeds(speeds) | {plan.speed_key: reached["tokens_per_second"]}
    write_whole(speeds, json.dumps(known, indent=0, sort_keys=True).encode())


def machine_name(device: str) -> str:
    """What speeds are kept by: the GPU, or the processor and its threads."""
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    name = torch.cpu.get_capabilities().get("cpu_name") or "processor"
    return f"{name}, {torch.get_num_threads()} threads"


def _rows_cut(chats: Chats) -> int:
    report = chats.path / "aside" / "tokens.json"
    return int(json.loads(report.read_bytes())["train"]["cut"]) if report.exists() else 0


def _held(device: str) -> int:
    import psutil

    return 0 if device == "cuda" else int(psutil.Process().memory_info().rss)


def _memory(device: str) -> int:
    """Of the GPU, or of the machine or the container, whichever is less."""
    import psutil
    import torch

    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(psutil.virtual_memory().total, int(text) if text.isdecimal() else math.inf)  # type: ignore[return-value]


def _read_speeds(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}  # a probe does as well


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

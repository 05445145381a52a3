"""What a training will take, said before its weights are loaded: memory, speed, time; and what it came to.

The params decide how large a batch is, because that decides the result: a plan says what they lead to, refuses what the
machine cannot hold, and names the batches that it can. Whether activations are checkpointed changes no byte of the
result: where params say `auto` the plan decides it. What depends on the machine stands beside results, never in them.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from retuner.artifacts import Base, Chats
from retuner.determinism import quiet
from retuner.feasible import device_of, refuse_what_cannot_be_shared, refuse_what_cannot_work
from retuner.files import write_whole
from retuner.fingerprint import fingerprint
from retuner.float8 import uses_float8
from retuner.layer_probe import head_seconds, layer_cost
from retuner.lora import count_trainable, put_adapter_on
from retuner.plan import Plan
from retuner.ranks import share
from retuner.row_attention import attends_by_row
from retuner.row_trainer import makes_logits
from retuner.skeleton import empty_model, skeleton_of
from retuner.step_load import StepLoad, step_load
from retuner.targets import choose_targets
from retuner.train_params import DpoParams, SftParams
from retuner.training import planned_steps

OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 1, "paged_adamw_8bit": 2}
"""Kept beside each number that learns; 8 for the others, two moments of float32."""
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0}
QUANTIZED_BYTES = {True: 0.52, False: 0.57}
"""A 4-bit weight with its share of the scales, which are quantised themselves or not."""
FLOAT8_BYTES = 1.0
LOGIT_BYTES = 16
"""Of one logit: itself in the base's precision, in float32, its logarithm of the softmax, its gradient."""
PAIR_HEAD, REFERENCE_HEAD = 2.2, 0.9
"""Of the time of a token's logits, forward and back: TRL's log-probabilities of pairs, which make logits a second time
for the backward pass, and their forward pass alone. Measured on a processor."""
PROBE_TOKENS, MOST_PROBE_TOKENS, MOST_HEAD_TOKENS = 512, 16_384, 128
"""A processor computes a few hundred tokens as fast as many; a GPU is given as many as a step will have."""
IN_LAYER = re.compile(r"\.layers\.(\d+)\.")
SPEEDS = "speeds.json"
"""Below Runtime.home: what runs reached on this machine, tokens a second by `Plan.speed_key`."""


def make_plan(
    chats: Chats,
    base: Base,
    params: SftParams | DpoParams,
    device: str,
    speeds: Path,
    processes: int = 1,
    strategy: str = "ddp",
) -> Plan:
    """`speeds` is a file of what earlier runs reached on this machine.

    Errors: Refused or Unavailable for what cannot be trained at all; not for what cannot fit.
    """
    import torch

    device = device_of(device)
    with quiet():
        refuse_what_cannot_be_shared(params, base.path, device, processes, strategy)
        by_row = attends_by_row(base.path, params.attention)
        load = step_load(chats, params, share(params, processes)[0], by_row)
        refuse_what_cannot_work(load.counts, params, device, base.path)
        with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
            return _plan(load, chats, base, params, device, speeds, processes, strategy)


def _plan(
    load: StepLoad,
    chats: Chats,
    base: Base,
    params: SftParams | DpoParams,
    device: str,
    speeds: Path,
    processes: int,
    strategy: str,
) -> Plan:
    model = empty_model(base.path)
    total, config = sum(weight.numel() for weight in model.parameters()), model.config
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    in_layers = sum(weight.numel() for name, weight in model.named_parameters() if IN_LAYER.search(name))
    skeleton = skeleton_of(model)
    targets = choose_targets(params.lora, skeleton, quantized=params.quantization is not None)
    linear = sum(inputs * outputs for inputs, outputs in skeleton.linear.values())
    lora = params.lora.model_copy(update={"init": "default"})  # the others look at the weights
    model = put_adapter_on(model, lora, targets)
    trainable = sum(count_trainable(model, targets).values())
    pairs = isinstance(params, DpoParams)
    logits = isinstance(params, SftParams) and makes_logits(model, params, device)

    counts, (at_once, accumulation) = load.counts, share(params, processes)
    supervised = counts.supervised_tokens / counts.tokens
    probed = PROBE_TOKENS if device == "cpu" else min(load.batch_tokens, MOST_PROBE_TOKENS)
    rows = max(1, probed // load.row_tokens)
    layer = layer_cost(base.path, params, device, load.row_tokens, rows, load.end_to_end)
    width = WEIGHT_BYTES[params.precision]
    kept = load.batch_tokens * layer.saved_bytes
    learning = layers - _first_that_learns(model, skeleton.embedding, layers)
    activations = {
        # Gradients go no deeper than the first layer that learns, but checkpoints let them go through all.
        False: round(kept * learning),
        True: round(kept + load.batch_tokens * layers * config.hidden_size * width),
    }
    weights = total * width
    if params.quantization:
        weights = (total - linear) * width + linear * (
            FLOAT8_BYTES if uses_float8(params) else QUANTIZED_BYTES[params.quantization.double]
        )
    parts = processes if strategy == "fsdp" else 1
    if parts > 1:  # What is in no layer stays whole, and so does a layer while it computes.
        weights = (in_layers / parts + total - in_layers + in_layers / layers) * width
    loading = total * width if uses_float8(params) or (parts > 1 and device == "cpu") else 0

    @cache
    def head() -> float:
        tokens = min(load.row_tokens, MOST_HEAD_TOKENS)
        return head_seconds(config.hidden_size, vocabulary, params.precision, device, tokens)

    def token_seconds(checkpointing: bool) -> float:
        """Of one that is not padding."""
        passes = layers * layer.forward_seconds + learning * (layer.seconds - layer.forward_seconds)
        if checkpointing:
            passes = layers * (layer.seconds + layer.forward_seconds)
        return load.padded * passes + supervised * head() * (PAIR_HEAD if pairs else 1)

    def reference_seconds() -> float:
        """Of a pass over all pairs, each beside others of its length."""
        return counts.tokens * (layers * layer.forward_seconds + supervised * REFERENCE_HEAD * head())

    machine, known = machine_name(device), _read_speeds(speeds)
    together = at_once * accumulation * processes
    steps = planned_steps(load.sequences, params)
    learned_tokens = steps * counts.tokens / math.ceil(load.sequences / together)

    def planned(checkpointing: bool) -> Plan:
        key = fingerprint(
            {
                "machine": machine,
                "base": base.facts.weights_sha256,
                "layers": layers,
                "params": {
                    **params.model_dump(
                        mode="json", exclude={"seed", "max_steps", "epochs", "learning_rate"}
                    ),
                    "gradient_checkpointing": checkpointing,
                },
                "row_tokens": load.row_tokens,
                "batch_tokens": load.batch_tokens,
                "processes": [processes, strategy],
            }
        )
        speed, told = known.get(key), "an earlier run"
        if speed is None:
            speed, told = 1 / token_seconds(checkpointing), "a probe"
            if device == "cuda":
                speed *= processes
        return Plan(
            machine=machine,
            rows=counts.rows,
            tokens=counts.tokens,
            left_out=dict(chats.facts.left_out),
            rows_cut=_rows_cut(chats),
            packing_fill=load.fill,
            steps=steps,
            processes=processes,
            batch_size=at_once,
            step_sequences=together,
            trainable_parameters=trainable,
            total_parameters=total + trainable,
            weight_bytes=round(weights),
            loading_bytes=round(loading),
            adapter_bytes=trainable * (8 + OPTIMIZER_BYTES.get(params.optimizer, 8)) // parts,
            activation_bytes=activations[checkpointing],
            other_activation_bytes=activations[not checkpointing],
            logit_bytes=round(load.batch_tokens * supervised * vocabulary * LOGIT_BYTES) if logits else 0,
            process_bytes=_held(device),
            memory_bytes=_memory(device, processes),
            gradient_checkpointing=checkpointing,
            decided=params.gradient_checkpointing == "auto",
            savings=list(_savings(params, device, processes, strategy)),
            tokens_per_second=speed,
            speed_from=told,
            seconds=learned_tokens / speed,
            reference_seconds=reference_seconds() if pairs else 0.0,
            speed_key=key,
        )

    if params.gradient_checkpointing != "auto":
        return planned(params.gradient_checkpointing)
    plan = planned(False)
    return planned(True) if plan.wants_checkpoints else plan


def _first_that_learns(model: Any, embedding: str, layers: int) -> int:
    """The first layer to which gradients go back; `layers` where they go to none."""
    learn = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if any(f".{embedding}." in f"{name}." for name in learn):
        return 0
    return min((int(found[1]) for name in learn if (found := IN_LAYER.search(name))), default=layers)


def _savings(params: SftParams | DpoParams, device: str, processes: int, strategy: str) -> Iterator[str]:
    if params.gradient_checkpointing is False:
        yield "set train.gradient_checkpointing: auto"
    if params.precision != "bfloat16":
        yield "set train.precision: bfloat16"
    if not params.quantization and isinstance(params, SftParams):
        yield "hold the base in 4 bits, with train.quantization"
    if processes > 1 and strategy == "ddp":
        yield "share the base out, with --strategy fsdp"
    if processes > 1 and device == "cpu":
        yield "let fewer processes train"
    yield "let sequences be shorter, with template.max_tokens and pack_tokens"


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
    # Of pairs none is ever cut.
    return int(json.loads(report.read_bytes())["train"].get("cut", 0)) if report.exists() else 0


def _held(device: str) -> int:
    import psutil

    return 0 if device == "cuda" else int(psutil.Process().memory_info().rss)


def _memory(device: str, processes: int) -> int:
    """For each process: of its GPU, or its share of the machine or the container, whichever is less."""
    import psutil
    import torch

    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    there_is = int(psutil.virtual_memory().total)
    if text.isdecimal():
        there_is = min(there_is, int(text))
    return there_is // processes


def _read_speeds(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}  # a probe does as well

"""Training on one GPU with Phi-3-mini's shape and random weights: ours against the tutorial and TRL, interleaved.

    python -m benchmarks.train_gpu [--rounds 3] [--rows 600]
    python -m benchmarks.train_gpu --small --device cpu     # a tiny base: shows that it runs, measures nothing
    python -m benchmarks.train_gpu --llamafactory ../llamafactory/bin/python --unsloth ../unsloth/bin/python

Speed does not depend on the weights; that ours computes the same is shown on them: loss and gradients of one pack
against eager attention in float32. Rows are random ids with the lengths of chats, log-normal. Sides:
`benchmarks.training_sides`, one epoch each; tuned TRL is what its documentation advises on a GPU that is large enough
(bfloat16 weights, packing, no checkpointed activations, flash attention and Liger's kernels where they are installed).

LLaMA-Factory and Unsloth pin other versions than this project, so each is given as the interpreter of an environment:

    python3.11 -m venv ../llamafactory && ../llamafactory/bin/pip install llamafactory liger-kernel
    python3.11 -m venv ../unsloth && ../unsloth/bin/pip install unsloth

and, for flash attention, `pip install --no-build-isolation flash-attn` there; beside a CPU build of torch, torchvision
and torchaudio must be CPU builds too. A peer trains in a child process over the same token ids and labels, with the
same LoRA, optimizer, learning rate and one epoch, and its own best settings (`benchmarks/peers`). Rows never see one
another: LLaMA-Factory packs with neat_packing, Unsloth with TRL's packing, or pads where there is no GPU. Unsloth is
given the base with q, k, v and gate, up apart, as its own upload of Phi-3-mini is, since its kernels are for those; so
its adapter has an A for each of them, and more weights that learn. A peer that does not come to its end is reported
with the last line it said.

Reported: tokens without padding a second, the share of the matrix-product peak that is measured in the same run,
the most GPU memory, and what `retuner plan` said before. Steps count without the first.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training_peers import PeerFailed, peer, write_split_base
from benchmarks.training_rows import Work, make_random_work
from benchmarks.training_sides import (
    ALPHA,
    RANK,
    Trained,
    has_bfloat16,
    has_liger,
    ours,
    ours_params,
    trl,
    trl_defaults,
    tutorial,
)
from retuner.plan import Plan
from retuner.planner import make_plan
from retuner.tiny_phi3 import write_json, write_tiny_phi3

GOALS = {"tutorial": 1.8, "TRL, tuned": 1.3, "peer": 1.15}
PEAK_GOAL, MEMORY_GOAL, PLAN_GOAL = 0.58, 0.55, 0.10
OPTIONS = {"LLaMA-Factory": "llamafactory", "Unsloth": "unsloth"}
PHI3_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "sliding_window": 2047,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
}


def write_base(folder: Path, device: str, small: bool) -> None:
    """Phi-3-mini's shape and random weights with the tiny base's tokenizer, which only the libraries ask for."""
    write_tiny_phi3(folder, seed=0)
    if small:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **PHI3_MINI, "dtype": "bfloat16"})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(folder)), dtype=torch.bfloat16, trust_remote_code=False
        )
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder))


def trl_tuned(work: Work, folder: Path, device: str, pack_tokens: int, batch_size: int) -> Trained:
    from transformers.utils import is_flash_attn_2_available

    flash = device == "cuda" and is_flash_attn_2_available()
    return trl(
        work,
        folder,
        device,
        model_init_kwargs={
            "dtype": "bfloat16" if has_bfloat16(device) else "float32",
            "attn_implementation": "flash_attention_2" if flash else "sdpa",
        },
        packing=True,
        max_length=pack_tokens,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=False,
        use_liger_kernel=has_liger(device),
    )


def matmul_peak(device: str, size: int) -> float:
    """FLOP a second of the best of many square products."""
    import torch

    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        began = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def flop_a_token(work: Work) -> float:
    """Forward, and back through activations; the base's weights have no gradients. LoRA's own products do not count."""
    import torch

    from retuner.skeleton import empty_model

    model = empty_model(work.base.path)
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    head = model.get_output_embeddings().weight.numel()
    rows = [len(row.input_ids) for row in work.train]
    seen = sum(length * (length + 1) / 2 for length in rows) / sum(rows)
    supervised = sum(label >= 0 for row in work.train for label in row.labels) / sum(rows)
    config = model.config
    # Two products of attention forward, four back, each 2 · hidden FLOP a token that is seen.
    attention = 12 * config.num_hidden_layers * config.hidden_size * seen
    return 4 * linear + 4 * head * supervised + attention


def parity(work: Work, device: str) -> tuple[float, float]:
    """Of one pack, ours against eager attention in float32: relative difference of the loss, and one minus the cosine
    between all gradients."""
    import torch

    one, other = (
        _loss_and_gradient(work, device, precision, attention)
        for precision, attention in (
            ("bfloat16" if has_bfloat16(device) else "float32", "sdpa"),
            ("float32", "eager"),
        )
    )
    cosine = torch.nn.functional.cosine_similarity(one[1], other[1], dim=0).item()
    return abs(one[0] / other[0] - 1), 1 - cosine


def _loss_and_gradient(work: Work, device: str, precision: str, attention: str) -> tuple[float, Any]:
    import torch

    from retuner.base import load_model
    from retuner.fused_kernels import fuse, has_fused_head
    from retuner.lora import put_adapter_on
    from retuner.packing import collator, lay_out, read_rows
    from retuner.row_attention import attend_by_row
    from retuner.row_trainer import supervised_loss
    from retuner.skeleton import read_skeleton
    from retuner.targets import choose_targets

    base = load_model(work.base.path, precision, attention, device, use_cache=False)
    if attention == "sdpa":
        attend_by_row(base)
    params = ours_params(1, device)
    lora = params.lora.model_copy(update={"dropout": 0.0})
    model = put_adapter_on(base, lora, choose_targets(lora, read_skeleton(work.base.path)))
    fused = has_liger(device) and attention == "sdpa"
    if fused:
        fuse(model)
    torch.manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            weight.data = (torch.randn(weight.shape) * 0.02).to(weight)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(work.chats.path / "train.arrow")
        packs, _ = lay_out(rows, work.chats.path / "packs.arrow", Path(folder) / "packed.arrow")
        batch = collator(True, base.config._attn_implementation)([packs[0]])
    batch.pop("tokens")
    batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = supervised_loss(base, batch, items=1000, fused=fused and has_fused_head(model, params))
    loss.backward()
    learn = [
        weight.grad.float().flatten()
        for _, weight in sorted(model.named_parameters())
        if weight.requires_grad
    ]
    return loss.item(), torch.cat(learn).cpu()


def report(
    sides: dict[str, list[Trained]],
    absent: dict[str, str],
    work: Work,
    plan: Plan,
    device: str,
    peak: float,
    apart: tuple[float, float],
) -> None:
    """`absent`: of each peer that did not run, why."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "processor (not what this benchmark is for)"
    rounds = len(sides["ours"])
    print(
        f"{len(work.train):,} rows, {work.tokens:,} tokens, on a {name}; {peak / 1e12:.1f} TFLOP/s of matrix products; "
        f"LoRA r {RANK}, alpha {ALPHA}; medians of {rounds} interleaved rounds"
    )
    cost = flop_a_token(work)
    print(
        f"{'':<20}{'tokens/s':>10}{'of peak':>10}{'memory':>12}{'last loss':>12}{'held-out':>10}   grad norms"
    )
    speeds = {
        side: statistics.median(each.tokens_per_second for each in made) for side, made in sides.items()
    }
    for side, made in sides.items():
        norms = " ".join(f"{norm:.2f}" for norm in made[-1].grad_norms[:6])
        print(
            f"{side:<20}{speeds[side]:>10,.0f}{100 * speeds[side] * cost / peak:>8.1f} %"
            f"{made[-1].peak_bytes / 2**30:>8.1f} GiB{made[-1].losses[-1]:>12.4f}"
            f"{made[-1].held_out_loss:>10.4f}   {norms}"
        )
    print(f"goal: {100 * PEAK_GOAL:g} % of the peak")
    best = max(("tutorial: wrapped", "tutorial: bfd"), key=lambda side: speeds[side])
    peers = [side for side in OPTIONS if side in sides]
    compared = [(GOALS["tutorial"], best), (GOALS["TRL, tuned"], "TRL, tuned")]
    if peers:
        compared.append((GOALS["peer"], max(peers, key=lambda side: speeds[side])))
    for goal, side in compared:
        which = f"the best peer, {side}" if side in peers else side
        print(f"ours is {speeds['ours'] / speeds[side]:.2f} x as fast as {which} (goal {goal:g} x)")
    for side in peers:
        print(f"{side}: {sides[side][-1].how}")
    for side, why in absent.items():
        print(f"{side} did not run: {why}")
    if device == "cuda":
        padded, mine = (sides[side][-1].peak_bytes for side in ("TRL, defaults", "ours"))
        print(f"peak memory {mine / padded:.2f} x that of padded defaults (goal {MEMORY_GOAL:g} x)")
        print(f"planned {plan.peak_bytes / mine - 1:+.1%} of memory (goal within {PLAN_GOAL:.0%})")
    print(f"planned {plan.tokens_per_second / speeds['ours'] - 1:+.1%} of tokens/s, by {plan.speed_from}")
    print(
        f"against eager float32: loss apart by {apart[0]:.1e} of it, gradients by 1 - cosine {apart[1]:.1e}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rows", type=int, default=600)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--small", action="store_true", help="a tiny base and few rows")
    for name, option in OPTIONS.items():
        options.add_argument(f"--{option}", metavar="PYTHON", help=f"of an environment that has {name}")
    chosen = options.parse_args()
    pythons = {name: getattr(chosen, option) for name, option in OPTIONS.items()}
    device = chosen.device
    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary), Path(temporary) / "base"
        base.mkdir()
        write_base(base, device, chosen.small)
        rows, mean, pack, batch, rounds = chosen.rows, 400, 2048, 4, chosen.rounds
        if chosen.small:
            rows, mean, pack, batch, rounds = 24, 60, 256, 2, 1
        plain = make_random_work(folder / "rows", base, rows, mean, longest=pack // 2)
        work = plain.packed(folder / "packs", pack)
        made: dict[str, Any] = {
            "TRL, defaults": lambda place: trl_defaults(plain, place, device),
            "tutorial: wrapped": lambda place: tutorial(plain, place, device, pack, "wrapped", batch),
            "tutorial: bfd": lambda place: tutorial(plain, place, device, pack, "bfd", batch),
            "TRL, tuned": lambda place: trl_tuned(plain, place, device, pack, batch),
            "ours": lambda place: ours(work, place, batch, device),
        }
        absent = {
            name: f"--{OPTIONS[name]} PYTHON gives an environment that has it"
            for name, python in pythons.items()
            if python is None
        }
        bases = {"LLaMA-Factory": base, "Unsloth": folder / "split"}
        if pythons["Unsloth"]:
            write_split_base(base, bases["Unsloth"], device)
        for name, python in pythons.items():
            if python:
                made[name] = lambda place, name=name, python=python: peer(
                    name, python, work, bases[name], place, device, pack, batch
                )
        plan = make_plan(work.chats, work.base, ours_params(batch, device), device, folder / "speeds.json")
        peak, apart = matmul_peak(device, 256 if chosen.small else 8192), parity(work, device)
        sides: dict[str, list[Trained]] = {}
        for number in range(rounds):
            for name, train in made.items():
                if name in absent:
                    continue
                try:
                    trained = train(folder / f"{name.replace(': ', '-')}-{number}")
                except PeerFailed as failed:
                    absent[name] = str(failed)
                    sides.pop(name, None)
                    print(f"  round {number + 1}, {name}: did not run: {failed}", flush=True)
                    continue
                sides.setdefault(name, []).append(trained)
                print(f"  round {number + 1}, {name}: {trained.tokens_per_second:,.0f} tokens/s", flush=True)
        report(sides, absent, work, plan, device, peak, apart)


if __name__ == "__main__":
    main()

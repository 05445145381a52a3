"""What a plan says before a training against what the training comes to, in turns.

    python -m benchmarks.plan [--rounds 5] [--steps 6] [--layers 30] [--precision float32]

Base: SmolLM2-135M-Instruct as a Phi-3, or its first --layers layers. Rows: `benchmarks.training_rows`, in packs of 512
tokens, one a step, as params/quickstart.yaml has it. Each round plans by a new probe, trains --steps steps, and counts
them without the first. Reported: planned over reached, of tokens a second and of the process's peak memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.train_cpu import first_layers
from benchmarks.training_rows import make_work
from retuner.observe import Silent
from retuner.params_file import load
from retuner.planner import make_plan
from retuner.smollm2 import write_smollm2
from retuner.training import learned

PARAMS = Path(__file__).parents[1] / "params" / "quickstart.yaml"
GOAL = 0.10
PACK_TOKENS = 512


def one_round(folder: Path, base: Path, precision: str, steps: int) -> dict[str, float]:
    """In a process of its own, because a peak of memory is that of a process."""
    work = make_work(folder / "rows", base, 60, 4, longest=256).packed(folder / "packs", PACK_TOKENS)
    params = load(PARAMS, (f"train.max_steps={steps}", f"train.precision={precision}")).train
    plan = make_plan(work.chats, work.base, params, "cpu", folder / "speeds.json")
    params = params.model_copy(update={"gradient_checkpointing": plan.gradient_checkpointing})
    (folder / "work").mkdir()
    with learned(folder / "work", work.chats, work.base, params, "cpu", Silent()) as result:
        entries = result.log.entries[1:]
    reached = sum(entry["tokens"] for entry in entries) / sum(entry["seconds"] for entry in entries)
    return {
        "planned": plan.tokens_per_second,
        "reached": reached,
        "planned_bytes": plan.peak_bytes,
        "reached_bytes": max(entry["memory_mb"] for entry in entries) * 1e6,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--only", nargs=2, type=Path, metavar=("FOLDER", "BASE"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.only:
        print(json.dumps(one_round(*chosen.only, chosen.precision, chosen.steps)))
        return
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        write_smollm2(base)
        first_layers(base, chosen.layers)
        asked = ["--steps", str(chosen.steps), "--precision", chosen.precision]
        for number in range(chosen.rounds):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            command = [sys.executable, "-m", "benchmarks.plan", *asked, "--only", str(folder), str(base)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each = json.loads(done.stdout.splitlines()[-1])
            made.append(each)
            print(
                f"  round {number + 1}: planned {each['planned']:,.0f} tokens/s, reached {each['reached']:,.0f}; "
                f"planned {each['planned_bytes'] / 2**30:.2f} GiB, reached {each['reached_bytes'] / 2**30:.2f}",
                flush=True,
            )
    for name, planned, reached in (
        ("tokens/s", "planned", "reached"),
        ("memory", "planned_bytes", "reached_bytes"),
    ):
        apart = [each[planned] / each[reached] - 1 for each in made]
        print(
            f"{name}: planned {statistics.median(apart):+.1%} of what was reached, median of {len(apart)} rounds from "
            f"{min(apart):+.1%} to {max(apart):+.1%} (goal within {GOAL:.0%})"
        )


if __name__ == "__main__":
    main()

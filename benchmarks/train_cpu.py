"""Training on a processor: ours against TRL's SFTTrainer as it comes and against Microsoft's tutorial, interleaved.

    python -m benchmarks.train_cpu [--rounds 3] [--rows 192] [--layers 30] [--only padded] [--seed 0]
    python -m benchmarks.train_cpu --small      # a tiny base, in seconds: shows that it runs, measures nothing

Base: SmolLM2-135M-Instruct as a Phi-3, or its first --layers layers. Rows: `benchmarks.training_rows`, short chats, the
same token ids and labels on all sides. Sides: `benchmarks.training_sides`. One epoch each, so the held-out losses at
the end can be compared; an update sees about as many tokens on both sides of a comparison:

- padded: SFTTrainer's defaults, 8 rows a step, against ours with as many tokens in two packs, and against ours with the
  very same rows in each step, padded as well, whose loss must therefore be the same;
- tutorial: packs of 2,048 tokens, 4 a step, on both sides. Its packing cut rows and let them see one another
  (`wrapped`); what TRL does today for the same setting is `bfd`. The goal is meant against either.

Each round has a seed of its own, for the adapter's first weights and the order of rows: so short a training ends in a
loss that a seed moves by more than the goal is. Tokens are counted without padding, steps without the first. Where the
processor has no bfloat16 of its own all sides compute in float32. All run in one process with the same number of
threads. The last line is what step metrics cost that are streamed to a real MLflow on SQLite. A round takes 25 to 45
minutes on two cores, and each ends with a report.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.training_rows import Work, make_work
from benchmarks.training_sides import Trained, has_bfloat16, ours, trl_defaults, tutorial
from retuner.metric_stream import MetricStream
from retuner.observe import Silent
from retuner.runtime import load_runtime
from retuner.smollm2 import write_smollm2
from retuner.tiny_phi3 import write_tiny_phi3
from retuner.tracking import end_run, open_run

GOALS = {"padded": 2.0, "tutorial": 1.3}
LOSS_GOAL, MLFLOW_GOAL = 0.01, 0.01


@dataclass(frozen=True)
class Size:
    rows: int
    held_out: int
    longest: int
    """Tokens of a row; SFTTrainer cuts what is longer than 1,024."""
    tutorial_pack: int
    batch: int


@dataclass
class Counted(Silent):
    """Streams metrics, and notes the seconds that training waits for it."""

    stream: MetricStream
    seconds: float = 0.0

    def metrics(self, step: int, values: dict[str, float]) -> None:
        began = time.perf_counter()
        self.stream.metrics(step, values)
        self.seconds += time.perf_counter() - began


@dataclass
class Delivery:
    """What one streamed training cost, in seconds."""

    training: float
    waited: float
    processor: float
    """Of the thread that talks to MLflow."""
    points: int


@dataclass
class Results:
    sides: dict[str, list[Trained]] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)

    def speed(self, name: str) -> float:
        return statistics.median(trained.tokens_per_second for trained in self.sides[name])

    def processor_speed(self, name: str) -> float:
        return statistics.median(trained.tokens_per_processor_second for trained in self.sides[name])

    def ratio(self, fast: str, slow: str) -> float:
        """Median over rounds of the ratio within a round."""
        pairs = zip(self.sides[fast], self.sides[slow], strict=True)
        return statistics.median(one.tokens_per_second / other.tokens_per_second for one, other in pairs)

    def processor_ratio(self, fast: str, slow: str) -> float:
        pairs = zip(self.sides[fast], self.sides[slow], strict=True)
        return statistics.median(
            one.tokens_per_processor_second / other.tokens_per_processor_second for one, other in pairs
        )

    def losses_apart(self, mine: str, other: str) -> list[float]:
        """By how much of the other's the held-out loss of `mine` is higher, in each round."""
        pairs = zip(self.sides[mine], self.sides[other], strict=True)
        return [one.held_out_loss / another.held_out_loss - 1 for one, another in pairs]


def first_layers(folder: Path, layers: int) -> None:
    """Cut a model folder down to its first layers."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def compare(
    work: Work, folder: Path, size: Size, rounds: int, first_seed: int, only: str
) -> Iterator[tuple[int, Results]]:
    """The results so far, after each round."""
    results = Results()
    # Two packs with as many tokens as 8 rows have, so that both sides make as many updates. One pack would do, but its
    # rows were chosen to fit each other, and a step should see a sample.
    longest = max(len(row.input_ids) for row in work.train)
    half = max(longest, 4 * work.tokens // len(work.train))
    padded = work.packed(folder / "padded-packs", half)
    packed = work.packed(folder / "tutorial-packs", size.tutorial_pack)
    pack, batch = size.tutorial_pack, size.batch
    sides: dict[str, Callable[[Path, int], Trained]] = {
        "padded: TRL's defaults": lambda place, seed: trl_defaults(work, place, "cpu", seed),
        "padded: ours": lambda place, seed: ours(padded, place, 2, "cpu", seed=seed),
        "padded: ours, same rows": lambda place, seed: ours(work, place, 8, "cpu", seed=seed),
        "tutorial: wrapped": lambda place, seed: tutorial(work, place, "cpu", pack, "wrapped", batch, seed),
        "tutorial: bfd": lambda place, seed: tutorial(work, place, "cpu", pack, "bfd", batch, seed),
        "tutorial: ours": lambda place, seed: ours(packed, place, batch, "cpu", seed=seed),
        "MLflow: streamed": lambda place, seed: streamed(packed, place, batch, folder / "mlflow", results),
        "MLflow: silent": lambda place, seed: ours(packed, place, batch, "cpu"),
    }
    for number in range(rounds):
        for name, train in sides.items():
            if not name.startswith(only):
                continue
            began = time.perf_counter()
            trained = train(folder / f"{name.replace(': ', '-')}-{number}", first_seed + number)
            results.sides.setdefault(name, []).append(trained)
            took = time.perf_counter() - began
            print(
                f"  round {number + 1}, {name}: {trained.tokens_per_second:,.0f} tokens/s, {took:.0f} s, held-out "
                f"loss {trained.held_out_loss:.4f}",
                flush=True,
            )
        yield number + 1, results


def streamed(work: Work, place: Path, batch: int, home: Path, results: Results) -> Trained:
    """Ours, with the metrics of every step on their way to MLflow while it trains."""
    import psutil

    runtime = load_runtime(home=home, tracking_uri=f"sqlite:///{home.absolute() / 'mlflow.db'}")
    home.mkdir(exist_ok=True)
    run = open_run(
        runtime, key=place.name, experiment="benchmark", run_name=place.name, params={}, tags={}, dataset=None
    )
    with MetricStream(run, print) as stream:
        counted = Counted(stream)
        threads = [thread.native_id for thread in threading.enumerate() if thread.name == "metrics"]
        trained = ours(work, place, batch, "cpu", observer=counted)
        times = {each.id: each.user_time + each.system_time for each in psutil.Process().threads()}
    end_run(run, "FINISHED")
    results.deliveries.append(
        Delivery(
            training=sum(trained.seconds),
            waited=counted.seconds,
            processor=sum(times.get(number, 0.0) for number in threads),
            points=len(trained.seconds),
        )
    )
    return trained


def report(results: Results, work: Work, rounds: int, layers: int) -> None:
    import torch

    lengths = sorted(len(row.input_ids) for row in work.train)
    kind = "bfloat16" if has_bfloat16("cpu") else "float32: this processor has no bfloat16 of its own"
    print(
        f"{len(lengths):,} rows of {lengths[0]} to {lengths[-1]} tokens, half at most {lengths[len(lengths) // 2]}, "
        f"{work.tokens:,} in all; {layers} layers, {torch.get_num_threads()} threads, products in {kind}"
    )
    print(
        f"{'':<26}{'tokens/s':>10}{'a CPU-second':>14}{'held-out loss':>16}{'steps':>8}   "
        "grad norm of each step (last round)"
    )
    for name, all_rounds in results.sides.items():
        last = all_rounds[-1]
        norms = " ".join(f"{norm:.2f}" for norm in last.grad_norms)
        print(
            f"{name:<26}{results.speed(name):>10,.0f}{results.processor_speed(name):>14,.0f}"
            f"{last.held_out_loss:>16.4f}{len(last.seconds):>8}   {norms}"
        )
    print(f"medians of {rounds} interleaved rounds; ratios are medians of the rounds' own:")
    for mine, other in (
        ("padded: ours", "padded: TRL's defaults"),
        ("padded: ours, same rows", "padded: TRL's defaults"),
        ("tutorial: ours", "tutorial: wrapped"),
        ("tutorial: ours", "tutorial: bfd"),
    ):
        if other not in results.sides:
            continue
        goal = GOALS[other.partition(":")[0]]
        off = [100 * each for each in results.losses_apart(mine, other)]
        print(
            f"  {mine} is {results.ratio(mine, other):.2f} x as fast as {other} (goal {goal:g} x; "
            f"{results.processor_ratio(mine, other):.2f} x by processor time), its "
            f"held-out loss {statistics.mean(off):+.2f} %, mean of rounds from {min(off):+.2f} to {max(off):+.2f} "
            f"(goal within {100 * LOSS_GOAL:g} %)"
        )
    if not results.deliveries:
        return
    waited = statistics.median(each.waited / each.training for each in results.deliveries)
    used = statistics.median(each.processor / each.training for each in results.deliveries)
    slower = results.ratio("MLflow: silent", "MLflow: streamed") - 1
    points = results.deliveries[-1].points
    a_step = statistics.median(each.processor / each.points for each in results.deliveries)
    print(
        f"  MLflow: training waits {100 * waited:.3f} % of its time for it (goal {100 * MLFLOW_GOAL:g} %), its thread "
        f"uses {100 * used:.2f} % of a core ({1000 * a_step:.0f} ms a step, {points} steps, its first calls "
        f"included); streamed against silent {100 * slower:+.2f} %, the machine's noise included",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rows", type=int, default=192)
    options.add_argument("--layers", type=int, default=30, help="of SmolLM2's 30")
    options.add_argument(
        "--only", choices=("padded", "tutorial", "MLflow"), default="", help="one comparison"
    )
    options.add_argument("--seed", type=int, default=0, help="of the first round; each has the next")
    options.add_argument("--small", action="store_true", help="a tiny base and few rows")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary), Path(temporary) / "base"
        base.mkdir()
        if chosen.small:
            write_tiny_phi3(base, seed=0)
            size, rounds, layers = Size(12, 4, 1024, 1024, 2), 1, 2
        else:
            write_smollm2(base)
            layers, rounds = chosen.layers, chosen.rounds
            if layers < 30:
                first_layers(base, layers)
            size = Size(chosen.rows, 32, 1024, 2048, 4)
        work = make_work(folder / "rows", base, size.rows, size.held_out, size.longest)
        for done, results in compare(work, folder, size, rounds, chosen.seed, chosen.only):
            report(results, work, done, layers)
        shutil.rmtree(base)


if __name__ == "__main__":
    main()

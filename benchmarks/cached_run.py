"""A run with nothing to do against `dvc repro` with nothing to do, whole processes, interleaved.

    python -m benchmarks.cached_run [--rounds 15] [--params params/smoke.yaml]

Ours verifies the data, every stored byte (large files by size, times and inode), the code, the installed
versions and the registry; dvc checks the same number of stages, each with a script and a file between.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows.pipeline import STAGES

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "evaluate", "prefect", "mlflow")
GOAL = 0.6

LOADED = """
import sys
from flows.cli import main
sys.argv = ["retuner", "run", {params!r}, "--json"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--params", default="params/smoke.yaml")
    chosen = options.parse_args()
    retuner = [str(Path(sys.executable).with_name("retuner")), "run", chosen.params, "--json"]
    with tempfile.TemporaryDirectory() as folder:
        project = _dvc_project(Path(folder))
        dvc = [str(Path(sys.executable).with_name("dvc")), "repro", "--quiet"]
        subprocess.run(retuner, check=True, stdout=subprocess.DEVNULL)  # compute what is not there
        seconds: dict[str, list[float]] = {"retuner run": [], "dvc repro": []}
        for _ in range(chosen.rounds):
            seconds["retuner run"].append(_timed(retuner, Path.cwd()))
            seconds["dvc repro"].append(_timed(dvc, project))
    for name, values in seconds.items():
        print(
            f"{name:<12} median {statistics.median(values):.3f} s  min {min(values):.3f}  max {max(values):.3f}"
        )
    ratio = statistics.median(seconds["retuner run"]) / statistics.median(seconds["dvc repro"])
    print(f"ratio of medians {ratio:.2f} (goal: at most {GOAL}), {chosen.rounds} interleaved rounds")
    code = LOADED.format(params=chosen.params, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    states = [stage["state"] for stage in json.loads(done.stdout)["stages"]]
    print(
        f"stages {states.count('cached')} of {len(states)} cached; heavy modules loaded: {done.stderr.strip()}"
    )


def _timed(command: list[str], folder: Path) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _dvc_project(folder: Path) -> Path:
    """A DVC pipeline of as many stages as ours, each reading what the one before it wrote; run once."""
    dvc = str(Path(sys.executable).with_name("dvc"))
    stages, before = [], "data.txt"
    (folder / "data.txt").write_text("data\n")
    (folder / "stage.py").write_text("import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read())\n")
    for stage in STAGES:
        stages.append(
            f"  {stage}:\n    cmd: {sys.executable} stage.py {before} {stage}.txt\n"
            f"    deps: [stage.py, {before}]\n    outs: [{stage}.txt]\n"
        )
        before = f"{stage}.txt"
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(stages))
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    for command in ([dvc, "init", "--no-scm", "--quiet"], [dvc, "repro", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


if __name__ == "__main__":
    main()

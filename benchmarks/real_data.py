"""The pipeline on public data with SmolLM2: loss and BLEU (E2E) or the final number (GSM8K), before and after.

    python -m benchmarks.real_data e2e ../shared/data [--steps 50]
    python -m benchmarks.real_data gsm8k ../shared/data
    python -m benchmarks.real_data e2e ../shared/data --set 'train.quantization={kind: nf4, double: true}'

The data is put under DVC in a project of its own in .retuner/real-data, as a user would.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    # Short rows, several references a prompt.
    "e2e": [
        "evaluate.metrics=[bleu, rouge_l]",
        "evaluate.max_new_tokens=64",
        "template.pack_tokens=256",
        "template.max_tokens=256",
    ],
    # Chains of thought; the answer is the number after ####.
    "gsm8k": [
        "evaluate.metrics=[final_number]",
        "evaluate.max_new_tokens=200",
        "template.pack_tokens=512",
        "template.max_tokens=512",
    ],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("name", choices=SETTINGS)
    options.add_argument("data", type=Path, help="the folder that holds e2e/ and gsm8k/")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--prompts", type=int, default=40)
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as `retuner run` takes it"
    )
    chosen = options.parse_args()
    project = ROOT / ".retuner" / "real-data" / chosen.name
    shutil.rmtree(project / "data", ignore_errors=True)
    shutil.copytree(chosen.data / chosen.name, project / "data", ignore=shutil.ignore_patterns("LICENSE"))
    dvc = Path(sys.executable).with_name("dvc")
    if not (project / ".dvc").exists():
        subprocess.run([dvc, "init", "--no-scm", "--quiet"], cwd=project, check=True)
    subprocess.run([dvc, "add", "--quiet", "data"], cwd=project, check=True)
    text = (ROOT / "params" / "quickstart.yaml").read_text()
    rules = text[text.index("    rules:") :]
    (project / "params.yaml").write_text(
        text.replace(rules, "    rules:\n      - {metric: loss, against: base, min_gain: 0.1}\n")
    )
    settings = [
        f"register.model_name={chosen.name}",
        f"train.max_steps={chosen.steps}",
        f"evaluate.max_prompts={chosen.prompts}",
        *SETTINGS[chosen.name],
        *chosen.set,
    ]
    command = [Path(sys.executable).with_name("retuner"), "run", "params.yaml", "--json"]
    for setting in settings:
        command += ["--set", setting]
    began = time.monotonic()
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    summary = json.loads(done.stdout)
    print(json.dumps(summary["metrics"], indent=1))
    for stage in summary["stages"]:
        print(f"{stage['name']:<11} {stage['state']:<9} {stage['seconds']:8.1f} s")
    print(f"{chosen.name}: {chosen.steps} steps, whole process {seconds:.0f} s, exit code {done.returncode}")


if __name__ == "__main__":
    main()

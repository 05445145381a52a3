"""Both targets side by side: `python -m fuzz -max_total_time=3600`. Leaves with 1 when either found something."""

import subprocess
import sys

from fuzz.running import ROOT

TARGETS = ("fuzz.fuzz_reader", "fuzz.fuzz_templating")

if __name__ == "__main__":
    runs = [subprocess.Popen([sys.executable, "-m", target, *sys.argv[1:]], cwd=ROOT) for target in TARGETS]
    sys.exit(max(run.wait() != 0 for run in runs))

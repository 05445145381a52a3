"""Runs a fuzz target in a process of its own, and says in one line what came of it.

libFuzzer ends the process it runs in, so what is counted is counted in a small file.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FINDINGS = ROOT / "fuzz" / "findings"
COUNTS = struct.Struct("<QQ")
SHOWN = re.compile(
    r"^(==|Traceback|  File|\w*(Error|No|Exception)\b|SUMMARY|artifact_prefix|Test unit| === )"
)


class Counter:
    """Executions and cases so far, in the file that the parent process reads."""

    def __init__(self, path: Path):
        self.executions = self.cases = 0
        self._handle = os.open(path, os.O_CREAT | os.O_WRONLY)

    def add(self, cases: int) -> None:
        self.executions, self.cases = self.executions + 1, self.cases + cases
        os.pwrite(self._handle, COUNTS.pack(self.executions, self.cases), 0)


def run(module: str, options: list[str]) -> int:
    """Fuzz until libFuzzer's `options` say that it is enough, or something is found; with the names of findings among
    them, run those again instead. Returns the exit status."""
    FINDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            cwd=ROOT,
            env={**os.environ, "FUZZ_WORK": work, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert child.stdout
        for line in child.stdout:
            if SHOWN.match(line):
                print(line, end="", flush=True)
        status = child.wait()
        seconds = time.monotonic() - begun
        counts = Path(work) / "counts"
        executions, cases = COUNTS.unpack(counts.read_bytes()) if counts.exists() else (0, 0)
    print(
        f"{module}: {executions:,} executions, {cases:,} cases in {seconds:,.0f} s, "
        f"{cases / seconds:,.0f} cases a second, "
        f"{'1 finding, see ' + FINDINGS.name if status else '0 findings'}",
        flush=True,
    )
    return status


def start(
    test_one: Callable[[bytes], int], seeds: Iterable[bytes], words: Iterable[bytes], options: list[str]
) -> None:
    """In the child: hand `test_one`, which returns how many cases it checked, to libFuzzer. Never returns."""
    import atheris

    work = Path(os.environ["FUZZ_WORK"])
    corpus = work / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
    (work / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    counter = Counter(work / "counts")
    arguments = [
        sys.argv[0],
        f"-artifact_prefix={FINDINGS}/",
        f"-dict={work}/words",
        "-max_len=4096",
        "-timeout=60",
    ]
    findings = [option for option in options if not option.startswith("-")]
    atheris.Setup(
        [*arguments, *options, *([] if findings else [str(corpus)])],
        lambda data: counter.add(test_one(data)),
    )
    atheris.Fuzz()


def main(module: str, fuzz: Callable[[list[str]], None]) -> None:
    """The command line of a target: its parent process, or where the parent says so the child."""
    if "FUZZ_WORK" in os.environ:
        fuzz(sys.argv[1:])
    else:
        sys.exit(run(module, sys.argv[1:]))

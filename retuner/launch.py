"""`train` in several processes of this machine, started and watched by torch's own launcher.

    this process --- torch.distributed.run --- rank 0 (`retuner.launched`) --- rank 1 ...
        |  stdin:  open for as long as this process lives; `stop` once it got SIGTERM
        |  stdout: what rank 0 has to say, and any rank's error, a JSON object a line

Where one rank dies the launcher ends the others; where this process dies they end by themselves.
"""

import json
import os
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from retuner.artifacts import AdapterFacts, Base, Chats
from retuner.errors import RetunerError, from_spelled
from retuner.feasible import device_of, refuse_what_cannot_be_shared
from retuner.observe import Observer
from retuner.termination import sigterm_held_back
from retuner.train_params import SftParams

STOP = b"stop\n"
LAST_LINES = 8
SEAL_SECONDS = 3600
"""Given to ranks where the launcher itself gets SIGTERM: for the step under way and its checkpoint."""


def train_in_processes(
    out: Path,
    work: Path,
    chats: Chats,
    base: Base,
    params: SftParams,
    device: str,
    observer: Observer,
    start: Path | None,
    processes: int,
    strategy: str,
) -> AdapterFacts:
    """As `retuner.training.train`: the same sequences a step, so the same adapter but for how floats are added up.

    Errors: also Refused or Unavailable when the work cannot be shared out; RetunerError when a process dies.
    """
    device = device_of(device)
    refuse_what_cannot_be_shared(params, base.path, device, processes, strategy)
    asked = {
        "out": str(out),
        "work": str(work),
        "chats": chats.model_dump(mode="json"),
        "base": base.model_dump(mode="json"),
        "params": params.model_dump(mode="json"),
        "device": device,
        "start": str(start) if start else None,
        "strategy": strategy,
    }
    (work / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    log = work / "processes.log"
    launcher: subprocess.Popen[bytes] | None = None
    with sigterm_held_back(lambda: _stop(launcher)) as asked_to_stop:
        with (
            log.open("wb") as rest,
            subprocess.Popen(
                _command(processes, work / "asked.json"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=rest,
                env={**os.environ, "OMP_NUM_THREADS": _threads(processes)},
                # Ctrl-C reaches this process alone, which ends the others.
                start_new_session=True,
            ) as launcher,
        ):
            try:
                if asked_to_stop():  # Maybe before there was anyone to tell.
                    _stop(launcher)
                facts, error = _listen(launcher.stdout, observer)  # type: ignore[arg-type]
            except BaseException:
                launcher.kill()
                raise
            finally:
                launcher.stdin.close()  # type: ignore[union-attr]
        if error and not asked_to_stop():
            raise error
    if facts is None:
        raise error or RetunerError(
            f"one of the {processes} processes that trained together died:\n{_last_lines(log)}",
            "all of them to the end",
            f"see {log}; run again to go on from the newest checkpoint",
        )
    return facts


def _command(processes: int, asked: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    patience = ["--shutdown-timeout", str(SEAL_SECONDS)]
    ranks = ["--nproc-per-node", str(processes), "--module", "retuner.launched", str(asked)]
    return [*launcher, *patience, *ranks]


def _threads(processes: int) -> str:
    """So that together they use the cores that there are, unless a person has said otherwise."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))


def _stop(launcher: subprocess.Popen[bytes] | None) -> None:
    with suppress(OSError, ValueError):  # It has ended by itself.
        if launcher:
            os.write(launcher.stdin.fileno(), STOP)  # type: ignore[union-attr]


def _listen(lines: IO[bytes], observer: Observer) -> tuple[AdapterFacts | None, RetunerError | None]:
    """Until every process has ended. The first error is the cause of others."""
    facts, error = None, None
    for line in lines:
        [(kind, told)] = json.loads(line).items()
        match kind:
            case "say":
                observer.say(told)
            case "progress":
                observer.progress(*told)
            case "metrics":
                observer.metrics(*told)
            case "facts":
                facts = AdapterFacts.model_validate(told)
            case "error":
                error = error or from_spelled(told)
    return facts, error


def _last_lines(log: Path) -> str:
    with log.open(errors="replace") as lines:
        return "".join(f"    {line}" for line in deque(lines, LAST_LINES)).rstrip()

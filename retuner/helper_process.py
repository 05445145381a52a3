"""A child with two pipes that does some of this process's work, and may be gone at any time.

It reads requests from its standard input until that ends, which it also does when this process is killed, so none
outlives who started it.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any, cast

KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**25), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""For work in arrays that come and go: glibc gives memory back only when there is much of it, because to get it anew
costs a fifth of the time."""


class HelperProcess:
    """Runs a module of this project, seen from who started it."""

    def __init__(self, module: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Whatever ends a helper, who started it comes upon too, and can say it better.
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        self._requests = cast(IO[bytes], self.process.stdin)
        self._answers = cast(IO[bytes], self.process.stdout)

    def tell(self, asked: dict[str, Any], data: bytes = b"") -> None:
        """A line of JSON, and `data` after it."""
        with suppress(BrokenPipeError):  # it is gone: it will not answer
            self._requests.write(json.dumps(asked).encode() + b"\n" + data)
            self._requests.flush()

    def answer(self) -> dict[str, Any] | None:
        """Its next line; None when it is gone."""
        line = self._answers.readline()
        return dict(json.loads(line)) if line else None

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        """Once it has read all that it was told."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self.process.wait()
        self._answers.close()

"""Blocks parsed ahead of their reader by other processes, which leave what they find in the memo.

A helper only ever fills the memo: what it could not parse, because it was killed or because the block is refused, the
reader parses itself and says so itself. So helpers change how long reading takes and nothing else.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from retuner.chats import Block
from retuner.dataset import DataFile
from retuner.errors import Refused
from retuner.helper_process import KEEPS_MEMORY, HelperProcess
from retuner.memo import Memo

if TYPE_CHECKING:
    from retuner.intake import Reading

WORTH_BYTES = 2**21
"""So much unknown data takes longer to parse than a helper takes to start."""
MOST_HELPERS = 16
SETTINGS = ("format", "columns", "redact", "salt")


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ReadingAhead:
    """Helpers that start when there is enough to do, one for each core; with one core there are none."""

    def __init__(self, reading: "Reading", helpers: int | None = None):
        self.reading = reading
        self.count = min(MOST_HELPERS, usable_cores()) if helpers is None else helpers
        self._idle: SimpleQueue[_Helper | None] = SimpleQueue()
        self._closing = ExitStack()
        self._threads: ThreadPoolExecutor | None = None
        self._unknown_bytes = 0

    def __enter__(self) -> "ReadingAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def of(self, blocks: Iterable[Block], found: str | None) -> Iterator[Block]:
        """The blocks, in order. `found` is the format of their file. Those that helpers were given are in the memo
        when they come out, or were not to be parsed."""
        waiting: deque[tuple[Block, Future[None] | None]] = deque()
        for block in blocks:
            waiting.append((block, self._ask(block, found)))
            if len(waiting) > 2 * self.count:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())

    def _ask(self, block: Block, found: str | None) -> "Future[None] | None":
        memo, data = self.reading.memo, block.data
        if memo is None or data is None or self.count < 2 or self.reading.remembers(block, found):
            return None
        self._unknown_bytes += len(data)
        if self._unknown_bytes < WORTH_BYTES:
            return None
        if self._threads is None:
            for _ in range(self.count):
                helper = _Helper(self.reading, memo)
                self._closing.callback(helper.end)
                self._idle.put(helper)
            self._threads = ThreadPoolExecutor(self.count)
            # Before the helpers end, their last answers are waited for.
            self._closing.callback(self._threads.shutdown, cancel_futures=True)
        return self._threads.submit(self._parse, block, data, found)

    def _parse(self, block: Block, data: bytes, found: str | None) -> None:
        helper = self._idle.get()
        if helper and not helper.parse(block, data, found):
            helper = None  # it is gone, and its reader does its work
        self._idle.put(helper)


def _done(block: Block, asked: "Future[None] | None") -> Block:
    if asked:
        asked.result()
    return block


class _Helper(HelperProcess):
    def __init__(self, reading: "Reading", memo: Memo):
        super().__init__(__name__, **KEEPS_MEMORY)
        settings = {name: getattr(reading, name) for name in SETTINGS}
        self.tell(settings | {"root": str(memo.root.absolute()), "key": memo.key})

    def parse(self, block: Block, data: bytes, found: str | None) -> bool:
        """Whether the helper is still there afterwards. `data` are the bytes of the block."""
        asked = {"file": block.file.relpath, "line": block.first_line, "sha256": block.sha256, "found": found}
        self.tell(asked | {"bytes": len(data)}, data)
        return self.answer() is not None


def main() -> None:
    """What a helper does."""
    from retuner.intake import Reading

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(requests.readline())
    memo = Memo(Path(settings["root"]), settings["key"])
    reading = Reading(**{name: settings[name] for name in SETTINGS}, memo=memo)
    while line := requests.readline():
        asked = json.loads(line)
        data = requests.read(asked["bytes"])
        if len(data) < asked["bytes"]:
            return  # the reader was killed while it wrote
        file = DataFile(asked["file"], Path(asked["file"]), len(data), "")
        with suppress(Refused):
            reading.remember(Block(file, asked["line"], asked["sha256"], data), asked["found"])
        answers.write(b"{}\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Chats tokenised by other processes, which leave the rows in the memo.

A helper only ever fills the memo: what it did not tokenise, because it was killed or because the chat is refused, its
reader tokenises itself and says so itself. So helpers change how long templating takes and nothing else.

A helper starts without transformers: it is given the tokenizer, and asks for layouts.
"""

import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from retuner.chat_lines import read_runs
from retuner.encoding import ChatEncoder
from retuner.errors import Refused
from retuner.helper_process import KEEPS_MEMORY, HelperProcess
from retuner.layout import Layout
from retuner.reading_ahead import MOST_HELPERS, usable_cores
from retuner.rendering import Renderer
from retuner.row_memo import RowWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from retuner.template_side import Side

WORTH_BYTES = 2**23
"""So much takes longer to tokenise than a helper takes to start."""

Batches = deque[tuple["Side", "NDArray[Any]"]]
"""Rows of a side, by their numbers, rising."""


class TemplatingAhead:
    """Helpers that start when there is enough to do, one for each core but the reader's own."""

    def __init__(self, memo: Path, missing_bytes: int, helpers: int | None = None):
        """`missing_bytes`: of the lines that are to be tokenised. Helpers load what they need while their reader loads
        its tokenizer."""
        count = min(MOST_HELPERS, usable_cores() - 1) if helpers is None else helpers
        self._helpers = [_Helper(memo) for _ in range(count)] if missing_bytes >= WORTH_BYTES else []

    def __enter__(self) -> "TemplatingAhead":
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.end()

    @contextmanager
    def taking(self, renderer: Renderer, batches: Batches) -> Iterator["Helped"]:
        """Helpers take batches from the end of `batches` until it is empty; at the end of the block their rows are in
        files of the memo."""
        helped = Helped()
        arguments = renderer, batches, helped
        threads = [Thread(target=helper.work, args=arguments) for helper in self._helpers]
        for thread in threads:
            thread.start()
        try:
            yield helped
        finally:
            batches.clear()
            for helper in self._helpers:
                helper.hurry()
            for thread in threads:
                thread.join()


class Helped:
    """What helpers did."""

    def __init__(self) -> None:
        self.rows = 0
        self.files: list[str] = []
        """Names of files of the memo."""


class _Helper(HelperProcess):
    def __init__(self, memo: Path):
        super().__init__(__name__, TOKENIZERS_PARALLELISM="false", **KEEPS_MEMORY)
        self.memo = memo
        self.is_ready = False

    def work(self, renderer: Renderer, batches: Batches, helped: Helped) -> None:
        """Until there is no batch left, or the helper is gone; then its rows are written."""
        self.template = renderer.template
        if not self.is_ready:
            tokenizer = renderer.tokenizer.backend_tokenizer.to_str()
            self.tell({"memo": str(self.memo.absolute()), "tokenizer": tokenizer})
            self.is_ready = self._answer() is not None
        while self.is_ready:
            try:
                side, rows = batches.pop()
            except IndexError:
                break
            self.tell({"path": str(side.lines.path.absolute()), "runs": side.lines.runs(rows)})
            if self._answer() is None:
                return
            helped.rows += len(rows)
        self.tell({"flush": True})
        if written := self._answer():
            helped.files += written["files"]

    def hurry(self) -> None:
        """There is nothing left to do: a helper that has not started yet never will."""
        if not self.is_ready:
            self.kill()

    def end(self) -> None:
        self.kill()
        super().end()

    def _answer(self) -> dict[str, Any] | None:
        """None when the helper is gone. Layouts that it asks for it gets."""
        while (answer := self.answer()) is not None and "roles" in answer:
            try:
                self.tell({"items": self.template.of_chat(tuple(answer["roles"])).spelled()})
            except Refused:
                self.tell({"items": None})
        return answer


# --- a helper


def main() -> None:
    """What a helper does."""
    import numpy as np
    import pyarrow  # noqa: F401  # what comes later imports it too, and now there is time
    from tokenizers import Tokenizer

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    layouts: dict[tuple[str, ...], Layout] = {}

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    def layout_of(roles: tuple[str, ...]) -> Layout:
        if roles not in layouts:
            tell({"roles": roles})
            items = json.loads(requests.readline())["items"]
            if items is None:
                raise Refused("roles that the template refuses", "others")
            layouts[roles] = Layout.from_spelled(items)
        return layouts[roles]

    begin = json.loads(requests.readline())
    written: list[str] = []
    encoder = ChatEncoder(Tokenizer.from_str(begin["tokenizer"]), layout_of)
    writer = RowWriter(Path(begin["memo"]))
    tell({})
    while line := requests.readline():
        asked = json.loads(line)
        if writer.is_full or "flush" in asked:
            written += [file.path.name for file in writer.flush()]
        if "flush" in asked:
            tell({"files": written})
            written = []
            continue
        chats = read_runs(Path(asked["path"]), asked["runs"])
        said = [chat["messages"] for chat in chats]
        ids = np.frombuffer(bytes.fromhex("".join([chat["id"] for chat in chats])), np.uint8).reshape(-1, 16)
        with suppress(Refused):
            writer.add(ids, encoder.encode_chats(said), *encoder.traits(said))
        tell({})


if __name__ == "__main__":
    main()

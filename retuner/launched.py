"""`python -m retuner.launched ASKED.json`: one of the processes of `retuner.launch`."""

import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from retuner.artifacts import Base, Chats
from retuner.errors import RetunerError
from retuner.observe import Observer, Silent
from retuner.ranks import Rank
from retuner.train_params import SftParams
from retuner.training import learned, write_learned


class Channel:
    """An observer that passes everything on, and whatever else there is to say."""

    def __init__(self, handle: int):
        self.handle = handle

    def send(self, kind: str, told: Any) -> None:
        # One write a line, so that lines of several processes do not mix.
        os.write(self.handle, json.dumps({kind: told}).encode() + b"\n")

    def say(self, line: str) -> None:
        self.send("say", line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        self.send("progress", [what, done, total, note])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.send("metrics", [step, values])


def main(asked: dict[str, Any], rank: Rank, channel: Channel) -> None:
    observer: Observer = channel if rank.leads else Silent()
    params, base = SftParams.model_validate_json(json.dumps(asked["params"])), Base(**asked["base"])
    start = Path(asked["start"]) if asked["start"] else None
    if asked["device"] == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # So that `cuda` is one's own.
    inputs = (Path(asked["work"]), Chats(**asked["chats"]), base, params, asked["device"])
    with learned(*inputs, observer, start, rank=rank) as result:
        if rank.leads:
            channel.send(
                "facts", write_learned(Path(asked["out"]), result, base, params).model_dump(mode="json")
            )


def _follow_parent(rank: Rank) -> NoReturn:
    """End with the process that asked for this one, and stop when it says so."""
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN if rank.leads else 0)
    while True:
        for _, event in poll.poll():
            if event & select.POLLIN and os.read(sys.stdin.fileno(), 100):
                os.kill(os.getpid(), signal.SIGTERM)
            elif event & (select.POLLHUP | select.POLLERR):
                os._exit(1)


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_bytes())
    here = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), wanted["strategy"])
    told = Channel(os.dup(1))
    os.dup2(2, 1)  # Whatever a library prints goes to the log.
    threading.Thread(target=_follow_parent, args=(here,), daemon=True).start()
    try:
        main(wanted, here, told)
    except RetunerError as error:
        with suppress(OSError):
            told.send("error", error.spelled())
        sys.exit(1)

"""Sealed checkpoints of a training that is not finished, where several machines share results.

`URL/work/<fingerprint>/step-N/` is a checkpoint as `retuner.checkpoints` seals it, its manifest copied last. Another
machine that is asked for the same fingerprint goes on from there. With the result they go away.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from retuner import checkpoints
from retuner.errors import Unavailable
from retuner.shared_store import SharedStore, work_of

LOOK_SECONDS = 2.0


class CheckpointSharing:
    """Use as a context manager around a training in `work`, the folder of a fingerprint.

    First the checkpoints that lie there come here, unless those here are newer, and only whole. Then a thread sends
    what is sealed, and takes back what is let go of here; training waits for it at its end alone. A place that
    cannot be written is said once.
    """

    def __init__(self, shared: SharedStore, work: Path, say: Callable[[str], None]):
        self.shared, self.work, self.say = shared, work, say
        self.place = work_of(work.name)
        self._sent: set[int] = set()
        self._told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, name="checkpoints", daemon=True)

    def __enter__(self) -> None:
        self._bring()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()

    def _bring(self) -> None:
        try:
            there = [name for name in self.shared.names(self.place) if name.removeprefix("step-").isdecimal()]
        except Unavailable as error:
            self.say(f"train: begun without the checkpoints of other machines: {error.found}")
            return
        here = checkpoints.steps(self.work)
        if not there or (here and max(here) >= max(map(checkpoints.step_of, there))):
            return
        for name in there:
            draft = self.work / "brought" / name
            try:
                if checkpoints.step_of(name) in here:
                    continue
                if not self.shared.bring(f"{self.place}/{name}", draft, self.say):
                    continue
                if reason := checkpoints.why_broken(draft):
                    self.say(
                        f"train: the copy of {name} in the shared store is damaged and not used: {reason}"
                    )
                    continue
                (self.work / "sealed").mkdir(exist_ok=True)
                os.rename(draft, self.work / "sealed" / name)
                self._sent.add(checkpoints.step_of(name))
                self.say(f"train: the checkpoint {name} was brought from the shared store")
            except Unavailable as error:
                self.say(f"train: the checkpoint {name} is not used: {error.found}")
            finally:
                shutil.rmtree(self.work / "brought", ignore_errors=True)

    def _send_until_closed(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(LOOK_SECONDS)
            here = set(checkpoints.steps(self.work))
            for step in sorted(here - self._sent):
                self._send(step)
            # One that is there may need another: of these none goes before all that are kept here have come.
            if here and here <= self._sent:
                for step in self._sent - here:
                    self.shared.drop(f"{self.place}/{checkpoints.sealed(self.work, step).name}")
                self._sent &= here

    def _send(self, step: int) -> None:
        folder, told = checkpoints.sealed(self.work, step), list[str]()
        self.shared.send(f"{self.place}/{folder.name}", folder, told.append)
        if not told:
            self._sent.add(step)
        elif folder.exists() and not self._told:  # Else it was let go of meanwhile.
            self._told = True
            self.say(f"train: its checkpoints are {told[0]}")

"""SIGTERM, as a preempted machine or a scheduler that cancels sends it: not at once, but when a step is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_held_back(
    then: Callable[[], None] = lambda: None, repeats: bool = False
) -> Iterator[Callable[[], bool]]:
    """While inside, a SIGTERM is only noted, and `then` called: what is handed out says whether one came. On leaving
    it is delivered after all, to whatever would have had it, which may raise, end the process, or do nothing.

    A second one is not held back, unless `repeats`: whoever stops may then be heard more than once. Python hears
    signals in its main thread alone; in another nothing is held back.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, frame: object) -> None:
        came.set()
        if not repeats:
            signal.signal(signal.SIGTERM, before)
        then()

    signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
    if came.is_set():
        signal.raise_signal(signal.SIGTERM)

"""How long work tells the world about itself, without knowing who listens."""

from typing import Protocol


class Observer(Protocol):
    def say(self, line: str) -> None:
        """One line a person should see."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `what`; `note` is short (loss, tokens/s)."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one training step."""


class Silent:
    def say(self, line: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        pass

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass


class Tee:
    """Tells several listeners, in order."""

    def __init__(self, *listeners: Observer):
        self.listeners = listeners

    def say(self, line: str) -> None:
        for listener in self.listeners:
            listener.say(line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        for listener in self.listeners:
            listener.progress(what, done, total, note)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for listener in self.listeners:
            listener.metrics(step, values)

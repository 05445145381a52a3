"""How a row of the tutorial's table is written: a verdict, the setting it goes to, and for which values."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from retuner.skeleton import FUSED

Verdict = Literal["kept", "changed", "refused"]
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Rule:
    verdict: Verdict
    why: str = ""
    to: str | None = None
    value: Callable[[Any], Any] = lambda value: value
    only: Callable[[Any], bool] = lambda value: True
    do: str = ""
    note: str = ""
    """Said beside the value in the params file."""
    weak: bool = False
    """Gives way where another name says the same setting."""
    any_value: bool = False
    """The value makes no difference, so it need not be known."""


@dataclass(frozen=True)
class Entry:
    groups: tuple[str, ...]
    names: tuple[str, ...]
    rules: tuple[Rule, ...]


def off(value: Any) -> bool:
    return value is None or value is False or value in (0, "", "no", "none") or value in ([], {})


def on(value: Any) -> bool:
    return value is True


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


def positive(value: Any) -> bool:
    """A number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def names_a_repository(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) is not None


def keep(to: str, **more: Any) -> Rule:
    return Rule("kept", to=to, **more)


def already(why: str, only: Callable[[Any], bool]) -> Rule:
    """It asks for what happens in any case."""
    return Rule("kept", why, only=only)


def instead(why: str, **more: Any) -> Rule:
    """Whatever its value, something else takes its place."""
    return Rule("changed", why, any_value=True, **more)


def refuse(why: str, do: str = "leave it out", **more: Any) -> Rule:
    return Rule("refused", why, do=do, **more)


def only_off(why: str, do: str = "leave it out") -> tuple[Rule, ...]:
    return already("not used, here neither", off), refuse(why, do)


def only_off_whatever(why: str, do: str = "leave it out") -> tuple[Rule, ...]:
    """For what is code: its value need not be known."""
    return already("not used, here neither", off), refuse(why, do, any_value=True)


def row(groups: str, names: str, *rules: Rule | tuple[Rule, ...]) -> Entry:
    flat = tuple(r for rule in rules for r in (rule if isinstance(rule, tuple) else (rule,)))
    return Entry(tuple(groups.split()), tuple(names.split()), flat)


def is_llama(value: Any) -> bool:
    return are_names(value) and any(name in FUSED for name in value)


def are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def of_phi3(value: Any) -> bool:
    return are_names(value) and set(map(_layer, value)) <= set(PROJECTIONS)


def _layer(name: str) -> str:
    return FUSED[name][0] if name in FUSED else name


def fused(names: list[str]) -> list[str]:
    """Phi-3's name where it or all parts of its layer are named; other parts keep theirs, for `train` to find."""

    def is_whole(layer: str) -> bool:
        parts = {name for name, (whole, _) in FUSED.items() if whole == layer}
        return layer in names or (bool(parts) and parts <= set(names))

    whole = [layer for layer in PROJECTIONS if is_whole(layer)]
    return whole + [name for name in names if _layer(name) not in whole]


def plain_dtype(value: Any) -> str:
    return str(value).removeprefix("torch.")


def dtype(*names: str) -> Callable[[Any], bool]:
    return lambda value: plain_dtype(value) in names

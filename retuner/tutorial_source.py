"""What a fine-tuning script, notebook or settings file asks for, read without running any of it."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.tutorial_script import Script
from retuner.tutorial_values import GROUP_OF_NAME, Setting

SHAPES = "a Python file, a notebook, or a JSON or YAML file with a training_config and a peft_config"
WHOLE_FILE = "file"
"""Group of a key that stands at the top of a settings file, under no name of a group."""


@dataclass(frozen=True)
class Source:
    name: str
    settings: tuple[Setting, ...]
    classes: frozenset[str]
    """The configuration classes it calls: their defaults hold where it says nothing."""


def read(path: Path) -> Source:
    """Everything that the file sets, in its order. Errors: Refused."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Refused(f"there is no {path}", SHAPES, "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}", SHAPES) from None
    try:
        match path.suffix:
            case ".py":
                script = Script("line {}")
                script.visit(_parsed(text, str(path)))
                found, classes = script.settings(), script.classes
            case ".ipynb":
                found, classes = _notebook(text, str(path))
            case ".json":
                found, classes = list(_json(text, str(path))), set()
            case ".yaml" | ".yml":
                found, classes = list(_yaml(text, str(path))), set()
            case _:
                raise Refused(
                    f"{path} is no {path.suffix or 'file without a suffix'} that is read here", SHAPES
                )
    except RecursionError:
        raise Refused(f"{path} is nested too deep to be read", SHAPES) from None
    if not any(setting.group != "code" for setting in found):
        raise Refused(
            f"{path} sets nothing that a training run is made of", SHAPES, "name the file that does"
        )
    found.sort(key=lambda setting: [int(number) for number in re.findall(r"\d+", setting.place)])
    return Source(path.name, tuple(_together(found)), frozenset(classes))


def _parsed(text: str, name: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f"{name}, line {line}" if line else name
        raise Refused(f"{where}: not Python: {getattr(error, 'msg', error)}", SHAPES) from None


def _notebook(text: str, name: str) -> tuple[list[Setting], set[str]]:
    """Cells share one namespace; a cell that is no Python is told, for what it would set is not known."""
    try:
        cells = json.loads(text)["cells"]
        sources = [
            (number, "".join(cell["source"]))
            for number, cell in enumerate(cells, start=1)
            if cell["cell_type"] == "code"
        ]
    except (ValueError, KeyError, TypeError):
        raise Refused(
            f"{name} is no notebook", "JSON with a list of cells", "save it again in Jupyter"
        ) from None
    script, unread = Script(""), []
    for number, source in sources:
        if source.lstrip().startswith("%%"):
            continue  # another language, such as %%bash
        # `!pip install` and `%matplotlib` are Jupyter's; the lines keep their numbers.
        lines = ["" if line.lstrip().startswith(("!", "%")) else line for line in source.split("\n")]
        script.place = f"cell {number}, line {{}}"
        try:
            script.visit(ast.parse("\n".join(lines)))
        except (SyntaxError, ValueError) as error:
            unread.append(Setting("code", "unreadable_cell", str(error), f"cell {number}"))
    return script.settings() + unread, script.classes


def _yaml(text: str, name: str) -> Iterator[Setting]:
    from ruamel.yaml import YAML, YAMLError

    try:
        data: Any = YAML(pure=True).load(text)
    except YAMLError as error:
        raise Refused(f"{name} is not YAML: {' '.join(str(error).split())}", SHAPES) from None

    def place(part: Any, key: Any) -> str:
        return f"line {part.lc.key(key)[0] + 1}"

    return _grouped(data, name, place)


def _json(text: str, name: str) -> Iterator[Setting]:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"it says {twice[0]} twice")
        return dict(pairs)

    def no_number(spelled: str) -> None:
        raise ValueError(f"{spelled} is no number")

    try:
        data = json.loads(text, object_pairs_hook=mapping, parse_constant=no_number)
    except ValueError as error:
        raise Refused(f"{name} is not JSON: {error}", SHAPES) from None

    def place(part: dict[str, Any], key: str) -> str:
        """The line of the key, looked for behind the name of the group that holds it."""
        begin = 0
        for group, held in data.items():
            if held is part:
                begin = at(group, 0)
        return f"line {text.count(chr(10), 0, at(key, begin)) + 1}"

    def at(key: str, begin: int) -> int:
        spellings = "|".join(re.escape(json.dumps(key, ensure_ascii=ascii)) for ascii in (True, False))
        found = re.compile(rf"(?:{spellings})\s*:").search(text, begin)
        return found.start() if found else begin

    return _grouped(data, name, place)


def _grouped(data: Any, name: str, place: Callable[[Any, Any], str]) -> Iterator[Setting]:
    """The settings of each dictionary with a name that is known, and those at the top."""
    if not isinstance(data, dict):
        raise Refused(f"{name} holds {type(data).__name__}", SHAPES)
    for key, held in data.items():
        group = GROUP_OF_NAME.get(str(key).lower())
        if group and isinstance(held, dict):
            yield from (Setting(group, str(inner), _plain(held[inner]), place(held, inner)) for inner in held)
        else:
            yield Setting(WHOLE_FILE, str(key), _plain(held), place(data, key))


def _plain(value: Any) -> Any:
    """ruamel's numbers and texts, which remember how they were spelled, as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _together(settings: list[Setting]) -> Iterator[Setting]:
    """The same thing said at several places is one setting; a tutorial trusts remote code five times over."""
    merged: dict[tuple[str, str, str], Setting] = {}
    for setting in settings:
        key = (setting.group, setting.key, repr((setting.value, setting.again)))
        before = merged.get(key)
        if before is None:
            merged[key] = setting
        elif setting.place not in before.place.split("; "):
            merged[key] = replace(before, place=f"{before.place}; {setting.place}")
    yield from merged.values()

"""Params out of a YAML file, with everything that is wrong with it told at once."""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from retuner.errors import Refused
from retuner.params import Params
from retuner.train_params import DpoParams, SftParams


def load(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """The run that a YAML file describes, with `a.b=value` overrides laid over it.

    YAML 1.2, so 1e-4 is a number and `no` is a word. Errors: Refused, naming everything that is wrong.
    """
    data = _read_yaml(path)
    for override in overrides:
        _lay_over(data, override)
    return check(data, str(path))


def check(data: Any, name: str) -> Params:
    """Params from plain values, such as a file's or a lineage's. Errors: Refused, naming `name`."""
    try:
        # Through JSON, because strict models take a list for a tuple there and nowhere else.
        return Params.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        lines = [f"  - {sentence}" for sentence in _sentences(error.errors(include_url=False), data)]
        raise Refused(
            f"{name} does not describe a run:\n" + "\n".join(lines),
            do="mend the lines named above; params/quickstart.yaml shows a complete file",
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    shipped = "one of the files in params/, e.g. params/quickstart.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused(f"there is no {path}", shipped, "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}", shipped) from None
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise Refused(
            f"{path} is not YAML: {' '.join(str(error).split())}", "one mapping of settings"
        ) from None
    if not isinstance(data, dict):
        raise Refused(
            f"{path} holds {type(data).__name__}", "one mapping of settings", f"start from {shipped}"
        )
    return data


def _lay_over(data: dict[str, Any], override: str) -> None:
    from ruamel.yaml import YAML, YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise Refused(f"--set {override}", "KEY=VALUE, e.g. train.lora.rank=16")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except YAMLError:
        raise Refused(f"--set {override}", "a value that is YAML, e.g. train.lora.rank=16") from None
    *parents, last = key.split(".")
    place: Any = data
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise Refused(f"--set {key}", f"a key of the params file{_near(key.split('.')[0], data)}")
    place[last] = value


def _sentences(details: list[ErrorDetails], data: Any) -> list[str]:
    """One for each thing that is wrong; where several kinds of value would do, it names them all."""
    expected: dict[tuple[str, str], list[str]] = {}
    for detail in details:
        begin, kind, end = _sentence(detail, data)
        expected.setdefault((begin, end), []).append(kind)
    return [begin + " or ".join(dict.fromkeys(kinds)) + end for (begin, end), kinds in expected.items()]


def _sentence(detail: ErrorDetails, data: Any) -> tuple[str, str, str]:
    """About one thing that is wrong, with the place as the file spells it: in the middle what was expected."""
    place, keys = data, []
    # Behind `train` stands the recipe whose settings these are, which no file spells there.
    loc = detail["loc"] if detail["loc"][:1] != ("train",) else ("train", *detail["loc"][2:])
    for part in loc:
        inside = isinstance(place, dict) and part in place
        listed = isinstance(place, list) and isinstance(part, int) and part < len(place)
        if inside or listed:
            place = place[part]
            keys.append(str(part))
        elif detail["type"] == "missing" and part == loc[-1]:
            keys.append(str(part))
    where = ".".join(keys)
    found = detail["input"]
    match detail["type"]:
        case "missing":
            return f"{where}: missing", "", ""
        case "extra_forbidden":
            return f"{where}: not a setting{_near(keys[-1], _siblings(keys[:-1], data))}", "", ""
        case "value_error":
            return f"{where + ': ' if where else ''}{detail['msg'].removeprefix('Value error, ')}", "", ""
        case "union_tag_invalid" | "union_tag_not_found":
            key, tags = (
                ("recipe", "sft, dpo") if where == "train" else ("source", "smollm2, hub, local, tiny")
            )
            return f"{where}.{key}: expected one of {tags}", "", ""
    expected = detail["msg"].removeprefix("Input should be ").replace("String should match", "text of the")
    return f"{where}: expected ", expected, f", found {found!r}"


def _near(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _siblings(parents: list[str], data: Any) -> list[str]:
    """The settings that exist beside a misspelt one."""
    model: Any = Params
    for parent in parents:
        if model is Params and parent == "train":
            model = DpoParams if data["train"].get("recipe") == "dpo" else SftParams
            continue
        fields = {(f.alias or n): f for n, f in model.model_fields.items()}
        annotation = fields[parent].annotation if parent in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [f.alias or n for n, f in model.model_fields.items()]

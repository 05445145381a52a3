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

NO_YAML_VALUE = tuple("*&!%@`")
"""An override that begins like this is text: what YAML makes of it (an alias, a tag) needs a whole file."""


def load(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """The run that a YAML file describes, with `a.b=value` overrides laid over it.

    YAML 1.2, so 1e-4 is a number and `no` is a word. Errors: Refused, naming everything that is wrong and whether
    the file or which override is at fault.
    """
    data, name = _read_yaml(path), str(path)
    not_laid: dict[str, str] = {}
    at_fault = dict.fromkeys(_wrong(data), name)
    for override in overrides:
        source = f"--set {override}"
        if reason := _lay_over(data, override):
            not_laid[reason] = source
        at_fault = {sentence: at_fault.get(sentence, source) for sentence in _wrong(data)}
    if not_laid or at_fault:
        raise _refused({**at_fault, **not_laid}, name)
    return check(data, name)


def check(data: Any, name: str) -> Params:
    """Params from plain values, such as a file's or a lineage's. Errors: Refused, naming `name`."""
    if wrong := _wrong(data):
        raise _refused(dict.fromkeys(wrong, name), name)
    return _params(data)


def _params(data: Any) -> Params:
    # Through JSON, because strict models take a list for a tuple there and nowhere else.
    return Params.model_validate_json(json.dumps(data, default=str))


def _wrong(data: Any) -> list[str]:
    """A sentence for each thing that keeps these values from being params."""
    try:
        _params(data)
    except ValidationError as error:
        return _sentences(error.errors(include_url=False), data)
    except (TypeError, ValueError) as error:  # a key that is a list, a list that holds itself
        return [f"no JSON can hold this: {error}"]
    return []


def _refused(at_fault: dict[str, str], name: str) -> Refused:
    """What is wrong by who is at fault: the params of this name, or an override of them."""
    lines = []
    for source in dict.fromkeys(at_fault.values()):
        lines.append(f"{source} {'does not describe a run' if source == name else f'does not fit {name}'}:")
        lines += [f"  - {sentence}" for sentence, whose in at_fault.items() if whose == source]
    return Refused(
        "\n".join(lines), do="mend what is named above; params/quickstart.yaml shows a complete file"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    shipped = "one of the files in params/, e.g. params/quickstart.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused(f"there is no {path}", shipped, "check the path") from None
    except IsADirectoryError:
        raise Refused(f"{path} is a folder", shipped, "name a file in it") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8: {error}", "text in UTF-8", "save it as UTF-8") from None
    except OSError as error:
        raise Refused(
            f"{path} cannot be read: {error}", shipped, "check the path and who may read it"
        ) from None
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise Refused(
            f"{path} is not YAML: {' '.join(str(error).split())}",
            "one mapping of settings",
            "mend it there; text that begins with * or another special character needs quotes",
        ) from None
    if not isinstance(data, dict):
        held = "nothing" if data is None else "a list" if isinstance(data, list) else "only one value"
        raise Refused(f"{path} holds {held}", "one mapping of settings", f"start from {shipped}")
    return data


def _lay_over(data: dict[str, Any], override: str) -> str | None:
    """Changes the data, or says why it cannot."""
    from ruamel.yaml import YAML, YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override}: expected KEY=VALUE, e.g. train.lora.rank=16"
    try:
        value = text if text.startswith(NO_YAML_VALUE) else YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return f"{key}: {text} is not YAML; text may need quotes within, e.g. --set 'prepare.files=\"[a].jsonl\"'"
    *parents, last = key.split(".")
    place: Any = data
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return f"{key}: not a key of the params file{_near(key.split('.')[0], data)}"
    place[last] = value
    return None


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

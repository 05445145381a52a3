"""What a fine-tuning script, notebook or settings file asks for, read without running any of it.

A script is parsed, never executed: literals, names that hold them, `torch.bfloat16` and its like, and the calls that
take settings (`LoraConfig(...)`, `TrainingArguments(**training_config)`, ...). What only running it would tell is
handed on as `Unknown`, so that nothing is guessed and nothing is lost.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.tutorial_values import (
    CALLS,
    GROUP_OF_NAME,
    POSITIONAL,
    WIRING,
    Placed,
    Unknown,
    last_name,
    value_of,
)

SHAPES = "a Python file, a notebook, or a JSON or YAML file with a training_config and a peft_config"
TRAINERS = {"SFTTrainer", "Trainer"}
WHOLE_FILE = "file"
"""Group of a key that stands at the top of a settings file, under no name of a group."""


@dataclass(frozen=True)
class Setting:
    """One thing that a file asks for: `group` is what it was given to (training, peft, model, trainer, ...)."""

    group: str
    key: str
    value: Any
    place: str
    again: str | None = None
    """Where the same file sets it again, and so decides."""


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
                script = _Script("line {}")
                script.visit(_parsed(text, str(path)))
                found, classes = script.settings(), script.classes
            case ".ipynb":
                found, classes = _notebook(text, str(path))
            case ".json" | ".yaml" | ".yml":
                found, classes = list(_mapping(text, str(path))), set()
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
    script, unread = _Script(""), []
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


def _mapping(text: str, name: str) -> Iterator[Setting]:
    """JSON is YAML, but for tabs between its tokens."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data: Any = YAML(pure=True).load(text.replace("\t", " "))
    except YAMLError as error:
        raise Refused(f"{name} is not YAML: {' '.join(str(error).split())}", SHAPES) from None
    if not isinstance(data, dict):
        raise Refused(f"{name} holds {type(data).__name__}", SHAPES)

    def setting(group: str, part: Any, key: Any) -> Setting:
        return Setting(group, str(key), _plain(part[key]), f"line {part.lc.key(key)[0] + 1}")

    for name_there, held in data.items():
        group = GROUP_OF_NAME.get(str(name_there).lower())
        if group and isinstance(held, dict):
            yield from (setting(group, held, key) for key in held)
        else:
            yield setting(WHOLE_FILE, data, name_there)


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


class _Script(ast.NodeVisitor):
    """Walks a script in its order and keeps what each name holds. `place` has a `{}` for the line."""

    def __init__(self, place: str):
        self.place = place
        self.classes: set[str] = set()
        self._names: dict[str, Any] = {}
        self._found: list[Setting] = []
        self._dicts: dict[str, tuple[str, Placed]] = {}
        """Dictionaries of settings that no call has taken yet, by name, with their group."""
        self._trainer_made = False

    def settings(self) -> list[Setting]:
        """In the file's order; a dictionary that is only defined counts as one that is used."""
        for group, held in self._dicts.values():
            self._take(group, held)
        return self._found

    # Names

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self._forget(node.target)

    def visit_For(self, node: ast.For) -> None:
        self._forget(node.target)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = dict(self._names)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self._names[argument.arg] = Unknown(argument.arg)
        self.generic_visit(node)
        self._names = outside

    def visit_If(self, node: ast.If) -> None:
        """What a branch assigns is one of two values, unless both agree."""
        self.visit(node.test)
        if ast.unparse(node.test).startswith("__name__"):
            for statement in node.body:
                self.visit(statement)
            return
        before = dict(self._names)
        for statement in node.body:
            self.visit(statement)
        taken, self._names = self._names, dict(before)
        for statement in node.orelse:
            self.visit(statement)
        for name in taken.keys() | self._names.keys():
            values = [side[name] for side in (taken, self._names) if name in side]
            if len(values) == 1 or values[0] != values[1]:
                options = [o for v in values for o in (v.options if isinstance(v, Unknown) else (v,))]
                self._names[name] = Unknown(name, tuple(options))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        match target:
            case ast.Tuple(elts=names) | ast.List(elts=names):
                values = value.elts if isinstance(value, ast.Tuple | ast.List) else []
                for index, name in enumerate(names):
                    if len(values) == len(names):
                        self._bind(name, values[index])
                    else:
                        self._forget(name)
            case ast.Subscript(value=holder, slice=ast.Constant(value=str(key))):
                self._put(last_name(holder), key, value)
            case ast.Attribute(value=holder, attr=key) if group := self._group_of(holder):
                self._say(group, key, value_of(value, self._names), value, decides=True)
            case ast.Name() | ast.Attribute(value=ast.Name(id="self")):
                held = value_of(value, self._names, self._at)
                self._names[last_name(target)] = held
                if isinstance(held, Placed) and (group := GROUP_OF_NAME.get(last_name(target).lower())):
                    self._dicts[last_name(target)] = (group, held)

    def _forget(self, target: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name | ast.Attribute):
                self._names[last_name(node)] = Unknown(last_name(node))

    def _group_of(self, holder: ast.expr) -> str | None:
        """The group of `holder.key = value`: a configuration that was made, a tokenizer, a model's config."""
        name = last_name(holder)
        made = self._names.get(name)
        if isinstance(made, Unknown) and made.text in CALLS:
            return CALLS[made.text]
        if isinstance(holder, ast.Attribute) and holder.attr in ("config", "generation_config"):
            return "model" if holder.attr == "config" else "generation"
        return "tokenizer" if name == "tokenizer" else None

    def _put(self, name: str, key: str, value: ast.expr) -> None:
        held = self._names.get(name)
        if isinstance(held, Placed):
            held[key] = value_of(value, self._names)
            held.places[key] = self._at(value)

    # Calls

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        match node.func:
            case ast.Attribute(value=holder, attr="update") if last_name(holder) in self._dicts:
                given = value_of(node.args[0], self._names, self._at) if node.args else None
                if isinstance(given, Placed):
                    held = self._names[last_name(holder)]
                    held.update(given)
                    held.places |= given.places
                elif node.args:
                    self._say("code", "settings_changed", ast.unparse(node), node)
                for keyword in node.keywords:
                    if keyword.arg:
                        self._put(last_name(holder), keyword.arg, keyword.value)
            case ast.Attribute(value=holder, attr="pop" | "setdefault") if last_name(holder) in self._dicts:
                self._say("code", "settings_changed", ast.unparse(node), node)
        ends = [end for end in CALLS if name == end or name.endswith(f".{end}")]
        if ends:
            self._call(max(ends, key=len), node)
        self.generic_visit(node)

    def _call(self, name: str, node: ast.Call) -> None:
        group = CALLS[name]
        if group == "code":
            self._say("code", name, "called", node)
            return
        if name == "AutoModelForCausalLM.from_pretrained" and self._trainer_made:
            group = "answering"  # what was trained is loaded to be used
        self.classes.add(name)
        for key, value in zip(POSITIONAL.get(name, ()), node.args):
            self._say(group, key, value_of(value, self._names), value)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._spread(group, keyword.value)
            else:
                self._keyword(group, keyword.arg, keyword.value)
        if name == "train_test_split" and not any(k.arg in ("seed", "random_state") for k in node.keywords):
            self._say("code", "unseeded_split", ast.unparse(node), node)
        if name in TRAINERS:
            self._trainer_made = True
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "eval_dataset" in given and given["eval_dataset"] == given.get("train_dataset"):
                self._say("code", "eval_on_training_rows", given["eval_dataset"], node)

    def _keyword(self, group: str, key: str, node: ast.expr) -> None:
        value = value_of(node, self._names)
        made = isinstance(value, Unknown) and value.text in CALLS
        if key not in WIRING.get(group, ()) and not made:
            self._say(group, key, value, node)

    def _spread(self, group: str, given: ast.expr) -> None:
        """`**training_config`."""
        held = value_of(given, self._names, self._at)
        if isinstance(held, Placed):
            self._dicts.pop(last_name(given), None)
            self._take(group, held)
        else:
            self._say(group, f"**{ast.unparse(given)}", Unknown(ast.unparse(given)), given)

    def _take(self, group: str, held: Placed) -> None:
        for key, value in held.items():
            if key not in WIRING.get(group, ()):
                self._found.append(Setting(group, key, value, held.places[key]))

    def _say(self, group: str, key: str, value: Any, node: ast.AST, decides: bool = False) -> None:
        if decides:
            self._found = [
                replace(old, again=self._at(node)) if (old.group, old.key) == (group, key) else old
                for old in self._found
            ]
        self._found.append(Setting(group, key, value, self._at(node)))

    def _at(self, node: ast.AST) -> str:
        return self.place.format(getattr(node, "lineno", "?"))

    # Texts that go wrong

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._texts([part.value if isinstance(part, ast.FormattedValue) else part for part in node.values])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Add):
            self._texts([node.left, node.right])
        self.generic_visit(node)

    def _texts(self, parts: list[ast.expr]) -> None:
        """Pieces that a text is put together from."""
        for before, part in zip([None, *parts], parts):
            inner = part
            if isinstance(part, ast.Call) and last_name(part.func) == "str" and part.args:
                inner = part.args[0]
            if "eos_token_id" in _meaning(inner, self._names) or _literal(part).strip() == "32000":
                self._say("code", "eos_as_text", ast.unparse(part), part)
            if before is not None and "Input:" in _literal(before) and not _literal(part):
                self._say("code", "input_without_input", _literal(before), part)


def _meaning(node: ast.expr, names: dict[str, Any]) -> str:
    if isinstance(node, ast.Name):
        held = names.get(node.id)
        return held.text if isinstance(held, Unknown) else ""
    return node.attr if isinstance(node, ast.Attribute) else ""


def _literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

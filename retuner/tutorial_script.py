"""A script's settings, found without running it.

It is parsed: literals, names that hold them, `torch.bfloat16` and its like, and the calls that take settings
(`LoraConfig(...)`, `TrainingArguments(**training_config)`, ...). What only running it would tell is handed on as
`Unknown`, so that nothing is guessed and nothing is lost.
"""

import ast
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from retuner.tutorial_values import (
    CALLS,
    GROUP_OF_NAME,
    POSITIONAL,
    WIRING,
    Placed,
    Setting,
    Unknown,
    either,
    last_name,
    one_of,
    value_of,
)

TRAINERS = {"SFTTrainer", "Trainer"}


class Script(ast.NodeVisitor):
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
        match node:
            case ast.AugAssign(target=held, op=ast.BitOr()) if self._holds_settings(held):
                self._add(held, [node.value], node)
            case ast.AugAssign(target=ast.Subscript(value=held)) if self._holds_settings(held):
                self._cannot_follow(held, node)
            case _:
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
        before, dicts = dict(self._names), self._all_dicts()
        as_before = [held.copy() for held in dicts]
        for statement in node.body:
            self.visit(statement)
        taken, self._names = self._names, dict(before)
        as_taken = [held.copy() for held in dicts]
        for held, contents in zip(dicts, as_before):
            held.become(contents)
        for statement in node.orelse:
            self.visit(statement)
        for held, contents in zip(dicts, as_taken):
            held.become(either(contents, held))
        for name in taken.keys() | self._names.keys():
            values = [side[name] for side in (taken, self._names) if name in side]
            if len(values) == 2 and all(isinstance(value, Placed) for value in values):
                self._names[name] = held = values[0] if values[0] is values[1] else either(*values)
                if name in self._dicts:
                    self._dicts[name] = (self._dicts[name][0], held)
            elif len(values) == 1 or values[0] != values[1]:
                self._names[name] = one_of(values, name)

    def _all_dicts(self) -> list[Placed]:
        """Each once, whatever its names."""
        named = [*self._names.values(), *(held for _, held in self._dicts.values())]
        return list({id(held): held for held in named if isinstance(held, Placed)}.values())

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
                self._put(holder, key, value)
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

    def _put(self, holder: ast.expr, key: str, value: ast.expr) -> None:
        held = self._names.get(last_name(holder))
        if isinstance(held, Placed):
            held[key] = value_of(value, self._names)
            held.places[key] = self._at(value)
        elif last_name(holder) in self._dicts:
            self._cannot_follow(holder, value)

    def _add(self, holder: ast.expr, given: Sequence[ast.expr], node: ast.AST) -> None:
        held = self._names.get(last_name(holder))
        more = [value_of(each, self._names, self._at) for each in given]
        if not isinstance(held, Placed) or not all(isinstance(each, Placed) for each in more):
            self._cannot_follow(holder, node)
            return
        for each in more:
            held.add(each)

    def _holds_settings(self, holder: ast.expr) -> bool:
        name = last_name(holder)
        return name in self._dicts or isinstance(self._names.get(name), Placed)

    def _cannot_follow(self, holder: ast.expr, node: ast.AST) -> None:
        """What `node` does to a dictionary only running it would tell."""
        if last_name(holder) in self._dicts:
            self._say("code", "settings_changed", ast.unparse(node), node)
        else:
            self._forget(holder)

    # Calls

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        match node.func:
            case ast.Attribute(value=holder, attr="update") if self._holds_settings(holder):
                named = ast.Call(ast.Name("dict"), [], node.keywords)
                self._add(holder, [*node.args, named], node)
            case ast.Attribute(value=holder, attr="pop" | "setdefault") if self._holds_settings(holder):
                self._cannot_follow(holder, node)
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

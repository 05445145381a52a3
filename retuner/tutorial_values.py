"""Values in a script that can be known without running it, and the calls that take settings."""

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GROUP_OF_NAME = {
    "training_config": "training",
    "train_config": "training",
    "training_args": "training",
    "training_arguments": "training",
    "train_args": "training",
    "sft_config": "training",
    "training": "training",
    "peft_config": "peft",
    "peft_conf": "peft",
    "lora_config": "peft",
    "peft": "peft",
    "lora": "peft",
    "model_kwargs": "model",
    "model": "model",
    "bnb_config": "quantization",
    "quantization_config": "quantization",
    "quantization": "quantization",
    "trainer_kwargs": "trainer",
    "trainer": "trainer",
    "tokenizer": "tokenizer",
    "generation_config": "generation",
    "generation_kwargs": "generation",
    "generation": "generation",
}
"""Dictionaries that hold settings, by the names people give them."""

CALLS = {
    "TrainingArguments": "training",
    "SFTConfig": "training",
    "LoraConfig": "peft",
    "BitsAndBytesConfig": "quantization",
    "AutoModelForCausalLM.from_pretrained": "model",
    "AutoPeftModelForCausalLM.from_pretrained": "answering",
    "PeftModel.from_pretrained": "answering",
    "AutoTokenizer.from_pretrained": "tokenizer",
    "SFTTrainer": "trainer",
    "Trainer": "trainer",
    "EarlyStoppingCallback": "early_stopping",
    "load_dataset": "data",
    "train_test_split": "split",
    "set_seed": "seeding",
    "generate": "generation",
    "pipeline": "generation",
    "lora.Linear": "loralib",
    "lora.Embedding": "loralib",
    "lora.MergedLinear": "loralib",
    "lora.Conv2d": "loralib",
} | dict.fromkeys(
    (
        "load_metric",
        "evaluate.load",
        "push_to_hub",
        "merge_and_unload",
        "prepare_model_for_kbit_training",
        "mark_only_lora_as_trainable",
        "lora_state_dict",
        "load_state_dict",
        "wandb.init",
        "wandb.login",
        "notebook_login",
        "login",
    ),
    "code",
)
"""A call, by the end of its name, to the group of what it is given; `code` where only the call counts."""

POSITIONAL = {
    "AutoModelForCausalLM.from_pretrained": ("pretrained_model_name_or_path",),
    "load_dataset": ("path", "name"),
    "set_seed": ("seed",),
    "lora.Linear": ("in_features", "out_features", "r"),
    "lora.Embedding": ("num_embeddings", "embedding_dim", "r"),
    "lora.MergedLinear": ("in_features", "out_features", "r"),
    "lora.Conv2d": ("in_channels", "out_channels", "kernel_size", "r"),
}

WIRING = {
    "trainer": {"model", "args", "peft_config"},
    "generation": {"model", "input_ids", "attention_mask", "task", "inputs"},
    "tokenizer": {"pretrained_model_name_or_path"},
    "answering": {"model", "model_id", "pretrained_model_name_or_path"},
}
"""Arguments that pass on what was made before; what they were made with is read where they were made."""

ENUMS = {"TaskType", "SchedulerType", "IntervalStrategy", "SaveStrategy", "OptimizerNames", "PeftType"}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Unknown:
    """A value that only running the file would tell, as it is spelled there, and what it may come to."""

    text: str
    options: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Setting:
    """One thing that a file asks for: `group` is what it was given to (training, peft, model, trainer, ...)."""

    group: str
    key: str
    value: Any
    place: str
    again: str | None = None
    """Where the same file sets it again, and so decides."""


class Placed(dict[str, Any]):
    """A dictionary that knows at which place each of its keys was said."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def add(self, more: "Placed") -> None:
        self.update(more)
        self.places |= more.places

    def copy(self) -> "Placed":
        made = Placed()
        made.add(self)
        return made

    def become(self, other: "Placed") -> None:
        self.clear()
        self.places.clear()
        self.add(other)


def one_of(values: Sequence[Any], text: str | None = None) -> Unknown:
    """What comes to one of these."""
    options = [o for value in values for o in (value.options if isinstance(value, Unknown) else (value,))]
    return Unknown(text or " or ".join(map(str, values)), tuple(options))


def either(one: Placed, other: Placed) -> Placed:
    """What two branches leave of a dictionary."""
    made = Placed()
    for key in {**one, **other}:
        sides = [side for side in (one, other) if key in side]
        values = [side[key] for side in sides]
        agreed = len(sides) == 2 and values[0] == values[1]
        made[key] = values[0] if agreed else one_of(values)
        made.places[key] = "; ".join(dict.fromkeys(side.places[key] for side in sides))
    return made


def last_name(node: ast.expr) -> str:
    """`training_config` of both `training_config` and `self.training_config`; empty for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def value_of(node: ast.expr, names: dict[str, Any], place: Callable[[ast.AST], str] = lambda _: "") -> Any:
    """A plain value, or Unknown. A configuration that is made in place is Unknown under its class's name."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return _whole([value_of(item, names) for item in items], node)
        case ast.Dict(keys=keys, values=values):
            return _dict(list(zip(keys, values)), names, place)
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            pairs = [(ast.Constant(k.arg) if k.arg else None, k.value) for k in keywords]
            return _dict(pairs, names, place)
        case ast.Call(func=called):
            text = ast.unparse(called)
            made = next((end for end in CALLS if text == end or text.endswith(f".{end}")), None)
            if text.endswith("is_bf16_supported"):
                return Unknown(f"{text}()", (True, False))
            return Unknown(made or _short(node))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = value_of(operand, names)
            return (
                -value
                if isinstance(value, int | float) and not isinstance(value, bool)
                else Unknown(_short(node))
            )
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = value_of(operand, names)
            if isinstance(value, Unknown):
                return Unknown(_short(node), tuple(not option for option in value.options))
            return not value
        case ast.Name(id=name):
            return names.get(name, Unknown(name))
        case ast.Attribute(attr=attribute):
            return _attribute(node, attribute, names)
        case ast.IfExp(body=body, orelse=orelse):
            return Unknown(_short(node), (value_of(body, names), value_of(orelse, names)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return _arithmetic(op, value_of(left, names), value_of(right, names), node)
    return Unknown(_short(node))


def _dict(pairs: Sequence[tuple[ast.expr | None, ast.expr]], names: dict[str, Any], place: Any) -> Any:
    made = Placed()
    for key, value in pairs:
        found = value_of(value, names, place)
        if key is None and isinstance(found, Placed):
            made.add(found)
        elif isinstance(key, ast.Constant):
            made[str(key.value)] = found
            made.places[str(key.value)] = place(value)
        else:
            text = f"**{_short(value)}" if key is None else _short(key)
            made[text] = Unknown(text)
            made.places[text] = place(value)
    return made


def _attribute(node: ast.Attribute, name: str, names: dict[str, Any]) -> Any:
    holder = ast.unparse(node.value)
    if holder == "torch":
        return name
    if holder.rpartition(".")[2] in ENUMS:
        return name if holder.endswith(("TaskType", "PeftType")) else name.lower()
    held = names.get(name)
    return held if holder == "self" and held is not None else Unknown(_short(node))


def _arithmetic(op: ast.operator, left: Any, right: Any, node: ast.expr) -> Any:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (left, right))
    texts = isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str)
    try:
        return ARITHMETIC[type(op)](left, right) if numbers or texts else Unknown(_short(node))
    except (ZeroDivisionError, OverflowError):
        return Unknown(_short(node))


def _whole(items: list[Any], node: ast.expr) -> Any:
    return Unknown(_short(node)) if any(isinstance(item, Unknown) for item in items) else items


def _short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 80 else text[:77] + "..."

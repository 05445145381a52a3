"""A tutorial's settings as a params file: what each became, why, and what is refused.

Nothing is dropped: every name that the file sets ends in a row that says kept, changed or refused.
"""

import difflib
import json
import re
import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retuner.errors import Refused
from retuner.params import Params
from retuner.tutorial_rules import Entry, Rule, Verdict, refuse
from retuner.tutorial_source import WHOLE_FILE, Source
from retuner.tutorial_table import (
    GONE,
    MAX_TOKENS,
    OTHERWISE,
    PACK_TOKENS,
    PACKING,
    PINNED,
    SAMPLING,
    SFT_DEFAULTS,
    TABLE,
    THEIR_DEFAULTS,
    WARMUP_STEPS,
)
from retuner.tutorial_values import Setting, Unknown
from retuner.tutorial_yaml import Line, Sheet, spelled

TEMPLATE = Path(__file__).parents[1] / "params" / "phi3_mini_lora.yaml"
"""A complete file: what theirs says nothing of (preparing, evaluating, the gate) stays as it is there."""

SECRETS = {"token", "hub_token", "use_auth_token", "push_to_hub_token"}
CALLED = {
    "data": "load_dataset",
    "split": "train_test_split",
    "seeding": "set_seed",
    "tokenizer": "tokenizer",
    "generation": "generate",
    "loralib": "loralib",
    "early_stopping": "EarlyStoppingCallback",
    "answering": "from_pretrained",
}
"""Groups whose names alone would not say what they belong to."""
QUANTIZATION = "train.quantization"
DRAWN = "evaluate.sampling"


@dataclass(frozen=True)
class Row:
    """What became of one name. `became` is empty where nothing needs to be set."""

    group: str
    key: str
    value: str
    place: str
    verdict: Verdict
    became: str = ""
    why: str = ""
    do: str = ""

    @property
    def name(self) -> str:
        return f"{CALLED[self.group]}.{self.key}" if self.group in CALLED else self.key


@dataclass(frozen=True)
class Translation:
    rows: tuple[Row, ...]
    added: tuple[str, ...]
    """Settings that theirs is silent about and whose library default is written down."""
    text: str
    """The params file, as it is with everything refused left out."""

    @property
    def refused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "refused")

    def as_json(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "added": list(self.added), "params": self.text}


def translate(source: Source, commit: str | None = None) -> Translation:
    """Every setting's row, and the params file that results. `commit` pins a base that the file leaves unpinned.

    Errors: Refused when values that are each possible do not fit together.
    """
    sheet = Sheet(TEMPLATE.read_text(encoding="utf-8"))
    book = _Book(sheet)
    for setting in source.settings:
        book.enter(setting)
    book.settle(commit, SFT_DEFAULTS if "SFTConfig" in source.classes else {})
    book.refuse_what_params_refuse()
    return Translation(tuple(book.rows), book.added, _written(source, book, sheet))


@dataclass
class _Book:
    """The rows so far, and for each setting of ours the value and the row that said it."""

    sheet: Sheet
    rows: list[Row] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    said_by: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    weak: set[str] = field(default_factory=set)
    added: tuple[str, ...] = ()

    def enter(self, setting: Setting) -> None:
        rule, value, undecided = _decide(setting)
        shown = "***" if setting.key in SECRETS else _shown(setting.value)
        row = Row(setting.group, setting.key, shown, setting.place, rule.verdict, why=rule.why, do=rule.do)
        if undecided and row.verdict == "kept":
            why = "decided where it runs, which is part of what a run is here"
            row = replace(row, verdict="changed", why=why)
        if gone := GONE.get(setting.key):
            row = replace(row, why=f"{row.why} ({gone})" if row.why else gone)
        if row.verdict != "refused":
            row = replace(row, do="")
        self.rows.append(row)
        if setting.again:
            self._amend(-1, "changed", why=f"{setting.again} sets it again")
        elif rule.to and row.verdict != "refused":
            self._set(rule, rule.value(value))

    def _set(self, rule: Rule, value: Any) -> None:
        path = rule.to or ""
        if path not in (WARMUP_STEPS, PACKING, SAMPLING) and not self.sheet.has(path):
            self._amend(-1, "refused", why=f"Retuner has no such setting as {path}", do="leave it out")
            return
        if path in self.values and self.values[path] != value:
            first = self.rows[self.said_by[path]]
            if rule.weak:
                self._amend(-1, "changed", why=f"{first.key} decides ({first.place})")
                return
            if path not in self.weak:
                why = f"{path} is one setting, and {first.place} asks for {spelled(self.values[path])}"
                self._amend(-1, "refused", why=why, do="say one of the two")
                return
            self._amend(self.said_by[path], "changed", became="", why=f"{self.rows[-1].key} decides")
        elif path in self.values and rule.weak:
            self._amend(-1, became=f"{path}: {spelled(value)}")
            return
        self.values[path], self.said_by[path] = value, len(self.rows) - 1
        self.weak = self.weak | {path} if rule.weak else self.weak - {path}
        self.notes[path] = rule.note
        self._amend(-1, became=f"{path}: {spelled(value)}")

    def _amend(self, index: int, verdict: Verdict | None = None, **changes: str) -> None:
        self.rows[index] = replace(self.rows[index], verdict=verdict or self.rows[index].verdict, **changes)

    def _take_back(self, path: str, verdict: Verdict, why: str, do: str = "") -> None:
        del self.values[path]
        self._amend(self.said_by.pop(path), verdict, became="", why=why, do=do)

    def settle(self, commit: str | None, defaults: dict[str, Any]) -> None:
        """What several settings decide together, and what theirs leaves to its libraries."""
        if (steps := self.values.get(WARMUP_STEPS)) is not None:
            self._warm_up_by_steps(steps)
        if self.values.get("train.max_steps") is not None and "train.epochs" in self.values:
            self._take_back("train.epochs", "changed", "max_steps decides, there too")
        self._quantize()
        self._sample()
        self._pin(commit)
        said = set(self.values)
        silent = {path: value for path, value in (THEIR_DEFAULTS | defaults).items() if path not in said}
        if self.values.get("train.max_steps") is not None:
            silent["train.epochs"] = None
        self.values |= silent
        if self.values["train.schedule"] == "constant" and self.values["train.warmup_fraction"]:
            self._amend(self.said_by["train.warmup_fraction"], "changed", became="train.warmup_fraction: 0.0",
                        why="the schedule constant has no warm-up, there neither")  # fmt: skip
            self.values["train.warmup_fraction"] = 0.0
        silent |= self._pack()
        self.values["template.too_long"] = "truncate"
        self.notes["template.too_long"] = "as theirs does; a row that loses every answer is reported"
        self.values["evaluate.metrics"] = ["rouge_1", "rouge_2", "rouge_l", "rouge_lsum"]
        self.notes["evaluate.metrics"] = "and the loss, always"
        self.added = tuple(sorted(silent))

    def _warm_up_by_steps(self, steps: float) -> None:
        of = self.values.get("train.max_steps")
        index = self.said_by.pop(WARMUP_STEPS)
        del self.values[WARMUP_STEPS]
        if "train.warmup_fraction" in self.values and "train.warmup_fraction" not in self.weak:
            self._amend(index, "refused", became="", why="warmup_ratio says the same setting",
                        do="say one of the two")  # fmt: skip
        elif of:
            self.values["train.warmup_fraction"], self.said_by["train.warmup_fraction"] = steps / of, index
            self._amend(index, "changed", became=f"train.warmup_fraction: {spelled(steps / of)}",
                        why=f"{steps} of {of} steps")  # fmt: skip
        else:
            self._amend(index, "refused", became="", why="warm-up is a share of the steps here, and how many "
                        "there are is not known yet", do="write it as warmup_ratio")  # fmt: skip

    def _pack(self) -> dict[str, Any]:
        """Packs are as long as the longest row may be, as theirs are. Returns what their silence decides."""
        packed = bool(self.values.pop(PACKING, False))
        tokens = self.values[MAX_TOKENS] if packed else None
        if PACKING in self.said_by:
            index = self.said_by[PACK_TOKENS] = self.said_by.pop(PACKING)
            self._amend(index, became=f"{PACK_TOKENS}: {spelled(tokens)}")
        self.values[PACK_TOKENS] = tokens
        return {} if PACK_TOKENS in self.said_by else {PACK_TOKENS: tokens}

    def _quantize(self) -> None:
        parts = {path: path.rpartition(".")[2] for path in self.values if path.startswith(f"{QUANTIZATION}.")}
        for path, part in parts.items():
            if QUANTIZATION in self.values:
                self.values[QUANTIZATION] = self.values[QUANTIZATION] | {part: self.values.pop(path)}
            else:
                self._take_back(
                    path, "refused", "the base is not quantised", "load_in_4bit: true, or leave it out"
                )

    def _sample(self) -> None:
        """Their libraries' defaults stand in for what is not said of how answers are drawn."""
        drawn = self.values.pop(SAMPLING, False)
        parts = {path: path.rpartition(".")[2] for path in self.values if path.startswith(f"{DRAWN}.")}
        if SAMPLING in self.said_by:
            value: dict[str, Any] | None = None
            if drawn:
                seed = self.values.get("train.seed", THEIR_DEFAULTS["train.seed"])
                said = {part: self.values.pop(path) for path, part in parts.items()}
                value = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, **said, "seed": seed}
                parts = {}
            index = self.said_by[DRAWN] = self.said_by.pop(SAMPLING)
            self.values[DRAWN] = value
            self._amend(index, became=f"{DRAWN}: {spelled(value)}")
        for path in parts:
            self._take_back(path, "changed", "not used without do_sample, there neither")

    def _pin(self, commit: str | None) -> None:
        repo = self.values.get("base.repo")
        if not isinstance(repo, str) or "base.commit" in self.values:
            return
        if known := commit or PINNED.get(repo):
            self.values["base.commit"] = known
            self.notes["base.commit"] = "pinned: a branch could change under you"
        else:
            do = f"--commit HASH; left out, the base is that of params/{TEMPLATE.name}"
            self._take_back("base.repo", "refused", "without a commit its files could change under you", do)

    def refuse_what_params_refuse(self) -> None:
        """Values that the params file may not have go back to their rows, and the library's default stands in."""
        for _ in range(2):  # defaults that stand in are checked too
            try:
                Params.model_validate_json(json.dumps(self.sheet.data(self.values)))
                return
            except ValidationError as error:
                unplaced = []
                for detail in error.errors(include_url=False):
                    where = ".".join(map(str, detail["loc"])).replace("train.sft.", "train.", 1)
                    path = next((p for p in self.said_by if where == p or where.startswith(f"{p}.")), None)
                    if path is None and where.startswith("base."):
                        path = "base." + where.rpartition(".")[2]
                    if path in self.said_by and path in self.values:
                        expected = detail["msg"].removeprefix("Input should be ")
                        do = self.rows[self.said_by[path]].do or "leave it out, or say what is expected"
                        self._take_back(path, "refused", f"{path}: expected {expected}", do)
                        if path in THEIR_DEFAULTS:
                            self.values[path] = THEIR_DEFAULTS[path]
                            self.added = tuple(sorted({*self.added, path}))
                    else:
                        unplaced.append(f"{where}: {detail['msg']}".removeprefix(": Value error, "))
                if unplaced:
                    raise Refused("the settings do not fit together: " + "; ".join(unplaced)) from None


def _decide(setting: Setting) -> tuple[Rule, Any, bool]:
    """The rule for a setting, the value it is for, and whether that is one of several it may come to."""
    entry = _entry(setting)
    if entry is None:
        return OTHERWISE.get(setting.group) or _unknown_name(setting), setting.value, False
    if entry.rules[0].any_value and len(entry.rules) == 1:
        return entry.rules[0], setting.value, False
    if not isinstance(setting.value, Unknown):
        return _first(entry.rules, setting.value), setting.value, False
    for value in setting.value.options:
        if not isinstance(value, Unknown) and (rule := _first(entry.rules, value)).verdict != "refused":
            return rule, value, True
    for rule in entry.rules:
        if rule.any_value:
            return rule, None, False
    return refuse("only running the file would tell what it comes to", "write the value"), None, False


def _entry(setting: Setting) -> Entry | None:
    for entry in TABLE:
        if setting.key in entry.names and setting.group in (*entry.groups, WHOLE_FILE):
            return entry
    return None


def _first(rules: tuple[Rule, ...], value: Any) -> Rule:
    for rule in rules:
        if rule.only(value):
            return rule
    return refuse("a value that has no meaning here", "leave it out")


def _unknown_name(setting: Setting) -> Rule:
    names = [n for entry in TABLE if setting.group in (*entry.groups, WHOLE_FILE) for n in entry.names]
    close = difflib.get_close_matches(setting.key, names, n=1)
    return refuse("not a setting", f"did you mean {close[0]}?" if close else "leave it out")


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Unknown) else spelled(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _written(source: Source, book: _Book, sheet: Sheet) -> str:
    model = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source.name).stem).strip("-.") or "tutorial"
    lines = {"register.model_name": Line(model, "")}
    for path, value in book.values.items():
        comment = "silent there: their libraries' default" if path in book.added else ""
        if path in book.said_by:
            row = book.rows[book.said_by[path]]
            comment = f"{row.place}: {row.key}"
        lines[path] = Line(value, "; ".join(part for part in (comment, book.notes.get(path)) if part))
    head = [
        f"{source.name} as a run of Retuner, written by `retuner params from-tutorial`.",
        "Each value names the place in that file it comes from. Where that file is silent and its libraries have",
        f"no default, the value is that of params/{TEMPLATE.name}.",
    ]
    for verdict, title in (("changed", "Nothing to set for:"), ("refused", "Left out:")):
        told: dict[str, list[str]] = {}
        for row in book.rows:
            if row.verdict == verdict and not row.became:
                told.setdefault(row.why, []).append(f"{row.name} ({row.place})")
        for index, (why, names) in enumerate(told.items()):
            head += ["", title] if not index else []
            head += textwrap.wrap(
                f"{', '.join(names)}: {why}", 106, initial_indent="- ", subsequent_indent="  "
            )
    return sheet.text(head, lines)

"""Writing into a params file as a person would: line by line, its layout and its other comments left alone."""

import json
import re
from dataclasses import dataclass
from typing import Any

SETTING = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]+):(?: +(?P<value>[^#\s].*?))?(?P<comment>\s+#.*)?$")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
WORDS_OF_YAML = {"true", "false", "null", "yes", "no", "on", "off"}
COMMENT_AT = 34
GATE_RULE = re.compile(r"^ +- \{metric: (\w+),")


@dataclass(frozen=True)
class Line:
    value: Any
    comment: str


class Sheet:
    """A complete params file in block style, one setting a line."""

    def __init__(self, text: str):
        self._lines = text.splitlines()
        while self._lines and self._lines[0].startswith("#"):
            del self._lines[0]
        self._at = dict(self._paths())

    def has(self, path: str) -> bool:
        """Whether it is a setting, or a part of one that holds several in one line."""
        parent = path.rpartition(".")[0]
        return path in self._at or (parent in self._at and parent.count(".") > 0)

    def data(self, values: dict[str, Any]) -> dict[str, Any]:
        """The file with `values` in place, as plain data."""
        from ruamel.yaml import YAML

        return YAML(typ="safe", pure=True).load(self.text([], {p: Line(v, "") for p, v in values.items()}))

    def text(self, head: list[str], lines: dict[str, Line]) -> str:
        """The file with `head` as its opening comment; gate rules on metrics that are not evaluated are left out."""
        written = list(self._lines)
        for path, line in lines.items():
            index = self._at[path]
            found = SETTING.match(written[index])
            assert found  # noqa: S101  (`_paths` found it by the same pattern)
            setting = f"{found['indent']}{found['key']}: {spelled(line.value)}"
            comment = _escaped(line.comment)
            written[index] = f"{setting:<{COMMENT_AT - 3}}   # {comment}" if comment else setting
        if metrics := lines.get("evaluate.metrics"):
            known = {"loss", *metrics.value}
            written = [text for text in written if not (rule := GATE_RULE.match(text)) or rule[1] in known]
        opening = [f"# {_escaped(line)}".rstrip() for line in head]
        return "\n".join([*opening, *written]) + "\n"

    def _paths(self) -> Any:
        """Dotted path of every setting that has a value, with the number of its line."""
        parents: list[tuple[int, str]] = []
        for index, text in enumerate(self._lines):
            if not (found := SETTING.match(text)):
                continue
            indent = len(found["indent"])
            parents = [parent for parent in parents if parent[0] < indent]
            if found["value"] is None:
                parents.append((indent, found["key"]))
            else:
                yield ".".join([*(key for _, key in parents), found["key"]]), index


def spelled(value: Any) -> str:
    """A value in YAML 1.2, in one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return re.sub(r"e([-+])0*(\d)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", repr(value))
        case dict():
            return "{" + ", ".join(f"{spelled(key)}: {spelled(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(spelled(item) for item in value) + "]"
        case str() if PLAIN.fullmatch(value) and value.lower() not in WORDS_OF_YAML:
            return value
        case str():
            return _escaped(json.dumps(value, ensure_ascii=False))
    return str(value)


def _escaped(text: str) -> str:
    """Without characters that would end a line or that YAML does not take, spelled as in a quoted text."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)

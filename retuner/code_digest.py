"""Which of the project's code a stage can reach, as one digest.

From a root function the graph of top-level names is followed through this package: calls, base
classes, constants, annotations, imports at the top of a module or inside a function. Each name that is
reached counts with its source as Python reads it, so comments, docstrings and formatting do
not. What the libraries do is not followed; their versions stand in the fingerprint instead.
"""

import ast
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from retuner.errors import RetunerError

PACKAGE = "retuner"
FOLDER = Path(__file__).parent

Symbol = tuple[str, str]
"""(module, top-level name); the name `*` stands for the whole module."""


def code_digest(root: str, notes: Path | None = None, folder: Path = FOLDER) -> str:
    """64 hex digits for the code reachable from `module:function`.

    `notes` is a file that remembers the digests of the newest sources, so that an unchanged project is
    hashed and not parsed. Errors: RetunerError when the root is not there.
    """
    sources = _sources(folder)
    key = hashlib.sha256(json.dumps([sys.version_info[:2], sorted(sources.items())]).encode()).hexdigest()
    known = _remembered(notes, key)
    if root not in known:
        known[root] = _digest(root, sources)
        if notes:
            _remember(notes, key, known)
    return known[root]


def reachable(root: str, folder: Path = FOLDER) -> dict[Symbol, str]:
    """Every reachable top-level name with its normalised source."""
    return _reach(root, _sources(folder))


def _sources(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*.py"):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def _digest(root: str, sources: dict[str, str]) -> str:
    reached = sorted(_reach(root, sources).items())
    return hashlib.sha256(json.dumps(reached).encode()).hexdigest()


def _reach(root: str, sources: dict[str, str]) -> dict[Symbol, str]:
    @cache
    def module(name: str) -> Module:
        return _read_module(name, sources)

    start: Symbol = tuple(root.split(":"))  # type: ignore[assignment]
    if start[0] not in sources or start[1] not in module(start[0]).symbols:
        raise RetunerError(f"there is no {root} in the project's code")
    reached: dict[Symbol, str] = {}
    waiting = [start]
    while waiting:
        symbol = waiting.pop()
        if symbol in reached or symbol[0] not in sources:
            continue
        holder = module(symbol[0])
        if symbol[1] == "*":
            reached[symbol] = ""
            waiting += [(symbol[0], name) for name in holder.symbols]
        elif nodes := holder.symbols.get(symbol[1]):
            reached[symbol] = "\n".join(ast.unparse(node) for node in nodes)
            waiting += [target for node in nodes for target in _references(node, holder, sources)]
        elif symbol[1] in holder.imports:
            waiting.append(holder.imports[symbol[1]])
        else:
            waiting.append((f"{symbol[0]}.{symbol[1]}", "*"))
        if holder.loose and (symbol[0], "") not in reached:
            # Statements that run at import can change anything in their module.
            reached[symbol[0], ""] = "\n".join(ast.unparse(node) for node in holder.loose)
            waiting += [target for node in holder.loose for target in _references(node, holder, sources)]
    return reached


@dataclass
class Module:
    name: str
    symbols: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, Symbol] = field(default_factory=dict)
    loose: list[ast.stmt] = field(default_factory=list)


def _read_module(name: str, sources: dict[str, str]) -> Module:
    read = Module(name)
    for node in _without_docstrings(ast.parse(sources[name])).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            read.imports.update(_imports(node, sources))
        elif bound := sorted(_bound(node)):
            for each in bound:
                read.symbols.setdefault(each, []).append(node)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom) and not _is_definition(node):
                    read.imports.update(_imports(inner, sources))
        else:
            read.loose.append(node)
    return read


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])  # type: ignore[attr-defined]
    return tree


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _bound(node: ast.stmt) -> set[str]:
    """The top-level names that a statement gives a value."""
    if _is_definition(node):
        return {node.name}  # type: ignore[attr-defined]
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.name for n in ast.walk(node) if isinstance(n, ast.stmt) and _is_definition(n)}  # type: ignore[attr-defined]


def _imports(node: ast.Import | ast.ImportFrom, sources: dict[str, str]) -> Iterator[tuple[str, Symbol]]:
    """Local name to what of the project it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                yield alias.asname or PACKAGE, (alias.name, "*")
        return
    if node.level:
        raise RetunerError(f"line {node.lineno}: a relative import", "imports from the package's full name")
    if node.module and node.module.split(".")[0] == PACKAGE:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            target = (inner, "*") if inner in sources else (node.module, alias.name)
            yield alias.asname or alias.name, target


def _references(node: ast.stmt, holder: Module, sources: dict[str, str]) -> Iterator[Symbol]:
    """The project's names that a statement uses."""
    imports = dict(holder.imports)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            imports.update(_imports(inner, sources))
    through_attribute = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            target = imports.get(inner.value.id)
            if target and target[1] == "*" and f"{target[0]}.{inner.attr}" not in sources:
                through_attribute.add(id(inner.value))
                yield target[0], inner.attr
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Name) or id(inner) in through_attribute:
            continue
        if inner.id in holder.symbols:
            yield holder.name, inner.id
        if inner.id in imports:
            yield imports[inner.id]


def _remembered(notes: Path | None, key: str) -> dict[str, str]:
    if notes is None:
        return {}
    try:
        saved = json.loads(notes.read_text())
    except (OSError, ValueError):
        return {}  # Only a shortcut: without it the code is parsed.
    return saved.get("digests", {}) if saved.get("sources") == key else {}


def _remember(notes: Path, key: str, digests: dict[str, str]) -> None:
    notes.parent.mkdir(parents=True, exist_ok=True)
    draft = notes.with_name(f"{notes.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps({"sources": key, "digests": digests}))
    os.replace(draft, notes)

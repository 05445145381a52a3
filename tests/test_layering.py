"""Imports point one way, and what is heavy is loaded by those who need it, when they need it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("flows", "tasks", "retuner")
FILES = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "evaluate"}
MLFLOW_SPEAKERS = {"registry.py", "tracking.py", "metric_stream.py", "mlflow_model.py"}

named = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")


def imports(path: Path, at: str = "anywhere") -> set[str]:
    """Top names of what a file imports; `at="load"` leaves out what waits inside functions or for type checkers."""
    found = set()

    def visit(node: ast.AST) -> None:
        if at == "load" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at == "load" and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path.name}:{node.lineno} imports relatively; say the whole name"
            found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@named
def test_flows_know_tasks_and_tasks_know_nouns_and_never_the_other_way(path):
    may = PARTS[PARTS.index(path.relative_to(ROOT).parts[0]) :]
    assert not imports(path) & (set(PARTS) - set(may))


@named
def test_prefect_is_spoken_in_flows_and_tasks_only(path):
    if path.is_relative_to(ROOT / "retuner"):
        assert "prefect" not in imports(path)


@named
def test_mlflow_is_spoken_by_the_registry_and_the_tracker_only(path):
    if path.is_relative_to(ROOT / "retuner") and path.name in MLFLOW_SPEAKERS:
        return
    assert "mlflow" not in imports(path)


@named
def test_heavy_libraries_wait_for_the_function_that_needs_them(path):
    assert not imports(path, at="load") & HEAVY


def test_importing_all_the_nouns_loads_no_heavy_library():
    # mlflow_model.py is the code of a logged model: MLflow runs it as a script.
    nouns = [
        p.stem for p in FILES if p.parent.name == "retuner" and p.stem not in ("__init__", "mlflow_model")
    ]
    program = "import importlib, sys\n"
    program += f"for noun in {nouns}: importlib.import_module('retuner.' + noun)\n"
    program += f"print(sorted({HEAVY | {'mlflow', 'prefect', 'dvc', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_help_loads_neither_prefect_nor_any_heavy_library():
    program = (
        "import sys\nfrom flows.cli import main\nsys.argv = ['retuner', '--help']\n"
        "try: main()\nfinally: print('loaded:', "
        f"sorted({HEAVY | {'mlflow', 'prefect', 'dvc'}} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "loaded: []" in done.stderr

"""Small real projects: chats under DVC, and a params file for the tiny base."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.pipeline import pipeline
from retuner.params_file import load
from retuner.runtime import load_runtime
from tasks.context import RunContext, open_context
from tasks.step import carry_out

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "gold")


def chats(rows: int = 48) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Colour of item {row}?"},
                {"role": "assistant", "content": COLOURS[row % len(COLOURS)]},
            ]
        }
        for row in range(rows)
    ]


def write_chats(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "chats.jsonl").write_text(text, encoding="utf-8")


def add_to_dvc(project: Path, folder: str = "data") -> None:
    """What `dvc add FOLDER` does, in the project's own DVC repository."""
    from dvc.repo import Repo

    with Repo(str(project)) if (project / ".dvc").exists() else Repo.init(str(project), no_scm=True) as repo:
        repo.add(str(project / folder))


def make_project(folder: Path, rows: int = 48) -> Path:
    """A project folder with data/, data.dvc and params.yaml (the shipped smoke run, made shorter)."""
    write_chats(folder / "data", chats(rows))
    add_to_dvc(folder)
    text = (ROOT / "params" / "smoke.yaml").read_text()
    for before, after in (
        ("max_tokens: 1024 ", "max_tokens: 128 "),
        ("pack_tokens: 1024", "pack_tokens: 128"),
        ("max_steps: 8", "max_steps: 4"),
        ("held_out_fraction: 0.1", "held_out_fraction: 0.2"),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "params.yaml").write_text(text)
    return folder


def retrain(
    overrides: tuple[str, ...] = (), params: Path = Path("params.yaml"), **runtime: Any
) -> RunContext:
    """The pipeline of a params file, without Prefect. The context's records say what happened."""
    settings = replace(load_runtime(), **runtime)
    context = open_context(load(params, overrides), settings)
    pipeline(context, lambda step: carry_out(context, step)[0])
    context.close_run("FINISHED")
    return context


def states(context: RunContext) -> dict[str, str]:
    return {record.name: record.state for record in context.records}


def copy_code(target: Path) -> Path:
    """The project's code, to be edited."""
    for package in ("flows", "retuner", "tasks"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def environment(home: Path, **more: str) -> dict[str, str]:
    """For a `retuner` process of its own, with only the settings that the test names."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("RETUNER_", "PREFECT_", "MLFLOW_TRACKING"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "RETUNER_HOME": str(home), **more}


def retuner(project: Path, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=project,
        env=environment(home, **more),
        capture_output=True,
        text=True,
    )

"""What is installed is what is locked, and a set-up that cannot work says so."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.lock"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Measured: outside these, servers do not start, schedules are silently never created, or nothing resolves.
KNOWN_TO_WORK = [
    "prefect==3.8.8",
    "fastapi>=0.139,<0.151",
    "sqlalchemy>=2.0,<2.1",
    "mlflow==3.17.2",
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "trl==1.16.0",
    "datasets==5.2.0",
    "evaluate==0.4.6",
    "dvc==3.67.1",
]


def locked(lock: Path) -> dict[str, Requirement]:
    """Requirements by canonical name; the hash lines are left out."""
    lines = [line.rstrip("\\ ") for line in lock.read_text().splitlines() if not line.startswith(" ")]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def declared() -> list[Requirement]:
    project = PYPROJECT["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    return [Requirement(line) for lines in lists for line in lines]


def test_every_installed_package_has_the_version_that_is_locked():
    wrong = []
    for name, requirement in locked(ROOT / "locks/main.lock").items():
        if requirement.marker and not requirement.marker.evaluate():
            continue
        installed = importlib.metadata.version(name)
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement}, but {installed} is installed")
    assert not wrong


@pytest.mark.parametrize("text", KNOWN_TO_WORK)
def test_the_versions_that_are_known_to_work_together_are_installed(text):
    requirement = Requirement(text)
    # A build's local part (2.13.0+cpu) is the same version.
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))


def test_boto3_is_locked_below_the_version_that_breaks_dvc():
    assert Requirement("boto3<1.44").specifier.contains(
        str(locked(ROOT / "locks/s3.lock")["boto3"].specifier).removeprefix("==")
    )


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_holds_exact_versions_with_hashes_and_nothing_of_one_machine(lock):
    entries = lock.read_text().replace("\\\n", " ").splitlines()
    assert entries
    for entry in entries:
        assert "==" in entry
        assert "--hash=sha256:" in entry
        assert "://" not in entry
        assert " /" not in entry


def test_what_pyproject_declares_is_what_the_locks_hold():
    pins = {name: pin for lock in LOCKS for name, pin in locked(lock).items()}
    for requirement in declared():
        if requirement.name == "torch":
            continue  # its builds differ by index, so no lock can hold its hash
        pin = pins[canonicalize_name(requirement.name)]
        assert pin.specifier == requirement.specifier, f"{requirement}: run `make lock`"


def test_every_library_that_the_code_imports_is_declared():
    providers = importlib.metadata.packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    ours = ("flows", "tasks", "retuner")
    missing = set()
    for path in [path for part in ours for path in (ROOT / part).glob("*.py")]:
        for top in {module.split(".")[0] for module in imported(path)} - {*sys.stdlib_module_names, *ours}:
            if not names & {canonicalize_name(name) for name in providers.get(top, [top])}:
                missing.add(f"{path.name} imports {top}")
    assert not missing


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.fixture
def checkout(tmp_path):
    """What `make setup` reads, with an install that does what `outcome` says instead of downloading."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/main.lock").write_text("")
    write_program(tmp_path / "locks/install", 'echo "installed with $1 $2" >>installs; exit $(cat outcome)')
    (tmp_path / "outcome").write_text("0")
    # Makes its environments in no time.
    write_program(
        tmp_path / "python",
        'case "$*" in *venv?--clear*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;; esac',
    )
    return tmp_path


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        # Not what a surrounding `make test PYTHON=...` was told.
        env={**os.environ, "MAKEFLAGS": "", "PYTHON": "", **environment},
        capture_output=True,
        text=True,
    )


def test_setting_up_is_done_once_and_again_when_a_lock_changes(checkout):
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0
    installs = checkout / "installs"
    assert len(installs.read_text().splitlines()) == 1
    os.utime(checkout / "locks/main.lock", (2e9, 2e9))
    assert make(checkout, "setup", "PYTHON=./python", "EXTRAS=s3").returncode == 0
    assert installs.read_text().splitlines()[1:] == ["installed with .venv/bin/python s3"]


def test_an_install_that_fails_is_not_taken_for_a_whole_one(checkout):
    (checkout / "outcome").write_text("7")
    assert make(checkout, "setup", "PYTHON=./python").returncode != 0
    (checkout / "outcome").write_text("0")
    assert make(checkout, "setup", "PYTHON=./python").returncode == 0
    assert len((checkout / "installs").read_text().splitlines()) == 2


def test_a_shim_that_finds_no_python_is_passed_over_and_the_next_one_tried(checkout):
    shims = checkout / "shims"
    shims.mkdir()
    for name in ("python3.11", "python3.12", "python3"):
        write_program(shims / name, "echo 'command not found' >&2; exit 127")
    shutil.copy(checkout / "python", shims)
    done = make(checkout, "setup", PATH=f"{shims}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr


def test_without_a_python_that_fits_the_set_up_says_what_it_needs(checkout):
    done = make(checkout, "setup", "PYTHON=/nowhere/python3.9")
    assert done.returncode != 0
    assert "/nowhere/python3.9 is not one" in done.stderr
    assert "expected: Python 3.11 or 3.12" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


COMPOSE = ROOT / "docker/compose.yaml"


def services() -> dict[str, dict]:
    return YAML(typ="safe", pure=True).load(COMPOSE)["services"]


def test_no_container_listens_beyond_loopback():
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_image_is_of_one_version():
    images = [service["image"] for service in services().values()]
    images += re.findall(r"^FROM (\S+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert all(re.search(r":[\w.-]*\d+[.-]\d+", image) for image in images), images


def test_no_secret_is_written_down_or_may_be_left_empty():
    found = 0
    for name, service in services().items():
        for setting, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN$|AUTH_STRING|ACCESS_KEY_ID|ROOT_USER", setting):
                found += 1
                optional = setting == "HF_TOKEN"
                assert re.fullmatch(r"\$\{\w+:-\}" if optional else r"\$\{\w+:\?.+\}", value), (name, setting)
    assert found >= 10


def test_the_example_environment_names_what_compose_asks_for_and_gives_no_secret():
    lines = (ROOT / "docker/.env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    asked = set(re.findall(r"\$\{(\w+):[?-]", COMPOSE.read_text()))
    assert asked == set(example)
    assert {name for name, value in example.items() if value} == {"MODEL"}

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retuner.code_digest import FOLDER, code_digest, reachable
from retuner.errors import RetunerError
from retuner.fingerprint import fingerprint, library_versions, spell

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), PLAIN))
def test_the_order_of_keys_does_not_matter(identity):
    assert fingerprint(identity) == fingerprint(dict(reversed(identity.items())))


@pytest.mark.parametrize(
    "value", [Path("x"), {1, 2}, b"x", math.nan, math.inf, object(), {1: "x"}, {"a": [Path("x")]}, print]
)
def test_what_has_no_stable_spelling_is_refused(value):
    with pytest.raises(RetunerError, match="no stable spelling"):
        spell({"train": value})


def test_one_and_one_point_zero_and_true_are_three_things():
    assert len({fingerprint({"a": value}) for value in (1, 1.0, True, "1")}) == 4


def test_a_local_build_tag_is_not_another_release():
    assert "+" not in library_versions(("torch",))["torch"]


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "retuner"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "stage.py").write_text(
        '"""Doc."""\n'
        "from retuner import helpers\n"
        "from retuner.other import used as renamed\n\n"
        "FACTOR = 2\n\n"
        "def stage(x):\n"
        "    from retuner.late import late\n"
        "    return helpers.double(x) * renamed() + late()\n\n"
        "def unrelated():\n    return 1\n"
    )
    (folder / "helpers.py").write_text(
        "from retuner.stage import FACTOR\n\ndef double(x):\n    return inner(x) * FACTOR\n\n"
        "def inner(x):\n    return x\n\ndef unused():\n    return 0\n"
    )
    (folder / "other.py").write_text(
        "class Base:\n    y = 1\n\nclass Used(Base):\n    pass\n\ndef used():\n    return Used.y\n"
    )
    (folder / "late.py").write_text("def late():\n    return 7\n")
    return folder


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("stage.py", "FACTOR = 2", "FACTOR = 3"),
        ("helpers.py", "    return x\n", "    return x + 1\n"),
        ("other.py", "y = 1", "y = 2"),
        ("late.py", "return 7", "return 8"),
        ("late.py", "def late", "print('import')\n\ndef late"),
    ],
)
def test_an_edit_that_the_stage_can_reach_is_noticed(project, name, before, after):
    old = code_digest("retuner.stage:stage", folder=project)
    edit(project / name, before, after)
    assert code_digest("retuner.stage:stage", folder=project) != old


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("stage.py", "    return helpers", "    # why\n    return (\n        helpers"),
        ("stage.py", '"""Doc."""', '"""Another."""'),
        ("stage.py", "def stage(x):\n", 'def stage(x):\n    """Doc."""\n'),
        ("stage.py", "return 1", "return 2"),
        ("helpers.py", "return 0", "return 1"),
    ],
)
def test_comments_docstrings_format_and_unreached_code_are_not(project, name, before, after):
    old = code_digest("retuner.stage:stage", folder=project)
    edit(project / name, before, after)
    if after.endswith("helpers"):
        edit(project / name, "+ late()\n", "+ late()\n    )\n")
    assert code_digest("retuner.stage:stage", folder=project) == old


def test_remembered_digests_equal_fresh_ones_after_an_edit(project, tmp_path):
    notes = tmp_path / "notes.json"
    assert code_digest("retuner.stage:stage", notes, project) == code_digest(
        "retuner.stage:stage", folder=project
    )
    edit(project / "late.py", "return 7", "return 8")
    assert code_digest("retuner.stage:stage", notes, project) == code_digest(
        "retuner.stage:stage", folder=project
    )


def test_a_damaged_memory_is_only_slower(project, tmp_path):
    notes = tmp_path / "notes.json"
    notes.write_text("{")
    assert code_digest("retuner.stage:stage", notes, project) == code_digest(
        "retuner.stage:stage", folder=project
    )


def test_the_real_stages_reach_their_helpers():
    reached = reachable("retuner.templating:template")
    assert any(module == "retuner.rendering" for module, _ in reached)
    assert not any(module in ("retuner.training", "retuner.tracking") for module, _ in reached)


def test_the_same_code_elsewhere_under_another_hash_seed_has_the_same_digest(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "elsewhere" / "retuner")
    told = set()
    for place, seed in ((FOLDER.parent, "1"), (tmp_path / "elsewhere", "2")):
        code = "from retuner.code_digest import code_digest; print(code_digest('retuner.training:train'))"
        told.add(
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=place,
                env={"PYTHONPATH": str(place), "PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    assert len(told) == 1

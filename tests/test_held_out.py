"""Held-out sets frozen by name, and those of versions that were split by another rule."""

import json
from pathlib import Path

import pytest
from versions import (
    MODEL,
    a_decision,
    empty_database,
    quickstart,
    runtime_on_file,
    small_adapter,
    some_base,
    some_run,
)

from retuner import held_out, registry, tracking
from retuner.artifacts import Facts
from retuner.errors import Refused
from retuner.files import sha256_file
from retuner.held_out import EarlierSet, earlier, freeze, frozen, groups_in, parse_frozen, split_rule
from retuner.naming import group_of
from retuner.redaction import redacted
from retuner.runtime import Runtime
from retuner.store import Store

GROUPS = [f"{n:032x}" for n in (3, 1, 2)]


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    return empty_database(tmp_path_factory.getbasetemp() / "empty")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A project's folder of its own: frozen sets lie below the current one."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)


# --- frozen by name


def test_a_frozen_set_is_read_as_it_was_frozen():
    made = freeze("2026-q4", [*GROUPS, GROUPS[0]], "1 0.05 ", "data.dvc abc")
    assert frozen("2026-q4") == made
    assert made.groups == set(GROUPS)
    lines = Path("params/held_out/2026-q4.txt").read_text().splitlines()
    assert lines[0].startswith("# 3 held-out prompts of data.dvc abc; split rule: 1 0.05")
    assert lines[1:] == sorted(GROUPS)


def test_a_frozen_set_is_never_overwritten():
    freeze("a", GROUPS, "1 0.05 ", "data.dvc")
    before = Path("params/held_out/a.txt").read_bytes()
    with pytest.raises(Refused, match="never changed"):
        freeze("a", GROUPS[:1], "2 0.05 ", "data.dvc")
    assert Path("params/held_out/a.txt").read_bytes() == before


def test_the_digest_of_a_frozen_set_names_its_groups_and_not_its_comment():
    made = freeze("a", GROUPS, "1 0.05 ", "data.dvc")
    path = Path("params/held_out/a.txt")
    path.write_text("# mended\n" + path.read_text().split("\n", 1)[1])
    assert frozen("a").sha256 == made.sha256
    assert freeze("b", GROUPS[:2], "1 0.05 ", "data.dvc").sha256 != made.sha256


def test_nothing_to_freeze_is_refused():
    with pytest.raises(Refused, match="is empty"):
        freeze("a", [], "1 0.05 ", "data.dvc")


def test_a_set_that_was_never_frozen_is_refused_and_the_known_ones_are_named():
    freeze("known", GROUPS, "1 0.05 ", "data.dvc")
    with pytest.raises(Refused, match="no held-out set other") as refusal:
        frozen("other")
    assert "known" in refusal.value.expected
    assert "data freeze other" in refusal.value.do


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "a\n", "x" * 101, "-x"])
def test_a_name_never_leads_out_of_the_folder(name):
    for use in (frozen, lambda name: freeze(name, GROUPS, "", "data.dvc")):
        with pytest.raises(Refused, match="cannot name a held-out set"):
            use(name)
    assert not Path("params").exists()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "line 1"),
        ("# only a comment\n", "line 2 is missing"),
        (f"{GROUPS[1]}\n{GROUPS[2]}\n", "line 1 does not begin with a comment"),
        (f"# cut\n{GROUPS[1]}\n{GROUPS[2]}", "its last line is cut off"),
        (f"# order\n{GROUPS[0]}\n{GROUPS[1]}\n", "line 3 is not in order"),
        (f"# twice\n{GROUPS[1]}\n{GROUPS[1]}\n", "line 3 is not in order, or stands twice"),
        (f"# merge\n<<<<<<< HEAD\n{GROUPS[1]}\n", "line 2 is '<<<<<<< HEAD'"),
        (f"# case\n{'A' * 32}\n", "not 32 hexadecimal digits"),
        (f"# crlf\r\n{GROUPS[1]}\r\n", "not 32 hexadecimal digits"),
        ("# bytes\n\xff\n".encode("latin-1"), "not 32 hexadecimal digits"),
        (f"# blank\n\n{GROUPS[1]}\n", "line 2 is ''"),
    ],
)
def test_a_damaged_frozen_set_is_refused_with_its_line(text, what):
    with pytest.raises(Refused) as refusal:
        parse_frozen("a", text if isinstance(text, bytes) else text.encode())
    assert what in refusal.value.found


def test_the_rule_of_a_split_is_what_picks_the_held_out_side():
    prepare = {"split_salt": "1", "held_out_fraction": 0.05, "files": "*.jsonl"}
    assert split_rule(prepare) == split_rule({**prepare, "held_out_set": None, "files": "*"}) == "1 0.05 "
    others = [{"split_salt": "2"}, {"held_out_fraction": 0.1}, {"held_out_set": "a"}]
    assert len({split_rule(prepare), *(split_rule({**prepare, **other}) for other in others)}) == 4


def test_what_is_redacted_is_part_of_the_rule_where_anything_is():
    prepare = {"split_salt": "1", "held_out_fraction": 0.05}
    assert split_rule({**prepare, "redact": []}) == split_rule(prepare)
    one, both, turned = (
        split_rule({**prepare, "redact": kinds})
        for kinds in (["email"], ["phone", "email"], ["email", "phone"])
    )
    assert both == turned == "1 0.05  redact email,phone" and len({split_rule(prepare), one, both}) == 3


# --- earlier versions'


LINE = '{{"group": "{0:032x}", "id": "{0:032x}", "messages": []}}\n'


def some_splits(runtime: Runtime, salt: str, rows: int, train: int = 0) -> tuple[str, str]:
    """A stored `prepare` result with `rows` held-out rows and `train` after them; its fingerprint, and the digest
    of the held-out side."""

    held_out = "".join(LINE.format(row) for row in range(rows))
    return store_splits(
        runtime, {"split_salt": salt}, held_out, "".join(LINE.format(rows + row) for row in range(train))
    )


def store_splits(runtime: Runtime, params: dict, held_out: str, train: str) -> tuple[str, str]:
    def build(out: Path, work: Path) -> Facts:
        (out / "train.jsonl").write_text(train)
        (out / "held_out.jsonl").write_text(held_out)
        return Facts()

    identity = {"stage": "prepare", "params": params, "inputs": {"held_out": held_out}}
    made = Store(runtime.store).make("prepare", identity, Facts, build)
    return made.fingerprint, sha256_file(made.path / "held_out.jsonl")


def register(runtime: Runtime, folder: Path, value: float, **tags: str) -> int:
    return registry.register_version(
        some_run(runtime, key=f"key {value}"),
        MODEL,
        small_adapter(folder / f"adapter-{value}", value),
        some_base(),
        quickstart(),
        a_decision(),
        None,
        tags=tags,
        lineage={},
    )


def register_split(runtime: Runtime, folder: Path, value: float, rule: str, splits: tuple[str, str]) -> int:
    told = {"held_out_digest": splits[1], "held_out_splits": splits[0], "split_rule": rule}
    return register(
        runtime, folder, value, **told, stage_fingerprints=json.dumps({"prepare": splits[0], "train": "f"})
    )


@pytest.fixture
def on_file(tmp_path, database):
    return runtime_on_file(tmp_path / "home", database)


def test_the_sets_of_versions_with_another_rule_are_earlier_and_equal_ones_are_one(on_file, tmp_path):
    first, again, other = (
        some_splits(on_file, "1", 3),
        some_splits(on_file, "1 again", 3),
        some_splits(on_file, "2", 4),
    )
    assert first[1] == again[1] != other[1]
    for value, rule, splits in ((1.0, "1 0.05 ", first), (2.0, "1 0.05 ", again), (3.0, "2 0.05 ", other)):
        register_split(on_file, tmp_path, value, rule, splits)
    register(on_file, tmp_path, 4.0)  # registered before versions told what they were scored on

    assert earlier(on_file, MODEL, "1 0.05 ") == (
        EarlierSet(f"{MODEL} version 3", other[1], Store(on_file.store).folder(other[0]) / "held_out.jsonl"),
    )
    [one] = earlier(on_file, MODEL, "2 0.05 ")
    assert (one.name, one.digest) == (f"{MODEL} version 1", first[1])
    assert groups_in(one.path) == {f"{row:032x}" for row in range(3)}
    both = earlier(on_file, MODEL, "3 0.05 ")
    assert [each.digest for each in both] == sorted([first[1], other[1]])
    assert earlier(on_file, "another-model", "3 0.05 ") == ()


@pytest.mark.parametrize("damage", ["removed", "flipped", "another set"])
def test_an_earlier_set_that_is_no_longer_whole_is_left_out_and_said(on_file, tmp_path, damage):
    splits = some_splits(on_file, "1", 3)
    place = Store(on_file.store).folder(splits[0])
    told = (splits[0], "0" * 64) if damage == "another set" else splits
    register_split(on_file, tmp_path, 1.0, "1 0.05 ", told)
    if damage == "removed":
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
    elif damage == "flipped":
        (place / "held_out.jsonl").write_text("x" * (place / "held_out.jsonl").stat().st_size)
    said = []
    assert earlier(on_file, MODEL, "2 0.05 ", said.append) == ()
    assert any(f"{MODEL} version 1 is no longer in the store" in line for line in said)


def test_a_deleted_version_has_no_earlier_set(on_file, tmp_path):
    version = register_split(on_file, tmp_path, 1.0, "1 0.05 ", some_splits(on_file, "1", 3))
    assert earlier(on_file, MODEL, "2 0.05 ")
    tracking.mlflow_client(on_file).delete_model_version(MODEL, str(version))
    assert earlier(on_file, MODEL, "2 0.05 ") == ()


def test_a_result_stands_while_its_held_out_sets_are_the_same(on_file, tmp_path):
    params = {"split_salt": "1", "held_out_fraction": 0.05}
    before = {"params": params, "inputs": {"dataset": "d", "frozen": None, "earlier": []}}
    assert held_out.still_same(on_file, MODEL, before)
    splits = some_splits(on_file, "2", 3)
    register_split(on_file, tmp_path, 1.0, "2 0.05 ", splits)
    assert not held_out.still_same(on_file, MODEL, before)
    now = {**before, "inputs": {**before["inputs"], "earlier": [splits[1]]}}
    assert held_out.still_same(on_file, MODEL, now)
    register_split(on_file, tmp_path, 2.0, "1 0.05 ", some_splits(on_file, "1", 4))
    assert held_out.still_same(on_file, MODEL, now), "its own rule's set adds nothing"


def test_a_result_does_not_stand_when_its_frozen_set_changed(on_file):
    freeze("a", GROUPS, "1 0.05 ", "data.dvc")
    params = {"split_salt": "1", "held_out_fraction": 0.05, "held_out_set": "a"}
    identity = {"params": params, "inputs": {"frozen": frozen("a").sha256, "earlier": []}}
    assert held_out.still_same(on_file, MODEL, identity)
    Path("params/held_out/a.txt").write_text(f"# fewer\n{GROUPS[1]}\n")
    assert not held_out.still_same(on_file, MODEL, identity)
    Path("params/held_out/a.txt").unlink()
    with pytest.raises(Refused):
        held_out.still_same(on_file, MODEL, identity)


def test_a_version_is_suspected_only_when_it_may_have_seen_what_is_held_out_now(on_file, tmp_path):
    """Rows 0 to 2 are held out, 3 to 5 trained on by version 1; version 2's result is gone, 3 tells nothing."""
    gone = ("0" * 64, "0" * 64)
    register_split(on_file, tmp_path, 1.0, "1 0.05 ", some_splits(on_file, "1", 3, train=3))
    register_split(on_file, tmp_path, 2.0, "1 0.05 ", gone)
    register(on_file, tmp_path, 3.0)
    now = tmp_path / "now.jsonl"
    now.write_text("".join(LINE.format(row) for row in (0, 4, 5, 9)))

    def told(version: int, rule: str = "2 0.05 ") -> str | None:
        return held_out.seen_by(on_file, MODEL, version, rule, now)

    assert "version 1 was split by another rule (1 0.05, now 2 0.05)" in told(1)
    assert "trained on 2 of the 4 prompts held out now" in told(1)
    assert "it may have been trained on what is held out now" in told(2)
    assert told(1, "1 0.05 ") is told(2, "1 0.05 ") is told(3) is None
    now.write_text(LINE.format(0))
    assert told(1) is None, "it saw none of it"


@pytest.mark.parametrize(("then", "now"), [([], ["email"]), (["email"], []), (["email"], ["phone"])])
def test_a_prompt_is_known_again_though_other_kinds_were_redacted(on_file, tmp_path, then, now):
    prompts = ["I am a@b.org, call +44 20 7946 0958", "Who are you?"]

    def spelled(prompt: str, kinds: list[str]) -> str:
        messages, _ = redacted([{"role": "user", "content": prompt}], kinds)
        return json.dumps({"group": group_of(messages), "id": "0" * 32, "messages": messages}) + "\n"

    splits = store_splits(on_file, {"redact": then}, "", spelled(prompts[0], then))
    before, after = (
        split_rule({"split_salt": "1", "held_out_fraction": 0.05, "redact": kinds}) for kinds in (then, now)
    )
    version = register_split(on_file, tmp_path, 1.0, before, splits)
    path = tmp_path / "now.jsonl"
    path.write_text("".join(spelled(prompt, now) for prompt in prompts))
    told = held_out.seen_by(on_file, MODEL, version, after, path, now)
    assert "trained on 1 of the 2 prompts held out now" in told

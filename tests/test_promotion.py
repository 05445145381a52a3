"""The production alias: compare-and-set, verified bytes, and a log that tells what happened."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from versions import MODEL, empty_database, register, runtime_on_file

from retuner import audit, bundle, registry, tracking
from retuner.errors import GateSaidNo, Refused
from retuner.promotion import history, promote, rollback
from retuner.registry_reads import read_alias


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A database and its artifacts with versions 1 and 2, which passed their gate, and 3, which did not."""
    folder = tmp_path_factory.mktemp("registered")
    runtime = runtime_on_file(folder / "home", empty_database(tmp_path_factory.getbasetemp() / "empty"))
    assert [register(runtime, folder, value, passed=value < 3) for value in (1.0, 2.0, 3.0)] == [1, 2, 3]
    return runtime


@pytest.fixture
def runtime(registered, tmp_path):
    """The same registry, with no alias set and an audit log of its own; it is put back afterwards."""
    from dataclasses import replace

    fresh = replace(registered, home=tmp_path, tracking_uri=registered.mlflow_uri)
    for alias in ("production", "previous"):
        registry.set_alias(fresh, MODEL, alias, None)
    kept = {path: path.read_bytes() for path in registered.mlflow_artifacts.rglob("*") if path.is_file()}
    yield fresh
    for path, data in kept.items():
        path.write_bytes(data)


def put(runtime, version, expect_current="any", **options):
    return promote(runtime, MODEL, version, expect_current, options.pop("reason", ""), "ann", **options)


def where(runtime):
    return read_alias(runtime, MODEL, "production"), read_alias(runtime, MODEL, "previous")


def events(runtime):
    return [entry["event"] for entry in audit.verified(runtime.audit_log)]


def outside(runtime, alias, version):
    tracking.mlflow_client(runtime).set_registered_model_alias(MODEL, alias, str(version))


def test_promotion_and_rollback_move_both_aliases_and_are_recorded(runtime):
    assert put(runtime, 1, None).replaced is None
    assert where(runtime) == (1, None)
    assert put(runtime, 2, 1, reason="better").replaced == 1
    assert where(runtime) == (2, 1)
    back = rollback(runtime, MODEL, "it answers in French", "bob")
    assert (back.version, back.replaced) == (1, 2)
    assert where(runtime) == (1, 2)
    told = history(runtime, MODEL)
    assert (told.production, told.previous, told.notes) == (1, 2, ())
    done = [e for e in told.entries if e["event"] == "done"]
    assert [(e["action"], e["from"], e["to"], e["actor"]) for e in done] == [
        ("promote", None, 1, "ann"),
        ("promote", 1, 2, "ann"),
        ("rollback", 2, 1, "bob"),
    ]
    assert done[2]["reason"] == "it answers in French"
    assert done[1]["adapter_sha256"] == registry.tags_of(runtime, MODEL, 2)["adapter_sha256"]
    assert events(runtime) == ["intent", "done"] * 3


def test_promoting_what_is_in_production_changes_nothing_and_says_so(runtime):
    put(runtime, 1)
    put(runtime, 2, 1)
    again = put(runtime, 2, 1)  # the answer to the first call was lost
    assert again.already
    assert where(runtime) == (2, 1)
    assert events(runtime) == ["intent", "done"] * 2


@pytest.mark.parametrize("expected", [None, 2])
def test_production_that_is_not_what_was_expected_is_not_replaced(runtime, expected):
    put(runtime, 1)
    with pytest.raises(Refused, match="version 1 of support is in production"):
        put(runtime, 3, expected, force=True, reason="try")
    assert where(runtime) == (1, None)


def test_of_two_promotions_that_expect_the_same_one_wins(runtime):
    put(runtime, 1)
    put(runtime, 2)

    def one(version):
        try:
            return put(runtime, version, 2, force=True, reason="mine").version
        except Refused:
            return None

    with ThreadPoolExecutor(2) as pool:
        winners = [version for version in pool.map(one, (1, 3)) if version]
    assert len(winners) == 1
    assert where(runtime) == (winners[0], 2)


def test_a_version_whose_gate_said_no_needs_force_and_a_reason(runtime):
    for options in ({}, {"force": True}, {"force": True, "reason": "  "}, {"reason": "please"}):
        with pytest.raises(GateSaidNo, match="did not pass its gate"):
            put(runtime, 3, **options)
    assert where(runtime) == (None, None)
    put(runtime, 3, force=True, reason="the held-out set is wrong")
    assert where(runtime) == (3, None)
    assert history(runtime, MODEL).entries[-1]["forced"] is True


@pytest.mark.parametrize(
    "name", [bundle.ADAPTER + "/adapter_model.safetensors", "MLmodel", "mlflow_model.py"]
)
def test_one_changed_byte_keeps_a_version_out_of_production(runtime, registered, name):
    put(runtime, 2)
    source = tracking.mlflow_client(runtime).get_model_version(MODEL, "1").source
    stored = bundle.Path(source.removeprefix("file://"), name)
    data = stored.read_bytes()
    stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Refused, match="damaged"):
        put(runtime, 1)
    assert where(runtime) == (2, None)
    assert events(runtime) == ["intent", "done"]


def test_a_version_that_does_not_exist_is_refused(runtime):
    with pytest.raises(Refused, match="version 99 does not exist"):
        put(runtime, 99)


def test_there_is_no_rollback_without_a_previous_version(runtime):
    with pytest.raises(Refused, match="no version to roll back to"):
        rollback(runtime, MODEL, "", "ann")
    put(runtime, 1)
    with pytest.raises(Refused, match="no version to roll back to"):
        rollback(runtime, MODEL, "", "ann")


@pytest.mark.parametrize(
    ("dies_before", "expected", "outcome"),
    [
        ("previous", (1, None), "abandoned"),
        ("production", (1, None), "abandoned"),
        ("outcome", (2, 1), "done"),
    ],
)
def test_a_promotion_that_was_killed_is_settled_from_the_alias(
    runtime, monkeypatch, dies_before, expected, outcome
):
    put(runtime, 1)
    set_alias, append = registry.set_alias, audit.append

    def set_or_die(runtime, model_name, alias, version):
        if alias == dies_before:
            sys.exit("killed")
        set_alias(runtime, model_name, alias, version)

    def append_or_die(log, facts):
        if dies_before == "outcome" and facts["event"] == "done":
            sys.exit("killed")
        return append(log, facts)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", set_or_die)
        patch.setattr(audit, "append", append_or_die)
        with pytest.raises(SystemExit):
            put(runtime, 2, 1)
    assert "was cut off" in history(runtime, MODEL).notes[0]
    settled = put(runtime, expected[0])
    assert settled.already
    assert "was cut off" in settled.notes[0]
    assert where(runtime) == expected
    assert events(runtime) == ["intent", "done", "intent", outcome]
    assert history(runtime, MODEL).notes == ()


def test_a_change_made_outside_is_said_and_recorded(runtime):
    put(runtime, 1)
    outside(runtime, "production", 3)
    [note] = history(runtime, MODEL).notes
    assert "production is version 3, but the audit log ends with version 1" in note
    moved = put(runtime, 2, 3)
    assert moved.notes == (note,)
    assert events(runtime) == ["intent", "done", "outside", "intent", "done"]
    assert history(runtime, MODEL).notes == ()


def test_a_change_that_someone_makes_during_the_verification_is_not_overwritten(runtime, monkeypatch):
    put(runtime, 1)
    fetch = registry.fetch_bundle

    def fetch_while_another_promotes(*arguments):
        outside(runtime, "production", 3)
        return fetch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch_bundle", fetch_while_another_promotes)
        with pytest.raises(Refused, match="version 3 of support is in production"):
            put(runtime, 2, 1)
    assert where(runtime)[0] == 3


def test_history_changes_nothing(runtime):
    put(runtime, 1)
    outside(runtime, "production", 3)
    before = runtime.audit_log.read_bytes()
    history(runtime, MODEL)
    history(runtime, "another-model")
    assert runtime.audit_log.read_bytes() == before


# --- the log


@pytest.mark.parametrize(
    "tamper",
    [
        lambda lines: [lines[0].replace('"ann"', '"eve"'), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [lines[0], "not JSON", *lines[1:]],
        lambda lines: [lines[0], "[]", *lines[1:]],
    ],
)
def test_an_edited_log_is_noticed_and_nothing_is_added_to_it(runtime, tamper):
    put(runtime, 1)
    put(runtime, 2)
    lines = runtime.audit_log.read_text().splitlines()
    runtime.audit_log.write_text("\n".join(tamper(lines)) + "\n")
    before = runtime.audit_log.read_bytes()
    with pytest.raises(Refused, match="is not what was written there"):
        history(runtime, MODEL)
    with pytest.raises(Refused, match="is not what was written there"):
        put(runtime, 1)
    assert where(runtime) == (2, 1)
    assert runtime.audit_log.read_bytes() == before


def test_lines_cut_off_the_end_show_as_a_registry_elsewhere(runtime):
    put(runtime, 1)
    put(runtime, 2)
    lines = runtime.audit_log.read_text().splitlines(keepends=True)
    runtime.audit_log.write_text("".join(lines[:2]))
    assert (
        "production is version 2, but the audit log ends with version 1" in history(runtime, MODEL).notes[0]
    )


def test_a_torn_last_line_is_no_entry_and_is_kept_in_the_next(runtime):
    put(runtime, 1)
    with runtime.audit_log.open("a") as log:
        log.write('{"event": "inte')
    assert len(history(runtime, MODEL).entries) == 2
    put(runtime, 2)
    entries = history(runtime, MODEL).entries
    assert [entry["event"] for entry in entries] == ["intent", "done"] * 2
    assert entries[2]["after_torn_line"] == '{"event": "inte'
    assert all(json.loads(line) for line in runtime.audit_log.read_text().splitlines())

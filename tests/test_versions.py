"""How people name a version, and what the history says to them."""

import pytest
from versions import MODEL, empty_database, register, runtime_on_file

from flows.versions import history_lines, version_named
from retuner import registry
from retuner.errors import Refused
from retuner.promotion import history, promote, rollback


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registered")
    runtime = runtime_on_file(folder / "home", empty_database(tmp_path_factory.getbasetemp() / "empty"))
    assert [register(runtime, folder, value, passed=value < 2) for value in (1.0, 2.0)] == [1, 2]
    return runtime


def test_a_version_is_named_by_number_alias_or_run(runtime):
    run_id = registry.tags_of(runtime, MODEL, 2)["run_id"]
    assert version_named(runtime, MODEL, "2") == 2
    assert version_named(runtime, MODEL, "candidate") == 2
    assert version_named(runtime, MODEL, run_id) == 2


def test_the_run_that_decided_again_about_an_adapter_names_its_version_too(runtime, tmp_path):
    first = registry.tags_of(runtime, MODEL, 1)["run_id"]
    register(runtime, tmp_path, 1.0, key="again")
    again = registry.tags_of(runtime, MODEL, 1)["run_id"]
    assert again != first
    assert version_named(runtime, MODEL, again) == version_named(runtime, MODEL, first) == 1


@pytest.mark.parametrize("name", ["production", "f" * 32, "v1"])
def test_a_name_that_stands_for_nothing_says_what_would(runtime, name):
    with pytest.raises(Refused, match="has no version"):
        version_named(runtime, MODEL, name)


def test_the_history_is_told_in_sentences(runtime):
    promote(runtime, MODEL, 1, None, "it passed its gate", "retuner run")
    promote(runtime, MODEL, 2, 1, "we know better", "ann", force=True)
    rollback(runtime, MODEL, "", "bob")
    said = [line.partition("  ")[2] for line in history_lines(history(runtime, MODEL).entries)]
    assert said == [
        "promoted version 1 over nothing, by retuner run: it passed its gate",
        "promoted version 2 over version 1, although its gate said no, by ann: we know better",
        "rolled back to version 1 over version 2, by bob",
    ]

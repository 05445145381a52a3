"""Files broken in every way that was thought of: each gets its verdict, and none is believed that should not be."""

import json
import tracemalloc
from pathlib import Path

import pytest
from broken import corpus
from projects import add_to_dvc, make_project, retuner

from fuzz import oracle, reading
from retuner.chats import Chat, read_chats
from retuner.errors import RetunerError

SMALL = corpus.small_files()
EXPECTED = {row.file: row for row in corpus.expected()}
SHOWN_BAD = 3


def verdict(path: Path) -> tuple[int, list[str], RetunerError | None]:
    """Good rows, `cause@line:column` of the first bad ones, and the refusal."""
    good, bad, refused = 0, [], None
    try:
        for row in read_chats([reading.data_file(path)], "auto"):
            if isinstance(row, Chat):
                good += 1
            elif len(bad) < SHOWN_BAD:
                bad.append(row.where.replace(row.file, f"{row.cause}@", 1).replace("@:", "@"))
            elif len(bad) == SHOWN_BAD:
                bad.append("...")
    except RetunerError as error:
        refused = error
    return good, bad, refused


def holds(path: Path, expected: corpus.Expected) -> None:
    good, bad, refused = verdict(path)
    assert (good, tuple(bad)) == (expected.good, expected.bad)
    if expected.refused is None:
        assert refused is None and bad
    else:
        assert refused and refused.exit_code == expected.exit_code
        assert refused.found.startswith(path.name) and expected.refused in refused.found
        assert refused.expected and refused.do


def test_the_table_names_every_file_of_the_corpus():
    assert list(EXPECTED) == [*SMALL, *corpus.HUGE]
    assert len(EXPECTED) >= 60


@pytest.mark.parametrize("name", SMALL)
def test_a_broken_file_gets_its_verdict_at_its_place(tmp_path, name):
    (tmp_path / name).write_bytes(SMALL[name])
    holds(tmp_path / name, EXPECTED[name])


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith(reading.SUFFIXES)])
def test_of_a_broken_file_nothing_is_accepted_that_a_strict_oracle_refuses(tmp_path, name):
    (tmp_path / name).write_bytes(SMALL[name])
    reading.check(tmp_path / name, SMALL[name])


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith(".parquet")])
def test_of_a_broken_parquet_file_only_chats_are_accepted(tmp_path, name):
    (tmp_path / name).write_bytes(SMALL[name])
    accepted = [row for row in reading.read_whole(tmp_path / name).rows if isinstance(row, Chat)]
    if accepted:
        from pyarrow import parquet

        table = parquet.read_table(tmp_path / name)
        for chat in accepted:
            (row,) = table.slice(chat.line - 1, 1).to_pylist()
            oracle.check_row(row, chat.messages)
    assert reading.read_in_blocks(tmp_path / name).rows == reading.read_whole(tmp_path / name).rows


@pytest.mark.parametrize("name", corpus.HUGE)
def test_a_huge_row_or_a_bomb_gets_its_verdict_in_little_memory(tmp_path, name):
    corpus.HUGE[name](tmp_path / name)
    tracemalloc.start()
    holds(tmp_path / name, EXPECTED[name])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 40 * 2**20


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("broken") / "project")
    for name, content in SMALL.items():
        (project / "data" / name).write_bytes(content)
    add_to_dvc(project)
    return project


@pytest.mark.parametrize(
    "name", ["utf8-broken.jsonl", "unclosed.json", "quote-open.csv", "tools.parquet", "cut.jsonl.gz"]
)
def test_data_check_leaves_with_the_exit_code_of_the_verdict(project, name):
    done = retuner(
        project, project / "home", "data", "check", "params.yaml", "--set", f"prepare.files={name}", "--json"
    )
    expected = EXPECTED[name]
    assert done.returncode == expected.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)["error"]["found"]
    assert name in found and (expected.refused or expected.bad[0].split("@")[0]) in found

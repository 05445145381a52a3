"""Helpers that parse ahead change how long reading takes, and nothing else, whatever becomes of them."""

import signal
import subprocess
import sys

import psutil
import pytest
from prepare_stage import Stage
from test_memo import long_rows, results

from retuner import intake, reading_ahead
from retuner.errors import Refused
from retuner.memo import Memo


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture
def memo(tmp_path):
    return Memo(tmp_path / "memo", "key")


@pytest.fixture
def helpers(monkeypatch) -> list[subprocess.Popen]:
    """Two helpers start at once, and are told here."""
    started = []

    class Told(reading_ahead._Helper):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.process)

    monkeypatch.setattr(reading_ahead, "_Helper", Told)
    monkeypatch.setattr(reading_ahead, "WORTH_BYTES", 0)
    monkeypatch.setattr(reading_ahead, "usable_cores", lambda: 2)
    return started


@pytest.fixture
def parsed_here(monkeypatch) -> list[int]:
    """The lines at which blocks begin that the reader parses itself."""
    lines: list[int] = []
    parsed = intake.Reading._parsed

    def counted(self, block, found):
        lines.append(block.first_line)
        return parsed(self, block, found)

    monkeypatch.setattr(intake.Reading, "_parsed", counted)
    return lines


def test_helpers_parse_every_block_and_the_results_are_the_same(stage, memo, helpers, parsed_here):
    files = {"x.jsonl": long_rows(1500), "y.jsonl": long_rows(1700)}
    stage(files, redact=["email"])
    expected, alone = results(stage), parsed_here.copy()
    assert len(alone) > 6 and not helpers
    parsed_here.clear()
    stage(files, redact=["email"], memo=memo)
    assert results(stage) == expected and parsed_here == []
    assert [helper.poll() for helper in helpers] == [0, 0]


def test_bad_rows_are_told_where_they_stand(stage, memo, helpers):
    rows = b"".join(b'{"prompt": "p%d", "completion": "%s"}\n' % (n, b"x" * 2000) for n in range(700))
    stage({"x.jsonl": rows + b"oops\n" + rows.replace(b': "p', b': "q')}, max_bad_rows=1, memo=memo)
    assert [bad["line"] for bad in stage.quarantine()] == [701] and len(helpers) == 2


def test_what_is_refused_is_refused_with_its_line(stage, memo, helpers):
    rows = b"".join(b'{"prompt": "p%d", "completion": "%s"}\n' % (n, b"x" * 2000) for n in range(700))
    with pytest.raises(Refused, match=r"x\.jsonl:701 has chosen and rejected"):
        stage({"x.jsonl": rows + b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' + rows}, memo=memo)
    assert [helper.poll() for helper in helpers] == [0, 0]


def test_without_its_helpers_the_reader_parses_itself(stage, memo, helpers, parsed_here, monkeypatch):
    rows = long_rows(1500)
    stage({"x.jsonl": rows})
    expected = results(stage)
    parsed_here.clear()
    ask = reading_ahead._Helper.parse

    def killed_first(self, *block):
        self.process.kill()
        self.process.wait()
        return ask(self, *block)

    monkeypatch.setattr(reading_ahead._Helper, "parse", killed_first)
    stage({"x.jsonl": rows}, memo=memo)
    assert results(stage) == expected and len(parsed_here) > 3
    assert [helper.poll() for helper in helpers] == [-signal.SIGKILL] * 2


READER = """
import sys, time
from pathlib import Path
from retuner import reading_ahead
from retuner.chats import blocks
from retuner.dataset import DataFile
from retuner.dvc_file import md5_of
from retuner.intake import Reading
from retuner.memo import Memo

path, memo = Path(sys.argv[1]), Memo(Path(sys.argv[2]), "key")
file = DataFile(path.name, path, path.stat().st_size, md5_of(path.read_bytes()).hexdigest())
reading_ahead.WORTH_BYTES = 0
with reading_ahead.ReadingAhead(Reading("auto", memo=memo), helpers=2) as ahead:
    for block in ahead.of(blocks(file), None):
        print("read", flush=True)
        time.sleep(600)
"""


def test_no_helper_outlives_a_killed_reader(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"".join(b'{"prompt": "p%d", "completion": "%s"}\n' % (n, b"x" * 2000) for n in range(1000))
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(tmp_path / "memo")], stdout=subprocess.PIPE
    )
    assert reader.stdout.readline() == b"read\n"
    helpers = psutil.Process(reader.pid).children()
    assert len(helpers) == 2
    reader.kill()
    reader.communicate()
    _, alive = psutil.wait_procs(helpers, timeout=60)
    assert not alive

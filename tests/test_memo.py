"""What was read before is not read again, and never changes what comes out."""

import os
import random
import time
from pathlib import Path

import pytest
from prepare_stage import Stage, some_rows

from retuner.memo import DAY, Memo


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture
def memo(tmp_path):
    return Memo(tmp_path / "memo", "key")


def entries(memo: Memo) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in memo.folder.iterdir()}


def long_rows(count: int) -> list[dict]:
    return [{**row, "completion": f"{row['completion']} {n} " * 40} for n, row in enumerate(some_rows(count))]


def results(stage: Stage) -> list:
    return [*stage.bytes(), stage.report, stage.quarantine()]


def test_with_and_without_what_is_remembered_the_results_are_the_same(stage, memo):
    rows = long_rows(1500)
    files = {
        "x.jsonl": rows,
        "y.json": b'[{"prompt": "a", "completion": "b"}, {}, {"prompt": 1, "completion": ""}]',
    }
    policies = {"max_bad_rows": 2, "near_duplicates": {"similarity": 0.5, "policy": "remove"}}
    stage(files, **policies)
    expected = results(stage)
    for _ in range(2):
        stage(files, memo=memo, **policies)
        assert results(stage) == expected


def test_only_blocks_around_new_rows_are_read_again(stage, memo):
    rows = long_rows(1500)
    stage({"x.jsonl": rows}, memo=memo)
    before = entries(memo)
    assert len(before) > 3
    grown = [*rows[:750], {"prompt": "a new one", "completion": "in the middle"}, *rows[750:], rows[3]]
    stage({"x.jsonl": grown}, memo=memo)
    expected = results(stage)
    after = entries(memo)
    assert before.items() <= after.items() and 1 <= len(after) - len(before) <= 4
    stage({"x.jsonl": grown})
    assert results(stage) == expected


def test_what_is_remembered_belongs_to_bytes_and_settings_and_not_to_names(stage, memo):
    rows = [{"prompt": f"mail a{n}@b.org about {n}", "completion": str(n)} for n in range(40)]
    stage({"x.jsonl": rows}, memo=memo)
    stage({"other.jsonl": rows}, memo=memo)
    assert len(entries(memo)) == 1 and stage.report["rows_by_file"] == {"other.jsonl": 40}
    stage({"x.jsonl": rows}, redact=["email"])
    expected = results(stage)
    stage({"x.jsonl": rows}, redact=["email"], memo=memo)
    assert results(stage) == expected and len(entries(memo)) == 2


def test_bad_rows_are_told_at_their_lines_when_remembered(stage, memo):
    rows = b"".join(b'{"prompt": "p%d", "completion": "%s"}\n' % (n, b"x" * 2000) for n in range(700))
    data = rows + b"oops\n" + rows.replace(b': "p', b': "q')
    stage({"x.jsonl": data}, max_bad_rows=1, memo=memo)
    assert [bad["line"] for bad in stage.quarantine()] == [701]
    stage({"x.jsonl": b'{"prompt": "first", "completion": "x"}\n' + data}, max_bad_rows=1, memo=memo)
    assert [bad["line"] for bad in stage.quarantine()] == [702]


@pytest.mark.parametrize("harm", ["emptied", "truncated", "a bit flipped", "lengthened", "swapped"])
def test_a_damaged_entry_is_made_again(stage, memo, harm):
    rows = long_rows(1500)
    stage({"x.jsonl": rows}, memo=memo)
    expected = results(stage)
    victims = sorted(memo.folder.iterdir())[:2]
    whole = [victim.read_bytes() for victim in victims]
    middle = len(whole[0]) // 2
    victims[0].write_bytes(
        {
            "emptied": b"",
            "truncated": whole[0][:-7],
            "a bit flipped": whole[0][:middle] + bytes([whole[0][middle] ^ 8]) + whole[0][middle + 1 :],
            "lengthened": whole[0] + b"!",
            "swapped": whole[1][:-32] + whole[0][-32:],
        }[harm]
    )
    stage({"x.jsonl": rows}, memo=memo)
    assert results(stage) == expected
    assert victims[0].read_bytes() == whole[0]


def test_an_entry_whose_writer_fails_is_not_there(memo):
    with pytest.raises(RuntimeError), memo.write("entry") as add:
        add(b"half")
        raise RuntimeError
    assert memo.read("entry") is None and list(memo.folder.iterdir()) == []
    with memo.write("entry") as add:
        add(b"one")
        add(b"")
        add(b"three")
    assert list(memo.read("entry")) == [b"one", b"", b"three"]
    assert Memo(memo.root, "other").read("entry") is None


def write(memo: Memo, name: str, size: int, age: float) -> Path:
    with memo.write(name) as add:
        add(random.Random(name).randbytes(size))
    os.utime(memo.folder / name, (time.time() - age,) * 2)
    return memo.folder / name


def test_entries_that_nobody_used_go_first_and_what_was_used_stays(memo):
    old, used, new = (
        write(memo, name, 1000, age * DAY) for name, age in (("old", 40), ("used", 40), ("new", 1))
    )
    other = write(Memo(memo.root, "another key"), "old", 1000, 40 * DAY)
    draft = memo.folder / ".draft"
    draft.write_bytes(b"x")
    os.utime(draft, (time.time() - 2 * DAY,) * 2)
    assert memo.read("used") is not None
    memo.prune()
    assert not old.exists() and used.exists() and new.exists()
    assert not other.exists() and not other.parent.exists() and not draft.exists()


def test_beyond_its_size_the_longest_unused_go(memo):
    paths = [write(memo, f"entry {n}", 1000, n * 100) for n in range(10)]
    memo.prune(kept_bytes=4500)
    assert [path.exists() for path in paths] == [True] * 4 + [False] * 6

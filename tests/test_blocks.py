"""A file cut into blocks: nothing is lost by it, and what is new in a file leaves most blocks alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.reading import SMALL_LIMITS, data_file, read_in_blocks, read_whole
from retuner.chats import MAX_BLOCK_BYTES, blocks, read_block
from retuner.errors import Refused

GOOD = b'{"question": "Who?", "answer": "Me."}'
REAL = Path(__file__).parents[2] / "shared" / "data"


def rows(count: int, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [
        json.dumps({"question": f"{seed} {number}?", "answer": "x" * chance.randrange(1200)}).encode() + b"\n"
        for number in range(count)
    ]


def digests(path: Path, lines: list[bytes]) -> list[str]:
    path.write_bytes(b"".join(lines))
    cut = list(blocks(data_file(path)))
    assert b"".join(block.data for block in cut) == b"".join(lines)
    assert max(len(block.data) for block in cut) < 2 * MAX_BLOCK_BYTES
    return [block.sha256 for block in cut]


def test_lines_appended_or_inserted_change_the_block_they_fall_into_and_hardly_another(tmp_path):
    lines = rows(20_000, seed=1)
    before = digests(tmp_path / "x.jsonl", lines)
    assert 30 < len(before) < 90  # about 12 MB in blocks of about 256 KiB
    appended = digests(tmp_path / "x.jsonl", lines + rows(200, seed=2))
    assert len(set(before) - set(appended)) <= 1
    for place in (0, 7_000, 13_000):
        inserted = digests(tmp_path / "x.jsonl", lines[:place] + rows(3, seed=3) + lines[place:])
        assert len(set(before) - set(inserted)) <= 3
    assert digests(tmp_path / "y.jsonl", lines) == before


def test_equal_rows_in_another_kind_of_file_are_another_block(tmp_path):
    names = ("x.jsonl", "x.json", "x.csv", "x.jsonl.gz")
    for name in names:
        (tmp_path / name).write_bytes(b"[]")
    (tmp_path / "x.jsonl").write_bytes(b"{}")
    (tmp_path / "y.jsonl").write_bytes(GOOD)
    (tmp_path / "y.csv").write_bytes(GOOD)
    cut = [next(iter(blocks(data_file(tmp_path / name)))) for name in ("y.jsonl", "y.csv", *names)]
    assert len({block.sha256 for block in cut}) == len(cut)
    assert cut[1].data is None and cut[1].first_line == 1


lines = st.sampled_from(
    [
        GOOD,
        GOOD[:-2],
        b"",
        b" \t",
        b"\xff",
        b'{"question": "q"}',
        b'{"prompt": "p", "completion": "c"}',
        b"x" * 1500,
    ]
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(lines, max_size=120).map(b"\n".join),
    first=st.sampled_from([b"", b"\n", b"\r\n", b'{"question": 1}\n']),
    last=st.sampled_from([b"", b"\n", b"\n\n"]),
)
def test_reading_the_blocks_in_order_is_reading_the_file(tmp_path, monkeypatch, content, first, last):
    for module, name, value in SMALL_LIMITS:
        monkeypatch.setattr(module, name, value)
    path = tmp_path / "x.jsonl"
    path.write_bytes(first + content + last)
    assert read_in_blocks(path) == read_whole(path)


def test_a_block_counts_lines_from_its_own_first_and_refuses_with_those_of_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(rows(2_000, seed=4)) + b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    *_, block = blocks(data_file(path))
    assert block.first_line > 1
    reading = read_block(block, "auto", None, "question_answer")
    assert next(reading).line == 1
    with pytest.raises(Refused, match=r"x\.jsonl:2001 has chosen"):
        list(reading)


@pytest.mark.skipif(not REAL.exists(), reason="no real chats beside the project")
@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "e2e/test.jsonl", "alpaca/alpaca_en_demo.json"])
def test_real_files_read_the_same_by_blocks(name):
    whole = read_whole(REAL / name)
    by_blocks = read_in_blocks(REAL / name)
    assert len(whole.rows) > 900
    assert [replace(row, file="") for row in by_blocks.rows] == [replace(row, file="") for row in whole.rows]

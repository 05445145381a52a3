"""A file that is written to after it was hashed is never taken for what it was."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from prepare_stage import DEFAULTS, dataset
from pyarrow import parquet

from fuzz.reading import data_file
from retuner.chats import blocks, read_block, read_chats
from retuner.errors import Refused
from retuner.intake import Reading
from retuner.memo import Memo
from retuner.observe import Silent
from retuner.params import PrepareParams
from retuner.splits import prepare

KINDS = ("x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz", "x.json.zst")
CHANGED = "is not what it was when the run began"


def write(path: Path, answer: str, count: int = 300) -> None:
    rows = [{"question": f"Which number is {n}?", "answer": f"{answer} {n}"} for n in range(count)]
    kind = path.name.split(".")[1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    text = io.StringIO()
    if kind == "csv":
        table = csv.DictWriter(text, rows[0])
        table.writeheader()
        table.writerows(rows)
    else:
        text.write(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    data = text.getvalue().encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_at_rest_is_read_and_one_that_has_changed_is_refused(tmp_path, name):
    path = tmp_path / name
    write(path, "no")
    file = data_file(path)
    assert len(list(read_chats([file], "auto"))) == 300
    write(path, "ja")
    with pytest.raises(Refused, match=CHANGED):
        list(read_chats([file], "auto"))
    with pytest.raises(Refused, match=CHANGED):
        for block in blocks(file):
            list(read_block(block, "auto"))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "x.jsonl"])
def test_what_changed_between_hash_and_parser_is_not_remembered(tmp_path, name):
    path = tmp_path / name
    write(path, "no")
    [block] = blocks(data_file(path))
    write(path, "ja")
    reading = Reading("auto", memo=Memo(tmp_path / "memo", "key"))
    with pytest.raises(Refused, match=CHANGED):
        reading.remember(block, "question_answer")
    assert not reading.remembers(block, "question_answer")


@pytest.mark.parametrize("name", KINDS)
def test_prepare_does_not_take_changed_data_for_what_it_was_though_it_remembers_those_bytes(tmp_path, name):
    params = PrepareParams.model_validate_json(json.dumps(DEFAULTS | {"files": "*"}))
    memo = Memo(tmp_path / "memo", "key")
    (tmp_path / "data").mkdir()

    def prepared(data) -> list[bytes]:
        out, work = tmp_path / f"out{len(made)}", tmp_path / f"work{len(made)}"
        made.append(out)
        out.mkdir()
        work.mkdir()
        prepare(out, work, data, params, Silent(), memo=memo)
        return [(out / side).read_bytes() for side in ("train.jsonl", "held_out.jsonl")]

    made: list[Path] = []
    write(tmp_path / "data" / name, "no")
    before = dataset(tmp_path / "data")
    first = prepared(before)
    write(tmp_path / "data" / name, "ja")
    assert prepared(dataset(tmp_path / "data")) != first
    with pytest.raises(Refused, match=CHANGED):
        prepared(before)
    write(tmp_path / "data" / name, "no")
    assert prepared(dataset(tmp_path / "data")) == first

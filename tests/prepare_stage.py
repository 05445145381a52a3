"""`prepare` alone, over folders of files that tests write."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuzz.reading import data_file
from retuner.dataset import Dataset
from retuner.observe import Silent
from retuner.params import PrepareParams
from retuner.splits import prepare

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real chats are not beside this checkout")

DEFAULTS = {
    "files": "**/*.json*",
    "format": "auto",
    "columns": None,
    "max_bad_rows": 0,
    "redact": (),
    "near_duplicates": {"similarity": 0.5, "policy": "report"},
    "leaks": {
        "exact": "remove",
        "same_prompt": "remove",
        "near": "report",
        "ngram_13": "report",
        "ngram_8": "report",
        "stock_phrase": 10,
    },
    "held_out_fraction": 0.2,
    "split_salt": "salt",
    "held_out_set": None,
}


def dataset(folder: Path) -> Dataset:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    random.Random(0).shuffle(paths)
    files = tuple(replace(data_file(path), relpath=path.relative_to(folder).as_posix()) for path in paths)
    return Dataset(md5="0" * 32 + ".dir", dvc_file="data.dvc", path=Path("data"), files=files)


class Stage:
    """Runs `prepare` over a folder of files and reads back what it wrote."""

    def __init__(self, tmp_path: Path):
        self.tmp_path, self.runs = tmp_path, 0

    def __call__(self, files: dict[str, list[dict] | bytes], /, **params):
        self.runs += 1
        data = self.tmp_path / f"data{self.runs}"
        for name, rows in files.items():
            content = (
                rows if isinstance(rows, bytes) else b"".join(json.dumps(r).encode() + b"\n" for r in rows)
            )
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(content)
        return self.over(data, **params)

    def over(self, data: Path, **params):
        self.runs += 1
        self.out = self.tmp_path / f"out{self.runs}"
        self.out.mkdir()
        work = self.tmp_path / f"work{self.runs}"
        work.mkdir()
        given = {name: params.pop(name) for name in ("frozen", "earlier", "memo") if name in params}
        checked = PrepareParams.model_validate_json(json.dumps(DEFAULTS | params))
        return prepare(self.out, work, dataset(data), checked, Silent(), **given)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "aside" / "report.json").read_text("utf-8"))

    def rows(self, side: str) -> list[dict]:
        # Not splitlines(): it would break a text at U+2028, which JSON leaves as it is.
        return [json.loads(line) for line in (self.out / f"{side}.jsonl").read_text("utf-8").split("\n")[:-1]]

    def bytes(self) -> tuple[bytes, bytes]:
        return (self.out / "train.jsonl").read_bytes(), (self.out / "held_out.jsonl").read_bytes()

    def quarantine(self) -> list[dict]:
        return [
            json.loads(line)
            for line in (self.out / "aside" / "quarantine.jsonl").read_text().split("\n")[:-1]
        ]


def some_rows(count: int, answers: int = 1, seed: int = 0) -> list[dict]:
    numbers = random.Random(seed)
    prompts = [f"What is {numbers.random()}?" for _ in range(count)]
    return [{"prompt": prompt, "completion": f"{prompt} {n}"} for prompt in prompts for n in range(answers)]

"""The template stage over made-up chats that share a memo, in this process or in one to be killed.

`python template_job.py` reads from stdin, line by line, `[base, folder, seconds or null]`, runs the stage in a fork
of itself and, where seconds are given, kills that then; it says what the fork told.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from retuner import row_memo
from retuner.artifacts import Base, BaseFacts, Splits, SplitsFacts
from retuner.base import load_tokenizer
from retuner.files import sha256_file
from retuner.observe import Silent
from retuner.params import TemplateParams
from retuner.templating import template
from retuner.tiny_phi3 import write_tiny_phi3

Chat = list[dict[str, str]]
JOB_ROWS = 3000


def write_base(folder: Path) -> Path:
    write_tiny_phi3(folder, seed=0)
    return folder


def chat(number: int) -> Chat:
    draw = random.Random(number)
    words = ["red", "green", "the", "a", "Über", "naïve", "42", "中文 x", "\n", " ", "🙂"]
    turns = ("user", "assistant") * (2 if number % 7 == 0 else 1)
    said = [" ".join(draw.choices(words, k=draw.randint(1, 20))).strip() or "x" for _ in turns]
    chat = [{"role": role, "content": text} for role, text in zip(turns, said, strict=True)]
    return [{"role": "user", "content": f"{number}: {said[0]}"}, *chat[1:]]


def rows(*numbers: int) -> list[tuple[str, Chat]]:
    return [(f"{number}", chat(number)) for number in numbers]


class Heard(Silent):
    def __init__(self) -> None:
        self.new: int | None = None

    def say(self, line: str) -> None:
        if "were tokenised before" in line:
            self.new = int(line.split(", ")[-1].removesuffix(" are new").replace(",", ""))


class Project:
    """Runs of the stage that share a memo, or have none."""

    def __init__(self, folder: Path, base: Path, memo: bool = True):
        self.folder, self.base = folder, base
        self.memo = folder / "memo" if memo else None

    def run(
        self, train: list[tuple[str, Chat]], held_out: list[tuple[str, Chat]], too_long: Any = "truncate"
    ) -> tuple[dict[str, str], int]:
        """Digests of what was written, and how many rows were tokenised. Rows are (group, messages)."""
        here = self.folder / f"run-{time.time_ns()}"
        out, work, data = here / "out", here / "work", here / "splits"
        for folder in (out, work, data / "aside"):
            folder.mkdir(parents=True)
        for name, side in (("train", train), ("held_out", held_out)):
            (data / f"{name}.jsonl").write_text("".join(sorted(map(_line, side))), encoding="utf-8")
        (data / "aside" / "report.json").write_text("{}")
        facts = SplitsFacts(
            formats={}, rows_read=1, rejected={}, redacted={}, duplicates={}, leaks={}, removed={},
            train_rows=1, held_out_rows=1, train_groups=1, held_out_groups=1,
        )  # fmt: skip
        splits = Splits(stage="prepare", fingerprint="", digest="", path=data, facts=facts)
        about = BaseFacts(
            source="tiny", architecture="", parameters=1, weights_sha256="", tokenizer_sha256="",
            template_sha256="", stop_token_ids=(1,),
        )  # fmt: skip
        base = Base(stage="fetch_base", fingerprint="", digest="", path=self.base, facts=about)
        params = TemplateParams(max_tokens=96, too_long=too_long, pack_tokens=128)
        heard = Heard()
        template(out, work, splits, base, params, self.memo, heard)
        digests = {path.name: sha256_file(path) for path in out.glob("*.*")}
        digests["report.html"] = sha256_file(out / "aside" / "report.html")
        return digests, len(train) + len(held_out) if heard.new is None else heard.new


def _line(row: tuple[str, Chat]) -> str:
    group, id = (hashlib.sha256(json.dumps(part).encode()).hexdigest()[:32] for part in row)
    return json.dumps({"group": group, "id": id, "messages": row[1]}, ensure_ascii=False) + "\n"


def main() -> None:
    row_memo.FULL_BYTES = 20_000  # many files, so that there is something to be killed between
    train, held_out = rows(*range(JOB_ROWS)), rows(*range(JOB_ROWS, JOB_ROWS + 100))
    for line in sys.stdin:
        base, folder, killed_after = json.loads(line)
        load_tokenizer(Path(base))  # What is slow to import, the forks inherit.
        told = Path(folder).with_suffix(".json")
        told.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            began = time.monotonic()
            digests, tokenised = Project(Path(folder), Path(base)).run(train, held_out)
            done = {"digests": digests, "tokenised": tokenised, "seconds": time.monotonic() - began}
            told.write_text(json.dumps(done))
            os._exit(0)
        if killed_after is not None:
            time.sleep(killed_after)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(told.read_text() if told.exists() else "{}", flush=True)


if __name__ == "__main__":
    main()

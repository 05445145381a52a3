"""Data preparation, from a file of chats to token ids with a loss mask: ours against `datasets.map`, interleaved.

    python -m benchmarks.prepare ../shared/data ../shared/phi3-tokenizer [--rows 100000] [--rounds 3]
    python -m benchmarks.prepare ../shared/data ../shared/phi3-tokenizer --memory [--rows 100000]

Rows: `benchmarks.chat_corpus`. Ids and masks of all sides are compared, row by row, before anything is reported.

- per row: `load_dataset("json")`, then `map` with `apply_chat_template`, ids and assistant mask from the template's
  `{% generation %}` marks (the lengths of prompts give the same mask and take longer: one more rendering a turn).
- batched: the same with `batched=True`: `apply_chat_template(tokenize=False)`, one tokenizer call a batch, and the
  mask from the places of the control tokens, in numpy.
- Rust: `encode_batch_fast` of the contents alone: no reading, no template, no mask, nothing written.
- ours: the stages prepare (strict reading, validation, exact and near duplicates, leaks, splitting) and template (ids,
  masks, held-out prompts, pack plan, report), with an empty memo, and again with 1 % new rows. Sealing
  (hashing and fsync for the store) is told apart.

Every side runs in a process of its own, with its own default threads, after imports and a first run over few rows, so
that none inherits another's heap. `--memory` instead runs our stages over --rows and ten times as many, and compares
their peaks.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chat_corpus import chats, write_chats
from retuner import splits, templating
from retuner.artifacts import Artifact, Base, BaseFacts, ChatsFacts, SplitsFacts
from retuner.base import load_tokenizer
from retuner.dataset import DataFile, Dataset
from retuner.dvc_file import md5_of
from retuner.files import sha256_file
from retuner.memo import Memo
from retuner.observe import Silent
from retuner.params_file import load
from retuner.store import Store

PARAMS = Path(__file__).parents[1] / "params" / "phi3_mini_lora.yaml"
MAX_TOKENS = 4096
SIDES = ("per row", "batched", "Rust", "ours")
GOALS = {"per row": 5.0, "batched": 2.0}
NEW_SHARE, NEW_GOAL = 0.01, 0.05
MEMORY_GOAL = 1.3
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% else %}{{'<|assistant|>\n'}}{% generation %}{{message['content'] + '<|end|>'}}{% endgeneration %}{{'\n'}}"
    "{% endif %}{% endfor %}{{ eos_token }}"
)
"""Phi-3's own template for user and assistant, with the marks."""


@dataclass
class Stages:
    """What our two stages took, in seconds, and what they made."""

    prepare: float
    template: float
    sealing: float
    splits: Artifact[SplitsFacts]
    chats: Artifact[ChatsFacts]

    @property
    def seconds(self) -> float:
        return self.prepare + self.template


@dataclass
class Ours:
    """A store with a memo, in which data that grows is prepared."""

    home: Path
    tokenizer: Path
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.home)

    def run(self, file: Path) -> Stages:
        run = time.time_ns()  # nothing is served from the store, only from the memo
        # Of a million chats put together by chance a few say the same twice.
        few = f"prepare.max_bad_rows={file.stat().st_size >> 20}"
        params = load(
            PARAMS, (f"template.max_tokens={MAX_TOKENS}", f"template.pack_tokens={MAX_TOKENS}", few)
        )
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, md5_of).hexdigest()
        data = DataFile(file.name, file, file.stat().st_size, md5)
        dataset = Dataset("0" * 32, "data.dvc", file.parent, (data,))
        name = "0" * 64
        facts = BaseFacts(
            source="local", architecture="Phi3ForCausalLM", parameters=1, weights_sha256=name, tokenizer_sha256=name,
            template_sha256=name, stop_token_ids=(32007,),
        )  # fmt: skip
        base = Base(stage="fetch_base", fingerprint=name, digest=name, path=self.tokenizer, facts=facts)
        memos = self.home / "memo"
        built: dict[str, float] = {}
        began = time.perf_counter()

        def prepare(out: Path, work: Path) -> SplitsFacts:
            start = time.perf_counter()
            made = splits.prepare(out, work, dataset, params.prepare, Silent(), memo=Memo(memos, "prepare"))
            built["prepare"] = time.perf_counter() - start
            return made

        split = self.store.make("prepare", {"stage": "prepare", "run": run}, SplitsFacts, prepare)

        def template(out: Path, work: Path) -> ChatsFacts:
            start = time.perf_counter()
            made = templating.template(out, work, split, base, params.template, memos / "template", Silent())
            built["template"] = time.perf_counter() - start
            return made

        made = self.store.make("template", {"stage": "template", "run": run}, ChatsFacts, template)
        sealing = time.perf_counter() - began - sum(built.values())
        return Stages(**built, sealing=sealing, splits=split, chats=made)


def per_row(file: Path, tokenizer: Any, cache: Path) -> Any:
    from datasets import load_dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    return rows.map(encode, remove_columns=["messages"])


def batched(file: Path, tokenizer: Any, cache: Path) -> Any:
    import numpy as np
    from datasets import load_dataset

    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        masks = []
        for row in ids:
            tokens = np.array(row)
            mask = np.zeros(len(tokens), np.int64)
            ends = np.flatnonzero(tokens == end)
            for start in np.flatnonzero(tokens == begin):
                mask[start + 1 : ends[np.searchsorted(ends, start)] + 1] = 1
            masks.append(mask)
        return {"input_ids": ids, "assistant_masks": masks}

    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    return rows.map(encode, batched=True, remove_columns=["messages"])


def rust(texts: list[str], tokenizer: Any) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_batch_fast(texts, add_special_tokens=False)


def refuse_other_ids(theirs: Any, chats: Path) -> int:
    """Every row of ours must be one of theirs, id by id and label by label. Returns how many rows were compared."""
    import pyarrow as pa

    known = set()
    for batch in theirs.with_format("arrow").iter(1000):
        for ids, mask in zip(
            batch["input_ids"].to_pylist(), batch["assistant_masks"].to_pylist(), strict=True
        ):
            known.add((tuple(ids), bytes(mask)))
    compared = 0
    for side in ("train", "held_out"):
        with pa.memory_map(str(chats / f"{side}.arrow")) as source:
            for batch in pa.ipc.open_stream(source):
                pairs = zip(batch["input_ids"].to_pylist(), batch["labels"].to_pylist(), strict=True)
                for ids, labels in pairs:
                    mask = bytes(label != -100 for label in labels)
                    assert (tuple(ids), mask) in known, f"a row with other ids or another mask: {ids[:20]}"
                    compared += 1
    assert compared > 0
    return compared


def compare(data: Path, tokenizer: Path, rows: int, rounds: int) -> None:
    from datasets import Dataset as Rows

    new = int(rows * NEW_SHARE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_chats(folder / "chats.jsonl", data, 0, rows)
        grown = folder / "grown.jsonl"
        grown.write_bytes((folder / "chats.jsonl").read_bytes())
        write_chats(grown, data, rows, new)
        write_chats(folder / "few.jsonl", data, 10**9, 200)
        told: dict[str, list[dict[str, Any]]] = {}
        for number in range(rounds):
            for side in SIDES:
                for old in folder.glob(f"{side}-*"):
                    shutil.rmtree(old)
                told.setdefault(side, []).append(one_side(data, tokenizer, folder, side, number))
        ours = told["ours"][-1]
        for side in ("per row", "batched"):
            theirs = Rows.from_file(told[side][-1]["rows"])
            compared = refuse_other_ids(theirs, Path(ours["chats"]))
        assert compared == ours["train_rows"] + ours["held_out_rows"]
        report(told, rows, compared)
        minhash(data)


def one_side(data: Path, tokenizer: Path, folder: Path, side: str, number: int) -> dict[str, Any]:
    """What a process told that ran one side."""
    place = folder / f"{side}-{number}"
    command = [sys.executable, "-m", "benchmarks.prepare", str(data), str(tokenizer)]
    os.sync()  # what another side wrote is not written to disk at this one's cost
    done = subprocess.run(
        [*command, "--side", side, str(folder), str(place)], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout))


def run_side(side: str, folder: Path, place: Path, tokenizer_folder: Path) -> None:
    """One side over chats.jsonl in `folder`, and ours over grown.jsonl after it, with what is written in `place`."""
    few, file = folder / "few.jsonl", folder / "chats.jsonl"
    if side == "ours":
        Ours(place / "few", tokenizer_folder).run(few)
        ours = Ours(place / "store", tokenizer_folder)
        cold, again = ours.run(file), ours.run(folder / "grown.jsonl")
        print(
            json.dumps(
                {
                    "seconds": cold.seconds,
                    "parts": {"prepare": cold.prepare, "template": cold.template, "sealing": cold.sealing},
                    "again": {"prepare": again.prepare, "template": again.template, "sealing": again.sealing},
                    "chats": str(cold.chats.path),
                    **cold.chats.facts.model_dump(mode="json"),
                }
            )
        )
        return
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(tokenizer_folder)
    if side == "Rust":
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
        rust(texts[:200], tokenizer)
        began = time.perf_counter()
        rust(texts, tokenizer)
        print(json.dumps({"seconds": time.perf_counter() - began}))
        return
    encode = per_row if side == "per row" else batched
    encode(few, tokenizer, place / "few")
    began = time.perf_counter()
    rows = encode(file, tokenizer, place / "rows")
    seconds = time.perf_counter() - began
    (written,) = rows.cache_files
    print(json.dumps({"seconds": seconds, "rows": written["filename"]}))


def report(told: dict[str, list[dict[str, Any]]], rows: int, compared: int) -> None:
    ours = told["ours"]
    mean = ours[-1]["train_tokens"] / ours[-1]["train_rows"]
    cold = statistics.median(each["seconds"] for each in ours)
    again = statistics.median(each["again"]["prepare"] + each["again"]["template"] for each in ours)
    threads = len(os.sched_getaffinity(0))
    print(
        f"{rows:,} chats, {mean:.0f} tokens on average, {threads} cores, medians of {len(ours)} interleaved rounds"
    )
    print(f"ids and masks of {compared:,} rows are equal on all sides")
    line = "{:<26}{:>9.2f} s{:>10,.0f} rows/s{:>12,.0f} tokens/s   {}"
    for name in SIDES[:-1]:
        took = statistics.median(each["seconds"] for each in told[name])
        goal = f"ours is {took / cold:.1f} x as fast" + (
            f" (goal {GOALS[name]:g} x)" if name in GOALS else ""
        )
        print(line.format(name, took, rows / took, rows * mean / took, goal))
    print(line.format("ours, nothing in the memo", cold, rows / cold, rows * mean / cold, ""))
    for part in ("prepare", "template"):
        took = statistics.median(each["parts"][part] for each in ours)
        print(line.format(f"  {part}", took, rows / took, rows * mean / took, ""))
    print(
        f"{'ours, 1 % new rows':<26}{again:>9.2f} s   {100 * again / cold:.1f} % (goal {100 * NEW_GOAL:g} %)"
    )
    for part in ("prepare", "template"):
        print(f"  {part:<24}{statistics.median(each['again'][part] for each in ours):>9.2f} s")
    sealed = [statistics.median(each[which]["sealing"] for each in ours) for which in ("parts", "again")]
    print(f"{'sealing, not in the above':<26}{sealed[0]:>9.2f} s, {sealed[1]:.2f} s with 1 % new rows")
    if packs := ours[-1]["packs"]:
        print(f"packs of {MAX_TOKENS:,} tokens: {packs['count']:,}, {100 * packs['fill']:.2f} % full")


def minhash(data: Path, rows: int = 5000) -> None:
    """Rows a second on one core, from their texts to the sketches that near duplicates are found by."""
    import numpy as np

    from retuner.naming import folded
    from retuner.sketch import sketches, word_hashes, words_in

    some = [[message["content"] for message in messages] for messages in chats(data, 0, rows)]
    began = time.perf_counter()
    words = words_in(folded([text for said in some for text in said]))
    hashes, counts = word_hashes(words)
    sketches(hashes, np.add.reduceat(counts, np.cumsum([0, *map(len, some)])[:-1]))
    print(f"MinHash: {rows / (time.perf_counter() - began):,.0f} rows/s on one core (goal 5,000)")


def memory(data: Path, tokenizer: Path, rows: int) -> None:
    """Peaks of whole processes, each with a new store."""
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "chats.jsonl"
        written = 0
        for count in (rows, 10 * rows):
            write_chats(file, data, written, count - written)
            written = count
            for name in ("nothing in the memo", "all in the memo"):
                store = Path(temporary) / f"store-{count}"
                command = [sys.executable, "-m", "benchmarks.prepare", str(data), str(tokenizer)]
                done = subprocess.run(
                    [*command, "--only", str(file), str(store)], check=True, stdout=subprocess.PIPE, text=True
                )
                told = json.loads(done.stdout)
                peaks.append(told["peak_mb"])
                print(
                    f"{count:>9,} rows, {name:<20}{told['peak_mb']:>8.0f} MB  {told['seconds']:.1f} s",
                    flush=True,
                )
    for name, small, large in (("nothing in the memo", *peaks[::2]), ("all in the memo", *peaks[1::2])):
        print(f"ten times the rows, {name}: {large / small:.2f} x the peak (goal {MEMORY_GOAL:g} x)")


def only(file: Path, store: Path, tokenizer: Path) -> None:
    """One run of our stages, and what this process needed."""
    stages = Ours(store, tokenizer).run(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    digest = sha256_file(stages.chats.path / "train.arrow")
    print(json.dumps({"peak_mb": peak, "seconds": stages.seconds, "sha256": digest}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("data", type=Path, help="the folder that holds sharegpt/, alpaca/ and gsm8k/")
    options.add_argument("tokenizer", type=Path, help="the folder of Phi-3-mini's tokenizer")
    options.add_argument("--rows", type=int)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--memory", action="store_true", help="peak memory instead; takes minutes")
    options.add_argument("--side", nargs=3, metavar=("SIDE", "FOLDER", "PLACE"), help=argparse.SUPPRESS)
    options.add_argument("--only", nargs=2, type=Path, metavar=("FILE", "STORE"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.side:
        side, folder, place = chosen.side
        run_side(side, Path(folder), Path(place), chosen.tokenizer)
    elif chosen.only:
        only(*chosen.only, chosen.tokenizer)
    elif chosen.memory:
        memory(chosen.data, chosen.tokenizer, chosen.rows or 100_000)
    else:
        compare(chosen.data, chosen.tokenizer, chosen.rows or 100_000, chosen.rounds)


if __name__ == "__main__":
    main()

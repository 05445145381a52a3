"""`prepare`: read every chat, set bad rows aside, drop duplicates, split by prompt.

A row's side follows from its own prompt and the salt, so no other row, no file name and no order can move
it: the held-out side stays held out as data grows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from retuner.artifacts import SplitsFacts
from retuner.chats import BadRow, Chat, read_chats
from retuner.dataset import DataFile, Dataset
from retuner.describe import describe
from retuner.errors import Refused
from retuner.observe import Observer
from retuner.params import PrepareParams

SHOWN_ROWS = 5


class SplitRow(NamedTuple):
    """A row of train.jsonl or held_out.jsonl; they are written in this order, by group, then id."""

    group: str
    id: str
    line: str


@dataclass
class Intake:
    """What reading found. Of bad rows only as many are kept as a run may have, or a message shows."""

    rows: dict[str, SplitRow] = field(default_factory=dict)
    """By the digest of the folded conversation, so duplicates meet."""
    bad_rows: list[BadRow] = field(default_factory=list)
    rows_by_file: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0


def prepare(out: Path, dataset: Dataset, params: PrepareParams, observer: Observer) -> SplitsFacts:
    """Writes train.jsonl and held_out.jsonl, and what was set aside under `out`/aside.

    Errors: Refused when no file matches, a file is of another kind, there are more bad rows than
    `params.max_bad_rows`, or a side would be empty. The message says where and what to do.
    """
    files = matching(dataset, params.files)
    intake = _read(files, params, observer)
    if intake.rejected.total() > params.max_bad_rows:
        raise _too_many_bad_rows(intake, params.max_bad_rows)
    train: list[SplitRow] = []
    held_out: list[SplitRow] = []
    for row in sorted(intake.rows.values()):
        side = held_out if is_held_out(row.group, params.split_salt, params.held_out_fraction) else train
        side.append(row)
    train_groups, held_out_groups = (len({row.group for row in side}) for side in (train, held_out))
    if not train or not held_out:
        raise _empty_side(len(intake.rows), train_groups, held_out_groups, params)
    facts = SplitsFacts(
        formats=intake.formats,
        rows_read=intake.rows_by_file.total(),
        rejected=dict(sorted(intake.rejected.items())),
        duplicates=intake.duplicates,
        train_rows=len(train),
        held_out_rows=len(held_out),
        train_groups=train_groups,
        held_out_groups=held_out_groups,
    )
    _write(out / "train.jsonl", (row.line for row in train))
    _write(out / "held_out.jsonl", (row.line for row in held_out))
    (out / "aside").mkdir()
    _write(out / "aside" / "quarantine.jsonl", (_json(asdict(bad)) for bad in intake.bad_rows))
    report = facts.model_dump() | {
        "rows_by_file": intake.rows_by_file,
        "duplicates": {"folded": facts.duplicates},
        "train": {"rows": facts.train_rows, "groups": facts.train_groups},
        "held_out": {"rows": facts.held_out_rows, "groups": facts.held_out_groups},
        "description": describe(json.loads(row.line)["messages"] for row in (*train, *held_out)).spelled(),
    }
    _write(out / "aside" / "report.json", [_json(report)])
    observer.say(
        f"prepare: {facts.rows_read:,} rows, {facts.duplicates:,} duplicates dropped, "
        f"{len(intake.bad_rows):,} set aside; train on {len(train):,} rows of {train_groups:,} prompts, "
        f"hold out {len(held_out):,} rows of {held_out_groups:,}"
    )
    return facts


def chat_id(messages: Sequence[dict[str, str]]) -> str:
    """32 hex digits that name a conversation by its exact roles and texts."""
    return _digest([f"{message['role']}\n{message['content']}" for message in messages])


def group_of(messages: Sequence[dict[str, str]]) -> str:
    """32 hex digits that conversations share when, but for case and space, all before an answer is equal."""
    return _digest(_prompt(_folded(messages)))


def is_held_out(group: str, salt: str, held_out_fraction: float) -> bool:
    """The side of a group: true for about `held_out_fraction` of all groups, and for ever the same."""
    return int(_digest([salt, group]), 16) < held_out_fraction * 2**128


def _folded(messages: Sequence[dict[str, str]]) -> list[str]:
    return [f"{message['role']}\n{' '.join(message['content'].casefold().split())}" for message in messages]


def _prompt(folded: list[str]) -> list[str]:
    return list(takewhile(lambda turn: not turn.startswith("assistant\n"), folded))


def _digest(parts: list[str]) -> str:
    # NUL keeps the parts apart: no text of a chat holds one.
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()[:32]


def matching(dataset: Dataset, pattern: str) -> list[DataFile]:
    """The files a glob names, in the sense of `Path.glob`, sorted by name."""
    files = sorted(dataset.files, key=lambda file: file.relpath)
    matching = [file for file in files if _matches(file.relpath.split("/"), pattern.split("/"))]
    if not matching:
        names = [file.relpath for file in files[:SHOWN_ROWS]] + ["..."] * (len(files) > SHOWN_ROWS)
        raise Refused(
            f"prepare.files is {pattern!r} and matches none of the {len(files)} files of {dataset.dvc_file}",
            f"a glob for some of: {', '.join(names) or 'no files'}",
            "change prepare.files (`*.jsonl` for the top folder, `**/*.jsonl` for all), or add chats to DVC",
        )
    return matching


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _read(files: list[DataFile], params: PrepareParams, observer: Observer) -> Intake:
    """Errors: Refused, naming every file that is of another kind."""
    intake = Intake(formats=dict.fromkeys((file.relpath for file in files), "none"))
    refusals = []
    for number, file in enumerate(files, 1):
        try:
            for row in read_chats([file], params.format):
                _take(intake, row, params.max_bad_rows)
        except Refused as refusal:
            refusals.append(refusal)
        else:
            rows = intake.rows_by_file[file.relpath]
            observer.say(f"{file.relpath}: {rows:,} rows, format {intake.formats[file.relpath]}")
        observer.progress("files read", number, len(files))
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        lines = [f"  - {refusal.found} (do: {refusal.do})" for refusal in refusals]
        raise Refused(f"{len(refusals)} files cannot be used:\n" + "\n".join(lines), refusals[0].expected)
    return intake


def _take(intake: Intake, row: Chat | BadRow, max_bad_rows: int) -> None:
    intake.rows_by_file[row.file] += 1
    if isinstance(row, BadRow):
        intake.rejected[row.cause] += 1
        if len(intake.bad_rows) <= max(max_bad_rows, SHOWN_ROWS):
            intake.bad_rows.append(row)
        return
    intake.formats[row.file] = row.format
    folded = _folded(row.messages)
    key, group, id = _digest(folded), _digest(_prompt(folded)), chat_id(row.messages)
    new = SplitRow(group, id, _json({"id": id, "group": group, "messages": row.messages}))
    known = intake.rows.get(key)
    intake.duplicates += known is not None
    # Of rows that differ in case and space alone, the least id stays, so that no order of reading matters.
    intake.rows[key] = min(known, new) if known else new


def _too_many_bad_rows(intake: Intake, max_bad_rows: int) -> Refused:
    total = intake.rejected.total()
    shown = [f"  - {bad.where} {bad.cause}: {bad.message}" for bad in intake.bad_rows[:SHOWN_ROWS]]
    more = [f"  - and {total - len(shown):,} more"] * (total > len(shown))
    causes = ", ".join(f"{cause} {count:,}" for cause, count in intake.rejected.most_common())
    return Refused(
        f"{total:,} of {intake.rows_by_file.total():,} rows cannot be used:\n"
        + "\n".join([*shown, *more, f"  by cause: {causes}"]),
        f"at most {max_bad_rows:,} bad rows (prepare.max_bad_rows)",
        f"mend them, or set prepare.max_bad_rows to {total} to leave them out and list them in quarantine",
    )


def _empty_side(rows: int, train_groups: int, held_out_groups: int, params: PrepareParams) -> Refused:
    groups = train_groups + held_out_groups
    if groups < 2:
        found = (
            f"{rows:,} usable rows, all with the same prompt"
            if rows > 1
            else ["no usable row", "one usable row"][rows]
        )
        return Refused(
            f"the data has {found}",
            "chats with at least two different prompts, one to train on and one held out",
            "add chats, or check prepare.files",
        )
    side = "held out" if train_groups else "left to train on"
    return Refused(
        f"of {rows:,} rows with {groups:,} different prompts none is {side}",
        f"prompts on both sides of prepare.held_out_fraction ({params.held_out_fraction})",
        "add chats, or change prepare.held_out_fraction or prepare.split_salt",
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)

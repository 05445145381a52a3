"""`prepare`: read every chat, set bad rows aside, drop duplicates, split by prompt, keep train and held-out apart.

A row's side follows from its own prompt and the salt, or from a frozen set, so no other row, no file name and no
order can move it: the held-out side stays held out as data grows. What is removed is removed from train.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.artifacts import SplitsFacts
from retuner.dataset import DataFile, Dataset
from retuner.errors import Refused, Unavailable
from retuner.files import sha256_file
from retuner.formats import PREFERENCE
from retuner.observe import Observer
from retuner.params import PrepareParams

if TYPE_CHECKING:
    from retuner.held_out import EarlierSet, FrozenSet
    from retuner.intake import Counts, Reading
    from retuner.memo import Memo
    from retuner.rows import Bodies, Ordered, Parted
    from retuner.separation import Separation

SHOWN_ROWS = 5


def prepare(
    out: Path,
    work: Path,
    dataset: Dataset,
    params: PrepareParams,
    observer: Observer,
    frozen: "FrozenSet | None" = None,
    earlier: Sequence["EarlierSet"] = (),
    memo: "Memo | None" = None,
) -> SplitsFacts:
    """Writes train.jsonl and held_out.jsonl, and what was set aside under `out`/aside; `work` is for files on the way.

    `frozen` decides what is held out instead of the hash, `earlier` are held-out sets of earlier versions, `memo`
    spares what was computed before: with and without it the result is the same.

    Errors: Refused when no file matches, a file is of another kind or has changed, there are more bad rows than
    `params.max_bad_rows`, there is a leak of a kind that is to be refused, or a side would be empty. The message
    says where and what to do. Unavailable when a file cannot be read or an earlier held-out set is damaged.
    """
    # A cached run imports this module too, and should not pay for numpy.
    from retuner.intake import Counts, Reading
    from retuner.ordering import by_draw, by_name, groups, order, write_lines
    from retuner.rows import Bodies, Ordered, Parted
    from retuner.separation import separate

    files = matching(dataset, params.files)
    if others := sorted({file.relpath for file in dataset.files} - {file.relpath for file in files}):
        more = f" and {len(others) - SHOWN_ROWS:,} more" if len(others) > SHOWN_ROWS else ""
        observer.say(f"prepare.files ({params.files}) leaves out: {', '.join(others[:SHOWN_ROWS])}{more}")
    counts = Counts(max(params.max_bad_rows, SHOWN_ROWS))
    bodies, parted = Bodies(work), Parted(work)
    rows = Ordered(work, bodies)
    try:
        reading = Reading(params.format, params.columns, params.redact, memo, params.split_salt)
        _read(files, reading, counts, bodies, parted, observer)
        if counts.rejected.total() > params.max_bad_rows:
            raise _too_many_bad_rows(counts, params.max_bad_rows)

        chosen = by_name(frozen.groups) if frozen else by_draw(params.split_salt, params.held_out_fraction)
        duplicates = order(parted, rows, chosen)
        _add_earlier(rows, earlier, reading)
        rows.finish()
        train, held = rows.sides == 0, rows.sides == 1
        if not train.any() or not held.any():
            usable = int((train | held).sum())
            raise _empty_side(usable, counts, groups(rows, train), groups(rows, held), params)
        apart = separate(rows, work, params, ["train", "held-out", *(each.name for each in earlier)])
        kept = train & ~apart.removed
        if not kept.any():
            raise _nothing_left(int(train.sum()), apart.removals())
        write_lines(rows, apart.removed, out)
        facts = SplitsFacts(
            formats=counts.formats,
            rows_read=counts.rows_by_file.total(),
            rejected=dict(sorted(counts.rejected.items())),
            redacted={kind: counts.redacted[kind] for kind in sorted(params.redact)},
            duplicates={**asdict(duplicates), "near": apart.near["near"]},
            leaks={kind: told["rows"] for kind, told in apart.leaks.items()},
            removed=apart.removals(),
            train_rows=int(kept.sum()),
            held_out_rows=int(held.sum()),
            train_groups=groups(rows, kept),
            held_out_groups=groups(rows, held),
            pairs=params.format == PREFERENCE,
        )
        if memo:
            memo.prune()
    finally:
        bodies.close()
        parted.close()
        rows.close()
    (out / "aside").mkdir()
    _write(out / "aside" / "quarantine.jsonl", (_json(asdict(bad)) for bad in counts.bad_rows))
    _write(out / "aside" / "report.json", [_json(_report(facts, counts, apart, params, frozen))])
    for line in _told(facts, counts, apart, params):
        observer.say(line)
    return facts


def _report(
    facts: SplitsFacts,
    counts: "Counts",
    apart: "Separation",
    params: PrepareParams,
    frozen: "FrozenSet | None",
) -> dict[str, Any]:
    """aside/report.json, see `retuner.data_report.DataReport`."""
    return {
        "formats": facts.formats,
        "rows_by_file": counts.rows_by_file,
        "rows_read": facts.rows_read,
        "rejected": facts.rejected,
        "redacted": facts.redacted,
        "duplicates": {
            **facts.duplicates,
            "near_policy": params.near_duplicates.policy,
            "clusters": apart.near["clusters"],
        },
        "leaks": apart.leaks,
        "train": {"rows": facts.train_rows, "groups": facts.train_groups},
        "held_out": {
            "rows": facts.held_out_rows,
            "groups": facts.held_out_groups,
            "set": frozen.name if frozen else None,
        },
        "description": counts.description.spelled(),
    }


def _told(facts: SplitsFacts, counts: "Counts", apart: "Separation", params: PrepareParams) -> Iterator[str]:
    dropped = facts.duplicates["exact"] + facts.duplicates["folded"]
    yield (
        f"prepare: {facts.rows_read:,} rows, {dropped:,} duplicates dropped, "
        f"{counts.rejected.total():,} set aside; train on {facts.train_rows:,} rows of {facts.train_groups:,} prompts, "
        f"hold out {facts.held_out_rows:,} rows of {facts.held_out_groups:,}"
    )
    for bad in counts.bad_rows[:SHOWN_ROWS]:
        yield f"set aside: {bad.where} {bad.cause}: {bad.message}"
    if counts.rejected.total() > SHOWN_ROWS:
        yield f"set aside, by cause: {_causes(counts)}"
    if any(facts.redacted.values()):
        yield "redacted: " + ", ".join(f"{kind} {count:,}" for kind, count in facts.redacted.items() if count)
    leaks = [
        f"{kind} {told['rows']:,}{' removed' if told['removed'] else ''}"
        for kind, told in apart.leaks.items()
        if told["rows"]
    ]
    stock = [
        f"{kind} {told['stock_phrases']['rows']:,}"
        for kind, told in apart.leaks.items()
        if told.get("stock_phrases", {}).get("rows")
    ]
    yield (
        f"train rows that share something with held-out ones: {', '.join(leaks) or 'none'}; near duplicates within "
        f"train: {facts.duplicates['near']:,}{' removed' if apart.near['removed'] else ''}"
    )
    if stock:
        yield f"train rows that share only stock phrases with held-out ones, which are no leaks: {', '.join(stock)}"


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


def _read(
    files: list[DataFile],
    reading: "Reading",
    counts: "Counts",
    bodies: "Bodies",
    parted: "Parted",
    observer: Observer,
) -> None:
    """Errors: Refused, naming every file that is of another kind."""
    from retuner.reading_ahead import ReadingAhead

    counts.formats.update(dict.fromkeys((file.relpath for file in files), "none"))
    refusals = []
    with ReadingAhead(reading) as ahead:
        for number, file in enumerate(files, 1):
            try:
                for line, segment in reading.segments(file, ahead):
                    counts.add(file.relpath, line, segment.notes)
                    parted.add(bodies.add(segment.batch))
            except Refused as refusal:
                refusals.append(refusal)
            else:
                rows = counts.rows_by_file[file.relpath]
                observer.say(f"{file.relpath}: {rows:,} rows, format {counts.formats[file.relpath]}")
            observer.progress("files read", number, len(files))
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        lines = [
            f"  - {refusal.found}\n    expected: {refusal.expected}\n    do: {refusal.do}"
            for refusal in refusals
        ]
        raise Refused(
            f"{len(refusals)} files cannot be used:\n" + "\n".join(lines),
            "files of chats alone",
            "see to each as said; prepare.files chooses which are read",
        )


def _add_earlier(rows: "Ordered", earlier: Sequence["EarlierSet"], reading: "Reading") -> None:
    """The rows of each earlier held-out set, as a side of their own. Errors: Unavailable when one is damaged."""
    import numpy as np

    for side, held_out in enumerate(earlier, 2):
        if sha256_file(held_out.path) != held_out.digest:
            raise Unavailable(
                f"the held-out set of {held_out.name} is damaged: {held_out.path} has another digest",
                held_out.digest,
                "run the same command again: the damaged copy is set aside",
            )
        for segment in reading.stored(held_out.path, held_out.digest):
            heads = rows.bodies.add(segment.batch)
            rows.add(heads, np.full(len(heads), side))


def _too_many_bad_rows(counts: "Counts", max_bad_rows: int) -> Refused:
    total = counts.rejected.total()
    shown = [f"  - {bad.where} {bad.cause}: {bad.message}" for bad in counts.bad_rows[:SHOWN_ROWS]]
    more = [f"  - and {total - len(shown):,} more"] * (total > len(shown))
    do = f"mend them, or set prepare.max_bad_rows to {total} to leave them out and list them in quarantine"
    if total == counts.rows_by_file.total():
        ((cause, count),) = counts.rejected.most_common(1)
        do = f"check prepare.format and prepare.columns, or mend the files: {count:,} times it is {cause}"
    return Refused(
        f"{total:,} of {counts.rows_by_file.total():,} rows cannot be used:\n"
        + "\n".join([*shown, *more, f"  by cause: {_causes(counts)}"]),
        f"at most {max_bad_rows:,} bad rows (prepare.max_bad_rows)",
        do,
    )


def _causes(counts: "Counts") -> str:
    return ", ".join(f"{cause} {count:,}" for cause, count in counts.rejected.most_common())


def _empty_side(
    rows: int, counts: "Counts", train_groups: int, held_out_groups: int, params: PrepareParams
) -> Refused:
    groups = train_groups + held_out_groups
    if groups < 2:
        read, aside = counts.rows_by_file.total(), counts.rejected.total()
        usable = (
            f"{rows:,} usable rows, all with the same prompt"
            if rows > 1
            else ["no usable row", "one usable row"][rows]
        )
        lost = [f"{read - aside - rows:,} duplicates dropped"] if read - aside > rows else []
        if aside:
            lost.append(f"{aside:,} set aside ({_causes(counts)}; the first at {counts.bad_rows[0].where})")
        return Refused(
            f"the data has {usable}" + (f": {read:,} read, {', '.join(lost)}" if lost else ""),
            "chats with at least two different prompts, one to train on and one held out",
            f"add chats, or check {'prepare.format, prepare.columns and ' if aside else ''}prepare.files",
        )
    side = "held out" if train_groups else "left to train on"
    if params.held_out_set:
        return Refused(
            f"of {rows:,} rows with {groups:,} different prompts none is {side}",
            f"some prompts that the held-out set {params.held_out_set} names, and others",
            "check prepare.files and prepare.held_out_set",
        )
    return Refused(
        f"of {rows:,} rows with {groups:,} different prompts none is {side}",
        f"prompts on both sides of prepare.held_out_fraction ({params.held_out_fraction})",
        "add chats, or change prepare.held_out_fraction or prepare.split_salt",
    )


def _nothing_left(rows: int, removed: dict[str, int]) -> Refused:
    causes = ", ".join(f"{cause} {count:,}" for cause, count in removed.items() if count)
    return Refused(
        f"all {rows:,} rows to train on were removed: {causes}",
        "rows that share nothing with held-out ones",
        "set the policies under prepare.leaks to report, and look at the report",
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)

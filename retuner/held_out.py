"""Which prompts are held out besides those a hash picks: sets frozen by name, and those of earlier versions.

A frozen set is a file in git, `params/held_out/NAME.txt`: it stays the same whatever becomes of the data, the salt
and the fraction. The sets of earlier versions matter when the rule changes: what an earlier adapter was scored on
should not be trained on now, or two versions could no longer be compared on it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner import registry_reads
from retuner.errors import Refused
from retuner.files import write_whole
from retuner.naming import group_of
from retuner.runtime import Runtime
from retuner.store import Store

FOLDER = Path("params/held_out")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
GROUP = re.compile(r"[0-9a-f]{32}")

# Dataclasses, not pydantic models: a fully cached run ends before pydantic would have been imported.


@dataclass(frozen=True)
class FrozenSet:
    """Prompts, by their group's hash, that are held out by name."""

    name: str
    groups: frozenset[str]
    sha256: str
    """Of the groups alone, so that a mended comment is no reason to run again."""


@dataclass(frozen=True)
class EarlierSet:
    """What a registered version was scored on, while it was split by another rule than this run."""

    name: str
    """Such as `support-emails version 3`, the first that had it."""
    digest: str
    """sha256 of its held_out.jsonl."""
    path: Path
    """That file, in the store."""


@dataclass(frozen=True)
class HeldOutSets:
    """What a run's `prepare` must know besides its data and its params."""

    frozen: FrozenSet | None
    earlier: tuple[EarlierSet, ...]

    @property
    def inputs(self) -> dict[str, Any]:
        """Their part of a step's identity."""
        return {
            "frozen": self.frozen.sha256 if self.frozen else None,
            "earlier": [each.digest for each in self.earlier],
        }

    def spelled(self) -> dict[str, Any]:
        """For a lineage: enough to have the same sets again."""
        frozen = self.frozen
        return {
            "frozen": {"name": frozen.name, "groups": sorted(frozen.groups)} if frozen else None,
            "earlier": [
                {"name": each.name, "digest": each.digest, "splits": each.path.parent.name}
                for each in self.earlier
            ],
        }


def split_rule(prepare: Mapping[str, Any]) -> str:
    """How a run picks its held-out side, from its `prepare` params as plain values. One rule never trains on what
    it held out. What is redacted is part of it: prompts are known by their redacted text."""
    frozen_name = prepare.get("held_out_set") or ""
    rule = f"{prepare['split_salt']} {prepare['held_out_fraction']} {frozen_name}"
    redact = ",".join(sorted(prepare.get("redact") or ()))
    return f"{rule} redact {redact}" if redact else rule


def sets_of(
    runtime: Runtime,
    model_name: str,
    prepare: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> HeldOutSets:
    """The sets for a run of these `prepare` params, as they are today. Errors: Refused, Unavailable."""
    name = prepare.get("held_out_set")
    return HeldOutSets(frozen(name) if name else None, earlier(runtime, model_name, split_rule(prepare), say))


# --- sets frozen by name


def frozen(name: str) -> FrozenSet:
    """The set that `params/held_out/NAME.txt` names. Errors: Refused."""
    path = place_of(name)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt"))) or "none yet"
        raise Refused(
            f"there is no held-out set {name}: {path} does not exist",
            f"prepare.held_out_set null, or the name of a frozen set ({known})",
            f"`retuner data freeze {name} PARAMS` freezes the current one",
        ) from None
    return parse_frozen(name, text)


def parse_frozen(name: str, text: bytes) -> FrozenSet:
    """The set in the bytes of its file, as it is or once was. Errors: Refused."""
    path = place_of(name)
    lines = text.decode("utf-8", "backslashreplace").split("\n")
    if not lines[0].startswith("#") or lines.pop() != "":
        raise _not_frozen(path, 1, "does not begin with a comment, or its last line is cut off")
    groups = lines[1:]
    for number, group in enumerate(groups, 2):
        if not GROUP.fullmatch(group):
            raise _not_frozen(path, number, f"is {group[:40]!r}, not 32 hexadecimal digits")
        if number > 2 and group <= groups[number - 3]:
            raise _not_frozen(path, number, "is not in order, or stands twice")
    if not groups:
        raise _not_frozen(path, 2, "is missing: the set is empty")
    return FrozenSet(name, frozenset(groups), _digest(groups))


def frozen_again(told: Mapping[str, Any] | None) -> FrozenSet | None:
    """The frozen set of a lineage, as `HeldOutSets.spelled` put it there."""
    return FrozenSet(told["name"], frozenset(told["groups"]), _digest(told["groups"])) if told else None


def freeze(name: str, groups: Iterable[str], rule: str, source: str) -> FrozenSet:
    """Write a set, for git to keep. `source` says in a few words where it comes from.

    Errors: Refused when there is one of that name: runs were scored on it.
    """
    path, ordered = place_of(name), sorted(set(groups))
    if path.exists():
        raise Refused(
            f"{path} exists: a frozen set is never changed, or runs with it could not be compared",
            "a new name",
            f"freeze under another name; to look at it: head {path}",
        )
    if not ordered:
        raise Refused(f"the held-out side of {source} is empty", "at least one prompt to freeze")
    head = f"# {len(ordered)} held-out prompts of {' '.join(source.split())}; split rule: {rule.strip()}"
    write_whole(path, ("\n".join([head, *ordered]) + "\n").encode())
    return FrozenSet(name, frozenset(ordered), _digest(ordered))


def place_of(name: str) -> Path:
    """The file of a frozen set. Errors: Refused for what is no plain name."""
    if not NAME.fullmatch(name):
        raise Refused(
            f"{name!r} cannot name a held-out set",
            "letters, digits, dots, dashes and underscores, such as 2026-q4",
        )
    return FOLDER / f"{name}.txt"


def groups_in(held_out: Path) -> set[str]:
    """The groups of a held_out.jsonl or train.jsonl that `prepare` wrote."""
    with held_out.open("rb") as lines:
        # `{"group": "<32 hex>", ...`: keys are sorted, so the group stands at one place.
        return {line[11:43].decode("ascii") for line in lines}


def groups_redacted(rows: Path, redact: Sequence[str]) -> set[str]:
    """What `groups_in` would find, had these kinds been redacted too."""
    from retuner.redaction import redacted

    with rows.open("rb") as lines:
        return {group_of(redacted(json.loads(line)["messages"], redact)[0]) for line in lines}


def _digest(groups: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(groups).encode()).hexdigest()


def _not_frozen(path: Path, line: int, what: str) -> Refused:
    return Refused(
        f"{path} is not a frozen set: line {line} {what}",
        "a comment, then sorted hashes of prompts, as `retuner data freeze` writes them",
        f"`git checkout {path}` brings it back",
    )


# --- what earlier versions were scored on


def earlier(
    runtime: Runtime, model_name: str, rule: str, say: Callable[[str], None] = lambda line: None
) -> tuple[EarlierSet, ...]:
    """The distinct held-out sets of this model's versions that were split by another rule than `rule`, by digest.

    A set whose result is no longer in the store is left out, and said. Errors: Unavailable.
    """
    store = Store(runtime.store, say, runtime.store_remote)
    found: dict[str, EarlierSet] = {}
    for version in registry_reads.held_out_sets(runtime, model_name):
        if version.rule == rule or version.digest in found:
            continue
        name = f"{model_name} version {version.version}"
        place = stored(store, version.splits, version.digest)
        if place is None:
            say(f"the held-out set of {name} is no longer in the store, so it is not looked at for leaks")
            continue
        found[version.digest] = EarlierSet(name, version.digest, place)
    return tuple(sorted(found.values(), key=lambda each: each.digest))


def stored(store: Store, splits: str, digest: str) -> Path | None:
    """The held_out.jsonl of this digest in a stored `prepare` result; None when it is not there, whole."""
    manifest = store.verified_manifest("prepare", splits) if splits else None
    if manifest is None or manifest["files"]["held_out.jsonl"]["sha256"] != digest:
        return None
    return store.folder(splits) / "held_out.jsonl"


def still_same(runtime: Runtime, model_name: str, identity: Mapping[str, Any]) -> bool:
    """Whether a `prepare` of this identity would be given the same held-out sets today. Errors: as `sets_of`."""
    today = sets_of(runtime, model_name, identity["params"]).inputs
    return all(identity["inputs"].get(name) == value for name, value in today.items())


def seen_by(
    runtime: Runtime, model_name: str, version: int, rule: str, held_out: Path, redact: Sequence[str] = ()
) -> str | None:
    """A sentence when a version may have been trained on what is in `held_out`, a held_out.jsonl of `rule` with
    `redact` redacted: its scores on that may then be too good. None when it was split by the same rule, tells none, or
    saw none of it.

    Errors: Unavailable.
    """
    tags = registry_reads.read_version(runtime, model_name, version) or {}
    theirs = tags.get("split_rule")
    if theirs is None or theirs == rule:
        return None
    told = f"{model_name} version {version} was split by another rule ({theirs.strip()}, now {rule.strip()})"
    splits = registry_reads.splits_of(tags)
    store = Store(runtime.store, shared_url=runtime.store_remote)
    manifest = store.verified_manifest("prepare", splits) if splits else None
    if manifest is None:
        return f"{told}: it may have been trained on what is held out now, and score too well on it"
    train = store.folder(splits) / "train.jsonl"
    their_redact = manifest["identity"]["params"].get("redact") or ()
    if set(redact) == set(their_redact):
        now, then = groups_in(held_out), groups_in(train)
    else:
        # What either has redacted is redacted in both, or the prompts could not be told to be the same.
        now, then = groups_redacted(held_out, their_redact), groups_redacted(train, redact)
    seen = len(now & then)
    if not seen:
        return None
    share = f"{seen:,} of the {len(now):,} prompts held out now"
    return f"{told}: it was trained on {share}, and may score too well on them"

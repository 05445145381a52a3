"""What is done about leaks and near duplicates, kind by kind, and what the report says of them."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from retuner.errors import Refused
from retuner.leaks import LONG, SHORT, Runs, Sharing, longest_shared, same_prompt, same_talk
from retuner.naming import folded
from retuner.near import SHOWN, Found, find_near
from retuner.params import PrepareParams
from retuner.preferences import said_in
from retuner.redaction import redacted
from retuner.rows import Ordered
from retuner.sketch import words_in

SHOWN_CLUSTERS = 20
SHOWN_CHARACTERS = 120
WHAT = {
    "exact": "are held-out conversations but for case, white space and system prompt",
    "same_prompt": "have the prompt of a held-out row",
    "near": "resemble a held-out row",
    "ngram_13": "share 13 words in a row with a held-out row",
    "ngram_8": "share 8 words in a row with a held-out row",
}
"""The kinds of leaks, in the order in which they are dealt with: what one kind removes is no leak of the next."""
RUNS = {"ngram_13": LONG, "ngram_8": SHORT}
"""Words of a run."""


@dataclass
class Separation:
    removed: Any
    """A bool for every row: of train, and to be left out."""
    leaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    near: dict[str, Any] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def removals(self) -> dict[str, int]:
        counts = {kind: told["removed"] for kind, told in self.leaks.items()}
        return counts | {"near_duplicate": self.near["removed"]}


def separate(rows: Ordered, folder: Path, params: PrepareParams, sides: Sequence[str]) -> Separation:
    """`sides` are the names of train, held-out and the held-out sets of earlier versions.

    Errors: Refused when there are leaks of a kind that params refuse.
    """
    made = Separation(np.zeros(len(rows), bool))
    shown = _Shown(rows, sides, params.redact)
    most = params.leaks.stock_phrase
    _deal_with(made, "exact", same_talk(rows, ~made.removed), params, shown)
    _deal_with(made, "same_prompt", same_prompt(rows, ~made.removed, most), params, shown)
    similarity = params.near_duplicates.similarity
    with ThreadPoolExecutor(2) as beside:
        runs = beside.submit(Runs, rows, ~made.removed, most, folder)
        sharing = {size: beside.submit(_sharing, runs, size) for size in RUNS.values()}
        near = find_near(rows, similarity, ~made.removed, folder) if similarity else None
        _deal_with(made, "near", near.leaks if near else Found(np.zeros(len(rows), bool)), params, shown)
        with closing(runs.result()):
            for kind, size in RUNS.items():
                _deal_with(made, kind, sharing[size].result().of(~made.removed), params, shown)
    clusters = _clusters_left(made, rows, near.clusters, similarity, folder) if near and similarity else None
    _deal_with_clusters(made, rows, clusters, params, shown)
    if made.refusals:
        raise Refused(
            "train and held-out are not apart:\n" + "\n".join(made.refusals),
            "none of the kinds of leaks that prepare.leaks refuses",
            "take those rows out of the data, or set the kind to remove (from train) or report",
        )
    return made


def _sharing(runs: "Future[Runs]", size: int) -> Sharing:
    return runs.result().sharing(size)


@dataclass(frozen=True)
class _Shown:
    """Rows as people see them."""

    rows: Ordered
    sides: Sequence[str]
    redact: Sequence[str]
    """An earlier held-out set may have been stored with less redacted."""

    def id(self, row: int) -> str:
        high, low = self.rows.head(row)["id"].tolist()
        return f"{high:016x}{low:016x}"

    def start(self, row: int) -> str:
        """How what the user says in a row begins."""
        return _begin(next(text for role, text in self._said(row) if role == "user"))

    def leak(self, kind: str, train: int, held_out: int) -> dict[str, str]:
        shared = {}
        if size := RUNS.get(kind):
            run = longest_shared(self._words(train), self._words(held_out), size)
            shared = {"shared": shorten(b" ".join(run).decode(), SHOWN_CHARACTERS, placeholder=" …")}
        return shared | {
            "train": self.id(train),
            "held_out": self.id(held_out),
            "start": self.start(train),
            "held_out_start": self.start(held_out),
            "against": self.sides[self.rows.sides[held_out]],
        }

    def _said(self, row: int) -> list[tuple[str, str]]:
        """Role and text of all that a row says."""
        _, head = next(self.rows.heads(row, row + 1))
        told = json.loads(self.rows.bodies.lines(head))
        turns, _ = redacted(said_in(told["messages"], told.get("rejected")), self.redact)
        return [(turn["role"], turn["content"]) for turn in turns]

    def _words(self, row: int) -> list[bytes]:
        return b" ".join(
            words_in(folded([text for role, text in self._said(row) if role != "system"]))
        ).split()


def _begin(text: str) -> str:
    return " ".join(text.split())[:SHOWN_CHARACTERS]


def _deal_with(made: Separation, kind: str, found: Found, params: PrepareParams, shown: _Shown) -> None:
    policy, count = getattr(params.leaks, kind), int(found.flags.sum())
    examples = [shown.leak(kind, *example) for example in found.examples]
    if policy == "remove":
        made.removed |= found.flags
    if policy == "refuse" and count:
        lines = [f"      {each['start']!r} ({each['train'][:12]}, {each['against']})" for each in examples]
        made.refusals.append("\n".join([f"  - {kind}: {count:,} train rows {WHAT[kind]}, such as", *lines]))
    removed = count if policy == "remove" else 0
    made.leaks[kind] = {"rows": count, "policy": policy, "removed": removed, "examples": examples}
    if stock := found.stock_phrases:
        made.leaks[kind]["stock_phrases"] = {
            "rows": int(stock.flags.sum()),
            "examples": [shown.leak(kind, *example) for example in stock.examples],
        }


def _clusters_left(made: Separation, rows: Ordered, clusters: Any, similarity: float, folder: Path) -> Any:
    """The clusters without the rows that leaks have removed, which may be all that held some of them together."""
    train = rows.sides == 0
    has_lost: Any = np.zeros(len(rows), bool)
    has_lost[clusters[train & made.removed]] = True
    left = train & ~made.removed & has_lost[clusters]
    if left.any():
        clusters[left] = find_near(rows, similarity, left, folder).clusters[left]
    return clusters


def _deal_with_clusters(
    made: Separation, rows: Ordered, clusters: Any, params: PrepareParams, shown: _Shown
) -> None:
    """Of the train rows that no leak has removed. The one with the least id stays for its cluster."""
    members, roots = _members(made, rows, clusters)
    ids = _ids(rows, members)
    order = np.lexsort((ids[:, 1], ids[:, 0], roots))
    members, roots = members[order], roots[order]
    begins = np.flatnonzero(np.concatenate([[True], roots[1:] != roots[:-1]])) if len(roots) else order
    extra: Any = np.ones(len(members), bool)
    extra[begins] = False
    if params.near_duplicates.policy == "remove":
        made.removed[members[extra]] = True
    sizes = np.diff(begins, append=len(members))
    largest = np.lexsort((members[begins], -sizes))[:SHOWN_CLUSTERS].tolist()
    made.near = {
        "near": int(extra.sum()),
        "removed": int(extra.sum()) if params.near_duplicates.policy == "remove" else 0,
        "clusters": [
            {
                "size": int(sizes[place]),
                "rows": [
                    {"id": shown.id(row), "start": shown.start(row)}
                    for row in members[begins[place] :][: min(SHOWN, int(sizes[place]))].tolist()
                ],
            }
            for place in largest
        ],
    }


def _members(made: Separation, rows: Ordered, clusters: Any) -> tuple[Any, Any]:
    """The rows of clusters of two and more, and which cluster each is of."""
    nobody: Any = np.zeros(0, np.int64)
    if clusters is None:
        return nobody, nobody
    members = np.flatnonzero(~made.removed & (rows.sides == 0))
    roots = clusters[members]
    # Most rows are alone: look closer only at those whose root has company.
    company: Any = np.zeros(len(rows), bool)
    company[roots[roots != members]] = True
    members, roots = members[company[roots]], roots[company[roots]]
    known, counts = np.unique(roots, return_counts=True)
    several = np.isin(roots, known[counts > 1])
    return members[several], roots[several]


def _ids(rows: Ordered, members: Any) -> Any:
    made: Any = np.zeros((len(members), 2), np.uint64)
    for first, heads in rows.heads():
        mine = (members >= first) & (members < first + len(heads))
        made[mine] = heads["id"][members[mine] - first]
    return made

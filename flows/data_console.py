"""What `retuner data stats` and `retuner data diff` show in a terminal."""

import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.stdout import JOINERS, escaped, visible
from retuner.data_page import left_out, rows_left_out
from retuner.data_report import LEAKS, DataReport, TokenReport
from retuner.describe import ROLES
from retuner.page_parts import number_of, percent

if TYPE_CHECKING:
    from retuner.data_diff import Change, DataDiff, State, WordShift

UNSEEN = re.compile(rf"[\s{JOINERS}\ufe00-\ufe0f]")


def show_stats(report: Mapping[str, Any], tokens: Mapping[str, Any] | None) -> None:
    """The report of `prepare`, and lengths in tokens where they are known, on stdout."""
    console = Console(highlight=False)
    read = DataReport.model_validate(report)
    counted = TokenReport.model_validate(tokens) if tokens else None
    rows = _table("rows", "", "", left=1)
    rows.add_row("read", f"{read.rows_read:,}", _files(read))
    for cause, count in sorted(read.rejected.items(), key=lambda pair: -pair[1]):
        rows.add_row("set aside", f"{count:,}", cause)
    rows.add_row("dropped", f"{read.dropped:,}", "duplicates of rows that stay")
    rows.add_row("removed", f"{read.leaked:,}", "leaks out of train")
    picked = f", frozen set {read.held_out.set}" if read.held_out.set else ""
    rows.add_row("train", f"{read.train.rows:,}", number_of(read.train.groups, "prompt"))
    rows.add_row("held out", f"{read.held_out.rows:,}", number_of(read.held_out.groups, "prompt") + picked)
    console.print(rows)
    _show_description(console, read)
    if counted:
        _show_tokens(console, counted)
    else:
        console.print(
            "lengths are in characters: the base, whose tokenizer counts tokens, is not here", style="dim"
        )
    _show_findings(console, read)


def show_diff(found: "DataDiff") -> None:
    """What changed, on stdout."""
    console = Console(highlight=False)
    a, b = found.a, found.b
    console.print(f"[bold]{_markup(a.name)}[/] {a.md5[:10]}  →  [bold]{_markup(b.name)}[/] {b.md5[:10]}")
    if a.md5 == b.md5:
        console.print("the same data, byte for byte")
        return
    files = {"added": found.files_added, "removed": found.files_removed, "changed": found.files_changed}
    for what, names in files.items():
        if names:
            listed = ", ".join(visible(name) for name in names)
            console.print(f"files {what}: {listed}", markup=False, soft_wrap=True)
    rows = (
        _table("conversations", "", "train", "held out")
        if found.added_by_side
        else _table("conversations", "")
    )
    for what, count, sides, style in (
        ("added", found.added, found.added_by_side, "green"),
        ("removed", found.removed, found.removed_by_side, "red"),
        ("answered anew", found.changed, {}, "yellow"),
        ("asked differently", found.asked_differently, {}, "yellow"),
        ("kept", found.kept, {}, ""),
    ):
        by_side = [f"{sides[side]:,}" if side in sides else "" for side in ("train", "held_out")]
        rows.add_row(
            what,
            Text(f"{count:,}", style=style if count else "dim"),
            *(by_side if found.added_by_side else ()),
        )
    console.print()
    console.print(rows)
    if found.moved is not None:
        moved = (
            "no prompt changed sides"
            if not found.moved
            else f"{number_of(found.moved, 'prompt')} changed sides"
        )
        console.print(moved, style="" if not found.moved else "bold red")
    console.print()
    console.print(_shape(a, b))
    console.print()
    console.print(f"words: {_vocabularies(found)}", markup=False)
    for what, words in (
        ("came", found.words_came),
        ("went", found.words_went),
        ("shifted", found.words_shifted),
    ):
        if words:
            told = Text(f"{what}: {', '.join(_word(word) for word in words)}")
            console.print(Padding(told, (0, 0, 0, 2)))
    _show_examples(console, found)


def _vocabularies(found: "DataDiff") -> str:
    if found.vocabulary_shift is None:
        empty = " and ".join(visible(state.name) for state in (found.a, found.b) if not state.words)
        return f"nothing to compare, there are none in {empty}"
    return f"{found.vocabulary_shift:.4f} bits apart (0: the same words as often; 1: no word in common)"


def _shape(a: "State", b: "State") -> Table:
    shape = _table("", a.name, b.name, "")
    lines: list[tuple[str, int, int]] = [("usable rows", a.rows, b.rows)]
    lines += [
        (f"rejected: {c}", a.rejected.get(c, 0), b.rejected.get(c, 0))
        for c in sorted({*a.rejected, *b.rejected})
    ]
    lines += [(f"characters a row, {name}", a.characters[name], b.characters[name]) for name in a.characters]
    for role in sorted({*a.roles, *b.roles}):
        for name in ("messages", "median"):
            then, now = (state.roles.get(role, {}).get(name, 0) for state in (a, b))
            lines.append((f"{role} {'messages' if name == 'messages' else 'characters, median'}", then, now))
    lines += [("words", a.words, b.words), ("distinct words", a.distinct_words, b.distinct_words)]
    for name, then, now in lines:
        shape.add_row(name, f"{then:,}", f"{now:,}", _change(then, now))
    return shape


def _change(then: int, now: int) -> Text:
    if then == now:
        return Text("")
    share = f" ({now / then - 1:+.1%})" if then else ""
    return Text(f"{now - then:+,}{share}", style="dim")


def _word(shift: "WordShift") -> str:
    if shift.a and shift.b:
        return f"{shift.word} {shift.a:,}→{shift.b:,}"
    return f"{shift.word} {shift.a or shift.b:,}"


def _show_examples(console: Console, found: "DataDiff") -> None:
    changed = {
        "answered anew": found.examples_changed,
        "asked differently": found.examples_asked_differently,
    }
    if found.examples_added or found.examples_removed or any(changed.values()):
        console.print("\nexamples", style="dim")
    for what, rows, style in (
        ("added", found.examples_added, "green"),
        ("removed", found.examples_removed, "red"),
    ):
        for row in rows:
            side = f" ({row.side.replace('_', ' ')})" if row.side else ""
            console.print(
                Text.assemble(
                    (f"{what}{side} ", style),
                    visible(row.prompt),
                    ("\n   → ", "dim"),
                    visible(row.answer),
                ),
                soft_wrap=True,
            )
    for what, changes in changed.items():
        for change in changes:
            side = f" ({change.side.replace('_', ' ')})" if change.side else ""
            before, after = _told_apart(change)
            console.print(
                Text.assemble(
                    (f"{what}{side} ", "yellow"),
                    visible(change.prompt),
                    ("\n   - ", "red"),
                    before,
                    ("\n   + ", "green"),
                    after,
                ),
                soft_wrap=True,
            )


def _told_apart(change: "Change") -> tuple[str, str]:
    """Both sides; where they would look the same, what one cannot see of them is spelled out."""
    looks = {_look(text) for text in (change.before, change.after)}
    spelled = _unseen_spelled if len(looks) == 1 else visible
    return spelled(change.before), spelled(change.after)


def _look(text: str) -> str:
    """Equal for texts that differ only in what one cannot see."""
    return UNSEEN.sub("", unicodedata.normalize("NFC", text))


def _unseen_spelled(text: str) -> str:
    return "".join(
        "·" if each == " " else escaped(each) if unicodedata.category(each)[0] in "CMZ" else each
        for each in text
    )


def _show_description(console: Console, read: DataReport) -> None:
    described = read.described
    if not described.rows:
        return
    roles = _table("role", "messages", "characters", "median", "90 % below", "longest")
    for role in sorted(described.messages, key=ROLES.index):
        lengths = described.lengths[role]
        quantiles = (f"{lengths.quantile(share):,}" for share in (0.5, 0.9, 1.0))
        roles.add_row(role, f"{described.messages[role]:,}", f"{described.characters[role]:,}", *quantiles)
    console.print()
    console.print(roles)
    console.print()
    whole = described.letters.total()
    scripts = ", ".join(f"{name} {percent(n, whole)}" for name, n in described.letters.most_common())
    turns = ", ".join(f"{answers}: {rows:,}" for answers, rows in sorted(described.turns.items()))
    console.print(f"scripts: {scripts or 'none'}\nanswers a row: {turns}", markup=False, soft_wrap=True)


def _show_tokens(console: Console, counted: TokenReport) -> None:
    tokens = _table("tokens", "rows", "in all", "with loss", "longest", "cut", "left out")
    for name, side in (("train", counted.train), ("held out", counted.held_out)):
        tokens.add_row(
            name,
            f"{side.rows:,}",
            f"{side.tokens:,}",
            percent(side.supervised, side.tokens),
            f"{side.longest:,} of {counted.max_tokens:,}",
            f"{side.cut:,}",
            f"{rows_left_out(side):,}",
        )
    console.print()
    console.print(tokens)
    for side in (counted.train, counted.held_out):
        for cause, count in side.left_out.items():
            console.print(f"left out: {left_out(cause, count)}", markup=False)
    if stripped := counted.train.stripped + counted.held_out.stripped:
        lose = number_of(stripped, "row", "loses", "lose")
        console.print(f"{lose} white space at the edge of a message: this tokenizer drops it there")
    if packs := counted.packs:
        console.print(f"{number_of(packs.count, 'pack')}, {packs.fill:.1%} filled")


def _show_findings(console: Console, read: DataReport) -> None:
    found = read.duplicates
    near = f", {found.near:,} nearly ({found.near_policy})" if found.near_policy else ""
    console.print(f"duplicates: {found.exact:,} equal, {found.folded:,} but for case and white space{near}")
    if read.leaks:
        leaks = _table("leaks", "rows", "removed", "policy", "train rows of which", left=2)
        for kind, leak in read.leaks.items():
            leaks.add_row(kind, f"{leak.rows:,}", f"{leak.removed:,}", leak.policy, LEAKS.get(kind, ""))
        console.print()
        console.print(leaks)
        stock = {
            kind: leak.stock_phrases.rows for kind, leak in read.leaks.items() if leak.stock_phrases.rows
        }
        if stock:
            told = ", ".join(f"{kind} {rows:,}" for kind, rows in stock.items())
            console.print(f"only stock phrases in common with held-out rows, so no leaks: {told}")
    if redacted := {kind: count for kind, count in read.redacted.items() if count}:
        console.print("redacted: " + ", ".join(f"{kind} {count:,}" for kind, count in redacted.items()))


def _files(read: DataReport) -> str:
    formats = sorted(set(read.formats.values()))
    return f"{number_of(len(read.rows_by_file), 'file')}, {', '.join(formats)}"


def _table(first: str, *others: str, left: int = 0) -> Table:
    """The first column and the last `left` ones are words, the others numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column(first)
    for at, name in enumerate(others):
        made.add_column(name, justify="left" if at >= len(others) - left else "right")
    return made


def _markup(text: str) -> str:
    from rich.markup import escape

    return escape(text)

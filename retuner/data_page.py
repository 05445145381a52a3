"""The data of a run as one page for people: what was read, what became of it, and what the model learns from it.

The page stands alone: no scripts, nothing fetched, so it reads the same in MLflow, from a disk and in ten years.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from retuner.coloured import KEY, ShownRow, coloured
from retuner.data_report import LEAKS, DataReport, LeakExample, SideTokens, TokenReport
from retuner.describe import ROLES, Description, quantile
from retuner.page_parts import (
    Share,
    bar,
    counts,
    histogram,
    number_of,
    percent,
    plural,
    said,
    stacked,
    table,
    tile,
)
from retuner.page_style import STYLE

LEFT_OUT = {
    "train_too_long": ("train row", "longer than max_tokens"),
    "held_out_too_long": ("held-out row", "longer than max_tokens"),
    "train_no_whole_answer": ("train row", "without a whole answer within max_tokens"),
    "held_out_no_whole_answer": ("held-out row", "without a whole answer within max_tokens"),
    "held_out_prompt_too_long": ("held-out prompt", "longer than max_tokens"),
}
"""What is left out and why, by cause."""
STOCK_PHRASES = {
    "same_prompt": "a short prompt with a held-out row, but so do many others under other system prompts",
    "ngram_13": "13 words in a row with a held-out row, but so do many others",
    "ngram_8": "8 words in a row with a held-out row, but so do many others",
}
"""What is told of train rows that have stock phrases in common with held-out rows, by kind."""
MOST_TURNS = 8
Section = tuple[str, str, str]
"""Its id, its heading, and its HTML."""


def data_page(
    report: Mapping[str, Any],
    tokens: Mapping[str, Any] | None,
    shown: Sequence[ShownRow] = (),
    tokenizer: Any = None,
) -> str:
    """A page of HTML. `report` and `tokens` are spelled as `retuner.data_report` says; without `tokens`
    lengths are told in characters. `shown` are rows to be coloured, `tokenizer` is transformers'.

    Errors: pydantic's ValidationError for a report of another shape.
    """
    read = DataReport.model_validate(report)
    counted = TokenReport.model_validate(tokens) if tokens else None
    sections = [part for part in _sections(read, counted, shown, tokenizer) if part[2]]
    links = "".join(f'<a href="#{id}">{escape(head)}</a>' for id, head, _ in sections)
    body = "".join(
        f'<section id="{id}"><h2>{escape(head)}</h2>{html}</section>' for id, head, html in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What the model learns from</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>What the model learns from</h1>\n<p class=lead>{_lead(read)}</p>\n<nav>{links}</nav>\n"
        f'<div class="tiles">{_tiles(read, counted)}</div>\n{body}\n</body>\n</html>\n'
    )


def _sections(
    report: DataReport, tokens: TokenReport | None, shown: Sequence[ShownRow], tokenizer: Any
) -> Iterator[Section]:
    described = report.described
    yield "rows", "Where the rows went", _whole(report, tokens)
    yield "look", "Worth a look", _look(report, tokens)
    yield "files", "Files", _files(report)
    yield "set-aside", "Set aside", _set_aside(report)
    yield "lengths", "Lengths", _lengths(tokens) if tokens else _characters(described)
    yield "loss", "Loss and packing", _loss(tokens) if tokens else ""
    yield "turns", "Roles and turns", _roles(described)
    yield "scripts", "Scripts", _scripts(described)
    yield "duplicates", "Duplicates", _duplicates(report)
    yield "leaks", "Leaks", _leaks(report)
    yield "redacted", "Redacted", _redacted(report)
    yield "sample", "What is learnt, token by token", _sample(shown, tokenizer)


def _lead(report: DataReport) -> str:
    source = f"{number_of(report.rows_read, 'row')} of {number_of(len(report.rows_by_file), 'file')}"
    train, held_out = report.train, report.held_out
    picked = f"the frozen set <code>{escape(held_out.set)}</code>" if held_out.set else "a hash of the prompt"
    return (
        f"{source}; {train.rows:,} to train on ({number_of(train.groups, 'prompt')}), {held_out.rows:,} held out "
        f"({number_of(held_out.groups, 'prompt')}, picked by {picked})."
    )


def _tiles(report: DataReport, tokens: TokenReport | None) -> str:
    tiles = []
    if tokens:
        train, held_out = tokens.train, tokens.held_out
        tiles += [
            _tile(train.rows, "row", "to train on", number_of(train.tokens, "token")),
            tile(
                percent(train.supervised, train.tokens),
                "of them with loss",
                number_of(train.supervised, "token"),
            ),
            _tile(held_out.rows, "row", "held out", number_of(held_out.tokens, "token")),
        ]
        if tokens.packs:
            tiles.append(
                tile(
                    f"{tokens.packs.fill:.1%}".replace("%", " %"),
                    "of packs filled",
                    number_of(tokens.packs.count, "pack"),
                )
            )
    else:
        tiles += [
            _tile(report.train.rows, "row", "to train on"),
            _tile(report.held_out.rows, "row", "held out"),
        ]
    tiles.append(_tile(report.dropped, "duplicate", "dropped", percent(report.dropped, report.rows_read)))
    stay = any(leak.rows > leak.removed for leak in report.leaks.values())
    note = ("others stay, see Leaks" if stay else "none stays") if report.leaks else "not looked for"
    tiles.append(_tile(report.leaked, "leak", "removed", note))
    return "".join(tiles)


def _tile(number: int, thing: str, what: str, note: str = "") -> str:
    return tile(f"{number:,}", f"{plural(number, thing)} {what}", note)


def _whole(report: DataReport, tokens: TokenReport | None) -> str:
    long_train, long_held = (
        (rows_left_out(tokens.train), rows_left_out(tokens.held_out)) if tokens else (0, 0)
    )
    shares = [
        Share("train", report.train.rows - long_train, "train"),
        Share("held out", report.held_out.rows - long_held, "held"),
        Share("duplicates", report.dropped, "twice"),
        Share("leaks removed", report.leaked, "leak"),
        Share("set aside", sum(report.rejected.values()), "bad"),
        Share("too long", long_train + long_held, "long"),
    ]
    rest = report.rows_read - sum(share.count for share in shares)
    return stacked([*shares, Share("not told", rest, "rest")])


def _look(report: DataReport, tokens: TokenReport | None) -> str:
    """Sentences about what a careful person would ask about."""
    aside = sum(report.rejected.values())
    could_not = "could not be used and"
    found = [
        (aside, "set-aside", number_of(aside, "row", f"{could_not} was", f"{could_not} were") + " set aside")
    ]
    for kind, leak in report.leaks.items():
        kept, stock = leak.rows - leak.removed, leak.stock_phrases.rows
        stay = number_of(kept, "train row", "stays", "stay")
        found.append((kept, "leaks", f"{stay} although {LEAKS.get(kind, kind)} ({kind}: {leak.policy})"))
        share = number_of(stock, "train row", "shares", "share")
        shared = STOCK_PHRASES.get(kind, kind)
        found.append((stock, "leaks", f"{share} {shared}: that counts as no leak ({kind})"))
    if report.duplicates.near_policy == "report":
        near = report.duplicates.near
        alike = number_of(near, "row", "is nearly another one and stays", "are nearly another one and stay")
        found.append((near, "duplicates", alike))
    if tokens:
        sides = (tokens.train, tokens.held_out)
        found += [
            (count, "lengths", f"{left_out(cause, count)} {'is' if count == 1 else 'are'} left out")
            for side in sides
            for cause, count in side.left_out.items()
        ]
        cut = sum(side.cut for side in sides)
        were_cut = number_of(cut, "row", "was cut", "were cut")
        found.append((cut, "lengths", f"{were_cut} at {tokens.max_tokens:,} tokens"))
        stripped = sum(side.stripped for side in sides)
        lose = number_of(stripped, "row", "loses", "lose")
        found.append(
            (
                stripped,
                "lengths",
                f"{lose} white space at the edge of a message: this tokenizer drops it there",
            )
        )
    lines = [f'<li>{escape(text)} (<a href="#{id}">more</a>)</li>' for count, id, text in found if count]
    return f'<ul class="look">{"".join(lines)}</ul>' if lines else "<p>Nothing stands out.</p>"


def left_out(cause: str, count: int) -> str:
    """`2 train rows longer than max_tokens`."""
    thing, why = LEFT_OUT.get(cause, ("row", f"({cause})"))
    return f"{number_of(count, thing)} {why}"


def _files(report: DataReport) -> str:
    rows = [
        (f"<code>{escape(name)}</code>", escape(report.formats.get(name, "")), f"{count:,}")
        for name, count in report.rows_by_file.items()
    ]
    return table(("file", "format", "rows"), rows, numbers=1, kind="narrow") if rows else ""


def _set_aside(report: DataReport) -> str:
    if not report.rejected:
        return ""
    found = dict(sorted(report.rejected.items(), key=lambda pair: -pair[1]))
    return (
        counts(("cause", "rows"), found)
        + "<p><small>Each with file, line and column: <code>data/quarantine.jsonl</code> of a finished run in MLflow, "
        "<code>objects/*/aside/quarantine.jsonl</code> in the store.</small></p>"
    )


def _lengths(tokens: TokenReport) -> str:
    train, held_out = tokens.train, tokens.held_out
    legend = (
        f'<ul class="sides"><li><i class="block"></i>train, {number_of(_rows_of(train), "row")}</li>'
        f'<li><i class="line"></i>held out, {number_of(_rows_of(held_out), "row")}</li></ul>'
    )
    chart = histogram({"train": train.histogram, "held out": held_out.histogram}, tokens.max_tokens)
    names = ("median", "90 % below", "99 % below", "longest")
    cells = [
        [name, *(f"{quantile(side.histogram, share):,}" for side in (train, held_out))]
        for name, share in zip(names, (0.5, 0.9, 0.99, 1.0), strict=True)
    ]
    cells.append(["longest used", f"{train.longest:,}", f"{held_out.longest:,}"])
    cells.append([f"cut at {tokens.max_tokens:,}", f"{train.cut:,}", f"{held_out.cut:,}"])
    cells.append(["left out", *(f"{rows_left_out(side):,}" for side in (train, held_out))])
    return legend + chart + table(("tokens a row", "train", "held out"), cells, numbers=2, kind="narrow")


def _characters(described: Description) -> str:
    if not described.rows:
        return ""
    lengths = described.lengths["all"]
    names = ("median", "90 % below", "99 % below", "longest")
    cells = [
        (name, f"{lengths.quantile(share):,}")
        for name, share in zip(names, (0.5, 0.9, 0.99, 1.0), strict=True)
    ]
    return (
        table(("characters a conversation", ""), cells, numbers=1, kind="narrow")
        + "<p><small>In characters, because the base's tokenizer is not here.</small></p>"
    )


def _loss(tokens: TokenReport) -> str:
    train = tokens.train
    html = "<h3>Tokens of train</h3>" + stacked(
        [
            Share("with loss", train.supervised, "train"),
            Share("read only", train.tokens - train.supervised, "twice"),
        ]
    )
    if packs := tokens.packs:
        padding = round(train.tokens / packs.fill) - train.tokens if packs.fill else 0
        html += f"<h3>{number_of(packs.count, 'pack')}</h3>" + stacked(
            [Share("tokens of rows", train.tokens, "train"), Share("padding", padding, "rest")]
        )
        too_long = number_of(packs.rows_too_long, "row", "was", "were")
        long = f"; {too_long} too long" if packs.rows_too_long else ""
        html += f"<p><small>No row is split{long}. Rows of one pack never see one another.</small></p>"
    return html


def _roles(described: Description) -> str:
    if not described.rows:
        return ""
    most = max(described.characters.values())
    rows = []
    for role in sorted(described.messages, key=ROLES.index):
        lengths = described.lengths[role]
        quantiles = (f"{lengths.quantile(share):,}" for share in (0.5, 0.9, 1.0))
        rows.append(
            (
                escape(role),
                bar(described.characters[role], most),
                f"{described.messages[role]:,}",
                f"{described.characters[role]:,}",
                *quantiles,
            )
        )
    heads = ("role", "characters", "messages", "in all", "median", "90 % below", "longest")
    turns = {
        number_of(answers, "answer"): rows
        for answers, rows in sorted(described.turns.items())
        if answers <= MOST_TURNS
    }
    if more := sum(rows for answers, rows in described.turns.items() if answers > MOST_TURNS):
        turns["more"] = more
    return (
        table(heads, rows, numbers=5)
        + "<h3>Answers in a conversation</h3>"
        + counts(("", "rows"), turns, described.rows)
        + "<p><small>Of every usable row, before duplicates and leaks were taken out.</small></p>"
    )


def _scripts(described: Description) -> str:
    letters = described.letters.total()
    most = max(described.letters.values(), default=0)
    rows = [
        (
            escape(script),
            bar(count, most),
            f"{count:,} <small>{percent(count, letters)}</small>",
            f"{described.script_rows[script]:,}",
        )
        for script, count in sorted(described.letters.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    heads = ("script", "", "letters", "rows with any")
    return table(heads, rows, numbers=2, kind="bars") if rows else ""


def _duplicates(report: DataReport) -> str:
    found = report.duplicates
    near = {"report": "stay", "remove": "taken out of train"}.get(found.near_policy or "", "not looked for")
    rows = [
        ("equal to another row", "dropped", f"{found.exact:,}"),
        ("equal but for case and white space", "dropped", f"{found.folded:,}"),
        ("nearly equal", near, f"{found.near:,}"),
    ]
    html = table(("rows that are", "", "rows"), rows, numbers=1, kind="narrow")
    if found.clusters:
        largest = "".join(
            f'<div class="cluster"><b>{number_of(cluster.size, "row")}</b><ol>'
            + "".join(f"<li><code>{escape(row.id[:8])}</code>{said(row.start)}</li>" for row in cluster.rows)
            + "</ol></div>"
            for cluster in found.clusters
        )
        html += f"<details><summary>Largest clusters: {len(found.clusters)}</summary>{largest}</details>"
    return html


def _leaks(report: DataReport) -> str:
    if not report.leaks:
        return ""
    rows = [
        (
            f"{escape(kind)}<br><small>{escape(LEAKS.get(kind, ''))}</small>",
            escape(leak.policy),
            f"{leak.rows:,}",
            f"{leak.removed:,}",
            f"{leak.stock_phrases.rows:,}" if kind in STOCK_PHRASES else "",
        )
        for kind, leak in report.leaks.items()
    ]
    heads = ("kind of train row", "policy", "rows", "removed", "stock phrases")
    html = table(heads, rows, numbers=3)
    if any(leak.stock_phrases.rows for leak in report.leaks.values()):
        html += (
            "<p><small>Stock phrases are what more train rows have than <code>prepare.leaks.stock_phrase</code> says; "
            "rows that share nothing else with held-out rows are no leaks.</small></p>"
        )
    for kind, leak in report.leaks.items():
        html += _examples(kind, leak.examples, leak.rows)
        html += _examples(f"{kind}, stock phrases", leak.stock_phrases.examples, leak.stock_phrases.rows)
    return html


def _examples(what: str, examples: Sequence[LeakExample], rows: int) -> str:
    if not examples:
        return ""
    pairs = []
    for example in examples:
        against = "held out" if example.against == "held-out" else example.against
        theirs = said(example.held_out_start) if example.held_out_start else "<small>begins alike</small>"
        shared = (
            f'<div class="shared"><span>both have</span>{said(example.shared)}</div>'
            if example.shared
            else ""
        )
        pairs.append(
            f'<div class="two"><div class="train"><span>train <code>{escape(example.train[:8])}</code></span>'
            f'{said(example.start)}</div><div class="held"><span>{escape(against)} '
            f"<code>{escape(example.held_out[:8])}</code></span>{theirs}</div>{shared}</div>"
        )
    told = f"{escape(what)}: {len(examples)} of {rows:,}, side by side"
    return f"<details><summary>{told}</summary>{''.join(pairs)}</details>"


def _redacted(report: DataReport) -> str:
    found = {kind: count for kind, count in report.redacted.items() if count}
    if not found:
        return ""
    return (
        counts(("kind", "places"), found)
        + "<p><small>Each replaced by a mark such as [EMAIL]; the source keeps what was there.</small></p>"
    )


def _sample(shown: Sequence[ShownRow], tokenizer: Any) -> str:
    return KEY + "\n".join(coloured(row, tokenizer) for row in shown) if shown else ""


def rows_left_out(side: SideTokens) -> int:
    """Without prompts that are left out: these are parts of rows, and not rows."""
    return sum(count for cause, count in side.left_out.items() if "prompt" not in cause)


def _rows_of(side: SideTokens) -> int:
    return sum(rows for _, _, rows in side.histogram)

"""The data of a run as one page for people: what was read, what became of it, and what the model learns from it.

The page stands alone: no scripts, nothing fetched, so it reads the same in MLflow, from a disk and in ten years.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from retuner.coloured import KEY, ShownRow, coloured
from retuner.data_report import LEAKS, DataReport, LeakExample, SideTokens, TokenReport
from retuner.describe import ROLES, Description
from retuner.page_parts import Share, bar, counts, histogram, percent, said, stacked, table, tile
from retuner.page_style import STYLE

LEFT_OUT = {
    "train_too_long": "train rows longer than max_tokens",
    "held_out_too_long": "held-out rows longer than max_tokens",
    "train_no_whole_answer": "train rows without a whole answer within max_tokens",
    "held_out_no_whole_answer": "held-out rows without a whole answer within max_tokens",
    "held_out_prompt_too_long": "held-out prompts longer than max_tokens",
}
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
    files = len(report.rows_by_file)
    source = f"{report.rows_read:,} rows of {files:,} file{'s' * (files != 1)}"
    held_out = report.held_out
    picked = f"the frozen set <code>{escape(held_out.set)}</code>" if held_out.set else "a hash of the prompt"
    return (
        f"{source}; {report.train.rows:,} to train on ({report.train.groups:,} prompts), {held_out.rows:,} held out "
        f"({held_out.groups:,} prompts, picked by {picked})."
    )


def _tiles(report: DataReport, tokens: TokenReport | None) -> str:
    tiles = []
    if tokens:
        train = tokens.train
        tiles += [
            tile(f"{train.rows:,}", "rows to train on", f"{train.tokens:,} tokens"),
            tile(
                percent(train.supervised, train.tokens), "of them with loss", f"{train.supervised:,} tokens"
            ),
            tile(f"{tokens.held_out.rows:,}", "rows held out", f"{tokens.held_out.tokens:,} tokens"),
        ]
        if tokens.packs:
            tiles.append(
                tile(
                    f"{tokens.packs.fill:.1%}".replace("%", " %"),
                    "of packs filled",
                    f"{tokens.packs.count:,} packs",
                )
            )
    else:
        tiles += [
            tile(f"{report.train.rows:,}", "rows to train on"),
            tile(f"{report.held_out.rows:,}", "rows held out"),
        ]
    tiles.append(tile(f"{report.dropped:,}", "duplicates dropped", percent(report.dropped, report.rows_read)))
    stay = any(leak.rows > leak.removed for leak in report.leaks.values())
    note = ("others stay, see Leaks" if stay else "none stays") if report.leaks else "not looked for"
    tiles.append(tile(f"{report.leaked:,}", "leaks removed", note))
    return "".join(tiles)


def _whole(report: DataReport, tokens: TokenReport | None) -> str:
    long_train = sum(
        n for cause, n in (tokens.train.left_out if tokens else {}).items() if "prompt" not in cause
    )
    long_held = sum(
        n for cause, n in (tokens.held_out.left_out if tokens else {}).items() if "prompt" not in cause
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
    found = [("set-aside", f"{sum(report.rejected.values()):,} rows could not be used and were set aside")]
    for kind, leak in report.leaks.items():
        kept = leak.rows - leak.removed
        found.append(
            ("leaks", f"{kept:,} train rows stay although {LEAKS.get(kind, kind)} ({kind}: {leak.policy})")
        )
        if stock := leak.stock_phrases.rows:
            shared = STOCK_PHRASES.get(kind, kind)
            found.append(("leaks", f"{stock:,} train rows share {shared}: these count as no leaks ({kind})"))
    near = report.duplicates
    if near.near_policy == "report":
        found.append(("duplicates", f"{near.near:,} rows are nearly another one and stay"))
    if tokens:
        for side in (tokens.train, tokens.held_out):
            found += [
                ("lengths", f"{count:,} {LEFT_OUT.get(cause, cause)} are left out")
                for cause, count in side.left_out.items()
            ]
        cut = tokens.train.cut + tokens.held_out.cut
        found.append(("lengths", f"{cut:,} rows were cut at {tokens.max_tokens:,} tokens"))
        stripped = tokens.train.stripped + tokens.held_out.stripped
        found.append(
            (
                "lengths",
                f"{stripped:,} rows lose white space at the edge of a message: this tokenizer drops it there",
            )
        )
    lines = [
        f'<li>{escape(text)} (<a href="#{id}">more</a>)</li>'
        for id, text in found
        if not text.startswith("0 ")
    ]
    return f'<ul class="look">{"".join(lines)}</ul>' if lines else "<p>Nothing stands out.</p>"


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
        + "<p><small>Each with file, line and column: <code>data/quarantine.jsonl</code>.</small></p>"
    )


def _lengths(tokens: TokenReport) -> str:
    train, held_out = tokens.train, tokens.held_out
    legend = (
        f'<ul class="sides"><li><i class="block"></i>train, {_rows_of(train):,} rows</li>'
        f'<li><i class="line"></i>held out, {_rows_of(held_out):,} rows</li></ul>'
    )
    chart = histogram({"train": train.histogram, "held out": held_out.histogram}, tokens.max_tokens)
    names = ("median", "90 % below", "99 % below", "longest used")
    cells = [
        [name, *(f"{_quantile(side, share):,}" for side in (train, held_out))]
        for name, share in zip(names, (0.5, 0.9, 0.99), strict=False)
    ]
    cells.append(["longest used", f"{train.longest:,}", f"{held_out.longest:,}"])
    cells.append([f"cut at {tokens.max_tokens:,}", f"{train.cut:,}", f"{held_out.cut:,}"])
    left = (sum(side.left_out.values()) for side in (train, held_out))
    cells.append(["left out", *(f"{count:,}" for count in left)])
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
        html += f"<h3>{packs.count:,} packs</h3>" + stacked(
            [Share("tokens of rows", train.tokens, "train"), Share("padding", padding, "rest")]
        )
        long = f"; {packs.rows_too_long:,} were too long" if packs.rows_too_long else ""
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
        f"{answers} answer{'s' * (answers != 1)}": rows
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
    near = {"report": "and stay", "remove": "taken out of train"}.get(
        found.near_policy or "", "not looked for"
    )
    rows = [
        ("equal to another row", "dropped", f"{found.exact:,}"),
        ("equal but for case and white space", "dropped", f"{found.folded:,}"),
        ("nearly equal", near, f"{found.near:,}"),
    ]
    html = table(("rows that are", "", "rows"), rows, numbers=1, kind="narrow")
    if found.clusters:
        largest = "".join(
            f'<div class="cluster"><b>{cluster.size:,} rows</b><ol>'
            + "".join(f"<li><code>{escape(row.id[:8])}</code>{said(row.start)}</li>" for row in cluster.rows)
            + "</ol></div>"
            for cluster in found.clusters
        )
        html += f"<details><summary>The {len(found.clusters)} largest clusters</summary>{largest}</details>"
    return html


def _leaks(report: DataReport) -> str:
    if not report.leaks:
        return ""
    rows = [
        (
            escape(kind),
            escape(LEAKS.get(kind, "")),
            escape(leak.policy),
            f"{leak.rows:,}",
            f"{leak.removed:,}",
            f"{leak.stock_phrases.rows:,}" if kind in STOCK_PHRASES else "",
        )
        for kind, leak in report.leaks.items()
    ]
    heads = ("kind", "of a train row", "policy", "rows", "removed", "stock phrases")
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
        pairs.append(
            f'<div class="two"><div class="train"><span>train <code>{escape(example.train[:8])}</code></span>'
            f'{said(example.start)}</div><div class="held"><span>{escape(against)} '
            f"<code>{escape(example.held_out[:8])}</code></span>{theirs}</div></div>"
        )
        if example.shared:
            pairs.append(f'<p class="shared"><small>both have</small> {said(example.shared)}</p>')
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


def _rows_of(side: SideTokens) -> int:
    return sum(rows for _, _, rows in side.histogram)


def _quantile(side: SideTokens, share: float) -> int:
    """The end of the bin up to which `share` of the rows reach."""
    wanted, seen = share * _rows_of(side), 0
    for _, high, rows in side.histogram:
        seen += rows
        if seen >= wanted:
            return high - 1
    return side.longest

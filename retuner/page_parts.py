"""What the data page is put together from: tiles, bars, tables and a histogram. HTML and SVG, no scripts.

Every function takes plain text and escapes it; what comes out is HTML.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from textwrap import shorten

from retuner.describe import Bin, quantile


@dataclass(frozen=True)
class Share:
    """A part of a whole, in a stacked bar."""

    name: str
    count: int
    kind: str
    """A class of the style sheet, which colours it."""


def plural(number: int, thing: str) -> str:
    return thing if number == 1 else f"{thing}s"


def number_of(number: int, thing: str, does: str = "", do: str = "") -> str:
    """`1 row`, `2,000 rows`; with what one `does` and more `do`: `1 row stays`, `2,000 rows stay`."""
    return f"{number:,} {plural(number, thing)} {does if number == 1 else do}".rstrip()


def said(text: str, most: int = 240) -> str:
    """What someone wrote, on one line, apart from the direction of the text around it."""
    return f'<bdi class="said">{escape(shorten(text, most, placeholder=" …") or "…")}</bdi>'


def tile(number: str, what: str, note: str = "") -> str:
    below = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(what)}</span>{below}</div>'


def stacked(shares: Sequence[Share]) -> str:
    """One bar for a whole and a legend with the counts; what is 0 is not drawn."""
    shown = [share for share in shares if share.count > 0]
    whole = sum(share.count for share in shown)
    bars = "".join(
        f'<i class="{share.kind}" style="flex-grow:{share.count}" title="{escape(share.name)}: {share.count:,}"></i>'
        for share in shown
    )
    legend = "".join(
        f'<li><i class="{share.kind}"></i>{escape(share.name)} <b>{share.count:,}</b> '
        f"<small>{percent(share.count, whole)}</small></li>"
        for share in shown
    )
    return f'<div class="stacked" aria-hidden="true">{bars}</div><ul class="legend">{legend}</ul>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int, kind: str = "") -> str:
    """`rows` are cells of HTML; the last `numbers` columns are set as numbers. `kind`: `bars`, or `narrow`."""
    first_number = len(heads) - numbers
    top = "".join(
        f"<th{' class=num' if at >= first_number else ''}>{escape(head)}</th>"
        for at, head in enumerate(heads)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=num' if at >= first_number else ''}>{cell}</td>" for at, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(count: int, most: int) -> str:
    """A bar for a table's cell, as long as the greatest of its column allows."""
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * count / max(most, 1):.2f}%"></i></span>'
    )


def counts(heads: tuple[str, str], found: Mapping[str, int], whole: int | None = None) -> str:
    """Names and how many of each, with bars; the greatest first unless `found` has an order of its own."""
    most = max(found.values(), default=0)
    rows = [
        (
            escape(name),
            bar(count, most),
            f"{count:,}" + (f" <small>{percent(count, whole)}</small>" if whole else ""),
        )
        for name, count in found.items()
    ]
    return table((heads[0], "", heads[1]), rows, numbers=1, kind="bars")


def histogram(sides: Mapping[str, Sequence[Bin]], limit: int) -> str:
    """Lengths in tokens of the first side (filled) and the second (outlined), with a line at `limit`.

    Heights are shares of a side's rows, so sides of unequal size compare. A long thin tail is cut off, and said.
    """
    longest = max((bins[-1][1] for bins in sides.values() if bins), default=1)
    edge = min(longest, 2 * max((quantile(bins, 0.99) + 1 for bins in sides.values()), default=1))
    inside = limit <= 1.3 * edge
    width = _round_up(edge / 48)
    number = -(-edge // width)
    right = 1.02 * max(number * width, limit if inside else 0)
    columns = {name: _columns(bins, width, number) for name, bins in sides.items()}
    totals = {name: max(sum(each), 1) for name, each in columns.items()}
    top = max((count / totals[name] for name, each in columns.items() for count in each), default=0.0) or 1.0
    paths = []
    for kind, (name, each) in zip(("filled", "outlined"), columns.items(), strict=False):
        steps = [
            f"V{300 - 290 * count / totals[name] / top:.1f}H{1000 * (at + 1) * width / right:.1f}"
            for at, count in enumerate(each)
        ]
        paths.append(f'<path class="{kind}" d="M0,300{"".join(steps)}V300"/>')
    pointed = "".join(
        f'<rect x="{1000 * at * width / right:.1f}" width="{1000 * width / right:.1f}" y="0" height="300"><title>'
        f"{number_of(at, 'token') if width == 1 else f'{at * width:,} to {(at + 1) * width - 1:,} tokens'}: "
        + ", ".join(f"{escape(name)} {number_of(each[at], 'row')}" for name, each in columns.items())
        + "</title></rect>"
        for at in range(number)
    )
    line, notes = "", []
    if inside:
        at = 100 * limit / right
        turned = ' class="left"' if at > 60 else ""
        line = f'<div class="limit" style="left:{at:.2f}%"><span{turned}>max_tokens {limit:,}</span></div>'
    else:
        notes.append(f"max_tokens, {limit:,}, lies beyond the right edge")
    if longest > number * width:
        more = sum(count for bins in sides.values() for _, _, count in bins)
        more -= sum(map(sum, columns.values()))
        notes.append(f"{number_of(more, 'row')} too, up to {longest - 1:,} tokens")
    beyond = f"; {', '.join(notes)}" if notes else ""
    ticks = "".join(f'<span style="left:{100 * tick / right:.2f}%">{tick:,}</span>' for tick in _ticks(right))
    return (
        '<div class="histogram"><div class="plot"><svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" '
        f'aria-label="Histogram of tokens a row">{"".join(paths)}<g class="point">{pointed}</g></svg>{line}</div>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div><p class="axis">tokens a row{beyond}</p></div>'
    )


def percent(part: int, whole: int | None) -> str:
    """`12 %`; with a decimal near the ends, so that neither nothing nor all is said where it is not so."""
    if not whole or part in (0, whole):
        return "100 %" if part and whole else "0 %"
    share = 100 * part / whole
    if share < 0.1:
        return "under 0.1 %"
    if share > 99.9:
        return "over 99.9 %"
    return f"{share:.1f} %" if share < 10 or share >= 99 else f"{share:.0f} %"


def _columns(bins: Sequence[Bin], width: int, number: int) -> list[int]:
    """How many there are in each of `number` columns of one width; a bin that lies in several is shared out."""
    columns = [0.0] * number
    for low, high, count in bins:
        for at in range(low // width, min(number, -(-high // width))):
            inside = min(high, (at + 1) * width) - max(low, at * width)
            columns[at] += count * inside / (high - low)
    # Rounded where they end, so that the columns are whole numbers and their sum is right.
    ends = [round(end, 6) for end in accumulate(columns, initial=0.0)]
    return [int(end + 0.5) - int(begin + 0.5) for begin, end in pairwise(ends)]


def _round_up(number: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is not less."""
    step = 1
    while step < number:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step


def _ticks(right: float) -> list[int]:
    """Round numbers from 0 on, at most seven of them."""
    return list(range(0, int(right) + 1, _round_up(right / 6)))

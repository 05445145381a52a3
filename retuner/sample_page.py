"""What a person looks at before trusting a loss mask: a page of rows with the learnt tokens coloured, and a
chart of how long rows are. Both stand alone: no scripts, nothing fetched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from retuner.token_rows import IGNORE


@dataclass(frozen=True, slots=True)
class ShownRow:
    side: str
    id: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that share a character."""

    ids: tuple[int, ...]
    text: str
    learnt: bool
    control: bool


def sample_page(rows: Sequence[ShownRow], tokenizer: Any, told: Sequence[str]) -> str:
    """A page of HTML. `told` are the lines of the stage, `tokenizer` is transformers'."""
    facts = "".join(f"<li>{escape(line)}</li>" for line in told)
    return PAGE.format(facts=facts, rows="\n".join(_row(row, tokenizer) for row in rows))


def draw_lengths(path: Path, lengths: dict[str, list[int]], max_tokens: int) -> None:
    """A histogram of tokens a row for each of two sides, none of them empty, and a line at `max_tokens`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(map(max, lengths.values()))
    edges = [longest * n / 50 for n in range(51)]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, side), filled in zip(lengths.items(), (True, False), strict=True):
        axes.hist(
            side,
            edges,
            weights=[100 / len(side)] * len(side),
            label=f"{name}: {len(side):,} rows",
            histtype="stepfilled" if filled else "step",
            color="#9fcdb7" if filled else "#b5761b",
            linewidth=1.5,
        )
    if max_tokens <= 1.5 * longest:
        over = sum(tokens > max_tokens for side in lengths.values() for tokens in side)
        label = f"max_tokens {max_tokens:,} ({over:,} rows above)"
        axes.axvline(max_tokens, color="#b3261e", linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("% of rows")
    axes.set_xlim(0, max(longest, max_tokens if max_tokens <= 1.5 * longest else 0) * 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _row(row: ShownRow, tokenizer: Any) -> str:
    learnt = len(row.labels) - row.labels.count(IGNORE)
    count = f"{len(row.input_ids):,} tokens, {learnt:,} {'learnt' if row.side == 'train' else 'scored'}"
    side = row.side.replace("_", " ")
    pieces = "".join(_span(piece) for piece in _pieces(row, tokenizer))
    return (
        f'<article><header><b class="{row.side}">{side}</b> <code>{escape(row.id[:12])}</code>'
        f"<span>{count}</span></header>"
        f'<div class="text" dir="auto">{pieces}</div></article>'
    )


def _span(piece: Piece) -> str:
    kinds = [name for name, holds in (("y", piece.learnt), ("c", piece.control)) if holds]
    text = escape(piece.text).replace("\n", '<i class="n">↵</i>\n')
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<span{kind} title="{" ".join(map(str, piece.ids))}">{text}</span>'


def _pieces(row: ShownRow, tokenizer: Any) -> Iterator[Piece]:
    from tokenizers.decoders import DecodeStream

    backend = tokenizer.backend_tokenizer
    controls = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
    stream, before = DecodeStream(), (False, False)
    waiting: tuple[int, ...] = ()
    for id, label in zip(row.input_ids, row.labels, strict=True):
        learnt, control = label != IGNORE, id in controls
        if waiting and (learnt, control) != before:
            yield Piece(waiting, "\ufffd", *before)
            waiting = ()
        if (learnt, control) != before:
            stream, before = DecodeStream(), (learnt, control)
        if control:
            yield Piece((id,), controls[id], learnt, control)
            continue
        text = stream.step(backend, id)
        waiting += (id,)
        if text is not None:
            yield Piece(waiting, text, learnt, control)
            waiting = ()
    if waiting:
        yield Piece(waiting, "\ufffd", *before)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the model learns</title>
<style>
:root {{ color-scheme: light dark; --ink: #1d2125; --dim: #6b737c; --paper: #f6f5f1; --card: #fff;
  --line: #e1ded6; --learnt: #cdeedd; --edge: #1d2125; --stop: #1f7a52; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7e9ea; --dim: #98a1a9; --paper: #16181a;
  --card: #1f2225; --line: #33383d; --learnt: #1c4a36; --edge: #e7e9ea; --stop: #4cc38a; }} }}
body {{ margin: 0 auto; max-width: 60rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; }}
ul {{ margin: 0 0 1rem; padding-left: 1.2rem; color: var(--dim); }}
.key span {{ margin-right: .3rem; }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0;
  overflow: hidden; }}
header {{ display: flex; gap: .6rem; align-items: baseline; padding: .5rem .9rem; font-size: .85rem;
  border-bottom: 1px solid var(--line); color: var(--dim); }}
header span {{ margin-left: auto; }}
header b.held_out {{ color: #b5761b; }}
.text {{ padding: .8rem .9rem; max-height: 26rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--dim); font: 14px/1.8 ui-monospace, "DejaVu Sans Mono", monospace; }}
.text span, .key span {{ padding: .1em 0; }}
.y {{ background: var(--learnt); color: var(--ink);
  box-shadow: inset 1px 0 color-mix(in srgb, var(--edge) 14%, transparent); }}
.text .c, .key .c {{ border: 1px solid currentColor; border-radius: 4px; padding: 0 .3em; margin: 0 .1em;
  font-size: .85em; white-space: nowrap; }}
.text .c.y, .key .c.y {{ background: var(--stop); border-color: var(--stop); color: var(--card); font-weight: 600; }}
.n {{ opacity: .45; font-style: normal; }}
</style>
</head>
<body>
<h1>What the model learns</h1>
<ul>{facts}</ul>
<p class="key"><span class="y">coloured text</span> is learnt, token by token;
<span class="c y">this</span> is the token by which the model learns to stop.
Grey text is read and not learnt; <span class="c">this</span> is a control token of the template.
<span class="n">↵</span> is a line break. Hold the pointer on a token for its id.</p>
{rows}
</body>
</html>
"""

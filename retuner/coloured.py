"""Rows as a person can check them: each token where it stands, those with loss coloured.

What stands between two control tokens is apart from the direction of what is around it: inside, words of any script
read as they are written; outside, everything stands in the order of its ids.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from retuner.token_rows import IGNORE

KEY = """<p class="key"><span class="y">coloured text</span> is learnt, token by token;
<span class="c y">this</span> is the token by which the model learns to stop.
Grey text is read and not learnt; <span class="c">this</span> is a control token of the template.
<span class="n">↵</span> is a line break, <span class="b">RLM</span> an unseen character that steers the direction
of text. Hold the pointer on a token for its id.</p>"""
STEERING = {
    "\u061c": "ALM",
    "\u200e": "LRM",
    "\u200f": "RLM",
    "\u202a": "LRE",
    "\u202b": "RLE",
    "\u202c": "PDF",
    "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2066": "LRI",
    "\u2067": "RLI",
    "\u2068": "FSI",
    "\u2069": "PDI",
}
"""Characters that are not seen and turn the text around them, and what Unicode calls them for short."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    side: str
    """`train` or `held_out`."""
    id: str
    input_ids: list[int]
    labels: list[int]
    answer: str = ""
    """`chosen` or `rejected`, of a preference pair."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that share a character."""

    ids: tuple[int, ...]
    text: str
    learnt: bool
    control: bool


def coloured(row: ShownRow, tokenizer: Any) -> str:
    """HTML of a row; `tokenizer` is transformers'."""
    learnt = len(row.labels) - row.labels.count(IGNORE)
    count = f"{len(row.input_ids):,} tokens, {learnt:,} {'learnt' if row.side == 'train' else 'scored'}"
    side = f"{row.side.replace('_', ' ')} {row.answer}".strip()
    parts = [
        (control, "".join(map(_span, pieces)))
        for control, pieces in groupby(_pieces(row, tokenizer), key=lambda piece: piece.control)
    ]
    text = "".join(spans if control else f"<bdi>{spans}</bdi>" for control, spans in parts)
    return (
        f'<article><header><b class="{row.side}">{side}</b> <code>{escape(row.id[:12])}</code>'
        f"<span>{count}</span></header>"
        f'<div class="text">{text}</div></article>'
    )


def _span(piece: Piece) -> str:
    kinds = [name for name, holds in (("y", piece.learnt), ("c", piece.control)) if holds]
    text = escape(piece.text).replace("\n", '<i class="n">↵</i>\n')
    text = re.sub(f"[{''.join(STEERING)}]", _seen, text)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<span{kind} title="{" ".join(map(str, piece.ids))}">{text}</span>'


def _seen(steering: re.Match[str]) -> str:
    """A mark instead of the character, which would turn what is behind it."""
    character = steering[0]
    name = f"U+{ord(character):04X} {unicodedata.name(character)}"
    return f'<i class="b" title="{name}">{STEERING[character]}</i>'


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

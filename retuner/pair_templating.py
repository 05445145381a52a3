"""`template` of preference pairs: the ids of each prompt, and of its chosen and its rejected answer.

Both answers of a pair are laid out as conversations of their own, by the same templating and the same memo as any
chat, and cut where the answer begins: an answer is its text and the stop token. A pair is used when both fit whole.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.artifacts import Base, ChatsFacts, Splits
from retuner.base import load_tokenizer
from retuner.chat_lines import Chat, ChatLines, hex_strings
from retuner.coloured import ShownRow
from retuner.data_page import data_page
from retuner.describe import Lengths
from retuner.errors import Refused, RetunerError
from retuner.held_out_prompts import write_prompts
from retuner.observe import Observer
from retuner.params import TemplateParams
from retuner.rendering import Renderer
from retuner.row_memo import Places, RowMemo
from retuner.template_side import SHOWN_ROWS, Side, chat_name
from retuner.templating import BATCH_ROWS, ReferenceCheck, add_missing, listed
from retuner.token_rows import IGNORE, TokenRows

if TYPE_CHECKING:
    from numpy.typing import NDArray


def template_pairs(
    out: Path,
    work: Path,
    splits: Splits,
    base: Base,
    params: TemplateParams,
    memo: Path | None,
    observer: Observer,
) -> ChatsFacts:
    """Write train.arrow, held_out.arrow and prompts.jsonl into `out`, and what people can look at into its aside.

    `memo` and errors are as for `retuner.templating.template`.
    """
    renderer = Renderer(load_tokenizer(base.path))
    rows = RowMemo(memo or work / "rows")
    check = ReferenceCheck(renderer)
    train, held_out = (PairSide(name, splits.path / f"{name}.jsonl") for name in ("train", "held_out"))
    answers = [*train.answers, *held_out.answers]
    for each in answers:
        each.places = rows.find(each.lines.ids)
    total, new = sum(len(each.lines) for each in answers), sum(each.missing for each in answers)
    check.first(train.chosen.lines)
    for done in add_missing(renderer, rows, answers):
        observer.progress("rows templated", done, total)
    rows.flush()
    if new < total:
        observer.say(f"template: {total - new:,} of {total:,} answers were tokenised before, {new:,} are new")
    for each in answers:
        each.measure(rows, params)
        check.others(each.lines, rows, each.places)
    for side in (train, held_out):
        side.refuse_too_long(params)
        side.write(out / f"{side.name}.arrow", rows)
    count, held_out.prompts_too_long = write_prompts(
        out / "prompts.jsonl", held_out.chosen.lines, rows, held_out.chosen.places, params.max_tokens
    )
    left_out = train.left_out | held_out.left_out
    facts = ChatsFacts(
        train_rows=len(train.kept),
        held_out_rows=len(held_out.kept),
        held_out_prompts=count,
        train_tokens=train.tokens,
        supervised_tokens=train.supervised,
        longest_row_tokens=max(train.longest, held_out.longest),
        left_out=dict(sorted(left_out.items())),
        packs=None,
        pairs=True,
    )
    _say(facts, params, observer)
    _write_page(out / "aside", splits, (train, held_out), rows, renderer.tokenizer, params)
    if memo:
        rows.compact(Places.joined([each.places for each in answers]))
    return facts


class RejectedLines(ChatLines):
    """The same pairs, each with the rejected answer in place of the chosen one, and under ids of their own."""

    def __init__(self, pairs: ChatLines):
        self.path, self.groups, self.bounds = pairs.path, pairs.groups, pairs.bounds
        self.ids = ~pairs.ids

    def read(self, rows: "NDArray[Any]") -> list[Chat]:
        return [_with_rejected(pair) for pair in super().read(rows)]


def _with_rejected(pair: Chat) -> Chat:
    *prompt, chosen = pair["messages"]
    return {**pair, "messages": [*prompt, {**chosen, "content": pair["rejected"]}]}


class PairSide:
    """The train or the held-out side. What is measured is known once `places` of both answers are."""

    def __init__(self, name: str, path: Path):
        self.name, lines = name, ChatLines(path)
        self.chosen, self.rejected = self.answers = (Side(name, lines), Side(name, RejectedLines(lines)))
        self.tokens = self.supervised = 0
        """Of the pairs that were written: of prompts and answers, and of answers alone."""
        self.prompts_too_long = 0

    @cached_property
    def kept(self) -> "NDArray[Any]":
        """The numbers of the pairs of which both answers fit."""
        import numpy as np

        return np.intersect1d(self.chosen.kept, self.rejected.kept, assume_unique=True)

    @cached_property
    def lengths(self) -> "NDArray[Any]":
        """Tokens of the longer conversation of each pair."""
        import numpy as np

        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def longest(self) -> int:
        return int(self.lengths[self.kept].max(initial=0))

    @property
    def too_long(self) -> int:
        return len(self.lengths) - len(self.kept)

    @property
    def left_out(self) -> dict[str, int]:
        """By cause; none that left nothing out."""
        counts = {"too_long": self.too_long, "prompt_too_long": self.prompts_too_long}
        return {f"{self.name}_{cause}": count for cause, count in counts.items() if count}

    def refuse_too_long(self, params: TemplateParams) -> None:
        """Errors: Refused when params leave out no pair, or there would be none left."""
        if len(self.kept) and (params.too_long != "refuse" or not self.too_long):
            return
        which, at = (
            ("longest", self.lengths.argmax()) if len(self.kept) else ("shortest", self.lengths.argmin())
        )
        name, tokens = chat_name(self.chosen.lines.read(at[None])[0]), self.lengths[at]
        raise Refused(
            f"too long are {self.too_long:,} of {len(self.lengths):,} {self.name} pairs; the {which} is {name} with "
            f"{tokens:,} tokens in its longer answer and prompt",
            f"at most {params.max_tokens:,} tokens (template.max_tokens)",
            f"raise template.max_tokens, to {tokens} for "
            + ("all, or set template.too_long: leave_out" if len(self.kept) else "this one"),
        )

    def write(self, path: Path, rows: RowMemo) -> None:
        """`id`, `group`, `prompt_ids`, `chosen_ids`, `rejected_ids`, in the order of the pairs."""
        import numpy as np
        import pyarrow as pa

        tokens, texts = pa.list_(pa.int32()), ("id", "group")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        schema = pa.schema({**dict.fromkeys(texts, pa.string()), **dict.fromkeys(names, tokens)})
        lines = self.chosen.lines
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for first in range(0, len(self.kept), BATCH_ROWS):
                numbers = self.kept[first : first + BATCH_ROWS]
                parts = [_cut(rows.rows(each.places[numbers], None)) for each in self.answers]
                prompts = [prompt for prompt, _ in parts[0]]
                if not all(np.array_equal(a, b) for (a, _), (b, _) in zip(*parts)):
                    raise RetunerError(f"two answers of {path.name} were given different prompts")
                answers = [[answer for _, answer in part] for part in parts]
                columns = [hex_strings(lines.ids[numbers]), hex_strings(lines.groups[numbers])]
                columns += [_joined(each) for each in (prompts, *answers)]
                stream.write_batch(pa.record_batch(columns, schema=schema))
                learnt = sum(len(answer) for each in answers for answer in each)
                self.supervised += learnt
                self.tokens += 2 * sum(map(len, prompts)) + learnt
                rows.let_go()

    def shown(self, rows: RowMemo) -> Iterator[ShownRow]:
        """Some pairs from all over the side, both answers of each."""
        for number in self.kept[:: max(1, 2 * len(self.kept) // SHOWN_ROWS[self.name])]:
            id = self.chosen.lines.ids[number].tobytes().hex()
            for each, answer in zip(self.answers, ("chosen", "rejected")):
                ((prompt, learnt),) = _cut(rows.rows(each.places[number : number + 1], None))
                labels = [IGNORE] * len(prompt) + learnt.tolist()
                yield ShownRow(self.name, id, [*prompt.tolist(), *learnt.tolist()], labels, answer)

    def spelled(self) -> dict[str, Any]:
        """As `retuner.data_report.SideTokens`."""
        histogram = Lengths()
        for tokens in self.lengths.tolist():
            histogram.add(tokens)
        return {
            "rows": len(self.kept),
            "tokens": self.tokens,
            "supervised": self.supervised,
            "longest": self.longest,
            "stripped": int((self.chosen.strips | self.rejected.strips).sum()),
            "left_out": self.left_out,
            "histogram": list(histogram.ranges()),
        }


def _cut(rows: TokenRows) -> list[tuple["NDArray[Any]", "NDArray[Any]"]]:
    """Of each row the ids up to its last answer, and those of that answer with its stop token."""
    last = rows.spans[rows.span_offsets[1:] - 1] + rows.offsets[:-1, None]
    return [
        (rows.input_ids[begin:answer], rows.input_ids[answer:end])
        for begin, (answer, end) in zip(rows.offsets.tolist(), last.tolist())
    ]


def _joined(ids: "list[NDArray[Any]]") -> Any:
    import numpy as np

    return listed(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))


def _say(facts: ChatsFacts, params: TemplateParams, observer: Observer) -> None:
    observer.say(
        f"template: {facts.train_tokens:,} tokens in {facts.train_rows:,} train pairs, "
        f"{facts.supervised_tokens / facts.train_tokens:.0%} of them in answers; the longest conversation has "
        f"{facts.longest_row_tokens:,} tokens (at most {params.max_tokens:,})"
    )
    observer.say(
        f"template: {facts.held_out_rows:,} held-out pairs, {facts.held_out_prompts:,} held-out prompts"
    )
    if facts.left_out:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in facts.left_out.items())
        observer.say(f"template: left out: {causes}")


def _write_page(
    aside: Path,
    splits: Splits,
    sides: tuple[PairSide, PairSide],
    rows: RowMemo,
    tokenizer: Any,
    params: TemplateParams,
) -> None:
    report = json.loads((splits.path / "aside" / "report.json").read_bytes())
    tokens = {"max_tokens": params.max_tokens, **{side.name: side.spelled() for side in sides}}
    shown = [row for side in sides for row in side.shown(rows)]
    aside.mkdir()
    (aside / "report.html").write_text(data_page(report, tokens, shown, tokenizer), encoding="utf-8")
    (aside / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")

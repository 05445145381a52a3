"""`template`: conversations as token ids with a loss mask, in Arrow streams that `datasets` reads as they are."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

from retuner.artifacts import Base, ChatsFacts, Splits
from retuner.base import load_tokenizer
from retuner.errors import Refused
from retuner.observe import Observer
from retuner.params import TemplateParams
from retuner.rendering import Renderer
from retuner.token_rows import IGNORE, Row
from retuner.sample_page import ShownRow, draw_lengths, sample_page

BATCH_ROWS = 1000
CHECKED_ROWS = 64
"""How many plain rows are compared with the reference, `apply_chat_template`, at least."""
SHOWN_ROWS = {"train": 16, "held_out": 4}

Chat = dict[str, Any]
"""A line of train.jsonl or held_out.jsonl."""


def template(out: Path, splits: Splits, base: Base, params: TemplateParams, observer: Observer) -> ChatsFacts:
    """Write train.arrow, held_out.arrow and prompts.jsonl into `out`, and what people can look at into its aside.

    Errors: Refused when a chat is too long and `params.too_long` is `refuse`, when nothing to train or score on
    remains, and when the base's template cannot lay out the chats. The message names a chat.
    """
    _check_room(base, params)
    renderer = Renderer(load_tokenizer(base.path))
    check = _reference_check(renderer)
    train = Side("train", splits.facts.train_rows, params)
    held_out = Side("held_out", splits.facts.held_out_rows, params)
    prompts = HeldOutPrompts(renderer, params.max_tokens)
    for side in (train, held_out):
        with _arrow_stream(out / f"{side.name}.arrow") as write:
            for chats in _batches(splits.path / f"{side.name}.jsonl"):
                check(chats)
                write(side.take(chats, _encode(renderer, chats)))
                if side is held_out:
                    prompts.take(chats)
                done = len(train.lengths) + len(held_out.lengths)
                observer.progress("rows templated", done, train.expected + held_out.expected)
    if params.too_long == "refuse":
        _refuse_too_long(train, held_out)
    facts = ChatsFacts(
        train_rows=train.rows,
        held_out_rows=held_out.rows,
        held_out_prompts=prompts.write(out / "prompts.jsonl"),
        train_tokens=train.tokens,
        supervised_tokens=train.supervised,
        longest_row_tokens=max(train.longest, held_out.longest),
        left_out=dict(sorted((train.left_out + held_out.left_out + prompts.left_out).items())),
    )
    _refuse_nothing_left(facts, train, held_out)
    told = _told(facts, train, held_out)
    for line in told:
        observer.say(f"template: {line}")
    (out / "aside").mkdir()
    page = sample_page([*train.shown, *held_out.shown], renderer.tokenizer, told)
    (out / "aside" / "sample.html").write_text(page, encoding="utf-8")
    lengths = {"train": train.lengths, "held out": held_out.lengths}
    draw_lengths(out / "aside" / "lengths.png", lengths, params.max_tokens)
    return facts


@dataclass
class Side:
    """The train or the held-out conversations, and what becomes of them."""

    name: str
    expected: int
    params: TemplateParams
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    cut: int = 0
    stripped: int = 0
    """Conversations of which the tokenizer drops white space at the edge of a message."""
    left_out: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    """Tokens of every conversation, before it was cut or left out."""
    longest_before: tuple[int, str] = (0, "")
    """Tokens and name of the longest of them."""
    shown: list[ShownRow] = field(default_factory=list)

    def take(self, chats: Sequence[Chat], rows: Sequence[Row]) -> list[tuple[Chat, Row]]:
        """Those that are used, cut to `max_tokens` where params say so."""
        used = []
        every = max(1, self.expected // SHOWN_ROWS[self.name])
        for chat, row in zip(chats, rows, strict=True):
            tokens = len(row.input_ids)
            if tokens > self.longest_before[0]:
                self.longest_before = (tokens, _name(chat))
            self.lengths.append(tokens)
            self.stripped += row.stripped_chars > 0
            if (fitting := self._fit(row)) is None:
                continue
            used.append((chat, fitting))
            self.rows += 1
            self.tokens += len(fitting.input_ids)
            self.supervised += len(fitting.labels) - fitting.labels.count(IGNORE)
            self.longest = max(self.longest, len(fitting.input_ids))
            if len(self.shown) < SHOWN_ROWS[self.name] and len(self.lengths) > len(self.shown) * every:
                self.shown.append(ShownRow(self.name, chat["id"], fitting.input_ids, fitting.labels))
        return used

    def _fit(self, row: Row) -> Row | None:
        if len(row.input_ids) <= self.params.max_tokens:
            return row
        if self.params.too_long != "truncate":
            self.left_out[f"{self.name}_too_long"] += 1
        elif (short := cut(row, self.params.max_tokens)) is None:
            self.left_out[f"{self.name}_no_whole_answer"] += 1
        else:
            self.cut += 1
            return short
        return None


def cut(row: Row, max_tokens: int) -> Row | None:
    """The first `max_tokens` tokens, with loss on whole answers only; None when no answer is whole.

    An answer without its stop token would teach the model to stop in the middle.
    """
    labels = row.labels[:max_tokens]
    if row.labels[max_tokens] != IGNORE:
        while labels and labels[-1] != IGNORE:
            labels.pop()
        labels += [IGNORE] * (max_tokens - len(labels))
    if labels.count(IGNORE) == len(labels):
        return None
    return Row(row.input_ids[:max_tokens], labels, row.stripped_chars)


@dataclass
class HeldOutPrompts:
    """What is asked of every model: per group the context of a last answer, and the answers known to it."""

    renderer: Renderer
    max_tokens: int
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def take(self, chats: Sequence[Chat]) -> None:
        for chat in chats:
            *context, answer = chat["messages"]
            known = self.asked.setdefault(chat["group"], {"messages": context, "references": []})
            same = _after_first_answer(known["messages"]) == _after_first_answer(context)
            if same and answer["content"] not in known["references"]:
                known["references"].append(answer["content"])

    def write(self, path: Path) -> int:
        """One line for each that fits into `max_tokens`, by group; returns how many."""
        count = 0
        with path.open("w", encoding="utf-8", newline="\n") as lines:
            for group, asked in sorted(self.asked.items()):
                prompt_ids = self.renderer.encode_prompt(asked["messages"])
                if len(prompt_ids) > self.max_tokens:
                    self.left_out["held_out_prompt_too_long"] += 1
                    continue
                line = {"group": group, "prompt_ids": prompt_ids, **asked}
                lines.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
                count += 1
        return count


def _after_first_answer(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """What conversations of one group need not share: their prompts are alike but for case and space."""
    return list(dropwhile(lambda message: message["role"] != "assistant", messages))


def _batches(path: Path) -> Iterator[list[Chat]]:
    with path.open(encoding="utf-8") as lines:
        while chats := [json.loads(line) for line in islice(lines, BATCH_ROWS)]:
            yield chats


@contextmanager
def _arrow_stream(path: Path) -> Iterator[Callable[[list[tuple[Chat, Row]]], None]]:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema({"id": pa.string(), "group": pa.string(), "input_ids": tokens, "labels": tokens})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:

        def write(used: list[tuple[Chat, Row]]) -> None:
            columns = (
                [chat["id"] for chat, _ in used],
                [chat["group"] for chat, _ in used],
                [row.input_ids for _, row in used],
                [row.labels for _, row in used],
            )
            arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            stream.write_batch(pa.record_batch(arrays, schema=schema))

        yield write


def _encode(renderer: Renderer, chats: Sequence[Chat]) -> list[Row]:
    try:
        return renderer.encode_chats([chat["messages"] for chat in chats])
    except Refused:
        for chat in chats:
            with _named(chat):
                renderer.encode_chat(chat["messages"])
        raise


def _reference_check(renderer: Renderer) -> Callable[[Sequence[Chat]], None]:
    """Compares the first plain conversations, and the first of each sequence of roles, with the reference."""
    seen: Counter[tuple[str, ...]] = Counter()

    def check(chats: Sequence[Chat]) -> None:
        for chat in chats:
            messages = chat["messages"]
            roles = tuple(message["role"] for message in messages)
            if (seen.total() < CHECKED_ROWS or roles not in seen) and renderer.is_plain(messages):
                with _named(chat):
                    renderer.check(messages)
                seen[roles] += 1

    return check


@contextmanager
def _named(chat: Chat) -> Iterator[None]:
    """Whatever is refused inside names the chat."""
    try:
        yield
    except Refused as refusal:
        raise Refused(f"{_name(chat)}: {refusal.found}", refusal.expected, refusal.do) from refusal


def _name(chat: Chat) -> str:
    asked = next((message for message in chat["messages"] if message["role"] == "user"), chat["messages"][0])
    opening = " ".join(asked["content"].split())
    return f"chat {chat['id']} ({opening[:50]!r}{'…' if len(opening) > 50 else ''})"


# --- what is refused, and what is said


def _check_room(base: Base, params: TemplateParams) -> None:
    room = json.loads((base.path / "config.json").read_bytes()).get("max_position_embeddings")
    if room is not None and params.max_tokens > room:
        raise Refused(
            f"template.max_tokens is {params.max_tokens:,}, but the base takes {room:,} tokens",
            f"at most {room:,}",
            "lower template.max_tokens, or use a base with a longer context",
        )


def _refuse_too_long(train: Side, held_out: Side) -> None:
    count = train.left_out.total() + held_out.left_out.total()
    if not count:
        return
    total = len(train.lengths) + len(held_out.lengths)
    longest, name = max(train.longest_before, held_out.longest_before)
    raise Refused(
        f"too long are {count:,} of {total:,} chats; the longest is {name} with {longest:,} tokens",
        f"at most {train.params.max_tokens:,} tokens (template.max_tokens)",
        f"raise template.max_tokens to {longest}, or set template.too_long to leave_out or truncate",
    )


def _refuse_nothing_left(facts: ChatsFacts, train: Side, held_out: Side) -> None:
    for side, rows in ((train, facts.train_rows), (held_out, facts.held_out_rows)):
        if rows == 0:
            longest, name = side.longest_before
            raise Refused(
                f"none of the {len(side.lengths):,} {side.name} chats fits; "
                f"the longest is {name} with {longest:,} tokens",
                f"a whole answer within {side.params.max_tokens:,} tokens (template.max_tokens)",
                "raise template.max_tokens",
            )
    if facts.held_out_prompts == 0:
        raise Refused(
            f"none of the {len(held_out.lengths):,} held-out prompts fits",
            f"prompts of at most {held_out.params.max_tokens:,} tokens (template.max_tokens)",
            "raise template.max_tokens",
        )


def _told(facts: ChatsFacts, train: Side, held_out: Side) -> list[str]:
    share = facts.supervised_tokens / facts.train_tokens
    lines = [
        f"{facts.train_tokens:,} tokens in {facts.train_rows:,} train rows, {share:.0%} of them with loss; "
        f"the longest row has {facts.longest_row_tokens:,} tokens (at most {train.params.max_tokens:,})",
        f"{facts.held_out_rows:,} held-out rows, {facts.held_out_prompts:,} held-out prompts",
    ]
    if count := train.cut + held_out.cut:
        lines.append(f"chats cut at {train.params.max_tokens:,} tokens: {count:,}")
    if facts.left_out:
        lines.append(
            "left out: " + ", ".join(f"{cause} {count:,}" for cause, count in facts.left_out.items())
        )
    if count := train.stripped + held_out.stripped:
        lines.append(
            "chats with white space at the edge of a message, which this tokenizer drops beside control tokens: "
            f"{count:,}"
        )
    return lines

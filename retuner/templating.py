"""`template`: conversations as token ids with a loss mask, in Arrow streams that `datasets` reads as they are.

Rows that are in the memo are not tokenised again. What is written is put together in the order of the rows, so that the
same data gives the same bytes whatever was in the memo.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.artifacts import Base, ChatsFacts, PacksFacts, Splits
from retuner.base import load_tokenizer
from retuner.chat_lines import Chat, ChatLines, hex_strings
from retuner.data_page import data_page
from retuner.errors import Refused
from retuner.held_out_prompts import write_prompts
from retuner.observe import Observer
from retuner.pack_plan import plan_packs, write_packs
from retuner.params import TemplateParams
from retuner.rendering import Renderer
from retuner.row_memo import MISSING, Places, RowMemo
from retuner.template_side import Side, chat_name
from retuner.templating_ahead import Batches, Helped, TemplatingAhead
from retuner.token_rows import TokenRows
from retuner.words import CHECKED_CHARACTERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_ROWS = 1000
"""Rows of one Arrow batch."""
CHECKED_ROWS = 64
"""How many plain rows are compared with the reference, `apply_chat_template`, at least."""


def template(
    out: Path,
    work: Path,
    splits: Splits,
    base: Base,
    params: TemplateParams,
    memo: Path | None,
    observer: Observer,
) -> ChatsFacts:
    """Write train.arrow, held_out.arrow, prompts.jsonl and, where rows are packed, packs.arrow into `out`, and what
    people can look at into its aside. `memo` is a folder of the rows that were tokenised before for this base; with
    and without it the result is the same.

    Errors: Refused when a chat is too long and `params.too_long` is `refuse`, when nothing to train or score on
    remains, and when the base's template cannot lay out the chats. The message names a chat.
    """
    rows = RowMemo(memo or work / "rows")
    train, held_out = (Side(name, ChatLines(splits.path / f"{name}.jsonl")) for name in ("train", "held_out"))
    for side in (train, held_out):
        side.places = rows.find(side.lines.ids)
    total, new = len(train.lines) + len(held_out.lines), train.missing + held_out.missing
    with TemplatingAhead(rows.folder, train.missing_bytes + held_out.missing_bytes) as ahead:
        renderer = Renderer(load_tokenizer(base.path))
        check = ReferenceCheck(renderer)
        check.first(train.lines)
        for done in add_missing(renderer, rows, (train, held_out), ahead):
            observer.progress("rows templated", done, total)
    rows.flush()
    if new < total:
        observer.say(f"template: {total - new:,} of {total:,} rows were tokenised before, {new:,} are new")
    for side in (train, held_out):
        side.measure(rows, params)
        rows.let_go()
        check.others(side.lines, rows, side.places)
        rows.let_go()
    if params.too_long == "refuse":
        _refuse_too_long(train, held_out, params)
    with ThreadPoolExecutor(1) as beside:
        writing = beside.submit(_write_rows, out / "train.arrow", train, rows, params)
        _write_rows(out / "held_out.arrow", held_out, rows, params)
        prompts, held_out.left_out["held_out_prompt_too_long"] = write_prompts(
            out / "prompts.jsonl", held_out.lines, rows, held_out.places, params.max_tokens
        )
        packs = _pack(out / "packs.arrow", train, params.pack_tokens)
        writing.result()
    for side in (train, held_out):
        side.lines.forget_groups()
    left_out = train.left_out + held_out.left_out
    facts = ChatsFacts(
        train_rows=train.rows,
        held_out_rows=held_out.rows,
        held_out_prompts=prompts,
        train_tokens=train.tokens,
        supervised_tokens=train.supervised,
        longest_row_tokens=max(train.longest, held_out.longest),
        left_out=dict(sorted(left_out.items())),
        packs=packs,
    )
    _refuse_nothing_left(facts, train, held_out, params)
    for line in _told(facts, train, held_out, params):
        observer.say(f"template: {line}")
    _write_page(out / "aside", splits, facts, (train, held_out), rows, renderer.tokenizer, params)
    if memo:
        rows.compact(Places.joined([train.places, held_out.places]))
    return facts


def add_missing(
    renderer: Renderer, rows: RowMemo, sides: Sequence[Side], ahead: TemplatingAhead | None = None
) -> Iterator[int]:
    """Tokenise what the memo does not hold; tells how many rows are done, those it holds included."""
    total = sum(len(side.lines) for side in sides)
    done = total - sum(side.missing for side in sides)
    yield done
    batches: Batches = deque(_missing(sides))
    taking = ahead.taking(renderer, batches) if ahead else nullcontext(Helped())
    with taking as helped:
        for side, numbers in _each(batches):
            _add(renderer, rows, side, numbers)
            done += len(numbers)
            yield done + helped.rows
    renderer.encoder.words.forget()
    if helped.files:
        rows.flush()
        rows.take_in(helped.files)
        for side in sides:
            side.look_again(rows)
    for side, numbers in _missing(sides):
        _add(renderer, rows, side, numbers)
    yield total


def _missing(sides: Sequence[Side]) -> "Iterator[tuple[Side, NDArray[Any]]]":
    """Batches of the rows that the memo does not hold."""
    import numpy as np

    for side in sides:
        for numbers in side.lines.batches(np.flatnonzero(side.places.file == MISSING)):
            yield side, numbers


def _each(batches: Batches) -> "Iterator[tuple[Side, NDArray[Any]]]":
    """From the front, until there is none: others take from the end."""
    with suppress(IndexError):
        while True:
            yield batches.popleft()


def _add(renderer: Renderer, rows: RowMemo, side: Side, numbers: "NDArray[Any]") -> None:
    chats = side.lines.read(numbers)
    encoded = _encode(renderer, chats)
    traits = renderer.encoder.traits([chat["messages"] for chat in chats])
    places = rows.add(side.lines.ids[numbers], encoded, *traits)
    side.places.file[numbers], side.places.row[numbers] = places.file, places.row


def _encode(renderer: Renderer, chats: Sequence[Chat]) -> TokenRows:
    try:
        return renderer.encode_chats([chat["messages"] for chat in chats])
    except Refused:
        for chat in chats:
            with _named(chat):
                renderer.encode_chat(chat["messages"])
        raise


class ReferenceCheck:
    """Compares the first plain conversations, and the first of each sequence of roles, with the reference. Which ones
    follows from the data alone, not from what is in the memo. Errors: Refused, naming the chat."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self.checked = 0
        self.roles: set[str] = set()
        self._early: tuple[ChatLines, int] | None = None

    def first(self, lines: ChatLines) -> None:
        """Before anything is tokenised for long."""
        import numpy as np

        count = min(CHECKED_ROWS, len(lines))
        self._early = lines, count
        chats = lines.read(np.arange(count))
        self._check([chat for chat in chats if self.renderer.is_plain(chat["messages"])])

    def others(self, lines: ChatLines, rows: RowMemo, places: Places) -> None:
        import numpy as np

        plain = rows.column("plain", places).astype(bool)
        if self._early and self._early[0] is lines:
            plain[: self._early[1]] = False
        numbers: Any = np.flatnonzero(plain).astype(np.int32)
        roles, names = rows.roles(places)
        first: Any = np.full(len(names), -1, np.int32)
        first[roles[numbers][::-1]] = numbers[::-1]  # of equal places the last one written stays
        of_each = zip(first.tolist(), names, strict=True)
        wanted = [number for number, name in of_each if number >= 0 and name not in self.roles]
        wanted += numbers[: max(0, CHECKED_ROWS - self.checked)].tolist()
        self._check(lines.read(np.unique(np.array(wanted, np.int64))))

    def _check(self, chats: Sequence[Chat]) -> None:
        chats = [_beginning(chat) for chat in chats]
        for chat, row in zip(chats, _encode(self.renderer, chats), strict=True):
            with _named(chat):
                self.renderer.check(chat["messages"], row.input_ids)
            self.roles.add("\n".join(message["role"] for message in chat["messages"]))
        self.checked += len(chats)


def _beginning(chat: Chat) -> Chat:
    """Each message up to CHECKED_CHARACTERS."""
    messages = [
        {**message, "content": message["content"][:CHECKED_CHARACTERS]} for message in chat["messages"]
    ]
    return {**chat, "messages": messages}


@contextmanager
def _named(chat: Chat) -> Iterator[None]:
    """Whatever is refused inside names the chat."""
    try:
        yield
    except Refused as refusal:
        raise Refused(f"{chat_name(chat)}: {refusal.found}", refusal.expected, refusal.do) from refusal


# --- what is written


def _write_rows(path: Path, side: Side, rows: RowMemo, params: TemplateParams) -> None:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema({"id": pa.string(), "group": pa.string(), "input_ids": tokens, "labels": tokens})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for first in range(0, side.rows, BATCH_ROWS):
            numbers = side.kept[first : first + BATCH_ROWS]
            batch = rows.rows(side.places[numbers], params.max_tokens)
            columns = [
                hex_strings(side.lines.ids[numbers]),
                hex_strings(side.lines.groups[numbers]),
                listed(batch.input_ids, batch.offsets),
                listed(batch.labels(), batch.offsets),
            ]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            rows.let_go()


def listed(values: "NDArray[Any]", offsets: "NDArray[Any]") -> Any:
    """An Arrow array of lists of int32; `offsets` say where each begins in `values`, and where the last ends."""
    import numpy as np
    import pyarrow as pa

    flat = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
    ends = pa.py_buffer(offsets.astype(np.int32))
    return pa.Array.from_buffers(pa.list_(pa.int32()), len(offsets) - 1, [None, ends], children=[flat])


def _pack(path: Path, train: Side, pack_tokens: int | None) -> PacksFacts | None:
    if pack_tokens is None or not train.rows:
        return None
    count = write_packs(path, plan_packs(train.kept_tokens, pack_tokens), pack_tokens)
    return PacksFacts(
        count=count,
        fill=train.tokens / (count * pack_tokens),
        rows_too_long=train.left_out.total(),
    )


def _write_page(
    aside: Path,
    splits: Splits,
    facts: ChatsFacts,
    sides: tuple[Side, Side],
    rows: RowMemo,
    tokenizer: Any,
    params: TemplateParams,
) -> None:
    report = json.loads((splits.path / "aside" / "report.json").read_bytes())
    tokens = {
        "max_tokens": params.max_tokens,
        **{side.name: side.spelled() for side in sides},
        "packs": facts.packs and facts.packs.model_dump(),
    }
    shown = [row for side in sides for row in side.shown(rows, params.max_tokens)]
    aside.mkdir()
    (aside / "report.html").write_text(data_page(report, tokens, shown, tokenizer), encoding="utf-8")
    (aside / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")


# --- what is refused, and what is said


def check_room(base: Base, params: TemplateParams) -> None:
    """Errors: Refused when rows may have more tokens than the base takes."""
    room = json.loads((base.path / "config.json").read_bytes()).get("max_position_embeddings")
    if room is not None and params.max_tokens > room:
        raise Refused(
            f"template.max_tokens is {params.max_tokens:,}, but the base takes {room:,} tokens",
            f"at most {room:,}",
            "lower template.max_tokens, or use a base with a longer context",
        )


def _refuse_too_long(train: Side, held_out: Side, params: TemplateParams) -> None:
    count = train.left_out.total() + held_out.left_out.total()
    if not count:
        return
    total = len(train.lines) + len(held_out.lines)
    side = max(train, held_out, key=lambda side: side.longest_before)
    raise Refused(
        f"too long are {count:,} of {total:,} chats; the longest is {side.name_of(side.lengths.argmax())} with "
        f"{side.longest_before:,} tokens",
        f"at most {params.max_tokens:,} tokens (template.max_tokens)",
        f"raise template.max_tokens to {side.longest_before}, or set template.too_long to leave_out or truncate",
    )


def _refuse_nothing_left(facts: ChatsFacts, train: Side, held_out: Side, params: TemplateParams) -> None:
    for side in (train, held_out):
        if side.rows == 0:
            raise Refused(
                f"none of the {len(side.lines):,} {side.name} chats fits; "
                f"the shortest is {side.name_of(side.shortest)} with {side.lengths[side.shortest]:,} tokens",
                f"a whole answer within {params.max_tokens:,} tokens (template.max_tokens)",
                f"raise template.max_tokens, to {side.lengths[side.shortest]} for this one",
            )
    if facts.held_out_prompts == 0:
        raise Refused(
            f"none of the {len(held_out.lines):,} held-out prompts fits",
            f"prompts of at most {params.max_tokens:,} tokens (template.max_tokens)",
            "raise template.max_tokens",
        )


def _told(facts: ChatsFacts, train: Side, held_out: Side, params: TemplateParams) -> list[str]:
    share = facts.supervised_tokens / facts.train_tokens
    lines = [
        f"{facts.train_tokens:,} tokens in {facts.train_rows:,} train rows, {share:.0%} of them with loss; "
        f"the longest row has {facts.longest_row_tokens:,} tokens (at most {params.max_tokens:,})",
        f"{facts.held_out_rows:,} held-out rows, {facts.held_out_prompts:,} held-out prompts",
    ]
    if packs := facts.packs:
        lines.append(
            f"{packs.count:,} packs of {params.pack_tokens:,} tokens, {100 * packs.fill:.1f} % full; "
            f"rows split 0, too long {packs.rows_too_long:,}"
        )
    if count := train.cut + held_out.cut:
        lines.append(f"chats cut at {params.max_tokens:,} tokens: {count:,}")
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

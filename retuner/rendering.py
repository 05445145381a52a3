"""Conversations to token ids and a loss mask, laid out by the tokenizer's own chat template.

Every segment between two control tokens of the template is tokenised as plain text by a tokenizer that knows no control
tokens. So text inside a message can never become one, while for other text the ids are those of
`apply_chat_template`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from retuner.errors import Refused
from retuner.layout import ChatTemplate, Control, Layout
from retuner.token_rows import TokenRows
from retuner.words import Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

Message = Mapping[str, str]


class Plan(NamedTuple):
    """A layout, and the messages whose numbers stand in it."""

    layout: Layout
    messages: Sequence[Message]


class Renderer:
    """One tokenizer's chat template, safely and fast. Errors of every method: Refused."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)

    @cached_property
    def words(self) -> Words:
        from tokenizers import Tokenizer

        backend = self.tokenizer.backend_tokenizer
        plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
        return Words(plain, {id: token.content for id, token in self.template.controls.items()})

    @cached_property
    def stop_id(self) -> int:
        """The control token that ends an assistant's turn."""
        items = self.template.of_chat(("user", "assistant")).items
        return next(item.id for item in items if isinstance(item, Control) and item.supervised)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Input ids and labels of a whole conversation, with loss on each assistant's content and its stop token."""
        row = self.encode_chats([messages])[0]
        return row.input_ids, row.labels

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> TokenRows:
        """The rows of many conversations, in order."""
        return self._encode([Plan(self.template.of_chat(_roles(chat)), chat) for chat in chats])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Input ids of a context whose answer is asked for; training rows of longer chats begin with them."""
        return self.encode_prompts([messages])[0].input_ids

    def encode_prompts(self, contexts: Sequence[Sequence[Message]]) -> TokenRows:
        """As `encode_prompt`, of many contexts, in order."""
        return self._encode(
            [Plan(self.template.of_context(_roles(asked), True), asked) for asked in contexts]
        )

    def encode_completion(self, messages: Sequence[Message], answer: str) -> list[int]:
        """What follows `encode_prompt(messages)` in a training row: the answer and the stop token, all with loss."""
        return self.encode_completions([[*messages, {"role": "assistant", "content": answer}]])[0].input_ids

    def encode_completions(self, chats: Sequence[Sequence[Message]]) -> TokenRows:
        """As `encode_completion`, of the last answer of each of many chats, in order."""
        plans = []
        for chat in chats:
            begin = len(self.template.of_context(_roles(chat[:-1]), True).items)
            plans.append(Plan(Layout(self.template.of_chat(_roles(chat)).items[begin : begin + 2]), chat))
        return self._encode(plans)

    def is_plain(self, messages: Sequence[Message]) -> bool:
        """Whether `apply_chat_template` must give the same ids: no control text, and no answer that begins with
        white space, which would melt into the template's own line break if it were not cut off from the prompt."""
        # NUL stands in no control token, so none comes of two messages.
        return not self.template.control_text.search("\0".join([m["content"] for m in messages])) and not any(
            m["content"][:1].isspace() for m in messages if m["role"] == "assistant"
        )

    def check(self, messages: Sequence[Message], ours: list[int] | None = None) -> None:
        """Compare the ids of a plain conversation, `ours`, with the reference, `apply_chat_template`."""
        ours = ours or self.encode_chat(messages)[0]
        reference = self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
        if ours == reference:
            return
        at = next(
            (n for n, pair in enumerate(zip(ours, reference, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(reference)),
        )
        raise Refused(
            f"the chat template cannot be laid out piece by piece: at token {at} it gives {reference[at : at + 3]}, "
            f"its pieces {ours[at : at + 3]}",
            "a template that depends on the roles alone, whose turns begin and end with control tokens",
            "use another base, or another chat_template in a local copy of this one",
        )

    def _encode(self, plans: Sequence[Plan]) -> TokenRows:
        """All rows as one sequence of items, these as one sequence of units, and those as one of tokens."""
        import numpy as np

        texts: list[str] = []
        stripped: list[int] = []
        for layout, messages in plans:
            contents = _contents(messages)
            own = [segment.text(contents) for segment in layout.segments]
            chars = layout.template_chars + sum([len(contents[number]) for number in layout.said])
            stripped.append(chars - sum(map(len, own)))
            texts += own
        try:
            segment_codes, segment_units = self.words.codes(texts)
        except UnicodeEncodeError:
            for plan in plans:
                _refuse_half_characters(plan.messages)
            raise

        controls = _joined([layout.controls for layout, _ in plans], np.int64)
        supervised = _joined([layout.supervised for layout, _ in plans], np.bool_)
        items = _ends([len(layout.items) for layout, _ in plans])
        is_control = controls >= 0
        units: Any = np.ones(len(controls), np.int64)
        units[~is_control] = segment_units
        codes = np.empty(units.sum(), np.int64)
        unit_is_control: Any = np.repeat(is_control, units)
        codes[unit_is_control] = self.words.control_codes(controls[is_control])
        codes[~unit_is_control] = segment_codes

        item_tokens = _ends(self.words.lengths(codes))[_ends(units)]
        offsets = item_tokens[items]
        # A span is a run of supervised items of one row.
        before, behind = np.roll(supervised, 1), np.roll(supervised, -1)
        before[items[:-1]] = behind[items[1:] - 1] = False
        first, last = np.flatnonzero(supervised & ~before), np.flatnonzero(supervised & ~behind)
        row = np.repeat(np.arange(len(plans)), np.diff(items))[first]
        spans = np.stack([item_tokens[first], item_tokens[last + 1]], axis=1) - offsets[row][:, None]
        return TokenRows(
            input_ids=self.words.ids(codes),
            offsets=offsets,
            spans=spans.astype(np.int32),
            span_offsets=_ends(np.bincount(row, minlength=len(plans))),
            stripped_chars=np.array(stripped, np.int32),
        )


def _joined(arrays: "list[NDArray[Any]]", kind: Any) -> "NDArray[Any]":
    import numpy as np

    return np.concatenate([np.zeros(0, kind), *arrays])


def _ends(lengths: Any) -> "NDArray[Any]":
    """Where each of several things laid end to end begins, and where the last ends."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple([message["role"] for message in messages])


def _contents(messages: Sequence[Message]) -> list[str]:
    """Errors: Refused for what is no text with something in it."""
    contents = [message["content"] for message in messages]
    for number, content in enumerate(contents):
        if not isinstance(content, str) or not content:
            raise Refused(
                f"message {number + 1} ({messages[number]['role']}) has no text",
                "a text in every message",
                "leave it out, or say it",
            )
    return contents


def _refuse_half_characters(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, 1):
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            half = ord(message["content"][error.start])
            raise Refused(
                f"message {number} ({message['role']}) has half a character, \\u{half:04x}",
                "whole characters",
                "write surrogates in pairs",
            ) from None

"""Chats of known layouts as token ids and a loss mask.

Every segment between two control tokens is tokenised as plain text by a tokenizer that knows no control tokens. So text
inside a message can never become one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from retuner.errors import Refused
from retuner.layout import Layout, control_pattern
from retuner.token_rows import TokenRows
from retuner.words import Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

Message = Mapping[str, str]


class Plan(NamedTuple):
    """A layout, and the messages whose numbers stand in it."""

    layout: Layout
    messages: Sequence[Message]


class ChatEncoder:
    """A tokenizers.Tokenizer at work on chats. Errors of every method: Refused."""

    def __init__(self, backend: Any, layout_of: Callable[[tuple[str, ...]], Layout]):
        """`layout_of` says how a whole chat of some roles is laid out."""
        self.backend, self.layout_of = backend, layout_of
        self.controls = backend.get_added_tokens_decoder()
        self.control_text = control_pattern(self.controls)

    @cached_property
    def words(self) -> Words:
        from tokenizers import Tokenizer

        plain = Tokenizer(self.backend.model)
        if self.backend.normalizer is not None:
            plain.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self.backend.pre_tokenizer
        return Words(plain, {id: token.content for id, token in self.controls.items()})

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> TokenRows:
        """The rows of whole conversations, in order."""
        return self.encode([Plan(self.layout_of(roles_of(chat)), chat) for chat in chats])

    def traits(self, chats: Sequence[Sequence[Message]]) -> tuple[list[str], list[bool]]:
        """Of each chat its roles, a line each, and whether it is plain."""
        roles = ["\n".join([message["role"] for message in chat]) for chat in chats]
        return roles, [self.is_plain(chat) for chat in chats]

    def is_plain(self, messages: Sequence[Message]) -> bool:
        """Whether `apply_chat_template` must give the same ids: no control text, and no answer that begins with
        white space, which would melt into the template's own line break if it were not cut off from the prompt."""
        # NUL stands in no control token, so none comes of two messages.
        return not self.control_text.search("\0".join([m["content"] for m in messages])) and not any(
            m["content"][:1].isspace() for m in messages if m["role"] == "assistant"
        )

    def encode(self, plans: Sequence[Plan]) -> TokenRows:
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
        item_units = _ends(units)
        control_units = item_units[:-1][is_control]
        codes: Any = np.empty(item_units[-1], np.int64)
        is_text: Any = np.ones(len(codes), np.bool_)
        is_text[control_units] = False
        codes[control_units] = self.words.control_codes(controls[is_control])
        codes[is_text] = segment_codes
        ids, unit_tokens = self.words.tokens(codes)

        item_tokens = unit_tokens[item_units]
        offsets = item_tokens[items]
        # A span is a run of supervised items of one row.
        before, behind = np.roll(supervised, 1), np.roll(supervised, -1)
        before[items[:-1]] = behind[items[1:] - 1] = False
        first, last = np.flatnonzero(supervised & ~before), np.flatnonzero(supervised & ~behind)
        row = np.repeat(np.arange(len(plans)), np.diff(items))[first]
        spans = np.stack([item_tokens[first], item_tokens[last + 1]], axis=1) - offsets[row][:, None]
        return TokenRows(
            input_ids=ids,
            offsets=offsets,
            spans=spans.astype(np.int32),
            span_offsets=_ends(np.bincount(row, minlength=len(plans))),
            stripped_chars=np.array(stripped, np.int32),
        )


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple([message["role"] for message in messages])


def _joined(arrays: "list[NDArray[Any]]", kind: Any) -> "NDArray[Any]":
    import numpy as np

    return np.concatenate([np.zeros(0, kind), *arrays])


def _ends(lengths: Any) -> "NDArray[Any]":
    """Where each of several things laid end to end begins, and where the last ends."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


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

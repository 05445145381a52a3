"""Conversations to token ids and a loss mask, laid out by the tokenizer's own chat template.

The template is rendered once for each sequence of roles, with stand-ins for the contents. What comes out is
cut at its control tokens, and every segment between two of them is tokenised as plain text by a tokenizer that
knows no control tokens. So text inside a message can never become one, while for other text the ids
are those of `apply_chat_template`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from retuner.errors import Refused

IGNORE = -100
"""The label of a token without loss, as torch's cross_entropy has it."""

# What `\s` and char::is_whitespace mean in Rust, where the tokenizer strips around control tokens. Python's
# str.strip() takes \x1c to \x1f too.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Control:
    """A control token of the template."""

    id: int
    supervised: bool
    """It ends an assistant's turn."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What is tokenised in one piece: template text, and the numbers of messages whose content stands there."""

    parts: tuple[str | int, ...]
    strip_left: bool
    strip_right: bool
    supervised: bool

    def text(self, contents: Sequence[str] | Mapping[int, str]) -> str:
        text = "".join([contents[part] if isinstance(part, int) else part for part in self.parts])
        if self.strip_left:
            text = text.lstrip(WHITE_SPACE)
        return text.rstrip(WHITE_SPACE) if self.strip_right else text

    def stripped_chars(self, contents: Sequence[str], text: str) -> int:
        """How many characters of the contents are not in `text`, which was made of them."""
        said = [contents[part] for part in self.parts if isinstance(part, int)]
        marks = {part: "x" for part in self.parts if isinstance(part, int)}
        template_chars = len(self.text(marks)) - len(said)
        return template_chars + sum(map(len, said)) - len(text)


Layout = tuple[Control | Segment, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the same id where there is loss, IGNORE elsewhere."""
    stripped_chars: int
    """White space at the edges of messages that the tokenizer drops beside control tokens."""


class Renderer:
    """One tokenizer's chat template, safely and fast. Errors of every method: Refused."""

    def __init__(self, tokenizer: Any):
        from tokenizers import Tokenizer

        if "strftime_now" in tokenizer.get_chat_template():
            raise Refused(
                "the chat template writes today's date into every chat",
                "a template that gives the same tokens every day",
                "take the date out of chat_template and use the folder as a local base",
            )
        backend = tokenizer.backend_tokenizer
        self.tokenizer = tokenizer
        self.plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self.plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self.plain.pre_tokenizer = backend.pre_tokenizer
        self._added = backend.get_added_tokens_decoder()
        self._id_of = {token.content: id for id, token in self._added.items()}
        longest_first = sorted(self._id_of, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._chat_layouts: dict[tuple[str, ...], Layout] = {}
        self._layouts: dict[tuple[tuple[str, ...], bool], Layout] = {}

    @cached_property
    def stop_id(self) -> int:
        """The control token that ends an assistant's turn."""
        layout = self._chat_layout(("user", "assistant"))
        return next(item.id for item in layout if isinstance(item, Control) and item.supervised)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Input ids and labels of a whole conversation, with loss on each assistant's content and its stop token."""
        row = self.encode_chats([messages])[0]
        return row.input_ids, row.labels

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[Row]:
        """The rows of many conversations, in order. Equal segments are tokenised once."""
        plans = [(self._chat_layout(_roles(messages)), _contents(messages)) for messages in chats]
        return self._encode(plans)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Input ids of a context whose answer is asked for; training rows of longer chats begin with them."""
        return self._encode([(self._layout(_roles(messages), True), _contents(messages))])[0].input_ids

    def encode_completion(self, messages: Sequence[Message], answer: str) -> list[int]:
        """What follows `encode_prompt(messages)` in a training row: the answer and the stop token, all with loss."""
        chat = [*messages, {"role": "assistant", "content": answer}]
        prompt_items = len(self._layout(_roles(messages), True))
        layout = self._chat_layout(_roles(chat))[prompt_items : prompt_items + 2]
        return self._encode([(layout, _contents(chat))])[0].input_ids

    def is_plain(self, messages: Iterable[Message]) -> bool:
        """Whether `apply_chat_template` must give the same ids: no control text, and no answer that begins with
        white space, which would melt into the template's own line break if it were not cut off from the prompt."""
        return not any(
            self._control_text.search(message["content"])
            or (message["role"] == "assistant" and message["content"][:1].isspace())
            for message in messages
        )

    def check(self, messages: Sequence[Message]) -> None:
        """Compare a plain conversation with the reference, `apply_chat_template`."""
        ours = self.encode_chat(messages)[0]
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

    # --- the template, once per sequence of roles

    def _chat_layout(self, roles: tuple[str, ...]) -> Layout:
        """The layout of a whole chat, in which every answer stands right behind the prompt that asks for it."""
        if roles in self._chat_layouts:
            return self._chat_layouts[roles]
        layout = self._layout(roles, False)
        for turn in (number for number, role in enumerate(roles) if role == "assistant"):
            prompt = self._layout(roles[:turn], True)
            answer = layout[len(prompt) : len(prompt) + 1]
            if layout[: len(prompt)] != prompt or not any(
                turn in getattr(item, "parts", ()) for item in answer
            ):
                raise Refused(
                    f"the chat template does not put message {turn + 1} right behind the prompt that asks for it",
                    "a template whose generation prompt begins the assistant's turn",
                    "use another base, or another chat_template in a local copy of this one",
                )
        self._chat_layouts[roles] = layout
        return layout

    def _layout(self, roles: tuple[str, ...], ask: bool) -> Layout:
        if (roles, ask) not in self._layouts:
            self._layouts[roles, ask] = self._cut(self._pieces(roles, ask), roles)
        return self._layouts[roles, ask]

    def _pieces(self, roles: tuple[str, ...], ask: bool) -> list[str | int]:
        """Template text and message numbers in the order of the rendered chat; numbers stand for contents."""
        from jinja2 import TemplateError

        if not roles:
            raise Refused("a chat without messages", "at least one message", "say something")
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        # White space around the marks shows whether the template trims.
        stand_ins = [f" \n{mark}\n " for mark in marks]
        messages = [
            {"role": role, "content": content} for role, content in zip(roles, stand_ins, strict=True)
        ]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise Refused(
                f"the chat template refuses the roles {', '.join(roles)}: {error}",
                "roles that this base was trained with",
                "change the chats, or use another base",
            ) from error
        for role, mark, stand_in in zip(roles, marks, stand_ins, strict=True):
            if text.count(mark) != 1:
                raise Refused(
                    f"the chat template {'repeats' if mark in text else 'drops'} what the role {role!r} says",
                    "every message in the prompt, once",
                    f"take {role!r} messages out of the chats, or use another base",
                )
            if stand_in not in text:
                raise Refused(
                    f"the chat template changes the text of {role!r} messages, such as the white space around it",
                    "a template that puts every message in as it is",
                    "use another base, or another chat_template in a local copy of this one",
                )
        pieces = re.split(" \n\ue000([0-9]+)\ue001\n ", text)
        return [int(piece) if odd % 2 else piece for odd, piece in enumerate(pieces)]

    def _cut(self, pieces: list[str | int], roles: tuple[str, ...]) -> Layout:
        """Cut at the control tokens of the template's text, and where an assistant's content begins."""
        layout: list[Control | Segment] = []
        parts: list[str | int] = []
        strip_left = supervised = False

        def close(strip_right: bool) -> None:
            if parts:
                layout.append(Segment(tuple(parts), strip_left, strip_right, supervised))
            parts.clear()

        for piece in pieces:
            if isinstance(piece, int):
                if supervised:
                    break
                if roles[piece] == "assistant":
                    # Still white space only since the control token, so what it strips reaches into the content.
                    reaches = strip_left and not "".join(map(str, parts)).strip(WHITE_SPACE)
                    close(strip_right=False)
                    strip_left, supervised = reaches, True
                parts.append(piece)
                continue
            end = 0
            for found in self._control_text.finditer(piece):
                token = self._added[self._id_of[found[0]]]
                if text := piece[end : found.start()]:
                    parts.append(text)
                close(strip_right=token.lstrip)
                layout.append(Control(self._id_of[found[0]], supervised))
                strip_left, supervised, end = token.rstrip, False, found.end()
            if text := piece[end:]:
                parts.append(text)
        if supervised:
            raise Refused(
                "the chat template ends an assistant's turn without a control token",
                "a token by which the model can say that it is done",
                "use an instruct model, or another chat_template in a local copy of this one",
            )
        close(strip_right=False)
        return tuple(layout)

    # --- contents into layouts

    def _encode(self, plans: list[tuple[Layout, list[str]]]) -> list[Row]:
        texts = [[item.text(said) for item in layout if isinstance(item, Segment)] for layout, said in plans]
        ids_of = self._tokenise(list(dict.fromkeys(text for row in texts for text in row)))
        rows = []
        for (layout, said), row_texts in zip(plans, texts, strict=True):
            input_ids: list[int] = []
            labels: list[int] = []
            stripped, waiting = 0, iter(row_texts)
            for item in layout:
                if isinstance(item, Control):
                    ids = [item.id]
                else:
                    text = next(waiting)
                    ids = ids_of[text]
                    stripped += item.stripped_chars(said, text)
                input_ids += ids
                labels += ids if item.supervised else [IGNORE] * len(ids)
            rows.append(Row(input_ids, labels, stripped))
        return rows

    def _tokenise(self, texts: list[str]) -> dict[str, list[int]]:
        ids_of = {}
        encodings = self.plain.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            if not self._added.keys().isdisjoint(ids):
                token = next(self._added[id].content for id in ids if id in self._added)
                raise Refused(
                    f"the tokenizer turns plain text into its control token {token!r}: {text[:60]!r}",
                    "a tokenizer with a token for every character, as byte-level and byte-fallback ones have",
                    "take the characters out that it does not know, or use another base",
                )
            ids_of[text] = ids
        return ids_of


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _contents(messages: Sequence[Message]) -> list[str]:
    """Errors: Refused for what is no text with something in it."""
    contents = []
    for number, message in enumerate(messages, 1):
        content = message["content"]
        if not isinstance(content, str) or not content:
            raise Refused(
                f"message {number} ({message['role']}) has no text",
                "a text in every message",
                "leave it out, or say it",
            )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"message {number} ({message['role']}) has half a character, \\u{ord(content[error.start]):04x}",
                "whole characters",
                "write surrogates in pairs",
            ) from None
        contents.append(content)
    return contents

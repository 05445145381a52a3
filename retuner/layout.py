"""The layout of a chat template: its control tokens, and what is tokenised between them.

The template is rendered once for each sequence of roles, with stand-ins for the contents. What comes out is
cut at its control tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from retuner.errors import Refused
from retuner.words import WHITE_SPACE

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    """Not empty. Template text at an edge that is stripped is stripped already."""
    strip_left: bool
    strip_right: bool
    supervised: bool

    def text(self, contents: Sequence[str] | Mapping[int, str]) -> str:
        if len(self.parts) == 1:
            (part,) = self.parts
            text = contents[part] if isinstance(part, int) else part
        else:
            text = "".join([contents[part] if isinstance(part, int) else part for part in self.parts])
        if self.strip_left:
            text = text.lstrip(WHITE_SPACE)
        return text.rstrip(WHITE_SPACE) if self.strip_right else text


@dataclass(frozen=True)
class Layout:
    """What a chat of certain roles is made of, in order."""

    items: tuple[Control | Segment, ...]

    def spelled(self) -> list[dict[str, Any]]:
        """Plain JSON values, see `from_spelled`."""
        return [asdict(item) for item in self.items]

    @classmethod
    def from_spelled(cls, items: Sequence[dict[str, Any]]) -> "Layout":
        return cls(
            tuple(
                Segment(**{**item, "parts": tuple(item["parts"])}) if "parts" in item else Control(**item)
                for item in items
            )
        )

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(item for item in self.items if isinstance(item, Segment))

    @cached_property
    def controls(self) -> "NDArray[Any]":
        """The id of every item that is a control token, -1 for the others."""
        import numpy as np

        return np.array([item.id if isinstance(item, Control) else -1 for item in self.items], np.int64)

    @cached_property
    def supervised(self) -> "NDArray[Any]":
        import numpy as np

        return np.array([item.supervised for item in self.items], np.bool_)

    @cached_property
    def said(self) -> tuple[int, ...]:
        """The numbers of the messages whose contents stand in it."""
        return tuple(part for item in self.segments for part in item.parts if isinstance(part, int))

    @cached_property
    def template_chars(self) -> int:
        """How many characters of the segments are none of a message's."""
        marks = dict.fromkeys(self.said, "x")
        return sum(len(segment.text(marks)) for segment in self.segments) - len(self.said)


def control_pattern(controls: Mapping[int, Any]) -> re.Pattern[str]:
    """Finds the texts of control tokens, given as tokenizers has them: AddedTokens by id."""
    longest_first = sorted((token.content for token in controls.values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class ChatTemplate:
    """The layouts of one tokenizer's chat template. Errors of every method: Refused."""

    def __init__(self, tokenizer: Any):
        if "strftime_now" in tokenizer.get_chat_template():
            raise Refused(
                "the chat template writes today's date into every chat",
                "a template that gives the same tokens every day",
                "take the date out of chat_template and use the folder as a local base",
            )
        self.tokenizer = tokenizer
        self.controls = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._id_of = {token.content: id for id, token in self.controls.items()}
        self.control_text = control_pattern(self.controls)
        self._of_chat: dict[tuple[str, ...], Layout] = {}
        self._of_context: dict[tuple[tuple[str, ...], bool], Layout] = {}

    def of_chat(self, roles: tuple[str, ...]) -> Layout:
        """The layout of a whole chat, in which every answer stands right behind the prompt that asks for it."""
        if roles in self._of_chat:
            return self._of_chat[roles]
        layout = self.of_context(roles, False)
        for turn in (number for number, role in enumerate(roles) if role == "assistant"):
            prompt = self.of_context(roles[:turn], True).items
            answer = layout.items[len(prompt) : len(prompt) + 1]
            if layout.items[: len(prompt)] != prompt or not any(
                turn in getattr(item, "parts", ()) for item in answer
            ):
                raise Refused(
                    f"the chat template does not put message {turn + 1} right behind the prompt that asks for it",
                    "a template whose generation prompt begins the assistant's turn",
                    "use another base, or another chat_template in a local copy of this one",
                )
        self._of_chat[roles] = layout
        return layout

    def of_context(self, roles: tuple[str, ...], ask: bool) -> Layout:
        """The layout of some messages, with the prompt for an answer behind them or not."""
        if (roles, ask) not in self._of_context:
            self._of_context[roles, ask] = self._cut(self._pieces(roles, ask), roles)
        return self._of_context[roles, ask]

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
        items: list[Control | Segment] = []
        parts: list[str | int] = []
        strip_left = supervised = False

        def close(strip_right: bool) -> None:
            left, right = strip_left, strip_right
            while left and parts and isinstance(parts[0], str):
                parts[0] = parts[0].lstrip(WHITE_SPACE)
                left = not parts[0]
                del parts[: int(left)]
            while right and parts and isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip(WHITE_SPACE)
                right = not parts[-1]
                del parts[len(parts) - int(right) :]
            if parts:
                items.append(Segment(tuple(parts), left, right, supervised))
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
            for found in self.control_text.finditer(piece):
                token = self.controls[self._id_of[found[0]]]
                if text := piece[end : found.start()]:
                    parts.append(text)
                close(strip_right=token.lstrip)
                items.append(Control(self._id_of[found[0]], supervised))
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
        return Layout(tuple(items))

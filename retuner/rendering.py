"""Conversations to token ids and a loss mask, laid out by the tokenizer's own chat template.

Every segment between two control tokens of the template is tokenised as plain text by a tokenizer that knows no control
tokens. So text inside a message can never become one, while for other text the ids are those of
`apply_chat_template`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from retuner.encoding import ChatEncoder, Message, Plan, roles_of
from retuner.errors import Refused
from retuner.layout import ChatTemplate, Control, Layout
from retuner.token_rows import TokenRows


class Renderer:
    """One tokenizer's chat template, safely and fast. Errors of every method: Refused."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.encoder = ChatEncoder(tokenizer.backend_tokenizer, self.template.of_chat)

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
        return self.encoder.encode_chats(chats)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Input ids of a context whose answer is asked for; training rows of longer chats begin with them."""
        return self.encode_prompts([messages])[0].input_ids

    def encode_prompts(self, contexts: Sequence[Sequence[Message]]) -> TokenRows:
        """As `encode_prompt`, of many contexts, in order."""
        return self.encoder.encode(
            [Plan(self.template.of_context(roles_of(asked), True), asked) for asked in contexts]
        )

    def encode_completion(self, messages: Sequence[Message], answer: str) -> list[int]:
        """What follows `encode_prompt(messages)` in a training row: the answer and the stop token, all with loss."""
        return self.encode_completions([[*messages, {"role": "assistant", "content": answer}]])[0].input_ids

    def encode_completions(self, chats: Sequence[Sequence[Message]]) -> TokenRows:
        """As `encode_completion`, of the last answer of each of many chats, in order."""
        plans = []
        for chat in chats:
            begin = len(self.template.of_context(roles_of(chat[:-1]), True).items)
            plans.append(Plan(Layout(self.template.of_chat(roles_of(chat)).items[begin : begin + 2]), chat))
        return self.encoder.encode(plans)

    def is_plain(self, messages: Sequence[Message]) -> bool:
        """See `ChatEncoder.is_plain`."""
        return self.encoder.is_plain(messages)

    def check(self, messages: Sequence[Message], ours: list[int] | None = None) -> None:
        """Compare the ids of a plain conversation, `ours`, with the reference, `apply_chat_template`."""
        ours = ours or self.encode_chat(messages)[0]
        # Unless told not to, it warns of a chat longer than the model takes; whether that is refused is another matter.
        reference = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
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

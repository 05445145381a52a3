"""What is asked of every model: per group the context of a last answer, and the answers known to it."""

from collections.abc import Iterator, Sequence
from itertools import dropwhile, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from retuner.chat_lines import Chat, ChatLines
from retuner.row_memo import Places, RowMemo

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_prompts(
    path: Path, lines: ChatLines, rows: RowMemo, places: Places, max_tokens: int
) -> tuple[int, int]:
    """One line for each group with a prompt that fits into `max_tokens`, in their order: `group`, `messages`,
    `prompt_ids`, `references`. Returns how many, and of how many no prompt fits."""
    count = too_long = 0
    with path.open("wb") as prompts:
        for group, members in groupby(
            _with_prompts(lines, rows, places), key=lambda member: member[0]["group"]
        ):
            asked = _asked(members, max_tokens)
            if asked is None:
                too_long += 1
                continue
            prompts.write(to_json({"group": group, **asked}) + b"\n")
            count += 1
    return count, too_long


def _with_prompts(lines: ChatLines, rows: RowMemo, places: Places) -> "Iterator[tuple[Chat, NDArray[Any]]]":
    """Each chat, and the ids of the prompt that asks for its last answer: those of the row before that answer,
    as `Renderer.encode_prompt` gives them."""
    import numpy as np

    for numbers in lines.batches(np.arange(len(lines))):
        chats = lines.read(numbers)
        tokens = rows.rows(places[numbers], None)
        rows.let_go()
        answers = tokens.offsets[:-1] + tokens.spans[tokens.span_offsets[1:] - 1, 0]
        for chat, start, answer in zip(chats, tokens.offsets.tolist(), answers.tolist(), strict=False):
            yield chat, tokens.input_ids[start:answer]


def _asked(members: "Iterator[tuple[Chat, NDArray[Any]]]", max_tokens: int) -> dict[str, Any] | None:
    """The first prompt that fits, and the answers of all that share it to the last turn; None where none fits."""
    asked = None
    answers: dict[bytes, list[str]] = {}
    for chat, prompt_ids in members:
        *context, answer = chat["messages"]
        known = answers.setdefault(to_json(_after_first_answer(context)), [])
        if answer["content"] not in known:
            known.append(answer["content"])
        if asked is None and len(prompt_ids) <= max_tokens:
            asked = {"messages": context, "prompt_ids": prompt_ids.tolist(), "references": known}
    return asked


def _after_first_answer(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """What conversations of one group need not share: their prompts are alike but for case and space."""
    return list(dropwhile(lambda message: message["role"] != "assistant", messages))

"""Preference pairs out of rows: a conversation that ends in the chosen answer, and the rejected answer to the same.

The forms are TRL's (explicit and implicit prompts, as texts and as messages: Anthropic's hh-rlhf and UltraFeedback are
among them), LLaMA-Factory's, and texts beside a question or an instruction.
https://huggingface.co/docs/trl/dataset_formats#preference
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from retuner.formats import (
    PAIRS,
    ROLES,
    SHAREGPT_ROLES,
    Format,
    Messages,
    Turn,
    Wanted,
    conversation,
    text,
)
from retuner.json_rows import Problem, kind_of

SAME_ANSWERS = "same_answers"
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""How a turn begins in hh-rlhf, where a conversation is one text."""


def pair_of(row: Mapping[str, Any], format: Format, wanted: Wanted) -> tuple[Messages, str]:
    """The conversation up to the chosen answer, and the rejected answer, texts unchanged. Errors: Problem, Refused."""
    wanted.refuse_unread(row, format)
    roles = SHAREGPT_ROLES if "from" in format.turn_keys else ROLES
    given = _given(row, format, wanted, roles)
    sides = [_side(row, key, format, wanted, roles) for key in PAIRS]
    if format.keys == PAIRS:
        chosen, rejected = (wanted.with_system(row, turns) for turns in sides)
    else:
        chosen, rejected = (_with_prompt(given, turns) for turns in sides)
    _refuse_other_prompts(chosen[:-1], rejected[:-1])
    if given:
        _refuse_other_prompts(given, chosen[:-1])
    for turns in (chosen, rejected):
        if turns[-1][0] != "assistant":
            raise Problem("wrong_role", f"{turns[-1][2]} is {turns[-1][0]}, where assistant should answer")
    messages = conversation(chosen)
    refused = text(rejected[-1][1], rejected[-1][2])
    if is_same(messages, refused):
        raise Problem(SAME_ANSWERS, "chosen and rejected are the same text, so neither is preferred")
    return messages, refused


def is_same(messages: Sequence[Mapping[str, str]], rejected: str) -> bool:
    """Whether a pair prefers nothing: tokenizers may drop white space at the edges."""
    return messages[-1]["content"].strip() == rejected.strip()


def said_in(messages: Sequence[dict[str, str]], rejected: str | None) -> tuple[dict[str, str], ...]:
    """All that a row says, the rejected answer under a role of its own."""
    return (*messages, *([] if rejected is None else [{"role": "rejected", "content": rejected}]))


def _given(row: Mapping[str, Any], format: Format, wanted: Wanted, roles: Mapping[str, str]) -> list[Turn]:
    """The prompt that stands under a key of its own; none where the two sides begin with it."""
    if format.keys == PAIRS:
        return []
    key = wanted.own(format.keys[0])
    value = row[key]
    if isinstance(value, list) and format.turn_keys:
        wanted.refuse_material(row)
        return wanted.with_system(row, wanted.turns(value, format, roles, f"{key} "))
    if format.name == "preference_sharegpt":
        raise Problem("not_a_list", f"{key} is {kind_of(value)}, not a list of turns")
    if isinstance(value, str) and _is_transcript(value):
        turns = _transcript(value, key)
        # It ends with the mark after which the answer stands.
        ends = turns[-1][0] == "assistant" and not turns[-1][1].strip()
        wanted.refuse_material(row)
        return wanted.with_system(row, turns[:-1] if ends else turns)
    return wanted.with_system(row, [("user", wanted.question(row, format), key)])


def _side(
    row: Mapping[str, Any], which: str, format: Format, wanted: Wanted, roles: Mapping[str, str]
) -> list[Turn]:
    """The turns of `chosen` or `rejected`: an answer, or a conversation that ends in it."""
    key = wanted.own(which)
    value, asked = row[key], row.get(wanted.own(format.keys[0]))
    if isinstance(value, dict) and format.turn_keys:
        return wanted.turns([value], format, roles, f"{key} ")
    if isinstance(value, list) and format.turn_keys:
        if not value:
            raise Problem("no_turns", f"{key} has no turns")
        return wanted.turns(value, format, roles, f"{key} ")
    if not isinstance(value, str):
        raise Problem("not_text", f"{key} is {kind_of(value)}, not text")
    if format.keys == PAIRS and not _is_transcript(value):
        raise Problem("no_prompt", f"{key} is a text without turns, and no key says what it answers")
    if isinstance(asked, str) and _is_transcript(asked):
        return (
            _transcript(value, key)
            if _is_transcript(value)
            else [("assistant", value.removeprefix(" "), key)]
        )
    return [("assistant", value, key)]


def _with_prompt(given: list[Turn], turns: list[Turn]) -> list[Turn]:
    """A side with its prompt: it may repeat that, with or without a system prompt that has a key of its own."""
    if len(turns) > 1 and given and given[0][0] == "system" != turns[0][0]:
        return [given[0], *turns]
    return turns if len(turns) > 1 else [*given, *turns]


def _refuse_other_prompts(one: list[Turn], other: list[Turn]) -> None:
    for a, b in zip(one, other, strict=False):
        if a[:2] != b[:2]:
            raise Problem("other_prompt", f"{a[2]} and {b[2]} differ: the answers are to different prompts")
    if len(one) != len(other):
        message = f"one answer comes after {len(one)} turns, the other after {len(other)}: the prompts differ"
        raise Problem("other_prompt", message)
    if not one:
        raise Problem("no_prompt", "nothing says what chosen and rejected answer")


def _is_transcript(value: str) -> bool:
    return bool(_TRANSCRIPT.match(value))


def _transcript(value: str, key: str) -> list[Turn]:
    pieces = _TRANSCRIPT.split(value)[1:]
    return [
        (SPEAKERS[speaker], said.removeprefix(" "), f"{key} turn {number}")
        for number, (speaker, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), 1)
    ]

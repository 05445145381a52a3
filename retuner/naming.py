"""Names of conversations: hashes by which the same ones, and those with the same prompt, are known."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple


class Names(NamedTuple):
    """16 bytes each. Without a system prompt `prompt` is `group`, and `talk` is `key` but for a rejected answer."""

    group: bytes
    """Of all before the first answer, but for case and white space."""
    id: bytes
    """Of the exact roles and texts."""
    key: bytes
    """Of the whole conversation, but for case and white space."""
    prompt: bytes
    """As `group`, whatever the system prompt."""
    talk: bytes
    """As `key`, whatever the system prompt."""


def names_of(
    messages: Sequence[dict[str, str]], rejected: str | None = None, contents: Sequence[bytes] | None = None
) -> Names:
    """`rejected`, the other answer of a preference pair, is part of what the pair is, `id` and `key`; what it is
    compared with others by, `group`, `prompt` and `talk`, is that of the conversation with the chosen answer.

    `contents` are the folded contents of the messages, and the folded rejected answer, where they are known already."""
    other = [] if rejected is None else [rejected]
    contents = contents or folded([*[turn["content"] for turn in messages], *other])
    roles = [turn["role"] for turn in messages]
    said = [f"{turn['role']}\n{turn['content']}" for turn in messages]
    alike = [_BEGINS[role] + content for role, content in zip(roles, contents)]
    asked = alike[: roles.index("assistant")] if "assistant" in roles else alike
    group, talk = _digest(asked), _digest(alike)
    if rejected is None:
        exact, key = _digest_of(said), talk
    else:
        exact = _digest_of([*said, f"rejected\n{rejected}"])
        key = _digest([*alike, b"rejected\n" + contents[-1]])
    if roles[0] == "system":
        return Names(group, exact, key, _digest(asked[1:]), _digest(alike[1:]))
    return Names(group, exact, key, group, talk)


def chat_id(messages: Sequence[dict[str, str]]) -> str:
    """32 hex digits that name a conversation by its exact roles and texts."""
    return names_of(messages).id.hex()


def group_of(messages: Sequence[dict[str, str]]) -> str:
    """32 hex digits that conversations share when, but for case and space, all before an answer is equal."""
    return names_of(messages).group.hex()


def is_held_out(group: str, salt: str, held_out_fraction: float) -> bool:
    """The side of a group: true for about `held_out_fraction` of all groups, and for ever the same."""
    return int.from_bytes(draw_of(group, salt)) < limit_of(held_out_fraction)


def draw_of(group: str, salt: str) -> bytes:
    """16 bytes, as if drawn by lot, the same ones every time."""
    return _digest_of([salt, group])


def limit_of(held_out_fraction: float) -> int:
    """Draws below this are held out."""
    return math.ceil(held_out_fraction * 2**128)


def folded(texts: Sequence[str]) -> list[bytes]:
    """Texts but for case and white space, in UTF-8. None may hold a NUL."""
    if sum(map(len, texts)) < WORTH_CHARACTERS:
        return [_folded(text).encode() for text in texts]
    import numpy as np

    spelled = [text if text.isascii() else _folded(text) for text in texts]
    letters = "\0".join(spelled).encode().translate(_FOLDED)
    data = np.frombuffer(letters, np.uint8)
    is_space = data == ord(" ")
    # Behind another one, or where a text begins, a space goes; so of each run of them one is left.
    goes = is_space.copy()
    goes[1:] &= is_space[:-1] | (data[:-1] == 0)
    return [text.rstrip(b" ") for text in data[~goes].tobytes().split(b"\0")]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


_FOLDED = bytes(
    byte if byte > 127 else ord(" ") if chr(byte).isspace() else ord(chr(byte).lower()) for byte in range(256)
)
"""What casefold and split make of ASCII."""
WORTH_CHARACTERS = 4096
"""From here on it is faster to fold all texts at once."""


_BEGINS = {role: f"{role}\n".encode() for role in ("system", "user", "assistant")}


def _digest_of(parts: list[str]) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8")).digest()[:16]


def _digest(parts: list[bytes]) -> bytes:
    # NUL keeps the parts apart: no text of a chat holds one.
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]

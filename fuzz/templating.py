"""What must hold of templating for any texts, checked for many conversations at a time; for Phi-3's kind of layout.

`<|role|>` and `<|end|>` alone are control tokens of it, in the order of the turns, and what stands between them is
what was said. Two things the tokenizer itself does to a text are allowed for: it drops white space behind
`<|role|>`, and it spells a space as U+2581, so that it cannot tell the two apart.
"""

from collections.abc import Sequence
from pathlib import Path

from retuner.rendering import Renderer
from retuner.token_rows import IGNORE
from retuner.words import WHITE_SPACE

PHI3 = Path(__file__).parents[2] / "shared" / "phi3-tokenizer"
MAX_CHATS = 16
Chat = list[dict[str, str]]


def conversations(data: bytes) -> list[Chat]:
    """Conversations out of any bytes: texts end at NUL; before each conversation's texts a byte gives its roles."""
    texts = data.split(b"\0")
    chats: list[Chat] = []
    while texts and len(chats) < MAX_CHATS:
        shape = texts[0][0] if texts[0] else 0
        texts[0] = texts[0][1:]
        roles = ["system"] * (shape & 1) + ["user", "assistant"] * (1 + (shape >> 1) % 3)
        chat = []
        for role in roles:
            text = texts.pop(0).decode("utf-8", "ignore") if texts else ""
            chat.append({"role": role, "content": text or "a"})
        chats.append(chat)
    return chats


class Checker:
    """One tokenizer's templating, with what its layout must be."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        backend = renderer.tokenizer.backend_tokenizer
        self.backend = backend
        self.controls = frozenset(backend.get_added_tokens_decoder())
        self.id_of = {
            role: backend.token_to_id(f"<|{role}|>") for role in ("system", "user", "assistant", "end")
        }
        self.last = renderer.tokenizer.eos_token_id

    def check(self, chats: Sequence[Chat]) -> None:
        """Errors: AssertionError."""
        rows = self.renderer.encode_chats(chats)
        said: list[list[int]] = []
        expected: list[str] = []
        for chat, row in zip(chats, rows, strict=True):
            pieces = self._pieces(row.input_ids)
            labels: list[int] = []
            assert [piece[0] for piece in pieces] == self._control_ids(chat), (
                "a control token too many or too few"
            )
            for message, (opening, ending) in zip(
                chat, zip(pieces[::2], pieces[1::2], strict=False), strict=True
            ):
                assert len(ending) == 1, "something stands behind the end of a turn"
                said.append(opening[1:])
                expected.append(kept(message["content"]))
                learnt = message["role"] == "assistant"
                labels += [IGNORE, *(opening[1:] + ending if learnt else [IGNORE] * len(opening))]
            assert row.labels == [*labels, IGNORE], "loss is not on the answers and their stop tokens alone"
        decoded = self.backend.decode_batch(said, skip_special_tokens=False)
        assert decoded == expected, "what was said does not come back"
        self._check_serving(chats, [row.input_ids for row in rows])

    def _check_serving(self, chats: Sequence[Chat], trained: Sequence[list[int]]) -> None:
        asked = [
            (input_ids, chat[: turn + 1])
            for chat, input_ids in zip(chats, trained, strict=True)
            for turn, message in enumerate(chat)
            if message["role"] == "assistant"
        ]
        prompts = self.renderer.encode_prompts([chat[:-1] for _, chat in asked])
        answers = self.renderer.encode_completions([chat for _, chat in asked])
        ends = {}
        for (input_ids, _), prompt, answer in zip(asked, prompts, answers, strict=True):
            served = prompt.input_ids + answer.input_ids
            assert input_ids[: len(served)] == served, "serving builds other ids"
            ends[id(input_ids)] = len(input_ids) - len(served)
        assert all(left == 1 for left in ends.values()), (
            "something stands between the last answer and the end"
        )

    def _control_ids(self, chat: Chat) -> list[int]:
        turns = [id for message in chat for id in (self.id_of[message["role"]], self.id_of["end"])]
        return [*turns, self.last]

    def _pieces(self, ids: list[int]) -> list[list[int]]:
        """The ids cut before each control token."""
        pieces: list[list[int]] = []
        for id in ids:
            if id in self.controls:
                pieces.append([id])
            else:
                pieces[-1].append(id)
        return pieces


def kept(text: str) -> str:
    return text.lstrip(WHITE_SPACE).replace("\u2581", " ")


def checkers(folder: Path) -> list[Checker]:
    """For the tiny base, made in `folder`, and for Phi-3's own tokenizer where it is there."""
    from retuner.base import load_tokenizer
    from retuner.tiny_phi3 import write_tiny_phi3

    write_tiny_phi3(folder, seed=0)
    return [Checker(Renderer(load_tokenizer(path))) for path in (folder, PHI3) if path.exists()]

"""Templating against any texts: `python -m fuzz.fuzz_templating -max_total_time=60`, with libFuzzer's options.

An input is up to sixteen conversations; each is a case, with the tiny base's tokenizer and, where it is beside
the project, with Phi-3's own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fuzz import running, seeds


def fuzz(options: list[str]) -> None:
    import atheris

    import retuner.base  # before what is instrumented: transformers must not be  # noqa: F401

    ours = ["retuner.rendering", "retuner.encoding", "retuner.layout", "retuner.words"]
    with atheris.instrument_imports(include=ours):
        from fuzz import templating

    base = Path(os.environ["FUZZ_WORK"]) / "base"
    base.mkdir()
    checkers = templating.checkers(base)

    def test_one(data: bytes) -> int:
        chats = templating.conversations(data)
        for checker in checkers:
            checker.check(chats)
        return len(chats) * len(checkers)

    running.start(test_one, _seeds(), seeds.words_as_bytes(), options)


def _seeds() -> Iterator[bytes]:
    words = seeds.words_as_bytes()
    for shape in range(6):
        yield b"\0".join(bytes([shape]) + word + b" x" for word in words if b"\0" not in word)
    texts = [text for row in seeds.real_rows() for text in _texts(row)]
    for at in range(0, len(texts), 8):
        yield b"\0".join(b"\2" + text.encode()[:400] for text in texts[at : at + 8])


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.replace("\0", "")
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


if __name__ == "__main__":
    running.main("fuzz.fuzz_templating", fuzz)

"""What fuzzing begins with: the corpus of broken files, and real rows where they are beside the project."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
MAX_SEED_BYTES = 4000
WORDS = (
    *(b'{"messages": [', b'{"role": "user", "content": "', b'{"role": "assistant", "content": "', b'"}]}\n'),
    *(
        b'"conversations"',
        b'"from": "human"',
        b'"from": "gpt"',
        b'"value"',
        b'"system"',
        b'"question"',
        b'"answer"',
    ),
    *(b'"prompt"', b'"completion"', b'"response"', b'"instruction"', b'"input"', b'"output"', b'"context"'),
    *(
        b'"chosen"',
        b'"rejected"',
        b'"label": true',
        b'"tools"',
        b'"tool_calls"',
        b'"text"',
        b'{"type": "text", "text": "',
    ),
    *(
        b"\\ud83d",
        b"\\ude00",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"null",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(b"question,answer\n", b'"\n"', b'""', b"\r\n", b"[", b"]", b"{", b"}", b",\n"),
)
CONTROL_WORDS = (
    *(b"<|end|>", b"<|user|>", b"<|assistant|>", b"<|system|>", b"<|endoftext|>", b"</s>", b"<s>", b"<unk>"),
    *(b"<|placeholder1|>", b"<0x0A>", b"{{ x }}", b"{% if", b"\0", b"\n\n", b"  ", b"\t", b"\x1c"),
    *(
        "\xa0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\u0301",
        "\u2581",
        "\U0001f642",
        "\ue0000\ue001",
        "\ufdfa",
    ),
)


def broken_files() -> dict[str, bytes]:
    """tests/broken, which lies where pytest looks for modules and nothing else does."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from broken.corpus import small_files

    return {name: content for name, content in small_files().items() if len(content) <= MAX_SEED_BYTES}


def real_rows() -> Iterator[dict]:
    """A few rows of each real file."""
    for path in sorted(REAL.rglob("*.json*")):
        if path.suffix == ".json":
            yield from json.loads(path.read_bytes())[:5]
        else:
            with path.open(encoding="utf-8") as stream:
                yield from (json.loads(line) for _, line in zip(range(5), stream, strict=False))


def words_as_bytes() -> list[bytes]:
    return [word if isinstance(word, bytes) else word.encode() for word in CONTROL_WORDS]

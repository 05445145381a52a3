"""Files that are broken in every way that was thought of, as exact bytes; `expected.tsv` says what must come of each.

python tests/broken/corpus.py FOLDER        writes them all, to look at or to try other readers on
"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = b'{"question": "Who?", "answer": "Me."}'
CHAT = b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'
SHAREGPT = b'{"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}'
ALPACA = b'{"instruction": "i", "input": "", "output": "o"}'


def between(row: bytes, neighbour: bytes = GOOD, end: bytes = b"\n") -> bytes:
    """The row as the second line of three."""
    return neighbour + end + row + end + neighbour + end


def chat(*turns: tuple[Any, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}).encode()


def of(letters: str) -> bytes:
    """A chat by the first letters of its roles; each turn says its letter and number."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return chat(*((roles[letter], f"{letter}{number}") for number, letter in enumerate(letters)))


def in_messages(row: bytes) -> bytes:
    return between(row, CHAT)


ENCODING = {
    "utf8-broken": between(b'{"question": "\xff", "answer": "a"}'),
    "utf8-latin1": between('{"question": "caf\u00e9", "answer": "a"}'.encode("latin-1")),
    "utf8-surrogate": between(b'{"question": "\xed\xa0\x80", "answer": "a"}'),
    "utf8-overlong": between(b'{"question": "\xc0\xaf", "answer": "a"}'),
    "utf8-above-unicode": between(b'{"question": "\xf4\x90\x80\x80", "answer": "a"}'),
    "utf8-in-a-key": between(b'{"quest\xe9on": "q", "answer": "a"}'),
    "utf8-cut-at-the-end": GOOD + b'\n{"question": "\xf0\x9f',
    "nul-byte": between(b'{"question": "a\0b", "answer": "a"}'),
    "nul-escaped": between(b'{"question": "a\\u0000b", "answer": "a"}'),
    "nul-padding": GOOD + b"\n" + b"\0" * 512,
    "mark-first": b"\xef\xbb\xbf" + between(GOOD),
    "mark-inside": between(b"\xef\xbb\xbf" + GOOD),
    "utf16-le": GOOD.decode().encode("utf-16"),
    "utf16-be": b"\xfe\xff" + GOOD.decode().encode("utf-16-be"),
    "utf16-without-mark": GOOD.decode().encode("utf-16-le"),
    "utf32": GOOD.decode().encode("utf-32"),
    "half-high": between(b'{"question": "a \\ud83d b", "answer": "x"}'),
    "half-low": between(b'{"question": "q", "answer": "\\udE00"}'),
    "half-swapped": between(b'{"question": "q", "answer": "\\ude00\\ud83d"}'),
    "half-in-a-part": in_messages(
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}'
    ),
}
SYNTAX = {
    "cut-in-a-text": GOOD + b'\n{"question": "q", "ans',
    "cut-after-a-key": between(b'{"question"'),
    "cut-in-an-escape": between(b'{"question": "q\\u00'),
    "cut-last-brace": GOOD + b"\n" + GOOD[:-1],
    "two-objects": between(GOOD + b" " + GOOD),
    "two-objects-touching": between(GOOD + GOOD),
    "comma-behind": between(GOOD + b","),
    "comma-inside": between(b'{"question": "q", "answer": "a",}'),
    "comma-missing": between(b'{"question": "q" "answer": "a"}'),
    "colon-missing": between(b'{"question" "q"}'),
    "spread-over-lines": b'{\n "question": "q",\n "answer": "a"\n}\n',
    "old-mac-line-ends": GOOD + b"\r" + GOOD + b"\r",
    "python-quotes": between(b"{'question': 'q', 'answer': 'a'}"),
    "python-words": between(b'{"question": "q", "answer": "a", "ok": True}'),
    "bare-keys": between(b'{question: "q", answer: "a"}'),
    "comment": between(b'// chats\n{"question": "q", /* */ "answer": "a"}'),
    "raw-tab": between(b'{"question": "a\tb", "answer": "a"}'),
    "raw-escape-character": between(b'{"question": "a\x1bb", "answer": "a"}'),
    "bad-escape": between(b'{"question": "a\\x41", "answer": "a"}'),
    "bad-unicode-escape": between(b'{"question": "a\\u12G4", "answer": "a"}'),
    "brackets-crossed": between(b'{"question": [1}, "answer": "a"]}'),
    "leading-zero": between(b'{"question": "q", "answer": "a", "n": 007}'),
    "hexadecimal": between(b'{"question": "q", "answer": "a", "n": 0x1F}'),
    "bare-point": between(b'{"question": "q", "answer": "a", "n": .5}'),
    "nan": between(b'{"question": "NaN", "answer": "a", "score": NaN}'),
    "infinity": between(b'{"question": "q", "answer": "a", "score": Infinity}'),
    "minus-infinity": between(b'{"question": "q", "answer": "a", "score": -Infinity}'),
    "key-twice": between(b'{"question": "q", "answer": "a", "question": "r"}'),
    "key-twice-escaped": between(b'{"question": "q", "answer": "a", "\\u0071uestion": "r"}'),
    "key-twice-inside": in_messages(b'{"messages": [{"role": "user", "content": "u", "role": "user"}]}'),
    "deep-lists": between(b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep-objects": between(b'{"question": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    "deep-and-open": between(b"[" * 100_000),
    "prose": between(b"Hello there"),
    "a-list": between(b'["q", "a"]'),
    "a-number": between(b"42"),
    "a-text": between(b'"question"'),
    "null": between(b"null"),
    "conflict-marks": b"<<<<<<< ours\n" + GOOD + b"\n=======\n" + GOOD + b"\n>>>>>>> theirs\n",
}
TURNS = {
    "no-turns": in_messages(chat()),
    "system-alone": in_messages(of("s")),
    "no-answer": in_messages(of("u")),
    "ends-with-the-user": in_messages(of("uau")),
    "starts-with-the-assistant": in_messages(of("au")),
    "two-users": in_messages(of("uua")),
    "two-assistants": in_messages(of("uaa")),
    "two-systems": in_messages(of("ssua")),
    "late-system": in_messages(of("usa")),
    "unknown-role": in_messages(chat(("developer", "d"), ("user", "u"), ("assistant", "a"))),
    "role-in-capitals": in_messages(chat(("User", "u"), ("Assistant", "a"))),
    "role-is-null": in_messages(chat((None, "u"), ("assistant", "a"))),
    "role-is-a-list": in_messages(chat((["user"], "u"), ("assistant", "a"))),
    "empty-turn": in_messages(chat(("user", ""), ("assistant", "a"))),
    "white-turn": in_messages(chat(("user", "u"), ("assistant", " \n\u00a0\u3000"))),
    "null-content": in_messages(chat(("user", "u"), ("assistant", None))),
    "number-content": in_messages(chat(("user", "2+2?"), ("assistant", 4))),
    "image-part": in_messages(chat(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a"))),
    "part-without-text": in_messages(chat(("user", [{"type": "text"}]), ("assistant", "a"))),
    "no-parts": in_messages(chat(("user", []), ("assistant", "a"))),
    "turn-without-content": in_messages(b'{"messages": [{"role": "user"}]}'),
    "turn-is-text": in_messages(b'{"messages": ["Hi", "Hello"]}'),
    "turns-as-json-text": in_messages(b'{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"u\\"}]"}'),
    "turn-twice": in_messages(chat(*[("user", "again"), ("assistant", "again.")] * 2)),
    "turn-twice-later": in_messages(
        chat(("system", "s"), ("user", "1"), ("assistant", "a"), *[("user", "2"), ("assistant", "b")] * 2)
    ),
    "speaker-unknown": between(b'{"conversations": [{"from": "narrator", "value": "n"}]}', SHAREGPT),
    "speaker-missing": between(b'{"conversations": [{"role": "user", "content": "u"}]}', SHAREGPT),
    "speaker-twice": between(
        b'{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "u"}]}', SHAREGPT
    ),
    "answer-is-a-number": between(b'{"question": "q", "answer": 42}'),
    "several-answers": between(b'{"question": "q", "answer": ["a", "b"]}'),
    "answer-is-missing": between(b'{"question": "q"}'),
    "instruction-is-empty": between(b'{"instruction": "", "input": "i", "output": "o"}', ALPACA),
    "turns-in-history": between(b'{"instruction": "i", "output": "o", "history": [["a", "b"]]}', ALPACA),
    "two-system-prompts": in_messages(
        b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        b'{"role": "assistant", "content": "a"}], "system": "t"}'
    ),
    "turn-of-no-width": in_messages(chat(("user", "u"), ("assistant", "\u200b\u2060\ufeff"))),
    "turn-not-to-be-learnt": in_messages(
        b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}'
    ),
    "reasoning-beside-an-answer": in_messages(
        b'{"messages": [{"role": "user", "content": "u"}, '
        b'{"role": "assistant", "content": "a", "reasoning_content": "r"}]}'
    ),
    "context-beside-turns": in_messages(CHAT[:-1] + b', "context": "c"}'),
    "input-and-context": between(b'{"question": "q", "answer": "a", "input": "i", "context": "c"}'),
    "images-beside-a-question": between(b'{"question": "q", "answer": "a", "images": ["x.png"]}'),
    "system-prompt-by-another-name": between(b'{"question": "q", "answer": "a", "system_prompt": "s"}'),
    "unknown-keys": between(b'{"body": "hello", "reply": "hi"}'),
    "no-keys": between(b"{}"),
    "two-formats-at-once": between(b'{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}'),
    "another-format-inside": between(b'{"prompt": "p", "completion": "c"}'),
}
OTHER_KINDS = {
    "preference-pairs": b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n',
    "preference-late": GOOD + b'\n{"question": "q", "chosen": "c", "rejected": "r"}\n',
    "preference-marks": b'{"prompt": "p", "completion": "c", "label": false}\n',
    "plain-text": b'{"text": "Once upon a time"}\n',
    "tool-role": CHAT + b"\n" + chat(("tool", "4"), ("assistant", "a")) + b"\n",
    "tool-calls": b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": 1}]}]}\n',
    "tools-on-offer": b'{"messages": [], "tools": [{"name": "f"}]}\n',
    "function-calls": b'{"conversations": [{"from": "human", "value": "h"}, {"from": "function_call"}]}\n',
    "array-named-jsonl": b"\n [" + GOOD + b"]",
}
ARRAYS = {
    "unclosed": b"[" + GOOD,
    "unclosed-behind-a-comma": b"[" + GOOD + b",",
    "nothing-but-a-bracket": b"[",
    "comma-last": b"[" + GOOD + b",]",
    "comma-first": b"[," + GOOD + b"]",
    "comma-twice": b"[" + GOOD + b",," + GOOD + b"]",
    "comma-missing": b"[" + GOOD + b"\n" + GOOD + b"]",
    "text-unclosed": b"[" + GOOD + b', {"question": "unclosed, "answer": "a"}]',
    "text-unclosed-amid-rows": b"[" + GOOD + b',\n{"question": "q, "answer": "a"},\n ' + GOOD + b"]",
    "texts-unclosed-twice": b"["
    + b",\n".join([GOOD, GOOD[:-2] + b"}", GOOD, b'{question": "q"}', GOOD])
    + b"]",
    "bracket-astray": b"[" + GOOD + b',\n{"question": "q", "answer": "a"]},\n ' + GOOD + b"]",
    "closed-early": b"[" + GOOD + b"],\n" + GOOD + b"]",
    "two-arrays": b"[" + GOOD + b"]\n[" + GOOD + b"]",
    "something-behind": b"[" + GOOD + b"]\n" + GOOD,
    "row-broken": b"[" + GOOD + b',\n {"question": ]},\n ' + GOOD + b"]",
    "row-not-utf8": b"[" + GOOD + b',\n {"question": "\xff", "answer": "a"},\n ' + GOOD + b"]",
    "rows-not-objects": b'[1, "],[", null, ' + GOOD + b"]",
    "row-deep": b"[" + GOOD + b',\n{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    "lines": between(GOOD),
    "below-a-key": b'{"data": [' + GOOD + b"]}",
    "empty": b"",
    "white": b" \n\t",
    "mark-first": b"\xef\xbb\xbf[" + GOOD + b"]",
    "not-json": b"<html>",
}
CSV = {
    "empty": b"",
    "columns-unknown": b"title,body\nq,a\n",
    "no-header": b"Who?,Me.\nWhat?,That.\n",
    "answer-missing": b"question,category\nq,c\n",
    "column-twice": b"question,answer,answer\nq,a,b\n",
    "column-without-a-name": b"question,answer,\nq,a,b\n",
    "row-short": b"question,answer\nq,a\nq\nq,a\n",
    "row-long": b"question,answer\nq,a\nq,a,b\nq,a\n",
    "quote-open": b'question,answer\nq,a\n"q,a\nq,a\n',
    "quote-inside": b'question,answer\nq,a\nan 8" pipe,a\nq,a\n',
    "quotes-astray": b'question,answer\nq,a\nan 8"\npipe" one,a\nq,a\n',
    "text-behind-a-quote": b'question,answer\n"q"x,"a"\n',
    "semicolons": b"question;answer\nq;a\n",
    "tabs": b"question\tanswer\nq\ta\n",
    "not-utf8": b"question,answer\nq,a\ncaf\xe9,a\nq,a\n",
    "not-utf8-below": b'question,answer\n"a\nb \xff",a\nq,a\n',
    "nul": b"question,answer\nq\0,a\nq,a\n",
    "mark-first": b"\xef\xbb\xbfquestion,answer\nq,a\n",
    "utf16": "question,answer\nq,a\n".encode("utf-16"),
    "cell-empty": b"question,answer\nq,\nq,a\n",
    "old-mac-line-ends": b"question,answer\rq,a\r",
    "header-not-utf8": b"question,answer,caf\xe9\nq,a,b\n",
    "preference-pairs": b"prompt,chosen,rejected\np,c,r\n",
    "preference-marks": b"prompt,completion,label\np,c,True\n",
    "plain-text": b"text\nOnce upon a time\n",
    "turns-in-a-field": b"messages\n[]\n",
    "two-formats": b"question,answer,prompt,completion\nq,a,p,c\n",
    "row-too-long": b"question,answer\n" + b"a" * (5 * 2**20) + b",a\nq,a\n",
    "row-too-long-in-quotes": b'question,answer\n"' + b"a" * (5 * 2**20) + b'",a\nq,a\n',
    "row-too-long-of-many-lines": b"question,answer\n" + b"q,a\r" * 2**20 + b"\nq,a\n",
    "row-too-long-behind-a-return": b"question,answer\r\n" + b"a" * (5 * 2**20) + b",a\r\nq,a\r\n",
    "quotes-astray-behind-a-bad-byte": b'question,answer\nan 8" \xff\npipe" one,a\nq,a\n',
}


def parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    out = io.BytesIO()
    writer.write_table(pyarrow.table(columns), out, write_page_checksum=True)
    return out.getvalue()


def texts_of_bytes(*values: bytes) -> Any:
    """An Arrow column of texts that are not UTF-8, which Arrow writes without looking."""
    import pyarrow

    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values).buffers())


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def parquets() -> dict[str, bytes]:
    import pyarrow

    whole = parquet(
        {"question": [f"question {n}" for n in range(500)], "answer": [f"answer {n}" for n in range(500)]}
    )
    turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]]
    late = [[{"role": "user", "content": "u"}]]
    tools = [[{"role": "user", "content": "u"}, {"role": "tool", "content": "4"}]]
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(["q"]), pyarrow.array(["a"]), pyarrow.array(["b"])], ["question", "answer", "answer"]
    )
    out = io.BytesIO()
    from pyarrow import parquet as writer

    writer.write_table(twice, out)
    return {
        "empty": b"",
        "not-parquet": between(GOOD),
        "cut-at-the-end": whole[:-7],
        "cut-at-the-start": whole[100:],
        "footer-flipped": flipped(whole, len(whole) - 60),
        "page-flipped": flipped(whole, 200),
        "columns-unknown": parquet({"title": ["t"], "body": ["b"]}),
        "column-twice": out.getvalue(),
        "answer-null": parquet({"question": ["q", "q"], "answer": ["a", None]}),
        "answer-empty": parquet({"question": ["q", "q"], "answer": ["a", " "]}),
        "answer-bytes": parquet({"question": ["q"], "answer": pyarrow.array([b"a"])}),
        "answer-numbers": parquet({"question": ["q"], "answer": [4]}),
        "text-not-utf8": parquet({"question": texts_of_bytes(b"q", b"\xff\xfe"), "answer": ["a", "b"]}),
        "turns-unanswered": parquet({"messages": turns + late}),
        "turns-null": parquet({"messages": [*turns, None]}),
        "turns-are-text": parquet({"messages": ["user: hi"]}),
        "tools": parquet({"messages": turns + tools}),
        "preference-pairs": parquet({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}),
        "preference-marks": parquet({"prompt": ["p"], "completion": ["c"], "label": [True]}),
        "plain-text": parquet({"text": ["Once upon a time"]}),
    }


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


def compressed() -> dict[str, bytes]:
    # Rows that differ, so that the streams are long enough to be cut in the middle.
    rows = b"".join(b'{"question": "%d?", "answer": "%d"}\n' % (n, n * n * 7919 % 99991) for n in range(2000))
    packed, squeezed = gzip.compress(rows, mtime=0), zstd(rows)
    return {
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "cut-in-the-checksum.jsonl.gz": packed[:-3],
        "checksum-wrong.jsonl.gz": flipped(packed, len(packed) - 6),
        "flipped.jsonl.gz": flipped(packed, len(packed) // 2),
        "something-behind.jsonl.gz": packed + GOOD,
        "second-member-cut.jsonl.gz": packed + packed[:-20],
        "not-compressed.jsonl.gz": between(GOOD),
        "empty.jsonl.gz": b"",
        "zstd-inside.jsonl.gz": squeezed,
        "mark-inside.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + GOOD, mtime=0),
        "row-broken.jsonl.gz": gzip.compress(between(b'{"question": "\xff"}'), mtime=0),
        "row-broken-in-member-two.jsonl.gz": packed + gzip.compress(b"{}\n", mtime=0),
        "row-cut-at-a-member.jsonl.gz": gzip.compress(GOOD[:20], mtime=0)
        + gzip.compress(b"\n" + GOOD, mtime=0),
        "array-inside.jsonl.gz": gzip.compress(b"[" + GOOD + b"]", mtime=0),
        "unclosed.json.gz": gzip.compress(b"[" + GOOD, mtime=0),
        "lines-inside.json.gz": gzip.compress(between(GOOD), mtime=0),
        "quote-open.csv.gz": gzip.compress(CSV["quote-open"], mtime=0),
        "row-short.csv.zst": zstd(CSV["row-short"]),
        "cut.jsonl.zst": squeezed[: len(squeezed) // 2],
        "flipped.jsonl.zst": flipped(squeezed, 2),
        "something-behind.jsonl.zst": squeezed + GOOD,
        "not-compressed.jsonl.zst": between(GOOD),
        "empty.jsonl.zst": b"",
        "row-broken.json.zst": zstd(ARRAYS["row-broken"]),
        "gzip-inside.jsonl": packed,
        "zstd-inside.jsonl": squeezed,
        "zip-inside.json": b"PK\x03\x04" + packed,
        "parquet-inside.jsonl": b"PAR1" + b"\0" * 100,
        "table.parquet.gz": packed,
        "rows.txt": b"Who? Me.\n",
        "rows.tsv": CSV["tabs"],
        "rows": between(GOOD),
    }


def small_files() -> dict[str, bytes]:
    """All that fit into memory with ease, by name."""
    lines = ENCODING | SYNTAX | TURNS | OTHER_KINDS
    groups = ((".jsonl", lines), (".json", ARRAYS), (".csv", CSV), (".parquet", parquets()))
    named = {name + suffix: content for suffix, group in groups for name, content in group.items()}
    return named | compressed()


def _write_long_line(path: Path) -> None:
    """A row of 200 MB between two others."""
    with path.open("wb") as stream:
        stream.write(GOOD + b'\n{"question": "')
        for _ in range(200):
            stream.write(b'a\\"b\\\\, ' * (10**6 // 8))
        stream.write(b'", "answer": "a"}\n' + GOOD + b"\n")


def _write_long_element(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(b"[" + GOOD + b',\n{"question": "')
        for _ in range(200):
            stream.write(b"0123456789" * 10**5)
        stream.write(b'", "answer": "a"},\n' + GOOD + b"]")


def _write_bomb(path: Path, codec: str) -> None:
    """A line that is never ended, of 300 MB from a few thousand bytes."""
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), codec) as stream:
        stream.write(GOOD + b"\n")
        for _ in range(300):
            stream.write(b"a" * 10**6)


def _write_repeating_parquet(path: Path) -> None:
    """Ten thousand rows with one and the same text of 20 MB, in a few kilobytes."""
    import pyarrow
    from pyarrow import parquet as writer

    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 10_000, pyarrow.int32()), ["x" * 20_000_000]
    )
    writer.write_table(pyarrow.table({"question": text, "answer": ["a"] * 10_000}), path)


HUGE: dict[str, Callable[[Path], None]] = {
    "line-of-200-megabytes.jsonl": _write_long_line,
    "row-of-200-megabytes.json": _write_long_element,
    "bomb.jsonl.gz": lambda path: _write_bomb(path, "gzip"),
    "bomb.jsonl.zst": lambda path: _write_bomb(path, "zstd"),
    "bomb.parquet": _write_repeating_parquet,
}


@dataclass(frozen=True)
class Expected:
    """What must come of a file."""

    file: str
    good: int
    bad: tuple[str, ...]
    """`cause@line:column` of each bad row, at most the first three; `...` behind them where there are more."""
    refused: str | None
    """The words of the refusal that must be there, `@line` first where it has one."""
    exit_code: int


def expected() -> Iterator[Expected]:
    with (Path(__file__).parent / "expected.tsv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield Expected(
                row["file"],
                int(row["good"]),
                tuple(row["bad"].split()),
                row["refused"] or None,
                int(row["exit"]),
            )


def write_all(folder: Path) -> None:
    for name, content in small_files().items():
        (folder / name).write_bytes(content)
    for name, write in HUGE.items():
        write(folder / name)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))

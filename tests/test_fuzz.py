"""The reader and templating against what hypothesis and a coverage-guided fuzzer think of; hours of it: `make fuzz`."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import reading, seeds, templating

ROOT = Path(__file__).parents[1]
SECONDS = 25
many = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

pieces = st.sampled_from(seeds.WORDS) | st.binary(max_size=4)
turn_keys = ("messages", "conversations", "role", "content", "from", "value", "system", "type", "text")
flat_keys = (
    "question",
    "answer",
    "prompt",
    "completion",
    "response",
    "instruction",
    "input",
    "output",
    "context",
)
other_keys = ("chosen", "rejected", "label", "tools", "tool_calls")
keys = st.sampled_from(turn_keys + flat_keys + other_keys)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)
files = st.lists(pieces, max_size=40).map(b"".join) | st.lists(
    values.map(lambda value: json.dumps(value).encode()), max_size=6
).map(b"\n".join)
fields = st.text(st.sampled_from('ab "\n\r,;é\U0001f600\x85\u2028'), max_size=8)
tables = st.lists(st.lists(fields, min_size=2, max_size=3), max_size=6).map(
    lambda rows: "".join(
        ",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) + "\n" for row in rows
    )
)


@pytest.fixture
def small_limits(monkeypatch):
    for module, name, value in reading.SMALL_LIMITS:
        monkeypatch.setattr(module, name, value)


@many
@given(
    content=files, suffix=st.sampled_from([".jsonl", ".json", ".csv"]), prefix=st.sampled_from([b"", b"["])
)
def test_any_bytes_read_whole_by_blocks_and_compressed_are_the_same_and_stand_before_the_oracle(
    tmp_path, small_limits, content, suffix, prefix
):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(prefix + content)
    whole = reading.check(path, prefix + content)
    (tmp_path / "packed").mkdir(exist_ok=True)
    reading.check_packed(tmp_path / "packed" / f"x{suffix}.gz", prefix + content, whole, path.name)


@many
@given(table=tables)
def test_any_quoted_table_is_read_as_the_standard_library_reads_it(tmp_path, small_limits, table):
    content = ("question,answer\n" + table).encode()
    (tmp_path / "x.csv").write_bytes(content)
    reading.check(tmp_path / "x.csv", content)


@pytest.fixture(scope="module")
def checkers(tmp_path_factory):
    return templating.checkers(tmp_path_factory.mktemp("tiny"))


texts = st.lists(
    st.sampled_from([word.decode() for word in seeds.words_as_bytes() if word != b"\0"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    min_size=1,
    max_size=6,
).map(lambda parts: "".join(parts) or "a")


@many
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.tuples(texts, texts), min_size=1, max_size=3)), max_size=4)
)
def test_no_text_becomes_a_control_token_and_each_comes_back_from_its_ids(checkers, shapes):
    chats = []
    for has_system, turns in shapes:
        chat = [{"role": "system", "content": turns[0][1]}] * has_system
        for asked, answered in turns:
            chat += [
                {"role": "user", "content": asked or "a"},
                {"role": "assistant", "content": answered or "a"},
            ]
        chats.append(chat)
    for checker in checkers:
        checker.check(chats)


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this machine"
)
@pytest.mark.parametrize("target", ["fuzz_reader", "fuzz_templating"])
def test_a_coverage_guided_fuzzer_finds_nothing(target):
    done = subprocess.run(
        [sys.executable, "-m", f"fuzz.{target}", f"-max_total_time={SECONDS}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"([\d,]+) executions, ([\d,]+) cases .* 0 findings", done.stdout)
    assert told and int(told[1].replace(",", "")) > 0 and int(told[2].replace(",", "")) > 0


def test_what_the_checks_are_there_for_they_notice(tmp_path, checkers):
    """A reader that loses a row, and a layout with a control token too many, do not pass."""
    row = b'{"question": "q", "answer": "a"}\n'
    (tmp_path / "x.jsonl").write_bytes(row)
    with pytest.raises(AssertionError, match="a row is lost"):
        reading.check(tmp_path / "x.jsonl", row + row)
    with pytest.raises(reading.oracle.No):
        reading.check(tmp_path / "x.jsonl", row.replace(b'"a"', b'"b"'))
    checker = checkers[0]
    open_to_it = templating.Checker.__new__(templating.Checker)
    open_to_it.__dict__.update(checker.__dict__, renderer=ReferenceRenderer(checker.renderer))
    chat = [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(AssertionError, match="control token"):
        open_to_it.check([chat])


class ReferenceRenderer:
    """`apply_chat_template`, which lets a text become a control token."""

    def __init__(self, renderer):
        self.renderer = renderer

    def encode_chats(self, chats):
        return [
            templating_row(
                self.renderer.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            )
            for chat in chats
        ]


def templating_row(ids):
    from retuner.token_rows import Row

    return Row(ids, ids, 0)

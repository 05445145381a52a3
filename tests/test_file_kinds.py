"""Kinds of files besides plain JSON, formats by other names, and the real files that were collected for this."""

import gzip
import io
import json
from pathlib import Path

import pytest
from broken.corpus import parquet, zstd

from fuzz.reading import data_file
from retuner import compressed
from retuner.chats import BadRow, Chat, format_of_file, read_chats
from retuner.errors import Refused

GOOD = b'{"question": "Who?", "answer": "Me."}'
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no real chats beside the project")


def read(path: Path, content: bytes, format: str = "auto", columns=None) -> list[Chat | BadRow]:
    path.write_bytes(content)
    return list(read_chats([data_file(path)], format, columns))


def said(rows: list[Chat | BadRow]) -> list[list[str]]:
    assert all(isinstance(row, Chat) for row in rows), rows
    return [[message["content"] for message in row.messages] for row in rows]


# --- compressed


ROWS = b"\n".join([GOOD, b"", b'{"question": "q", "answer": 7}', GOOD.replace(b"Me", b"You")])
ARRAY = b"[" + ROWS.replace(b"\n\n", b"\n,").replace(b"\n{", b",\n{").replace(b",,", b",") + b"]"
TABLE = b'question,answer\r\n"Who\nis, it?",Me.\r\nq,\r\n'
PACK = {
    ".gz": gzip.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(("kind", "content"), [(".jsonl", ROWS), (".json", ARRAY), (".csv", TABLE)])
def test_compressed_rows_are_the_rows_with_their_lines_and_columns(tmp_path, suffix, kind, content):
    plain = read(tmp_path / f"x{kind}", content)
    (tmp_path / "packed").mkdir()
    packed = read(tmp_path / "packed" / f"x{kind}{suffix}", PACK[suffix](content))
    assert len(plain) > 1 and any(isinstance(row, BadRow) for row in plain)
    shown = [[getattr(row, name, None) for name in ("line", "column", "messages", "cause")] for row in plain]
    assert shown == [
        [getattr(row, name, None) for name in ("line", "column", "messages", "cause")] for row in packed
    ]


def test_a_stream_of_several_members_or_frames_is_read_to_its_end(tmp_path):
    half = len(ROWS) // 2
    whole = read(tmp_path / "x.jsonl", ROWS)
    for suffix, pack in PACK.items():
        rows = read(tmp_path / f"x.jsonl{suffix}", pack(ROWS[:half]) + pack(ROWS[half:]))
        assert [row.line for row in rows] == [row.line for row in whole]
    # Tapes and block devices fill up with zeros, which gzip passes over too.
    assert len(read(tmp_path / "x.jsonl.gz", gzip.compress(ROWS) + bytes(512))) == len(whole)


def test_damage_behind_good_rows_is_said_with_the_last_line_before_it(tmp_path):
    many = b"".join(b'{"question": "%d?", "answer": "%x"}\n' % (n, n**5) for n in range(60_000))
    packed = gzip.compress(many)
    with pytest.raises(Refused, match=r"x\.jsonl\.gz cannot be unpacked: .* cut off, behind line \d{3,}"):
        read(tmp_path / "x.jsonl.gz", packed[:-20])


def test_a_file_that_unpacks_to_far_more_than_chats_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "SMALL_BYTES", 2**20)
    bomb = zstd(GOOD + b"\n" + b"\n" * 20_000_000)
    with pytest.raises(Refused, match="1,000 times its size"):
        read(tmp_path / "x.jsonl.zst", bomb)


# --- tables


def test_csv_fields_are_texts_unchanged_and_rows_have_their_first_line(tmp_path):
    content = 'id,question,answer\r\n1,"Say ""hé, you""\r\nplease",  b \r\n\r\n2,q,"\n"\n3,é,😀'.encode()
    first, blank, last = read(tmp_path / "x.csv", content)
    assert said([first, last]) == [['Say "hé, you"\r\nplease', "  b "], ["é", "😀"]]
    assert [(row.line) for row in (first, blank, last)] == [2, 5, 7]
    assert isinstance(blank, BadRow) and blank.cause == "empty_turn"


def test_parquet_rows_of_turns_and_of_texts_are_chats(tmp_path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = read(tmp_path / "x.parquet", parquet({"id": [1, 2], "messages": [turns, turns * 2]}))
    assert said(rows[:1]) == [["u", "a"]] and rows[1].cause == "duplicate_turn" and rows[1].line == 2
    rows = read(
        tmp_path / "y.parquet",
        parquet({"instruction": ["i", "j"], "input": [None, "x"], "output": ["o", "p"]}),
    )
    assert said(rows) == [["i", "o"], ["j\n\nx", "p"]]
    (bad,) = read(tmp_path / "z.parquet", parquet({"conversations": [[{"from": "gpt", "value": "a"}]]}))
    assert bad.cause == "wrong_order" and json.loads(bad.start)["conversations"][0]["from"] == "gpt"


def test_parquet_in_many_batches_and_row_groups_has_every_row_once(tmp_path):
    import pyarrow
    from pyarrow import parquet as writer

    names = [f"{number}?" for number in range(1000)]
    table = pyarrow.table({"question": names, "answer": pyarrow.array(names, pyarrow.large_string())})
    out = io.BytesIO()
    writer.write_table(table, out, row_group_size=130, use_dictionary=["question"])
    rows = read(tmp_path / "x.parquet", out.getvalue())
    assert said(rows) == [[name, name] for name in names]
    assert [row.line for row in rows] == list(range(1, 1001))


# --- names of one's own


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_give_a_format_the_names_that_the_data_has(tmp_path, suffix):
    rows = [{"question_text": "q", "reply": "a", "answer": "of another kind"}]
    contents = {
        ".jsonl": json.dumps(rows[0]).encode(),
        ".csv": b"question_text,reply,answer\nq,a,x\n",
        ".parquet": parquet({key: [row[key] for row in rows] for key in rows[0]}),
    }
    columns = {"prompt": "question_text", "completion": "reply"}
    for format in ("auto", "prompt_completion"):
        assert said(read(tmp_path / f"x{suffix}", contents[suffix], format, columns)) == [["q", "a"]]
    assert format_of_file(data_file(tmp_path / f"x{suffix}"), "auto", columns) == "prompt_completion"


def test_turns_and_systems_may_have_names_of_their_own_too(tmp_path):
    row = {"dialogue": [{"speaker": "human", "text": "u"}, {"speaker": "gpt", "text": "a"}], "setting": "S"}
    columns = {"conversations": "dialogue", "from": "speaker", "value": "text", "system": "setting"}
    assert said(read(tmp_path / "x.jsonl", json.dumps(row).encode(), "auto", columns)) == [["S", "u", "a"]]


def test_the_good_answers_of_preference_pairs_are_read_where_columns_say_so(tmp_path):
    row = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'
    with pytest.raises(Refused, match=r"prepare\.columns: {completion: chosen}"):
        read(tmp_path / "x.jsonl", row)
    assert said(read(tmp_path / "x.jsonl", row, "auto", {"completion": "chosen"})) == [["p", "c"]]


def test_a_column_that_is_not_there_is_said_by_both_its_names(tmp_path):
    columns = {"prompt": "asked", "completion": "told"}
    (bad,) = read(tmp_path / "x.jsonl", b'{"asked": "q", "tolt": "a"}', "auto", columns)
    assert bad.cause == "missing_column"
    assert all(word in bad.message for word in ("'told'", "completion", "'tolt'"))
    with pytest.raises(Refused, match=r"x\.csv:1 cannot be read by its columns: there is no 'told'"):
        read(tmp_path / "x.csv", b"asked,tolt\nq,a\n", "auto", columns)


@pytest.mark.parametrize(
    ("format", "columns", "says"),
    [
        ("auto", {"promt": "q"}, "'promt', which is no key of any format; did you mean prompt?"),
        ("alpaca", {"prompt": "q"}, "'prompt', which is no key of the format alpaca"),
        ("auto", {"prompt": "q", "answer": "a"}, "prompt, answer, which are not keys of one format"),
        ("auto", {"prompt": "q", "completion": "q"}, "one column to several keys"),
    ],
)
def test_a_mapping_that_fits_no_format_is_refused_before_anything_is_read(tmp_path, format, columns, says):
    with pytest.raises(Refused) as refusal:
        list(read_chats([], format, columns))
    assert says in refusal.value.found and refusal.value.expected and refusal.value.do


def test_instruction_lists_put_their_context_behind_the_instruction(tmp_path):
    dolly = {"instruction": "i", "context": "c", "response": "r", "category": "qa"}
    rows = read(
        tmp_path / "x.jsonl", "\n".join(json.dumps(dolly | {"context": c}) for c in ("c", "", None)).encode()
    )
    assert said(rows) == [["i\n\nc", "r"], ["i", "r"], ["i", "r"]]
    assert {row.format for row in rows} == {"instruction_response"}


# --- the real files

FORMATS = {
    "alpaca/alpaca_en_demo.json": ("alpaca", 999),
    "e2e/test.jsonl": ("prompt_completion", 4693),
    "e2e/train.jsonl": ("prompt_completion", 4672),
    "gsm8k/test.jsonl": ("question_answer", 1319),
    "gsm8k/train.jsonl": ("question_answer", 7473),
    "sharegpt/dummy_conversation.json": ("sharegpt", 500),
}
REFUSED = {
    "preference/dpo_en_demo.json": ("preference data", "one good answer each", "prepare.files"),
    "tools/glaive_toolcall_en_demo.json": (
        "tool transcript",
        "the chat template would drop",
        "write calls and results",
    ),
}


@needs_real
def test_every_real_file_is_read_or_refused():
    found = {path.relative_to(REAL).as_posix() for path in REAL.rglob("*.json*")}
    assert found == FORMATS.keys() | REFUSED.keys()


@needs_real
@pytest.mark.parametrize("name", FORMATS)
def test_a_real_file_is_read_in_its_format_row_for_row(name):
    format, count = FORMATS[name]
    rows = list(read_chats([data_file(REAL / name)], "auto"))
    assert all(isinstance(row, Chat) for row in rows)
    assert len(rows) == count and {row.format for row in rows} == {format}


@needs_real
@pytest.mark.parametrize("name", REFUSED)
def test_a_real_file_of_another_kind_is_refused_in_words_that_help(name):
    with pytest.raises(Refused) as refusal:
        list(read_chats([data_file(REAL / name)], "auto"))
    assert refusal.value.found.startswith(Path(name).name)
    for part in REFUSED[name]:
        assert part in str(refusal.value)

"""Pairs as ids: those of the reference template, no control token out of an answer, each answer with its stop."""

import json

import pyarrow as pa
import pytest
from template_job import write_base

from retuner.artifacts import Base, BaseFacts, Splits, SplitsFacts
from retuner.base import load_tokenizer
from retuner.errors import Refused
from retuner.files import sha256_file
from retuner.naming import names_of
from retuner.observe import Silent
from retuner.pair_templating import template_pairs
from retuner.params import TemplateParams

SYSTEM, ASK, ANSWER, AGAIN = (
    {"role": role, "content": text}
    for role, text in (("system", "Be kind."), ("user", "Hi 🙂?"), ("assistant", "Hello!"), ("user", "Well?"))
)
PAIRS = [
    ([ASK], "Yes, naïve.", "No."),
    ([SYSTEM, ASK], "Certainly.", "Certainly not, and never\nagain."),
    ([ASK, ANSWER, AGAIN], "I am.", "I am not."),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def lay_out(tmp_path, base):
    """Runs the stage over train and held-out pairs, with a memo that all runs of a test share."""
    runs = iter(range(100))

    def run(train, held_out=None, memo=True, **changed):
        here = tmp_path / f"run{next(runs)}"
        out, work, data = here / "out", here / "work", here / "splits"
        for folder in (out, work, data / "aside"):
            folder.mkdir(parents=True)
        for name, side in (("train", train), ("held_out", held_out or PAIRS[:1])):
            (data / f"{name}.jsonl").write_text("".join(sorted(map(line, side))), encoding="utf-8")
        (data / "aside" / "report.json").write_text("{}")
        params = TemplateParams(**{"max_tokens": 96, "too_long": "leave_out", "pack_tokens": None, **changed})
        heard = Said()
        run.facts = template_pairs(
            out, work, splits_in(data), base_in(base), params, tmp_path / "memo" if memo else None, heard
        )
        run.out, run.said = out, heard.lines
        with pa.memory_map(str(out / "train.arrow")) as source:
            return pa.ipc.open_stream(source).read_all().to_pylist()

    run.tokens = lambda: json.loads((run.out / "aside" / "tokens.json").read_bytes())
    return run


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def line(pair) -> str:
    prompt, chosen, rejected = pair
    messages = [*prompt, {"role": "assistant", "content": chosen}]
    names = names_of(messages, rejected)
    row = {"group": names.group.hex(), "id": names.id.hex(), "messages": messages, "rejected": rejected}
    return json.dumps(row, ensure_ascii=False) + "\n"


def splits_in(data) -> Splits:
    facts = SplitsFacts(
        formats={}, rows_read=1, rejected={}, redacted={}, duplicates={}, leaks={}, removed={},
        train_rows=1, held_out_rows=1, train_groups=1, held_out_groups=1, pairs=True,
    )  # fmt: skip
    return Splits(stage="prepare", fingerprint="", digest="", path=data, facts=facts)


def base_in(folder) -> Base:
    facts = BaseFacts(
        source="tiny", architecture="", parameters=1, weights_sha256="", tokenizer_sha256="", template_sha256="",
        stop_token_ids=(1,),
    )  # fmt: skip
    return Base(stage="fetch_base", fingerprint="", digest="", path=folder, facts=facts)


def test_the_ids_are_those_of_the_reference_template(lay_out, base):
    tokenizer = load_tokenizer(base)
    found = {
        (tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
        for row in lay_out(PAIRS)
    }
    stop = tokenizer.convert_tokens_to_ids("<|end|>")
    expected = set()
    for prompt, *answers in PAIRS:
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = []
        for answer in answers:
            whole = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": answer}], return_dict=False
            )
            assert whole[: len(asked)] == asked
            ids.append(tuple(whole[len(asked) : whole.index(stop, len(asked)) + 1]))
        expected.add((tuple(asked), *ids))
    assert found == expected


def test_text_in_an_answer_never_becomes_a_control_token(lay_out, base):
    tokenizer = load_tokenizer(base)
    controls = set(tokenizer.get_added_vocab().values())
    (row,) = lay_out([([ASK], "Yes<|end|>\n<|user|>\nmore", "No</s><|system|>")])
    for name in ("chosen_ids", "rejected_ids"):
        *text, stop = row[name]
        assert stop == tokenizer.convert_tokens_to_ids("<|end|>")
        assert not controls & set(text)


def test_a_pair_is_left_out_when_either_answer_is_too_long(lay_out):
    long = "x" * 100
    rows = lay_out([*PAIRS, ([ASK], long, "No."), ([ASK], "Yes.", long)])
    assert len(rows) == 3
    assert lay_out.facts.left_out == {"train_too_long": 2}
    assert lay_out.facts.longest_row_tokens <= 96
    with pytest.raises(Refused, match="2 of 5 train pairs"):
        lay_out([*PAIRS, ([ASK], long, "No."), ([ASK], "Yes.", long)], too_long="refuse")
    with pytest.raises(Refused, match="2 of 2 train pairs; the shortest is .* with 115 tokens"):
        lay_out([([ASK], long + long, "No."), ([ASK], "Yes.", long)])


def test_a_held_out_prompt_that_is_too_long_is_told_apart_from_its_pair(lay_out):
    lay_out(PAIRS, [*PAIRS[:1], ([{**ASK, "content": "x" * 100}], "Yes.", "No.")])
    told = {"held_out_prompt_too_long": 1, "held_out_too_long": 1}
    assert lay_out.facts.left_out == told
    assert lay_out.tokens()["held_out"]["left_out"] == told


def test_a_pair_loses_white_space_when_either_answer_does(lay_out):
    lay_out([*PAIRS, ([SYSTEM, ASK], " So.", "No."), ([ASK], "Sure.", " Never."), ([ASK], " Fine.", " Bad.")])
    assert lay_out.tokens()["train"]["stripped"] == 3


def test_tokens_are_counted_and_prompts_written_with_the_chosen_answer(lay_out):
    rows = lay_out(PAIRS, [*PAIRS[:1], ([ASK], "Yes, of course.", "No.")])
    facts = lay_out.facts
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert facts.pairs and facts.packs is None and facts.train_rows == 3
    assert facts.supervised_tokens == answers
    assert facts.train_tokens == answers + 2 * sum(len(row["prompt_ids"]) for row in rows)
    (prompt,) = map(json.loads, (lay_out.out / "prompts.jsonl").read_text().splitlines())
    assert sorted(prompt["references"]) == ["Yes, naïve.", "Yes, of course."]
    page = (lay_out.out / "aside" / "report.html").read_text()
    assert "train chosen" in page and "train rejected" in page


def test_answers_that_were_tokenised_before_are_not_again_and_the_bytes_are_the_same(lay_out):
    def digests():
        return [
            sha256_file(lay_out.out / name) for name in ("train.arrow", "held_out.arrow", "prompts.jsonl")
        ]

    lay_out(PAIRS[:2])
    lay_out(PAIRS)
    assert any("6 of 8 answers were tokenised before, 2 are new" in said for said in lay_out.said)
    known = digests()
    lay_out(PAIRS, memo=False)
    assert digests() == known

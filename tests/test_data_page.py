"""The page of the data: it says what the report says, of any report, and nothing in a chat can change it."""

import json
import re
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from retuner.coloured import ShownRow, coloured
from retuner.data_page import data_page
from retuner.data_report import DataReport
from retuner.describe import Lengths, describe
from retuner.page_parts import histogram, percent

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags must close in order; the visible text of each section is kept."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if "style" not in self.open:
            self.text[self.section] = self.text.get(self.section, "") + data


def asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def some_report(**changes) -> dict:
    """As `prepare` writes it."""
    hello = "How do I change my address?"
    return {
        "formats": {"a.jsonl": "messages", "b.json": "sharegpt"},
        "rows_by_file": {"a.jsonl": 90, "b.json": 30},
        "rows_read": 120,
        "rejected": {"bad_json": 2, "empty_turn": 5},
        "redacted": {"email": 3, "card": 0},
        "duplicates": {
            "exact": 4,
            "folded": 1,
            "near": 6,
            "near_policy": "report",
            "clusters": [
                {"size": 3, "rows": [{"id": "a" * 32, "start": hello}, {"id": "b" * 32, "start": "Hi"}]}
            ],
        },
        "leaks": {
            "exact": {"rows": 0, "policy": "remove", "removed": 0, "examples": []},
            "near": {
                "rows": 7,
                "policy": "report",
                "removed": 0,
                "examples": [
                    {"train": "c" * 32, "held_out": "d" * 32, "start": hello, "against": "support version 3"},
                    {
                        "train": "e" * 32,
                        "held_out": "f" * 32,
                        "start": "First words",
                        "held_out_start": "Other words",
                        "against": "held-out",
                    },
                ],
            },
            "same_prompt": {"rows": 8, "policy": "remove", "removed": 8, "examples": []},
        },
        "train": {"rows": 93, "groups": 80},
        "held_out": {"rows": 7, "groups": 6, "set": None},
        "description": describe([asked(hello, "In your profile."), asked("Привет", "Hallo")]).spelled(),
        **changes,
    }


def side(lengths: list[int], **changes) -> dict:
    held = Lengths()
    for length in lengths:
        held.add(length)
    counted = {"rows": len(lengths), "tokens": sum(lengths), "supervised": sum(lengths) // 4}
    edges = {"longest": max(lengths), "cut": 0, "stripped": 0, "left_out": {}}
    return {**counted, **edges, "histogram": [list(each) for each in held.ranges()], **changes}


def some_tokens(**changes) -> dict:
    return {
        "max_tokens": 256,
        "train": side([20] * 50 + [90] * 41 + [300] * 2, rows=91, left_out={"train_too_long": 2}),
        "held_out": side([25] * 7),
        "packs": {"count": 19, "fill": 0.983, "rows_too_long": 0},
        **changes,
    }


def test_the_report_has_the_shape_that_prepare_writes():
    told = some_report()
    read = DataReport.model_validate(told)
    assert json.loads(json.dumps(told)) == told
    assert (read.dropped, read.leaked) == (5, 8)
    assert read.described.rows == 2
    for name, wrong in (("duplicates", 3), ("leaks", {"near": 1}), ("rejected", {"bad_json": "two"})):
        with pytest.raises(ValidationError):
            data_page(some_report(**{name: wrong}), some_tokens())


def test_every_part_of_the_report_is_told():
    text = Page(data_page(some_report(), some_tokens())).text
    assert "120 rows of 2 files; 93 to train on (80 prompts), 7 held out (6 prompts" in text[""]
    assert "98.3 %of packs filled" in text[""] and "5duplicates dropped" in text[""]
    for part in ("train 91", "held out 7", "duplicates 5", "leaks removed 8", "set aside 7", "too long 2"):
        assert part in text["rows"]
    assert "not told" not in text["rows"]
    assert "a.jsonlmessages90" in text["files"]
    assert "empty_turn5" in text["set-aside"] and "bad_json2" in text["set-aside"]
    assert text["set-aside"].index("empty_turn") < text["set-aside"].index("bad_json")
    assert "train, 93 rows" in text["lengths"] and "max_tokens 256" in text["lengths"]
    assert "Latin" in text["scripts"] and "Cyrillic6" in text["scripts"]
    assert "How do I change my address?" in text["duplicates"] and "3 rows" in text["duplicates"]
    assert "support version 3" in text["leaks"] and "Other words" in text["leaks"]
    assert "email3" in text["redacted"] and "card" not in text["redacted"]


def test_lengths_are_true_and_none_is_above_the_longest():
    told = some_tokens(max_tokens=700, train=side([100] * 9 + [1001], longest=700, cut=1))
    text = Page(data_page(some_report(), told)).text["lengths"]
    assert "median10125" in text, "upper end of the bin from 100 to 101"
    assert "90 % below10125" in text and "99 % below1,00125" in text
    assert "longest1,00125" in text and "longest used70025" in text
    tail = {"train": side([100] * 999 + [100_001])["histogram"]}
    assert "1 row too, up to 100,001 tokens" in histogram(tail, 700)


def test_what_a_careful_person_would_ask_about_stands_on_top():
    text = Page(data_page(some_report(), some_tokens())).text["look"]
    assert "7 rows could not be used" in text
    assert "7 train rows stay although nearly the whole conversation is held out too (near: report)" in text
    assert "2 train rows longer than max_tokens are left out" in text
    assert "6 rows are nearly another one and stay" in text
    assert "same_prompt" not in text, "all of these were removed"
    quiet = some_report(rejected={}, leaks={}, duplicates={"exact": 4, "folded": 0, "near": 0})
    calm = Page(data_page(quiet, some_tokens(train=side([20] * 93)))).text
    assert "Nothing stands out." in calm["look"]
    assert not calm.keys() & {"set-aside", "leaks"}
    assert "not looked for" in calm["duplicates"] and "not looked for" in calm[""]


def test_one_of_a_kind_is_told_in_the_singular():
    leak = {"rows": 1, "policy": "report", "removed": 0}
    alike = {"train": "c" * 32, "held_out": "d" * 32, "start": "Hi", "against": "held-out"}
    one = some_report(
        rows_read=1,
        rows_by_file={"a.jsonl": 1},
        rejected={"bad_json": 1},
        duplicates={"exact": 1, "near": 1, "near_policy": "report"},
        leaks={
            "near": {**leak, "stock_phrases": {"rows": 1, "examples": [alike]}},
            "same_prompt": {**leak, "removed": 1},
        },
        train={"rows": 1, "groups": 1},
        held_out={"rows": 1, "groups": 1, "set": None},
    )
    causes = ("train_too_long", "train_no_whole_answer", "held_out_prompt_too_long")
    counted = side([1], cut=1, stripped=0, left_out=dict.fromkeys(causes, 1))
    packs = {"count": 1, "fill": 0.5, "rows_too_long": 1}
    tokens = some_tokens(train=counted, held_out=side([1], stripped=1), packs=packs)
    text = Page(data_page(one, tokens)).text
    for said in (
        "1 row could not be used and was set aside",
        "1 train row stays although",
        "1 train row shares",
        "1 row is nearly another one and stays",
        "1 train row longer than max_tokens is left out",
        "1 held-out prompt longer than max_tokens is left out",
        "1 row was cut",
        "1 row loses white space",
    ):
        assert said in text["look"]
    assert "1row to train on" in text[""] and "1duplicate dropped" in text[""] and "1leak removed" in text[""]
    plurals = "rows|tokens|packs|prompts|files|answers|duplicates|leaks|are|were|stay|share|lose"
    assert not re.search(rf"\b1 ?([a-z-]+ )?({plurals})\b", " ".join(text.values()))


def test_rows_that_no_cause_accounts_for_are_not_hidden():
    assert "not told 80" in Page(data_page(some_report(rows_read=200), some_tokens())).text["rows"]


def test_without_tokens_lengths_are_told_in_characters_and_that_is_said():
    text = Page(data_page(some_report(), None)).text
    assert "In characters, because the base's tokenizer is not here." in text["lengths"]
    assert "loss" not in text and "sample" not in text


def test_the_frozen_set_that_is_held_out_is_named():
    held_out = {"rows": 7, "groups": 6, "set": "2026-q4"}
    assert (
        "picked by the frozen set 2026-q4" in Page(data_page(some_report(held_out=held_out), None)).text[""]
    )


def test_a_report_of_an_older_run_is_shown_as_far_as_it_tells():
    text = Page(data_page({"rows_read": 3, "rows_by_file": {"a.jsonl": 3}}, None)).text
    assert "3 rows of 1 file" in text[""]


def test_the_page_stands_alone():
    html = data_page(some_report(), some_tokens())
    page = Page(html)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"https?:|url\(|@import|javascript:", html)
    links = [value for name, value in page.attributes if name == "href"]
    ids = {value for name, value in page.attributes if name == "id"}
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><b>",
    "\u202egnp.exe",
    "&lt;",
)


@pytest.mark.parametrize("evil", HOSTILE)
def test_nothing_in_the_data_becomes_markup(evil):
    begun = {"id": evil, "start": evil}
    leak = {"train": evil, "held_out": evil, "start": evil, "held_out_start": evil, "against": evil}
    report = some_report(
        formats={evil: evil},
        rows_by_file={evil: 120},
        rejected={evil: 1},
        redacted={evil: 1},
        duplicates={"clusters": [{"size": 2, "rows": [begun]}]},
        leaks={evil: {"rows": 1, "policy": evil, "removed": 0, "examples": [leak]}},
        held_out={"rows": 7, "groups": 6, "set": evil},
    )
    tokens = some_tokens(train=side([20], left_out={evil: 1}))
    plain, page = Page(data_page(some_report(), some_tokens())), Page(data_page(report, tokens))
    assert page.tags <= plain.tags | {"details", "summary"}
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
    assert evil in page.text["files"] and evil in page.text["leaks"]
    assert escape(evil) in data_page(report, tokens)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.integers(8, 8000),
)
def test_a_histogram_shows_every_row_once(train, held_out, limit):
    sides = {"train": side(train)["histogram"], "held out": side(held_out)["histogram"]}
    html = histogram(sides, limit)
    Page(html)
    drawn = sum(int(n.replace(",", "")) for n in re.findall(r"(?:train|held out) ([0-9,]+) rows?", html))
    cut_off = re.search(r"([0-9,]+) rows? too, up to", html)
    told = drawn + (int(cut_off[1].replace(",", "")) if cut_off else 0)
    assert told == len(train) + len(held_out)
    assert ('class="limit"' in html) != ("lies beyond the right edge" in html)


def test_shares_are_never_rounded_to_nothing_or_all():
    shares = {(0, 5): "0 %", (5, 5): "100 %", (1, 5000): "under 0.1 %", (4999, 5000): "over 99.9 %"}
    shares |= {(1, 40): "2.5 %", (1, 3): "33 %", (995, 1000): "99.5 %", (3, None): "0 %", (3, 0): "0 %"}
    assert {asked: percent(*asked) for asked in shares} == shares


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    from retuner.base import fetch_base, load_tokenizer
    from retuner.observe import Silent
    from retuner.params import TinyBase
    from retuner.rendering import Renderer

    base = tmp_path_factory.mktemp("base")
    fetch_base(base, TinyBase(source="tiny", seed=0), Silent())
    return Renderer(load_tokenizer(base))


def test_rows_are_shown_token_by_token(renderer):
    ids, labels = renderer.encode_chat(asked("<b>é🙂</b>", "red <|end|>"))
    row = ShownRow("held_out", "f" * 32, ids, labels)
    text = Page(data_page(some_report(), some_tokens(), [row], renderer.tokenizer)).text["sample"]
    assert "<b>é🙂</b>" in text and "red <|end|>" in text
    assert f"{len(ids)} tokens" in text and "scored" in text


def test_no_message_turns_what_is_around_it_and_what_would_is_seen(renderer):
    """Only what is within one isolated element can change the order of its neighbours."""
    ids, labels = renderer.encode_chat(asked("שלום \u202egnp.exe", "عربي \u2069\u200f."))
    html = coloured(ShownRow("train", "f" * 32, ids, labels), renderer.tokenizer)
    _, shown = html.split('<div class="text">')
    apart = re.findall("<bdi>(.*?)</bdi>", shown, re.DOTALL)
    messages = [re.sub("<.*?>", "", each) for each in apart]
    assert any("שלום RLOgnp.exe" in said for said in messages)
    assert any("عربي PDIRLM." in said for said in messages)
    around = re.sub("<.*?>", "", re.sub("<bdi>.*?</bdi>", "", shown, flags=re.DOTALL))
    assert around.isascii() and "<|user|>" not in "".join(messages)
    assert 'title="U+202E RIGHT-TO-LEFT OVERRIDE"' in html
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)

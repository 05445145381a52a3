"""What redaction takes for personal data or a secret, and what it does not."""

import json

import pytest
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from prepare_stage import REAL_DATA, Stage, real_data, some_rows

from retuner.memo import Memo
from retuner.naming import chat_id
from retuner.redaction import KINDS, redacted

AWS = "AKIA" + "IOSFODNN7EXAMPLE"  # in two pieces, so that nobody's scanner takes it for a live one
GITHUB = "ghp_" + "aB3" * 12
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "dozjgNryP4J3jVmNHl0w5N"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc=\n-----END RSA PRIVATE KEY-----"


HEX = "0f1e2d3c4b5a6978"
ALNUM = "aB3dE5gH7jK9"
# In pieces too: the beginning and what makes the token as long as those that are issued.
TOKENS = {
    "anthropic": ("sk-ant-", "api03-" + ALNUM * 8),
    "databricks": ("dapi", HEX * 2),
    "digitalocean": ("dop_v1_", HEX * 4),
    "digitalocean-oauth": ("doo_v1_", HEX * 4),
    "digitalocean-refresh": ("dor_v1_", HEX * 4),
    "docker": ("dckr_pat_", (ALNUM * 3)[:27]),
    "github": ("github_pat_", (ALNUM * 2)[:22] + "_" + (ALNUM * 5)[:59]),
    "gitlab": ("glpat-", (ALNUM * 2)[:20]),
    "gitlab-routed": ("glpat-", ALNUM * 5 + ".01.0a1b2c3d4"),
    "gitlab-runner": ("glrtr-", (ALNUM * 2)[:20]),
    "google": ("AIza", (ALNUM * 3)[:35]),
    "google-oauth": ("ya29.", "a0Af_" + ALNUM * 12),
    "google-service": ("ya29.", "c.b0Aa-" + ALNUM * 12),
    "google-client": ("GOCSPX-", (ALNUM * 3)[:28]),
    "grafana": ("glsa_", (ALNUM * 3)[:32] + "_0f1e2d3c"),
    "groq": ("gsk_", (ALNUM * 5)[:52]),
    "hugging-face": ("hf_", (ALNUM * 3)[:34]),
    "linear": ("lin_api_", (ALNUM * 4)[:40]),
    "notion": ("ntn_", "12345678901" + (ALNUM * 3)[:35]),
    "npm": ("npm_", ALNUM * 3),
    "openai": ("sk-", (ALNUM * 2)[:20] + "T3BlbkFJ" + (ALNUM * 2)[:20]),
    "openai-project": ("sk-proj-", ALNUM * 6 + "_-T3BlbkFJ" + ALNUM * 6),
    "openrouter": ("sk-or-v1-", HEX * 4),
    "perplexity": ("pplx-", ALNUM * 4),
    "postman": ("PMAK-", (HEX * 2)[:24] + "-" + (HEX * 3)[:34]),
    "replicate": ("r8_", (ALNUM * 4)[:37]),
    "shopify": ("shpat_", HEX * 2),
    "slack-app": ("xapp-", "1-A012B34CD-1234567890123-" + HEX * 4),
    "slack-configuration": ("xoxe.xoxp-", "1-" + (ALNUM * 14)[:166]),
    "stripe": ("rk_live_", (ALNUM * 9)[:99]),
    "stripe-webhook": ("whsec_", (ALNUM * 3)[:32]),
    "vault": ("hvs.", ALNUM * 8),
    "xai": ("xai-", (ALNUM * 7)[:80]),
}


def redact(text: str, kinds=KINDS) -> str:
    return redacted([{"role": "user", "content": text}], kinds)[0][0]["content"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jo.doe+x@ex-ample.co.uk.", "Write to [EMAIL]."),
        ("<müller@bücher.example>, a_b@c.io", "<[EMAIL]>, [EMAIL]"),
        ("_john@example.com_, __j_d@example.com__, -john@example.com", "_[EMAIL]_, __[EMAIL]__, -[EMAIL]"),
        ("john@example.com- or john@example.com2024-01-02", "[EMAIL]- or [EMAIL]2024-01-02"),
        ("o'brien@example.com, o’brien@example.com, 'jo@example.com'", "[EMAIL], [EMAIL], '[EMAIL]'"),
        ("b'jo@a.example.com', f'{x}jo@example.com'", "b'[EMAIL]', f'{x}[EMAIL]'"),
        ("user@xn--e1afmkfd.xn--p1ai. jo@163.com", "[EMAIL]. [EMAIL]"),
        ("Call +44 20 7946 0958 now", "Call [PHONE] now"),
        ("Call 0049 30 901820 now", "Call [PHONE] now"),
        ("020 7946 0958 020 7946 0959, 030 901820 +49 30 901821", "[PHONE] [PHONE], [PHONE] [PHONE]"),
        ("(415) 555-2671 or 415-555-2671 or 1-800-555-0199", "[PHONE] or [PHONE] or [PHONE]"),
        ("Tel. 020 7946 0958.", "Tel. [PHONE]."),
        ("+49 (89) - 636480 or (089) - 636480", "[PHONE] or [PHONE]"),
        ("06 12 34 56 78", "[PHONE]"),
        ("4111 1111 1111 1111, 5500000000000004, 3782 822463 10005", "[CARD], [CARD], [CARD]"),
        ("#4111111111111111, 4111\u00a01111\u00a01111\u00a01111", "#[CARD], [CARD]"),
        ("3782\u202f822463\u202f10005, 3530111333300000 (JCB)", "[CARD], [CARD] (JCB)"),
        (f"key={AWS};", "key=[SECRET];"),
        (f"{GITHUB} {JWT}", "[SECRET] [SECRET]"),
        (f"here:\n{PEM}\nthanks", "here:\n[SECRET]\nthanks"),
        ("Authorization: Bearer abcdefghijklmnopqrstuvwx.12", "Authorization: Bearer [SECRET]"),
        ("https://user:hunter2@host/x, hunter2", "https://user:[SECRET]@host/x, hunter2"),
    ],
)
def test_it_is_replaced_by_its_mark_and_nothing_else_changes(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "order #4417, ref. BX-44056, invoice 2024-000123456",
        "2024-01-02, 01-02-2024, 10.12.2024 14:30, 03/04/2025 0930",
        "$1,234,567.00 and 1 200 000 € and 12345678901234567890",
        "4111-1111-1111-1112 fails its check digit; IMEI 490154203237518 is no card",
        "order #4111111111111112, #3530111333300001, 4111\u00a01111\u00a01111\u00a01112, 3527000000000008",
        "SSN 078-05-1120 (046-12-3456)",
        "0900-0130, 555-1234, 3.14159265358979, 192.168.100.200, v10.15.7-2023",
        "a @ b, user@localhost, @name, #tag, <<48/2=24>>24, 2000000-400000=1600000",
        "a@b, foo@1.2, react@18.2.0, next@1.0.0-alpha.beta, checkout@v4.1.rc2, @types/node@18.2.x, logo@2x.png",
        "The key to success is a token of trust; password: see above.",
        "1000000000 people, 0.0000000001 mm, ISBN 978-3-16-148410-0",
    ],
)
def test_numbers_and_words_that_are_something_else_stay(text):
    assert redact(text) == text


@pytest.mark.parametrize("begin, rest", TOKENS.values(), ids=TOKENS)
def test_a_token_is_found_whole_by_its_form_and_its_beginning_alone_is_not(begin, rest):
    assert redact(f"TOKEN={begin}{rest}, or _{begin}{rest}.") == "TOKEN=[SECRET], or _[SECRET]."
    words = f"{begin} begins it, {begin}... and {begin}<your-token> and {begin}key stand for it."
    assert redact(words) == words


@pytest.mark.parametrize(
    ("detector", "text", "secret"),
    [
        (NpmDetector, "//registry.npmjs.org/:_authToken={}", "npm_" + ALNUM * 3),
        (NpmDetector, "\n//npm.example.org/a/b/:_authToken= {}\n", "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"),
        (OpenAIDetector, "OPENAI_API_KEY={}", "sk-" + (ALNUM * 2)[:20] + "T3BlbkFJ" + (ALNUM * 2)[:20]),
        (OpenAIDetector, "'{}'", "sk-team_1-" + (ALNUM * 2)[:20] + "T3BlbkFJ" + (ALNUM * 2)[:20]),
        (OpenAIDetector, "_{} is the key_", "sk-proj-x-" + (ALNUM * 2)[:20] + "T3BlbkFJ" + (ALNUM * 2)[:20]),
    ],
)
def test_what_detectors_that_are_left_out_find_is_found(detector, text, secret):
    assert any(secret in found for found in detector().analyze_string(text.format(secret)))
    assert redact(text.format(secret)) == text.format("[SECRET]")


@pytest.mark.parametrize("piece", ["//", "sk-a", "eyJ-", "a@a-a.", "4111\u00a0", "+1 ("])
def test_a_text_that_repeats_one_piece_for_a_megabyte_ends(piece):
    # An hour or more, were a pattern's time to grow with the square of the length.
    text = piece * (1_000_000 // len(piece))
    assert redact(text + AWS).endswith("[SECRET]")


@real_data
def test_false_alarms_in_real_chats():
    counts = {}
    for name in ("gsm8k/test", "e2e/test"):
        lines = (REAL_DATA / f"{name}.jsonl").read_text("utf-8").split("\n")[:-1]
        turns = [{"role": "user", "content": text} for line in lines for text in json.loads(line).values()]
        counts[name] = redacted(turns, KINDS)[1]
    assert not any(counts.values()), counts


def test_sample_emails_hold_nothing_to_redact():
    from retuner.support_emails import conversations

    turns = [turn for row in conversations(400, 3) for turn in row["messages"]]
    made, counts = redacted(turns, KINDS)
    assert not counts and list(made) == turns


def test_only_the_kinds_that_are_asked_for_are_touched():
    text = f"a@b.org +44 20 7946 0958 4111111111111111 {AWS}"
    assert redact(text, []) == text
    assert redact(text, ["phone", "email"]) == f"[EMAIL] [PHONE] 4111111111111111 {AWS}"


def test_prepare_redacts_before_it_names_compares_and_splits(tmp_path):
    stage = Stage(tmp_path)
    rows = [
        {"prompt": f"My mail is u{n}@example.org, help me.", "completion": f"Wrote to u{n}@example.org."}
        for n in range(5)
    ]
    facts = stage({"x.jsonl": rows + some_rows(40)}, redact=["email", "phone"])
    assert facts.redacted == {"email": 10, "phone": 0} and facts.duplicates["exact"] == 4
    assert stage.report["redacted"] == facts.redacted
    kept = [row for side in ("train", "held_out") for row in stage.rows(side)]
    mailed = [row for row in kept if "mail" in row["messages"][0]["content"]]
    assert [turn["content"] for turn in mailed[0]["messages"]] == [
        "My mail is [EMAIL], help me.",
        "Wrote to [EMAIL].",
    ]
    assert mailed[0]["id"] == chat_id(mailed[0]["messages"]) and len(mailed) == 1
    assert stage({"x.jsonl": rows + some_rows(40)}).redacted == {}
    assert all(b"example.org" in data for data in [b"".join(stage.bytes())])


def test_nothing_of_a_bad_row_is_kept_where_anything_is_redacted(tmp_path):
    stage, memo = Stage(tmp_path), Memo(tmp_path / "memo", "key")
    broken = b'{"prompt": "I am u@example.org'
    files = {"x.jsonl": some_rows(40), "y.jsonl": broken}
    stage(files, redact=["email"], max_bad_rows=1, memo=memo)
    [bad] = stage.quarantine()
    assert (bad["cause"], bad["file"], bad["start"]) == ("truncated", "y.jsonl", "")
    kept = [path.read_bytes() for path in (*stage.out.rglob("*.json*"), *memo.folder.iterdir())]
    assert not any(b"example.org" in data for data in kept) and len(kept) > 4
    stage(files, max_bad_rows=1, memo=memo)
    assert stage.quarantine()[0]["start"] == broken.decode()

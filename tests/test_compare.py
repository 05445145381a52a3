import json

import pytest

from retuner.compare import compare, render
from retuner.errors import Refused


def question(text):
    return [{"role": "user", "content": text}]


def report_at(folder, answers, losses=(), headline=None):
    """`answers`: prompt to (answer, right, reference); `losses`: (id, tokens, loss)."""
    folder.mkdir()
    scores = {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5} if headline is None else headline
    (folder / "report.json").write_text(json.dumps({"scores": {"candidate": scores}}))
    with (folder / "answers.jsonl").open("w") as file:
        for prompt, (answer, right, reference) in answers.items():
            row = {
                "group": prompt,
                "prompt": question(prompt),
                "references": [reference],
                "answers": {"base": "?", "candidate": answer},
                "scores": {"base": {"exact_match": 0.0}, "candidate": {"exact_match": right}},
            }
            print(json.dumps(row), file=file)
    with (folder / "losses.jsonl").open("w") as file:
        for id, tokens, loss in losses:
            row = {"id": id, "group": id, "tokens": tokens, "loss": {"base": 9.0, "candidate": loss}}
            print(json.dumps(row), file=file)
    return folder


def test_rows_that_flipped_are_shown_in_both_directions(tmp_path):
    a = report_at(tmp_path / "a", {"1+1": ("2", 1.0, "2"), "2+2": ("5", 0.0, "4"), "3+3": ("6", 1.0, "6")})
    b = report_at(tmp_path / "b", {"1+1": ("3", 0.0, "2"), "2+2": ("4", 1.0, "4"), "3+3": ("6", 1.0, "6")})
    result = compare(a, b)
    assert result.won == {"exact_match": 1}
    assert result.lost == {"exact_match": 1}
    flipped = {change.prompt[0]["content"]: (change.answer_a, change.answer_b) for change in result.changes}
    assert flipped == {"2+2": ("5", "4"), "1+1": ("2", "3")}


def test_only_shared_prompts_are_compared_and_the_others_are_counted(tmp_path):
    a = report_at(tmp_path / "a", {"1+1": ("2", 1.0, "2"), "old": ("x", 1.0, "x"), "same": ("y", 1.0, "y")})
    b = report_at(tmp_path / "b", {"1+1": ("3", 0.0, "2"), "new": ("x", 1.0, "x"), "same": ("y", 1.0, "z")})
    result = compare(a, b)
    # `same` has other references in B, so the two scores do not measure the same.
    assert (result.shared_prompts, result.only_a, result.only_b) == (1, 2, 2)
    (row,) = [row for row in result.metrics if row.metric == "exact_match"]
    assert (row.a, row.b, row.difference, row.rows) == (1.0, 0.0, -1.0, 1)
    assert row.better == "neither", "one prompt decides nothing"


def test_a_clear_difference_names_the_better_and_its_interval_holds_the_difference(tmp_path):
    a = report_at(tmp_path / "a", {f"q{n}": ("x", float(n % 10 == 0), "y") for n in range(60)})
    b = report_at(tmp_path / "b", {f"q{n}": ("y", float(n % 10 != 5), "y") for n in range(60)})
    for first, second, better in [(a, b, "b"), (b, a, "a"), (a, a, "neither")]:
        result = compare(first, second, shown=3)
        (row,) = [row for row in result.metrics if row.metric == "exact_match"]
        assert row.better == better
        assert row.low <= row.difference <= row.high
        assert row.difference == pytest.approx(row.b - row.a)
        assert len(result.changes) <= 6


def test_a_lower_loss_is_better_and_rows_weigh_by_their_tokens(tmp_path):
    answers = {"1+1": ("2", 1.0, "2")}
    losses_a = [(f"r{n}", 10 + n, 2.0 + n / 10) for n in range(30)]
    a = report_at(tmp_path / "a", answers, losses_a)
    b = report_at(tmp_path / "b", answers, [(id, tokens, loss - 0.5) for id, tokens, loss in losses_a])
    (row,) = [row for row in compare(a, b).metrics if row.metric == "loss"]
    assert row.better == "b"
    assert row.difference == pytest.approx(-0.5)
    tokens = sum(tokens for _, tokens, _ in losses_a)
    assert row.a == pytest.approx(sum(loss * tokens for _, tokens, loss in losses_a) / tokens)


def test_losses_over_another_tokenizer_s_tokens_are_not_compared(tmp_path):
    answers = {"1+1": ("2", 1.0, "2")}
    a = report_at(tmp_path / "a", answers, [("r", 10, 2.0)])
    b = report_at(tmp_path / "b", answers, [("r", 11, 1.0)])
    result = compare(a, b)
    assert [row.metric for row in result.metrics] == ["exact_match"]
    assert any("loss" in note for note in result.notes)


def test_reports_with_nothing_in_common_are_refused(tmp_path):
    a = report_at(tmp_path / "a", {"1+1": ("2", 1.0, "2")})
    b = report_at(tmp_path / "b", {"2+2": ("4", 1.0, "4")})
    with pytest.raises(Refused, match="share no held-out prompt"):
        compare(a, b)
    (b / "report.json").unlink()
    with pytest.raises(Refused, match=r"report\.json"):
        compare(a, b)


def test_the_comparison_reads_the_same_as_json_and_as_a_table(tmp_path):
    from rich.console import Console

    a = report_at(tmp_path / "a", {"[bold]1+1[/]": ("[red]2", 1.0, "2"), "x": ("", 0.0, "x")})
    b = report_at(tmp_path / "b", {"[bold]1+1[/]": ("", 0.0, "2"), "x": ("x", 1.0, "x")})
    result = compare(a, b)
    assert type(result).model_validate_json(result.model_dump_json()) == result
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(render(result, "version 3", "version 4"))
    shown = console.export_text()
    assert "version 3" in shown
    assert "exact_match" in shown
    assert "[bold]1+1[/]" in shown, "a prompt's own brackets are not markup"

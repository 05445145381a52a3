import json
import math

import numpy
import pytest

from retuner.artifacts import Report, ReportFacts
from retuner.errors import Refused
from retuner.gate import decide, paired_interval
from retuner.params import GateParams, GateRule


def report_of(folder, answers, losses=(), models=("base", "candidate")) -> Report:
    """`answers`: (group, {model: exact match}); `losses`: (group, tokens, {model: loss})."""
    folder.mkdir(exist_ok=True)
    with (folder / "answers.jsonl").open("w") as file:
        for group, scores in answers:
            row = {
                "group": group,
                "scores": {model: {"exact_match": value} for model, value in scores.items()},
            }
            print(json.dumps(row), file=file)
    with (folder / "losses.jsonl").open("w") as file:
        for at, (group, tokens, loss) in enumerate(losses):
            print(json.dumps({"id": str(at), "group": group, "tokens": tokens, "loss": loss}), file=file)
    facts = ReportFacts(scores={m: {} for m in models}, prompts=len(answers), rows=len(losses))
    return Report(stage="evaluate", fingerprint="f", digest="d", path=folder, facts=facts)


def gate(*rules: GateRule, confidence=0.95, resamples=1000, seed=0) -> GateParams:
    return GateParams(confidence=confidence, resamples=resamples, seed=seed, rules=rules)


def rule(metric="exact_match", against="base", **bound) -> GateRule:
    return GateRule(metric=metric, against=against, **bound)


def scored(base, candidate):
    return [
        (f"g{at}", {"base": b, "candidate": c}) for at, (b, c) in enumerate(zip(base, candidate, strict=True))
    ]


def test_an_identical_candidate_neither_gains_nor_loses(tmp_path):
    scores = numpy.random.default_rng(0).random(50).tolist()
    report = report_of(tmp_path, scored(scores, scores))
    unharmed, gained = decide(report, gate(rule(max_regression=0.0), rule(min_gain=0.001))).verdicts
    assert (unharmed.gain, unharmed.low, unharmed.high) == (0, 0, 0)
    assert unharmed.holds
    assert not gained.holds


def test_a_clear_gain_passes_and_its_mirror_image_does_not(tmp_path):
    random = numpy.random.default_rng(1)
    worse, better = (random.random(60) < 0.2).astype(float), (random.random(60) < 0.8).astype(float)
    demand = gate(rule(min_gain=0.2))
    assert decide(report_of(tmp_path, scored(worse, better)), demand).passed
    mirrored = decide(report_of(tmp_path, scored(better, worse)), demand)
    assert not mirrored.passed
    assert mirrored.verdicts[0].gain < 0


def test_a_gain_that_could_be_luck_does_not_pass(tmp_path):
    # 3 of 10 more right, 1 more wrong: the mean is above 0, its interval is not.
    report = report_of(tmp_path, scored([0, 0, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0, 1, 1]))
    verdict = decide(report, gate(rule(min_gain=0.0))).verdicts[0]
    assert verdict.gain == pytest.approx(0.2)
    assert verdict.low < 0
    assert not verdict.holds
    assert "too narrow" in verdict.note


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = numpy.random.default_rng(2)
    groups = [str(at) for at in range(80)]
    covered = 0
    for seed in range(300):
        _, low, high = paired_interval(groups, random.normal(0.1, 1, 80), [1] * 80, 0.9, 400, seed)
        covered += low <= 0.1 <= high
    # 0.9 give or take three standard errors, and a little for the percentile interval's known narrowness.
    assert 0.83 <= covered / 300 <= 0.95


def test_pairing_finds_a_small_gain_among_rows_of_very_different_difficulty(tmp_path):
    random = numpy.random.default_rng(3)
    base = random.normal(0, 10, 200)
    better = base + random.normal(0.1, 0.1, 200)
    demand = gate(rule(min_gain=0.05))
    assert decide(report_of(tmp_path, scored(base, better)), demand).passed
    unpaired = random.permutation(better)
    assert not decide(report_of(tmp_path, scored(base, unpaired)), demand).passed


def test_rows_of_one_group_count_as_one_observation():
    differences = numpy.random.default_rng(4).normal(0.1, 1, 40)
    groups = [f"g{at}" for at in range(40)]
    once = paired_interval(groups, differences, [1] * 40, 0.95, 1000, 0)
    tenfold = paired_interval(groups * 10, numpy.tile(differences, 10), [1] * 400, 0.95, 1000, 0)
    assert tenfold == pytest.approx(once)


def test_the_loss_gain_is_the_difference_of_the_losses_over_all_tokens(tmp_path):
    losses = [("a", 10, {"base": 2.0, "candidate": 1.0}), ("b", 90, {"base": 1.0, "candidate": 1.1})]
    report = report_of(tmp_path, [], losses)
    verdict = decide(report, gate(rule("loss", min_gain=0.0))).verdicts[0]
    base, candidate = (2.0 * 10 + 1.0 * 90) / 100, (1.0 * 10 + 1.1 * 90) / 100
    assert verdict.gain == pytest.approx(base - candidate)


def test_a_lower_loss_is_a_gain(tmp_path):
    losses = [(f"g{n}", 10 + n, {"base": 2.0 + n / 50, "candidate": 1.5 + n / 50}) for n in range(40)]
    decision = decide(report_of(tmp_path, [], losses), gate(rule("loss", min_gain=0.49)))
    assert decision.passed
    assert decision.verdicts[0].gain == pytest.approx(0.5)


def test_a_gain_of_exactly_what_is_asked_holds(tmp_path):
    report = report_of(tmp_path, scored([0.1] * 30, [0.4] * 30))
    assert decide(report, gate(rule(min_gain=0.3))).passed


def test_one_broken_rule_is_enough(tmp_path):
    report = report_of(tmp_path, scored([0.0] * 30, [0.5] * 30))
    decision = decide(report, gate(rule(min_gain=0.1), rule(min_gain=0.9)))
    assert [verdict.holds for verdict in decision.verdicts] == [True, False]
    assert not decision.passed


def test_a_first_candidate_is_not_held_against_a_production_that_is_not_there(tmp_path):
    report = report_of(tmp_path, scored([0.0] * 30, [0.0] * 30))
    verdict = decide(report, gate(rule(against="production", min_gain=0.5))).verdicts[0]
    assert verdict.holds
    assert verdict.gain is None
    assert "no production" in verdict.note


def test_a_production_that_is_there_is_compared_with(tmp_path):
    rows = [(f"g{n}", {"base": 0.0, "production": 1.0, "candidate": 0.5}) for n in range(30)]
    report = report_of(tmp_path, rows, models=("base", "production", "candidate"))
    decision = decide(report, gate(rule(against="production", max_regression=0.1)))
    assert not decision.passed
    assert decision.verdicts[0].gain == -0.5


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_never_pass(tmp_path, number):
    report = report_of(tmp_path, scored([0.0] * 30, [1.0] * 29 + [number]))
    verdict = decide(report, gate(rule(max_regression=1e9))).verdicts[0]
    assert not verdict.holds
    assert "finite" in verdict.note


@pytest.mark.parametrize("rows", [0, 3])
def test_fewer_than_two_groups_never_pass(tmp_path, rows):
    report = report_of(tmp_path, [("only", {"base": 0.0, "candidate": 1.0})] * rows)
    assert not decide(report, gate(rule(min_gain=0.0))).passed


def test_nothing_demanded_is_passed_with_no_verdict(tmp_path):
    decision = decide(report_of(tmp_path, scored([1.0], [0.0])), gate())
    assert decision.passed
    assert decision.verdicts == ()


def test_a_metric_that_was_not_evaluated_is_refused(tmp_path):
    report = report_of(tmp_path, scored([0.0, 0.0], [1.0, 1.0]))
    with pytest.raises(Refused, match="rouge_l"):
        decide(report, gate(rule("rouge_l", min_gain=0.0)))


def test_the_decision_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path):
    random = numpy.random.default_rng(5)
    rows = scored(random.random(40), random.random(40))
    verdict = decide(report_of(tmp_path, rows), gate(rule(min_gain=0.0), seed=7)).verdicts[0]
    again = decide(report_of(tmp_path, rows[::-1]), gate(rule(min_gain=0.0), seed=7)).verdicts[0]
    other = decide(report_of(tmp_path, rows), gate(rule(min_gain=0.0), seed=8)).verdicts[0]
    assert again == verdict
    assert (other.low, other.high) != (verdict.low, verdict.high)


def test_more_confidence_is_a_wider_interval(tmp_path):
    random = numpy.random.default_rng(6)
    report = report_of(tmp_path, scored(random.random(40), random.random(40)))
    wide, narrow = (
        decide(report, gate(rule(min_gain=0.0), confidence=confidence)).verdicts[0]
        for confidence in (0.99, 0.8)
    )
    assert wide.low < narrow.low < narrow.high < wide.high

"""From preference pairs an adapter learns to prefer, away from what it began as, the same bytes every time."""

import json
import math

import pytest
from pair_job import make_inputs, params, random_pairs, run
from training_job import STEPS, Heard, killed_thrice, trainings

from retuner.errors import Refused, RetunerError
from retuner.files import sha256_file
from retuner.lora import WEIGHTS

EVERY_STEP = params(log_every_steps=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, heard = make_inputs(tmp_path_factory.mktemp("undisturbed")), Heard()
    facts = run(folder, EVERY_STEP, heard)
    return folder, facts, heard


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


def rewards(heard, name="margins"):
    return [values[f"rewards/{name}"] for _, values in heard.points]


def test_the_margin_grows_from_nothing(undisturbed):
    _, facts, heard = undisturbed
    assert heard.points[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(rewards(heard)[0]) < 1e-5
    assert min(rewards(heard)[-3:]) > 0.5
    assert rewards(heard, "accuracies")[-3:] == [1.0, 1.0, 1.0]
    assert facts.final_loss < 0.5
    assert facts.preference.beta == 0.1 and facts.preference.reference is None


def test_log_probabilities_are_made_where_they_count_and_nowhere_else(inputs, monkeypatch):
    from trl.trainer import utils

    scored, original = [], utils._ChunkedLogProbFunction

    class Counted(original):
        @staticmethod
        def forward(ctx, hidden, *rest):
            scored.append(len(hidden))
            return original.forward(ctx, hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    before = utils._use_triton
    run(inputs, params(max_steps=2, batch_size=24, gradient_accumulation=1))
    answers = sum(len(chosen) + len(rejected) for _, chosen, rejected in random_pairs())
    # Of all pairs: for the reference, and in each of the two steps.
    assert sum(scored) == 3 * answers
    assert utils._use_triton is before


def test_checkpointed_activations_change_nothing(undisturbed, inputs):
    checkpointed = EVERY_STEP.model_copy(update={"gradient_checkpointing": True})
    facts = run(inputs, checkpointed)
    assert facts.sha256 == undisturbed[1].sha256
    assert facts.effective["gradient_checkpointing"] == "True"


def test_an_adapter_that_training_begins_as_is_the_reference(undisturbed, inputs):
    folder, facts, _ = undisturbed
    heard, asked = Heard(), params(log_every_steps=1, lora={"dropout": 0.0})
    again = run(inputs, asked, heard, start=folder / "out")
    assert again.preference.reference == facts.sha256 == sha256_file(folder / "out" / WEIGHTS)
    # Against the base it would begin with the margin that the first training ended with.
    assert heard.points[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(rewards(heard)[0]) < 1e-5
    assert again.sha256 != facts.sha256


def test_an_adapter_of_embeddings_is_part_of_the_reference_too(inputs):
    """Of a warm start TRL copies such an adapter in part only."""
    lora = {"targets": ("qkv_proj", "embed_tokens"), "dropout": 0.0}
    run(inputs, params(lora=lora), out="first", work="first-work")
    heard = Heard()
    run(inputs, params(log_every_steps=1, lora=lora), heard, start=inputs / "first")
    assert heard.points[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_is_computed_without_dropout_and_as_the_evaluation_does(inputs, monkeypatch):
    from retuner import dpo
    from retuner.evaluation import row_losses
    from retuner.generation import load
    from retuner.pair_evaluation import _row, read_pairs

    seen = {}
    original = dpo._with_reference

    def keep(*arguments):
        seen["pairs"] = original(*arguments)
        return seen["pairs"]

    monkeypatch.setattr(dpo, "_with_reference", keep)
    run(inputs, params(max_steps=1, lora={"dropout": 0.5}))
    pairs = read_pairs(inputs / "chats" / "train.arrow")
    model, _ = load(inputs / "base", "float32", "sdpa", "cpu")
    for column, answer in (("ref_chosen_logps", "chosen_ids"), ("ref_rejected_logps", "rejected_ids")):
        rows = [_row(pair, answer) for pair in pairs]
        losses = row_losses(model, rows, 8, lambda done, total: None)
        expected = [-loss * row["tokens"] for loss, row in zip(losses, rows)]
        assert list(seen["pairs"][column]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("loss_type", "smoothing"), [("ipo", 0.0), ("robust", 0.1)])
def test_other_losses_raise_the_margin_too(inputs, loss_type, smoothing):
    heard = Heard()
    settings = {"loss_type": loss_type, "label_smoothing": smoothing}
    run(inputs, params(settings=settings, log_every_steps=1), heard)
    assert rewards(heard)[-1] > rewards(heard)[0] + 0.1


# --- the same bytes


@pytest.mark.slow
def test_a_training_killed_thrice_ends_in_the_same_bytes(undisturbed, inputs):
    (inputs / "asked.json").write_text(EVERY_STEP.model_dump_json())
    with trainings() as start:
        done = killed_thrice(inputs, start, (2, 6, 8))
    assert any("going on after step-" in line for line in done["lines"])
    assert done["sha256"] == undisturbed[1].sha256


def test_a_resumed_training_tells_all_its_steps(undisturbed, inputs):
    with pytest.raises(KeyboardInterrupt):
        run(inputs, EVERY_STEP, Heard(die_after=9), out="died")
    heard = Heard()
    again = run(inputs, EVERY_STEP, heard)
    assert any("going on after step-8" in line for line in heard.lines)
    assert again.sha256 == undisturbed[1].sha256

    def told(folder):
        points = map(json.loads, (folder / "out" / "aside" / "metrics.jsonl").read_text().splitlines())
        timeless = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "rewards/chosen")
        return [(point["step"], [point["metrics"][name] for name in timeless]) for point in points]

    assert told(inputs) == told(undisturbed[0])
    assert [step for step, _ in told(inputs)] == list(range(1, STEPS + 1))


def test_it_writes_what_any_training_writes_and_leaves_the_chats_alone(undisturbed):
    folder, facts, _ = undisturbed
    out = folder / "out"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        WEIGHTS,
        "aside/effective.json",
        "aside/metrics.jsonl",
    ]
    assert facts.sha256 == sha256_file(out / WEIGHTS)
    assert sorted(path.name for path in (folder / "chats").iterdir()) == ["held_out.arrow", "train.arrow"]
    sealed = {path.name for path in (folder / "work" / "sealed" / "step-10").rglob("*")}
    assert "ref" not in sealed


def test_nothing_is_printed(inputs, capfd):
    run(inputs, params(max_steps=2))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


# --- what is refused


def test_a_training_that_diverges_stops_within_a_step_and_leaves_nothing(inputs):
    heard = Heard()
    asked = params(learning_rate=1e30, warmup_fraction=0.0, checkpoint_every_steps=1)
    with pytest.raises(RetunerError, match="step"):
        run(inputs, asked, heard)
    assert heard.steps[-1] <= 2
    assert list((inputs / "out").iterdir()) == []


def test_no_pairs_are_refused(tmp_path):
    with pytest.raises(Refused, match="no rows"):
        run(make_inputs(tmp_path, []))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora": {"init": "olora"}}, "lora.init must be default"),
        ({"lora": {"bias": "lora_only"}}, "lora.bias must be none"),
        ({"quantization": {"kind": "nf4", "double": True}}, "quantization must be null"),
        ({"settings": {"label_smoothing": 0.1}}, "the other losses know none"),
        ({"settings": {"loss_type": "robust"}}, "robust needs a share above 0"),
        ({"settings": {"loss_type": "best"}}, "sigmoid"),
        ({"settings": {"beta": 0.0}}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(changed, told):
    with pytest.raises(ValueError, match=told):
        params(**changed)


def test_pairs_are_not_in_the_order_of_their_length():
    """Or the batches of the reference would be those of training, and a mistake in their order would not show."""
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in random_pairs()]
    assert lengths != sorted(lengths)

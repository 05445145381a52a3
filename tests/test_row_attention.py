"""Rows that lie in one sequence are attended to as if each were alone, wherever their borders are."""

from functools import cache

import pytest
import torch
from training_job import make_inputs, params, random_rows, run

from retuner.base import load_model
from retuner.files import sha256_file
from retuner.lora import WEIGHTS, put_adapter_on
from retuner.packing import NO_LOSS, collate_end_to_end, collate_packed
from retuner.row_attention import ROW_ATTENTION, attend_by_row
from retuner.row_trainer import supervised_loss
from retuner.skeleton import read_skeleton
from retuner.targets import choose_targets

TOKENS = 9
IDS = [7, 300, 12, 5, 99, 201, 44, 18, 310]
WINDOWS = [2047, 3]
"""Tokens that one sees, itself included: of Phi-3, and fewer than the rows have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model_with(folder):
    """An adapted tiny model of float32 whose adapter does something, by attention, window and device."""

    @cache
    def make(attention, window, device="cpu", precision="float32"):
        base = load_model(folder / "base", precision, attention.replace(ROW_ATTENTION, "sdpa"), device)
        base.config.sliding_window = window
        if attention == ROW_ATTENTION:
            assert attend_by_row(base)
        asked = params(lora={"dropout": 0.0}).lora
        torch.manual_seed(0)
        model = put_adapter_on(base, asked, choose_targets(asked, read_skeleton(folder / "base")))
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape).to(weight) * 0.05
        return model

    return make


def packed(attention, rows):
    """One batch of one sequence that holds the rows."""
    sequence = {
        "input_ids": [token for row in rows for token in row],
        "labels": [token for row in rows for token in row],
        "seq_lengths": [len(row) for row in rows],
    }
    batch = (collate_end_to_end if attention == ROW_ATTENTION else collate_packed)([sequence])
    batch.pop("tokens")
    return batch


def alone(row):
    ids = torch.tensor([row])
    labels = ids.clone()
    labels[0, 0] = NO_LOSS
    return {"input_ids": ids, "labels": labels}


def outcome(model, batches):
    """Logits of every token, and the gradients of the loss over all batches."""
    model.zero_grad()
    logits = []
    for batch in batches:
        places = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            logits.append(model(**places, use_cache=False).logits[0])
        if (batch["labels"][:, 1:] != NO_LOSS).any():
            supervised_loss(model.get_base_model(), dict(batch), items=10).backward()
    found = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    return torch.cat(logits), found


def assert_same(one, other, tolerance=1e-5):
    torch.testing.assert_close(one[0], other[0], atol=tolerance, rtol=0)
    assert one[1].keys() == other[1].keys() and one[1]
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("attention", [ROW_ATTENTION, "sdpa", "eager"])
def test_a_border_at_any_place_keeps_two_rows_apart(model_with, attention, window):
    reference = model_with("eager", window)
    for border in range(1, TOKENS):
        rows = [IDS[:border], IDS[border:]]
        together = outcome(model_with(attention, window), [packed(attention, rows)])
        assert_same(together, outcome(reference, map(alone, rows)))


@pytest.mark.parametrize("window", WINDOWS)
def test_any_set_of_borders_keeps_rows_apart(model_with, window):
    """All of the 2⁵ ways to cut six tokens but the last, in which no token has one before it."""
    ids, reference = IDS[:6], model_with("eager", window)
    for cuts in range(2**5 - 1):
        ends = [place for place in range(1, 6) if cuts >> (place - 1) & 1]
        rows = [ids[start:end] for start, end in zip([0, *ends], [*ends, 6], strict=True)]
        together = outcome(model_with(ROW_ATTENTION, window), [packed(ROW_ATTENTION, rows)])
        assert_same(together, outcome(reference, map(alone, rows)))


def test_the_window_changes_what_is_seen(model_with):
    """So that the tests above do not compare two attentions that both forget it."""
    narrow, wide = (
        outcome(model_with(ROW_ATTENTION, window), [packed(ROW_ATTENTION, [IDS])]) for window in (3, 2047)
    )
    torch.testing.assert_close(narrow[0][:3], wide[0][:3], atol=1e-5, rtol=0)
    assert (narrow[0][3:] - wide[0][3:]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [3, 2047])
@pytest.mark.parametrize("length", [5, len(IDS)])
def test_rows_with_a_mask_are_attended_as_sdpa_does(model_with, window, length):
    """Padded or not."""
    ids = torch.tensor([IDS, IDS])
    mask = torch.ones_like(ids)
    mask[1, length:] = 0
    with torch.no_grad():
        ours, theirs = (
            model_with(attention, window)(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for attention in (ROW_ATTENTION, "sdpa")
        )
    assert ours[0].allclose(theirs[0], atol=1e-6) and ours[1, :length].allclose(theirs[1, :length], atol=1e-6)


def test_rows_that_do_not_say_where_they_end_are_not_guessed(model_with):
    with pytest.raises(ValueError, match="cu_seq_lens_q"), torch.no_grad():
        model_with(ROW_ATTENTION, 3)(input_ids=torch.tensor([IDS]), use_cache=False)


def test_a_batch_lies_end_to_end_without_padding():
    sequences = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2, 1]},
        {"input_ids": [4, 5], "labels": [NO_LOSS, 5], "seq_lengths": [2]},
    ]
    batch = collate_end_to_end(sequences)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[NO_LOSS, 2, NO_LOSS, NO_LOSS, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3, 5]
    assert (batch["max_length_q"], batch["tokens"]) == (2, 5)


def test_a_training_on_packed_rows_attends_row_by_row_and_says_so(tmp_path):
    facts = run(make_inputs(tmp_path), params(max_steps=1))
    assert facts.effective["packed_rows"] == "end to end, each attended by itself"
    assert facts.effective["attention"] == facts.effective["requested_attention"] == "sdpa"
    unpacked = run(make_inputs(tmp_path / "unpacked", pack_tokens=None), params(max_steps=1))
    assert "packed_rows" not in unpacked.effective


def test_row_by_row_and_by_mask_train_the_same_adapter(tmp_path, monkeypatch):
    """To rounding: sums are taken in another order."""
    from safetensors.torch import load_file

    asked = params(max_steps=4, optimizer="sgd", lora={"dropout": 0.0})
    run(make_inputs(tmp_path / "rows"), asked)
    monkeypatch.setattr("retuner.training.attend_by_row", lambda model: False)
    run(make_inputs(tmp_path / "mask"), asked)
    rows, mask = (load_file(tmp_path / name / "out" / WEIGHTS) for name in ("rows", "mask"))
    for name in rows:
        torch.testing.assert_close(rows[name], mask[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("asked", [{"gradient_checkpointing": True}, {"noise_alpha": 5.0}])
def test_it_is_repeatable_with_checkpointed_activations_and_with_noise(tmp_path, asked):
    shas = set()
    for name in ("one", "two"):
        folder = make_inputs(tmp_path / name, random_rows(12))
        run(folder, params(max_steps=3, **asked))
        shas.add(sha256_file(folder / "out" / WEIGHTS))
    assert len(shas) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_on_a_gpu_loss_and_gradients_are_those_of_eager_float32(model_with, precision, window):
    """bfloat16 takes torch's varlen kernel, float32 the rows one after another."""
    rows = [IDS[:4], IDS[4:], IDS]
    model = model_with(ROW_ATTENTION, window, "cuda", precision)
    batch = packed(ROW_ATTENTION, rows)
    found = outcome(model, [{n: v.cuda() if hasattr(v, "cuda") else v for n, v in batch.items()}])
    expected = outcome(model_with("eager", window), map(alone, rows))
    tolerance = 0.15 if precision == "bfloat16" else 1e-4
    found = found[0].float().cpu(), {name: grad.float().cpu() for name, grad in found[1].items()}
    assert_same(found, expected, tolerance)

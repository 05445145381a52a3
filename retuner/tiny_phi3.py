"""A random Phi-3 of 131 thousand weights, for trying things out: no download, ready in a moment.

Its control tokens, their white-space rules, the chat template's behaviour and the stop tokens are those of
Phi-3-mini-4k-instruct (July 2024), so that what goes wrong with the one goes wrong with the other.
"""

import json
import string
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 2, 4, 2, 16
VOCABULARY = 448
"""Rows of the embedding; more than there are tokens, as in Phi-3."""
MAX_TOKENS = 4096

# In the order of their ids. Phi-3's <|endoftext|>, <s> and <unk> leave white space alone; the others,
# </s> among them, take what stands to their right.
FIRST_TOKENS = ("<unk>", "<s>", "</s>")
LAST_TOKENS = (
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>"),
    *("<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
)
LEAVE_WHITE_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
MERGES = "▁ t|h e|▁ a|i n|▁t he|r e|o n|e r|▁ s|▁ i|o r|e n|a n|▁ c|▁ o|in g|▁ w|i s|o u|▁a n"

# A role that is none of the three leaves no trace, as in Phi-3's own template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)


def write_tiny_phi3(out: Path, seed: int) -> None:
    """A complete model folder; equal seeds give equal bytes."""
    ids = _write_tokenizer(out)
    special = {"bos_token_id": ids["<s>"], "pad_token_id": ids["<|endoftext|>"]}
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "dtype": "float32",
        "eos_token_id": ids["<|endoftext|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_TOKENS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "original_max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        **special,
    }
    stop_ids = sorted(ids[token] for token in ("<|endoftext|>", "<|assistant|>", "<|end|>"))
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"eos_token_id": stop_ids, **special})
    _write_weights(out, seed)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(out: Path, seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> Any:
        return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

    # Wider than the usual 0.02: with 64 hidden units that would hold all logits within ±1, and an
    # adapter on the projections alone could never make one token likely.
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, 1.0),
        "lm_head.weight": normal(VOCABULARY, HIDDEN, 0.4),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        shapes = {
            "self_attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        for name, (rows, columns) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(rows, columns, columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(out: Path) -> dict[str, int]:
    """Characters, a few merges, and bytes for everything else. Returns the ids by token."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    merges: list[Any] = [tuple(merge.split(" ")) for merge in MERGES.split("|")]
    pieces = [*FIRST_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
        *("".join(merge) for merge in merges),
    ]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=FIRST_TOKENS[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for content in (*FIRST_TOKENS, *LAST_TOKENS):
        strips = content not in LEAVE_WHITE_SPACE
        token = AddedToken(content, rstrip=strips, normalized=False, special=content != "</s>")
        # Only the second of the two keeps </s> where the special tokens are taken out of decoded text.
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "special_tokens_map.json", names)
    return tokenizer.get_vocab(with_added_tokens=True)

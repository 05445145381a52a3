"""Base and adapter, and an export of them, as models that answer the same questions."""

from pathlib import Path
from typing import Any, Literal

from retuner.base import load_tokenizer
from retuner.errors import Refused
from retuner.export_source import Source
from retuner.generation import adapter_on, load, one_rope_tokens, pad_token_id, put_on
from retuner.gguf_adapter import FILE, gguf_deltas
from retuner.loralib_file import SETTINGS, STATE, read_settings, read_state
from retuner.loralib_format import alpha_of, loralib_delta, parts_of
from retuner.parity import Asked, Behaviour, add_deltas, behaviour
from retuner.rendering import Renderer
from retuner.split_projections import longest_prompt_tokens, unfused

Shape = Literal["merged", "split", "loralib", "gguf"]
PROMPTS, NEW_TOKENS = 8, 48


def base_and_adapter(source: Source, device: str) -> tuple[Behaviour, Asked]:
    """What they answer to the first held-out prompts that every shape has room for.

    Errors: Refused when the adapter does not fit the base, and when no prompt is short enough.
    """
    model, tokenizer = load(source.base, "float32", "sdpa", device)
    limit = min(
        model.config.max_position_embeddings, one_rope_tokens(model), longest_prompt_tokens(model.config)
    )
    new_tokens = min(NEW_TOKENS, source.max_new_tokens)
    renderer = Renderer(tokenizer)
    encoded = map(renderer.encode_prompt, source.prompts)
    prompts = [ids for ids in encoded if len(ids) + new_tokens <= limit][:PROMPTS]
    if not prompts:
        raise Refused(
            f"none of the {len(source.prompts)} prompts leaves room for {new_tokens} tokens within {limit}",
            "a prompt to compare the export on",
            "use a base with a longer context",
        )
    stops = source.stop_token_ids
    asked = Asked(prompts, stops, pad_token_id(tokenizer, stops), new_tokens)
    with adapter_on(model, source.adapter):
        return behaviour(model, asked), asked


def exported(
    folder: Path, source: Source, shape: Shape, asked: Asked, along: Behaviour, device: str
) -> Behaviour:
    """What the export in `folder` answers, loaded from there alone as its users would, and for the rest the base.

    Errors: Refused when it cannot be loaded.
    """
    whole = folder if shape == "merged" else source.base
    model, tokenizer = load(whole, "float32", "sdpa", device)
    match shape:
        case "merged":
            _refuse_another_tokenizer(tokenizer, source)
        case "split":
            model = unfused(model)
            put_on(model, folder)
        case "loralib":
            _add_loralib(model, folder)
        case "gguf":
            add_deltas(model, gguf_deltas(folder / FILE, model))
    return behaviour(model, asked, along.answers)


def _add_loralib(model: Any, folder: Path) -> None:
    """What loralib's layers compute, by their own formulas on the weights that its file holds."""
    import torch

    state, settings = read_state(folder / STATE), read_settings(folder / SETTINGS)
    deltas = {}
    for name, a in state.items():
        path, _, last = name.rpartition(".")
        if last == "lora_A":
            module, b = model.get_submodule(path), state[f"{path}.lora_B"]
            deltas[path] = loralib_delta(
                a.float(), b.float(), module, parts_of(settings, path), alpha_of(settings, path)
            )
        elif last == "bias":
            with torch.no_grad():
                model.get_submodule(path).bias.copy_(state[name])
    add_deltas(model, deltas)


def _refuse_another_tokenizer(tokenizer: Any, source: Source) -> None:
    """What a tokenizer's files mean depends on the config.json beside them."""
    base = load_tokenizer(source.base)
    if (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template) != (
        base.backend_tokenizer.to_str(),
        base.chat_template,
    ):
        raise Refused("the merged model has another tokenizer or chat template than the base", "the same")

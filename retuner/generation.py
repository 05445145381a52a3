"""Answers from a causal model: greedy or drawn, batched, and with an adapter put on for a while.

Evaluation and serving share this, so that what is measured is what is served.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retuner.errors import Refused, Unavailable
from retuner.params import Sampling

Progress = Callable[[int, int], None]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Iterable[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, in the order of the prompts; or, with
    `sampling`, one that is drawn.

    A continuation ends before the first stop id, after `max_new_tokens`, or where the model's context
    is full. It does not depend on the other prompts of its batch, but for the rounding of floats:
    where two tokens are equally probable to the last bit, another batch may choose the other.
    Errors: Refused when a prompt is empty or longer than the context.
    """
    import torch
    from transformers import GenerationConfig

    from retuner.sampling import drawing

    stop_ids = sorted(set(stop_ids))
    context_tokens = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) <= context_tokens:
            raise Refused(
                f"a prompt of {len(prompt):,} tokens",
                f"1 to {context_tokens:,} tokens, the model's context",
                "shorten the conversation",
            )
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    # Longest first: what does not fit in memory fails at once.
    plan = batches([len(p) for p in prompts], batch_size, alone_above=one_rope_tokens(model) - max_new_tokens)
    with torch.inference_mode(), _generation_config(model, greedy):
        for rows in reversed(plan):
            width = max(len(prompts[row]) for row in rows)
            ids = torch.full((len(rows), width), pad_id)
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            for at, row in enumerate(rows):
                # On the left, so that the next token follows the prompt and not padding. `generate`
                # counts positions from the mask, so a prompt starts at 0 however far it is pushed.
                ids[at, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[at, width - len(prompts[row]) :] = 1
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=drawing(sampling, [prompts[row] for row in rows]) if sampling else None,
            )
            for row, tokens in zip(rows, out[:, width:].tolist(), strict=True):
                room = context_tokens - len(prompts[row])
                answers[row] = _until_stop(tokens[:room], stop_ids)
            done += len(rows)
            progress(done, len(prompts))
    return answers


def batches(
    lengths: Sequence[int],
    batch_size: int,
    max_tokens: float = float("inf"),
    alone_above: float = float("inf"),
) -> list[list[int]]:
    """Row numbers in batches of similar length, shortest first; ties in row order.

    A batch, padded to its longest row, has at most `max_tokens` tokens unless one row has more alone.
    A row of more than `alone_above` tokens is a batch of its own.
    """
    plan: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        length = lengths[row]
        full = not plan or len(plan[-1]) == batch_size or (len(plan[-1]) + 1) * length > max_tokens
        if full or length > alone_above:
            plan.append([])
        plan[-1].append(row)
    return plan


@contextmanager
def adapter_on(model: Any, folder: Path | None) -> Iterator[None]:
    """`model` itself computes with the adapter of `folder` until the block ends; then it is the base again.

    The folder holds adapter_config.json and adapter_model.safetensors of a LoRA; None leaves the model
    as it is. LoRA layers are taken out again, not merely switched off, so that the base is the base
    whatever the adapter held (biases and whole modules included).
    Errors: Refused unless the file has exactly the weights the configuration asks for, all finite.
    """
    if folder is None:
        yield
        return
    biases = {
        name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("bias")
    }
    adapted = put_on(model, folder)
    try:
        yield
    finally:
        _take_off(model, adapted)
        for name, value in model.named_parameters():
            if name in biases:
                value.data.copy_(biases[name])


class Answerer:
    """A base, with an adapter or without, that answers conversations as the evaluation lets it answer.

    Errors: Refused when the adapter does not fit.
    """

    def __init__(self, base_dir: Path, adapter_dir: Path | None, precision: str, attention: str, device: str):
        from retuner.rendering import Renderer

        self.model, self.tokenizer = load(base_dir, precision, attention, device)
        self.renderer = Renderer(self.tokenizer)
        if adapter_dir is not None:
            put_on(self.model, adapter_dir)

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> str:
        """Errors: Refused for a conversation the template or the context has no place for."""
        prompt = self.renderer.encode_prompt(messages)
        stop_ids = {self.renderer.stop_id, *_ids(self.model.generation_config.eos_token_id)}
        pad_id = pad_token_id(self.tokenizer, stop_ids)
        tokens = generate(
            self.model, [prompt], stop_ids, pad_id, max_new_tokens, batch_size=1, sampling=sampling
        )
        return decode(self.tokenizer, tokens)[0]


def load(base_dir: Path, precision: str, attention: str, device: str) -> tuple[Any, Any]:
    """The model, in eval mode, and the tokenizer of a base folder; `auto` is the GPU where there is one.

    Errors: Unavailable for a GPU that is not there.
    """
    import torch

    from retuner.base import load_model, load_tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("no GPU that this torch can use", "a CUDA GPU", "set RETUNER_DEVICE to cpu or auto")
    return load_model(base_dir, precision, attention, device), load_tokenizer(base_dir)


def pad_token_id(tokenizer: Any, stop_ids: Iterable[int]) -> int:
    """What fills a batch up. It is masked and never seen, so any token will do."""
    return min(stop_ids) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def decode(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """The texts, control tokens left out and nothing tidied."""
    return [
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for tokens in answers
    ]


def put_on(model: Any, folder: Path) -> Any:
    """The PeftModel whose layers now lie inside `model`."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = folder.name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        # PEFT would look for an absent file on the hub, or take a pickle instead.
        if not (folder / file).is_file():
            raise Refused(
                f"the adapter in {name}/ has no {file}", "a folder that `train` wrote", "train it again"
            )
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise Refused(
            f"the adapter in {name}/ cannot be read: {error}", "whole safetensors", "train it again"
        ) from None
    config = LoraConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise Refused(f"the adapter in {name}/ is of kind {config.peft_type}", "LORA")
    config.inference_mode = True
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that goes away in its next major version.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel(model, config)
    # "auto" would ask the hub whether the vocabulary grew.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong = [
        *(f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())),
        *(f"{key} has no place in the model" for key in sorted(tensors.keys() - expected.keys())),
        *(
            f"{key} is {tuple(tensors[key].shape)} where the model has {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & tensors.keys())
            if tensors[key].shape != expected[key].shape
        ),
        *(f"{key} is not finite" for key in sorted(tensors) if not torch.isfinite(tensors[key]).all()),
    ]
    if wrong:
        _take_off(model, adapted)
        raise Refused(
            f"the adapter in {name}/ does not fit: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if wrong[1:] else ""),
            "exactly the finite weights that its adapter_config.json asks for on this base",
            "train it again on this base",
        )
    set_peft_model_state_dict(adapted, tensors)
    # The new layers' dropout is in training mode until told otherwise.
    model.eval()
    return adapted


def _take_off(model: Any, adapted: Any) -> None:
    from peft.utils import ModulesToSaveWrapper

    # PEFT would leave the adapter's copies of whole modules in the model.
    own = {
        name: module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    adapted.unload()
    for name, module in own.items():
        model.set_submodule(name, module)


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills what a configuration leaves out from the model's own (temperature, penalties,
    ...), so the model's own is set aside."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def one_rope_tokens(model: Any) -> float:
    """The length up to which every row is rotated alike.

    LongRoPE (Phi-3 with 128k) takes other frequencies once the longest row of a batch passes its
    original length, so beyond it a row's numbers would depend on its neighbours.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return float("inf")
    return rope.get("original_max_position_embeddings") or model.config.original_max_position_embeddings


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _until_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:at]
    return tokens

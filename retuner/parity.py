"""Whether an export does what base and adapter do: the same logits, the same texts, on the same prompts.

Both sides compute in float32, so that what differs is the export and not the arithmetic.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from retuner.errors import Refused
from retuner.generation import generate


@dataclass(frozen=True)
class Tolerance:
    logits: float
    """The largest difference, as a share of the reference's largest logit."""
    nearly_tied: float
    """Texts may part where the reference preferred its own token by no more logits than this."""


TOLERANCES = {
    # In float32 the order of additions is all that differs. In the others it is the rounding of the merged weights,
    # on SmolLM2 in bfloat16 0.9 % of the largest logit, and 2 of 8 texts part.
    "float32": Tolerance(1e-4, 1e-3),
    "float16": Tolerance(1e-2, 0.1),
    "bfloat16": Tolerance(3e-2, 0.5),
}


@dataclass(frozen=True)
class Asked:
    """What both sides are asked."""

    prompts: Sequence[Sequence[int]]
    stop_ids: Sequence[int]
    pad_id: int
    max_new_tokens: int


@dataclass(frozen=True)
class Behaviour:
    answers: list[list[int]]
    """Greedy, without the stop token."""
    logits: list[Any]
    """(tokens + 1, vocabulary) a prompt: from the end of the prompt along the reference's answer."""


@dataclass(frozen=True)
class Parity:
    prompts: int
    positions: int
    max_abs_logit_difference: float
    largest_logit: float
    allowed_logit_difference: float
    equal_texts: int
    parted_where_nearly_tied: int


def behaviour(model: Any, asked: Asked, along: Sequence[Sequence[int]] | None = None) -> Behaviour:
    """What a float32 model answers, and its logits `along` given answers, else along its own."""
    import torch

    answers = generate(
        model,
        asked.prompts,
        asked.stop_ids,
        asked.pad_id,
        asked.max_new_tokens,
        batch_size=len(asked.prompts),
    )
    logits = []
    with torch.inference_mode():
        for prompt, answer in zip(asked.prompts, answers if along is None else along, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            out = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False)
            logits.append(out.logits[0].float().cpu())
    return Behaviour(answers, logits)


def compare(reference: Behaviour, export: Behaviour, stored_as: str) -> Parity:
    """The figures of the certificate. Errors: Refused when they show that the export is another model."""
    tolerance = TOLERANCES[stored_as]
    worst = max(
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(export.logits, reference.logits, strict=True)
    )
    largest = max(logits.abs().max().item() for logits in reference.logits)
    allowed = tolerance.logits * largest
    # Not `worst > allowed`: that is false for what is not a number.
    if not worst <= allowed:
        raise Refused(
            f"the export's logits differ from those of base and adapter by {worst:.3g}; it is not published",
            f"at most {allowed:.3g}, {tolerance.logits:g} of the largest logit, as rounding to {stored_as} gives",
            "this is a defect of the export: report it, and use another form",
        )
    equal, tied = 0, 0
    for number, (ours, theirs) in enumerate(zip(export.answers, reference.answers, strict=True)):
        if ours == theirs:
            equal += 1
            continue
        at = next(
            (n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs))
        )
        first, second = reference.logits[number][at].topk(2).values.tolist()
        if first - second > tolerance.nearly_tied:
            raise Refused(
                f"the export answers prompt {number + 1} otherwise from token {at + 1} on, where base and adapter "
                f"prefer their own by {first - second:.3g}; it is not published",
                f"the same text, but where two tokens are within {tolerance.nearly_tied:g} of each other",
                "this is a defect of the export: report it, and use another form",
            )
        tied += 1
    return Parity(
        prompts=len(reference.answers),
        positions=sum(len(logits) for logits in reference.logits),
        max_abs_logit_difference=worst,
        largest_logit=largest,
        allowed_logit_difference=allowed,
        equal_texts=equal,
        parted_where_nearly_tied=tied,
    )


def add_deltas(model: Any, deltas: dict[str, Any]) -> None:
    """Add to the weights of the model's layers, by their paths."""
    import torch

    untie(model, deltas)
    with torch.no_grad():
        for path, delta in deltas.items():
            model.get_submodule(path).weight.add_(delta.to(model.device))


def untie(model: Any, changed: Iterable[str]) -> bool:
    """Give the head a weight of its own where it shares the embedding's, and one of the two is `changed`: named
    by its path or something inside it.

    An adapter on the embedding changes what is looked up, and not what the head computes.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [name for name, module in model.named_modules() if module in (embedding, head)]
    touched = any(f"{name}.".startswith(f"{end}.") for name in changed for end in ends)
    if head.weight is not embedding.weight or not touched:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True

"""Tokens drawn by chance instead of the most probable one, each row by its own lots.

The Gumbel-max trick (Maddison, Tarlow and Minka, "A* Sampling", 2014): the token that is greatest after Gumbel noise is
added to the logits is drawn with the probability that softmax gives it. So a sampled answer is a greedy one over noisy
logits, and with noise that follows from a row's own prompt it does not depend on the other rows of its batch.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from retuner.params import Sampling


def drawing(sampling: Sampling, prompts: Sequence[Sequence[int]]) -> Any:
    """A LogitsProcessorList for greedy `generate` over a batch of prompts, given as their token ids, in its order."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    lots = [torch.Generator().manual_seed(_seed(sampling.seed, prompt)) for prompt in prompts]

    class Noise(LogitsProcessor):
        def __call__(self, input_ids, scores):
            waits = torch.empty(scores.shape)
            for row, lot in enumerate(lots):
                waits[row].exponential_(generator=lot)
            return scores.float() - waits.log().to(scores.device)

    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*warpers, Noise()])


def _seed(seed: int, prompt: Sequence[int]) -> int:
    spelled = json.dumps([seed, list(prompt)]).encode()
    return int.from_bytes(hashlib.sha256(spelled).digest()[:8], "big", signed=True)

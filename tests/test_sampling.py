"""Answers that are drawn: by the probabilities that were asked for, and each by its own lots."""

import pytest
import torch

from retuner.generation import generate
from retuner.params import Sampling
from retuner.sampling import drawing

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [20]]
WARM = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=0)


def changed(**settings) -> Sampling:
    return WARM.model_copy(update=settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from retuner.base import load_model
    from retuner.tiny_phi3 import write_tiny_phi3

    folder = tmp_path_factory.mktemp("base")
    write_tiny_phi3(folder, seed=0)
    return load_model(folder, "float32", "sdpa", "cpu")


def answers(model, prompts, sampling, batch_size=4):
    return generate(model, prompts, [1], 0, 12, batch_size, sampling=sampling)


def drawn(sampling: Sampling, logits: list[float], draws: int = 20_000) -> torch.Tensor:
    """How often each token comes out."""
    scores = torch.tensor(logits).expand(draws, -1)
    noisy = drawing(sampling, [[prompt] for prompt in range(draws)])(None, scores)
    return torch.bincount(noisy.argmax(dim=-1), minlength=len(logits)) / draws


def test_tokens_come_as_often_as_softmax_says():
    logits = [2.0, 1.0, 0.0, -1.0, -3.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(dim=-1)
        assert drawn(changed(temperature=temperature), logits) == pytest.approx(expected, abs=0.012)


def test_only_the_most_probable_tokens_are_drawn_where_that_is_asked_for():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().tolist()
    assert drawn(changed(top_k=2), logits) == pytest.approx(torch.tensor([0.625, 0.375, 0, 0]), abs=0.012)
    expected = probabilities * torch.tensor([1, 1, 1, 0]) / 0.95
    assert drawn(changed(top_p=0.9), logits) == pytest.approx(expected, abs=0.012)


def test_a_drawn_answer_depends_on_prompt_and_seed_and_not_on_its_batch(model):
    together = answers(model, PROMPTS, WARM)
    assert together == answers(model, PROMPTS, WARM)
    assert together == [answers(model, [prompt], WARM, 1)[0] for prompt in PROMPTS]
    assert together == answers(model, PROMPTS[::-1], WARM, 2)[::-1]
    assert together != answers(model, PROMPTS, changed(seed=1))
    assert together != answers(model, PROMPTS, None)


def test_one_token_to_draw_from_is_greedy(model):
    greedy = answers(model, PROMPTS, None)
    assert answers(model, PROMPTS, changed(top_k=1)) == greedy
    assert answers(model, PROMPTS, changed(temperature=1e-6)) == greedy

"""Sampling: greedy, and draws that belong to the request alone."""

from collections import Counter

import pytest
import torch

from qllm_ops.scheduler import sampling as module
from qllm_ops.scheduler.request import Request, Sampling
from qllm_ops.scheduler.sampling import LogitsError


def request(tokens=(), **sampling):
    return Request("r", [1], sampling=Sampling(**sampling), tokens=list(tokens))


def sample(request, logits):
    (outcome,) = module.sample([request], logits[None])
    return outcome


def test_greedy_takes_the_best_and_says_by_how_much():
    assert sample(request(), torch.tensor([0.5, 3.0, 2.25])) == (1, 0.75)
    assert sample(request(), torch.tensor([4.0])) == (0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_ones_the_first_is_taken(dtype):
    """However many rows there are: a batch must not decide."""
    logits = torch.full((40, 1000), -1.0, dtype=dtype)
    logits[:, [3, 500, 999]] = 2.0
    assert module.sample([request()] * 40, logits) == [(3, 0.0)] * 40


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, -30.0])
    draws = Counter(sample(request(temperature=2.0, seed=s), logits)[0] for s in range(3000))
    for token, share in enumerate((logits / 2).softmax(0).tolist()):
        assert draws[token] / 3000 == pytest.approx(share, abs=0.04)


def test_top_p_cuts_the_tail():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    drawn = {sample(request(temperature=1.0, top_p=0.8, seed=s), logits)[0] for s in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-38, 1e-37, 1e-10])
def test_a_tiny_temperature_takes_the_best(temperature, top_p):
    logits = torch.tensor([-300.0, 29.99, 30.0, 29.0, -torch.inf])
    asked = [request(temperature=temperature, top_p=top_p, seed=seed) for seed in range(20)]
    assert {sample(each, logits)[0] for each in asked} == {2}
    logits[1] = 30.0  # of equal ones, a draw may take either
    assert {sample(each, logits)[0] for each in asked} == {1, 2}


def test_a_draw_depends_on_seed_and_step_only():
    logits = torch.zeros(1000)
    draw = lambda seed, step: sample(request(range(step), temperature=1.0, seed=seed), logits)[0]  # noqa: E731
    assert draw(3, 5) == draw(3, 5)
    assert len({draw(seed, 0) for seed in range(20)}) > 15
    assert len({draw(0, step) for step in range(20)}) > 15


def test_logits_of_16_bits_are_sampled_from_in_float32():
    """Probabilities rounded to 16 bits would give another token now and then."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for seed in range(1000):
        asked = request(temperature=1.0, top_p=0.9, seed=seed)
        assert sample(asked, logits) == sample(asked, logits.float())


@pytest.mark.parametrize(
    "bad", [[float("nan"), 1.0], [1.0, float("nan")], [float("-inf")] * 2, [float("inf"), 0.0]]
)
def test_logits_that_are_not_numbers_are_an_error(bad):
    error = sample(request(), torch.tensor(bad))
    assert isinstance(error, LogitsError)
    assert "not numbers" in str(error)


def test_a_row_depends_on_no_other():
    """Nor does one without numbers harm the rest."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    requests = [request(), request(temperature=1.0, seed=3), request(), request(temperature=0.5, top_p=0.5)]
    alone = [sample(r, row) for r, row in zip(requests, logits, strict=True)]
    assert module.sample(requests, logits) == alone
    logits[2, 7] = float("nan")
    spoilt = module.sample(requests, logits)
    assert isinstance(spoilt[2], LogitsError)
    assert [spoilt[i] for i in (0, 1, 3)] == [alone[i] for i in (0, 1, 3)]
    assert module.sample([], logits[:0]) == []

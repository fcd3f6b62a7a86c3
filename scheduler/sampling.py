"""From logits to the next tokens; no draw depends on the neighbours in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import TopPLogitsWarper

from qllm_ops.scheduler.request import Request

SMALLEST = torch.finfo(torch.float32).tiny
"""A temperature below this one may be 0 in float32; this one already takes nothing but the best logits."""


class LogitsError(RuntimeError):
    """The logits of one request cannot be sampled from."""


def sample(requests: Sequence[Request], logits: torch.Tensor) -> list[tuple[int, float] | LogitsError]:
    """The next token of every request and how far its best logit lies above the second best.

    Args:
        logits: (requests, vocabulary), any float dtype, on any device: of a greedy request only these two
            numbers leave it.

    Returns:
        In a request's place a LogitsError, if one of its logits is NaN or none is finite.
    """
    if not requests:
        return []
    best, tokens = logits.max(-1)  # NaN counts as the largest; of equal ones the first, as in `generate`
    others = logits.scatter(1, tokens[:, None], -torch.inf).max(-1).values if logits.shape[1] > 1 else best
    numbers = (of.tolist() for of in (best, others, tokens))
    return [_pick(*row) for row in zip(requests, logits, *numbers, strict=True)]


def _pick(
    request: Request, logits: torch.Tensor, best: float, second: float, token: int
) -> tuple[int, float] | LogitsError:
    if not math.isfinite(best):
        return LogitsError(f"the model gave logits that are not numbers (best: {best})")
    sampling, margin = request.sampling, best - second
    if sampling.temperature == 0:
        return token, margin
    # From the best one down, so that no temperature, however small, makes them infinite: the best is 0.
    scores = (logits.cpu().float() - best) / max(float(sampling.temperature), SMALLEST)
    # A stream per token, not per request: a step that is repeated draws the same number again.
    generator = torch.Generator().manual_seed(_seed(sampling.seed, len(request.tokens)))
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(top_p=sampling.top_p)(None, scores[None])[0]
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator)), margin


def _seed(seed: int, step: int) -> int:
    """One 63-bit seed for draw number ``step`` of stream ``seed``."""
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63

"""From logits to the next tokens; no draw depends on the neighbours in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qllm_ops.scheduler.request import Request


class LogitsError(RuntimeError):
    """The logits of one request cannot be sampled from."""


def sample(requests: Sequence[Request], logits: torch.Tensor) -> list[tuple[int, float] | LogitsError]:
    """The next token of every request and how far its best logit lies above the second best.

    Args:
        logits: (requests, vocabulary) on the CPU, any float dtype.

    Returns:
        In a request's place a LogitsError, if one of its logits is NaN or none is finite.
    """
    if not requests:
        return []
    logits = logits.float()
    best, tokens = (of.tolist() for of in logits.topk(min(2, logits.shape[1])))  # NaN counts as the largest
    return [_pick(*row) for row in zip(requests, logits, best, tokens, strict=True)]


def _pick(
    request: Request, logits: torch.Tensor, best: list[float], tokens: list[int]
) -> tuple[int, float] | LogitsError:
    if not math.isfinite(best[0]):
        return LogitsError(f"the model gave logits that are not numbers (best: {best[0]})")
    sampling, margin = request.sampling, best[0] - best[-1]
    if sampling.temperature == 0:
        return tokens[0], margin
    # A stream per token, not per request: a step that is repeated draws the same number again.
    generator = torch.Generator().manual_seed(_seed(sampling.seed, len(request.tokens)))
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits[None])
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(top_p=sampling.top_p)(None, scores)
    return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator)), margin


def _seed(seed: int, step: int) -> int:
    """One 63-bit seed for draw number ``step`` of stream ``seed``."""
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63

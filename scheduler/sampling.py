"""From logits to the next token, one request at a time, so that no draw depends on the neighbours."""

from __future__ import annotations

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qllm_ops.scheduler.request import Request


class LogitsError(RuntimeError):
    """The logits of one request cannot be sampled from."""


def sample(request: Request, logits: torch.Tensor) -> tuple[int, float]:
    """The next token of ``request`` and how far its best logit lies above the second best.

    Args:
        logits: (vocabulary,) on the CPU, any float dtype.

    Raises:
        LogitsError: a logit is NaN or none is finite.
    """
    logits = logits.float()
    best, token = logits.topk(min(2, logits.numel()))
    if not torch.isfinite(best[0]) or torch.isnan(logits).any():
        raise LogitsError(f"the model gave logits that are not numbers (best: {best[0].item()})")
    margin = (best[0] - best[-1]).item()
    sampling = request.sampling
    if sampling.temperature == 0:
        return int(token[0]), margin
    # A stream per token, not per request: a step that is repeated draws the same number again.
    generator = torch.Generator().manual_seed(_seed(sampling.seed, len(request.tokens)))
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits[None])
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(top_p=sampling.top_p)(None, scores)
    return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator)), margin


def _seed(seed: int, step: int) -> int:
    """One 63-bit seed for draw number ``step`` of stream ``seed``."""
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63

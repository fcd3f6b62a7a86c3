"""Rows of an iteration, drawn at random, and their attention written out."""

import torch
from hypothesis import strategies as st

from qllm_ops.scheduler.attention import Segment


def written_out(q, k, v, past, window, scaling, sinks=None, softcap=None):
    """(heads, n, d) queries at positions past.. over (kv heads, past + n, d), one query at a time."""
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1])
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = max(0, past + i - window + 1) if window else 0
            keys, values = (x[h // groups, first : past + i + 1] for x in (k, v))
            scores = keys @ q[h, i] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:  # one more key, without a value
                scores = torch.cat([scores, sinks[h, None]])
            out[i, h] = scores.softmax(0)[: len(values)] @ values
    return out


@st.composite
def rows(draw):
    segments, query, slot = [], 0, 0
    for _ in range(draw(st.integers(1, 6))):
        length, past = (
            draw(st.just(1) | st.integers(1, 70)),
            draw(st.sampled_from([0, 30]) | st.integers(0, 90)),
        )
        segments.append(Segment(query, length, past, slot))
        query, slot = query + length, slot + past + length + draw(st.integers(0, 3))
    return segments, slot

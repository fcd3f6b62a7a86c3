"""Attention over rows of different lengths, on keys and values that lie in the KV pool.

An iteration's rows go through the model as one sequence of T tokens, so that projections and experts
see no padding. Only attention must tell the rows apart. `RaggedCache` stands where transformers
expects a cache: it writes the new keys and values into the pool. `ragged_attention`, registered with
transformers as "qllm", attends row by row; the attention itself is torch's scaled_dot_product_attention.

Most models hand what the cache returns to attention as it is; then each row's keys are read where they
lie. Multi-head latent attention expands it first; then the cache returns all rows' latents one after
the other, a copy. Which of the two a model does is seen in a probe.

Queries of a long prompt go in blocks. A paused lane stops between two of them, as it does between two
tiles of an expert, so that no single attention over thousands of tokens keeps an urgent request waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qllm"

BLOCK_SCORES = 640 * 1024
"""Scores (queries x keys) of one head in one block: about 8 ms of a two-core CPU's time at 8 heads
of 64."""


@dataclass
class Segment:
    """One row: its new tokens are ``[query, query + length)`` of the iteration's T tokens and follow
    ``past`` tokens whose keys and values lie in the pool from slot ``slot`` on."""

    query: int
    length: int
    past: int
    slot: int

    @property
    def total(self) -> int:
        return self.past + self.length


@dataclass
class Ragged:
    """The rows of the iteration that this thread is running."""

    segments: list[Segment]
    gate: Callable[[], None] | None = None  # called between blocks of queries; may stand still
    block_scores: int = BLOCK_SCORES
    returned: torch.Tensor | None = field(default=None, init=False)  # keys that the cache returned last
    views: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)  # of that layer
    expanded: bool = field(default=False, init=False)  # whether attention was given other keys than those

    def keys_and_values(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each row's (1, heads, total, size) keys and values, when attention is given these."""
        if key is self.returned:
            return self.views
        self.expanded = True
        sizes = [segment.total for segment in self.segments]
        if key.shape[2] != sum(sizes):
            raise RuntimeError(f"attention was given {key.shape[2]} keys for rows of {sizes}")
        return list(zip(key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True))


_current: ContextVar[Ragged | None] = ContextVar("qllm_ragged", default=None)


@contextlib.contextmanager
def ragged(rows: Ragged) -> Iterator[None]:
    """Attend by rows inside the body, in this thread."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


class KVPool:
    """Keys and values of every layer: per layer two tensors (heads, tokens, head size).

    The shapes are read off a two-token forward pass, so that whatever a model caches fits (grouped
    heads, or the latents of multi-head latent attention).
    """

    def __init__(self, model: torch.nn.Module, tokens: int):
        device = next(model.parameters()).device
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.tokens = tokens
        self.expands = True  # whether the model computes on what the cache returns; the runner finds out
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, layer in enumerate(cache.layers):
            pair = []
            for name in ("keys", "values"):
                seen = getattr(layer, name, None)
                if not isinstance(seen, torch.Tensor) or seen.dim() != 4 or seen.shape[2] != 2:
                    raise ValueError(
                        f"{type(model).__name__}: layer {i} keeps no plain keys and values per token "
                        f"({type(layer).__name__}); the engine cannot hold its state"
                    )
                pair.append(
                    torch.zeros(seen.shape[1], tokens, seen.shape[3], dtype=seen.dtype, device=device)
                )
            self.layers.append((pair[0], pair[1]))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class RaggedCache(Cache):
    """What a model writes its keys and values to during one iteration."""

    def __init__(self, pool: KVPool, rows: Ragged):
        super().__init__(layers=[])
        self.pool, self.rows = pool, rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Store the new keys and values, (1, heads, T, size).

        Returns those of all rows, (1, heads, S, size), or, to a model that does not look at them, the
        new ones again.
        """
        pair = self.pool.layers[layer_idx]
        rows = self.rows
        keys, values = (
            self._store(p, new[0]) for p, new in zip(pair, (key_states, value_states), strict=True)
        )
        rows.views = list(zip(keys, values, strict=True))
        if self.pool.expands:
            key_states, value_states = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        rows.returned = key_states
        return key_states, value_states

    def _store(self, pool: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
        views = []
        for s in self.rows.segments:
            view = pool[:, s.slot : s.slot + s.total]
            view[:, s.past :] = new[:, s.query : s.query + s.length]
            views.append(view.unsqueeze(0))
        return views

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(s.past for s in self.rows.segments)


def ragged_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of (1, heads, T, d) queries, each row over its own keys; outside an iteration of ours,
    transformers' own sdpa attention, so that the model can still be used directly."""
    rows = _current.get()
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in ("s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} needs {name!r} in attention, which is not supported"
            )
    window = kwargs.get("sliding_window") or 0
    heads, total, size = query.shape[1], query.shape[2], value.shape[-1]
    out = query.new_empty(total, heads, size)
    for segment, (k, v) in zip(rows.segments, rows.keys_and_values(key, value), strict=True):
        # Positions are counted in the row: its queries are [past, past + length).
        start = segment.past
        while start < segment.total:
            if start > segment.past and rows.gate is not None:
                rows.gate()
            block = _block(start, segment.total, window, rows.block_scores)
            low = max(0, start - window + 1) if window else 0
            q0 = segment.query + start - segment.past
            q = query[:, :, q0 : q0 + block]
            k_block, v_block = k[:, :, low : start + block], v[:, :, low : start + block]
            out[q0 : q0 + block] = _attend(q, k_block, v_block, start - low, window, scaling)
            start += block
    return out.unsqueeze(0), None


def _block(start: int, stop: int, window: int, scores: int) -> int:
    """How many queries to take from ``start`` on; a function of positions only, so that a preempted
    pass makes the same blocks as an uninterrupted one."""
    keys = min(start, window) if window else start
    block = 64
    while block < 1024 and 2 * block * (keys + 2 * block) <= scores:
        block *= 2
    return min(block, stop - start)


def _attend(q, k, v, past: int, window: int, scaling: float | None) -> torch.Tensor:
    """(1, heads, n, d) queries at positions [past, past + n) of the given keys -> (n, heads, d)."""
    _, heads, n, size = q.shape
    if n == 1 and not window:
        # Heads that share keys are laid out as queries of one head: the keys are read once.
        q = q.reshape(1, k.shape[1], heads // k.shape[1], size)
        out = scaled_dot_product_attention(q, k, v, scale=scaling)
        return out.reshape(heads, 1, v.shape[-1]).transpose(0, 1)
    mask = None
    if past > 0 or window:
        position = torch.arange(past, past + n, device=q.device)[:, None]
        column = torch.arange(k.shape[2], device=q.device)[None, :]
        mask = column <= position
        if window:
            mask &= column > position - window
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _mask(*args, **kwargs):
    return None if _current.get() is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, _mask)

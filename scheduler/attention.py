"""Attention over rows of different lengths, on keys and values that lie in the KV pool.

An iteration's rows go through the model as one sequence of T tokens, so that projections and experts
see no padding. Only attention must tell the rows apart. `RaggedCache` stands where transformers
expects a cache: it writes the new keys and values into the pool. `ragged_attention`, registered with
transformers as "qllm", attends to each row's keys: on a GPU in one launch where that can be had
(`flash.py`), and row by row elsewhere. A row's attention is torch's scaled_dot_product_attention, or, for a
model with attention sinks or a soft cap on its scores, `_attend_with`.

Row by row, those that decode over few keys are gathered into one padded batch: a call for each would cost
more in calls than in attention. Over many keys the copy would cost more, so those are read where they lie.

Most models hand what the cache returns to attention as it is; then that is the pool. Multi-head latent
attention expands it first; then the cache returns all rows' latents one after the other, a copy. Which
of the two a model does is seen in a probe.

Queries of a long prompt go in blocks there. A paused lane stops between two of them, as it does between two
tiles of an expert, so that no single attention over thousands of tokens keeps an urgent request waiting.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qllm_ops.models.choices import Choice
from qllm_ops.models.rotary import Row, positions_of
from qllm_ops.scheduler import flash

NAME = "qllm"

ATTENTION = Choice("_attn_implementation")
"""What the configs of the models named that run with the attention of this file now."""

BLOCK_SCORES = 640 * 1024
"""Scores (queries x keys) of one head in one block: about 8 ms of a two-core CPU's time at 8 heads
of 64."""

PADDED_BYTES = 256 * 1024
"""Most bytes of keys of a row in a padded batch: copying them takes about as long as one more call."""

ROW_BYTES = 16
"""Of what rows of a head are a multiple where keys may lie anywhere. Others, which no large model has, are
copied: products of 5 or 17 numbers of float32 have other last bits from slot to slot."""


@dataclass
class Segment:
    """One row: its new tokens are ``[query, query + length)`` of the iteration's T tokens and follow
    ``past`` tokens whose keys and values lie in the pool from slot ``slot`` on. It will have ``reach``
    tokens at most, 0 for no more than it has now; rotary embeddings may depend on that."""

    query: int
    length: int
    past: int
    slot: int
    reach: int = 0

    @property
    def total(self) -> int:
        return self.past + self.length

    def seen(self, window: int) -> int:
        """How many keys its last token sees, through a window of so many; 0 for all."""
        return min(window or self.total, self.total)


@dataclass
class Padded:
    """Rows that decode, as one batch: ``index`` (B * L,) says where their keys lie, ``mask``
    (B, 1, 1, L) which of them are padding; None if none are."""

    query: torch.Tensor
    index: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Ragged:
    """The rows of the iteration that this thread is running."""

    segments: list[Segment]
    gate: Callable[[], None] | None = None  # called between blocks of queries; may stand still
    block_scores: int = BLOCK_SCORES
    padded_bytes: int = PADDED_BYTES
    launch: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None  # as flash.attend_rows
    returned: torch.Tensor | None = field(default=None, init=False)  # keys that the cache returned last
    layer: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)  # its part of the pool
    expanded: bool = field(default=False, init=False)  # whether attention was given other keys than those
    _padded: dict = field(default_factory=dict, init=False)
    _rows: dict[tuple[int, ...], flash.Rows] = field(default_factory=dict, init=False)

    def keys_and_values(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """When attention is given these: where the rows' keys and values are, (heads, N, size) each, and
        at which of the N every row begins."""
        if key is self.returned:
            return *self.layer, [s.slot for s in self.segments]
        self.expanded = True
        sizes = [segment.total for segment in self.segments]
        if key.shape[2] != sum(sizes):
            raise RuntimeError(f"attention was given {key.shape[2]} keys for rows of {sizes}")
        return key[0], value[0], list(accumulate(sizes[:-1], initial=0))

    def decoding(self, most_keys: float = float("inf"), window: int = 0) -> list[int]:
        """The rows with one new token that sees at most so many keys, if there are two or more."""
        rows = [i for i, s in enumerate(self.segments) if s.length == 1 and s.seen(window) <= most_keys]
        return rows if len(rows) > 1 else []

    def at_once(self, starts: list[int], keys: torch.Tensor) -> flash.Rows:
        """All rows as one launch wants them; made once per iteration, where all layers hand on the same."""
        where = (*starts, keys.shape[1])
        if where not in self._rows:
            lengths, totals = zip(*((s.length, s.total) for s in self.segments), strict=True)
            self._rows[where] = flash.Rows.of(lengths, starts, totals, keys)
        return self._rows[where]

    def padded(self, rows: list[int], starts: list[int], window: int, like: torch.Tensor) -> Padded:
        """Those rows as one batch; made once per iteration and kind of layer."""
        key = (window, self.expanded, tuple(rows))
        if key not in self._padded:
            counts = [self.segments[i].seen(window) for i in rows]
            first = [starts[i] + self.segments[i].total - n for i, n in zip(rows, counts, strict=True)]
            first, count = torch.tensor([first, counts], device="cpu")[:, :, None]
            column = torch.arange(max(counts), device="cpu")
            # Padding repeats a row's own last key: another row's might be NaN, and NaN times zero is NaN.
            index = (first + column.minimum(count - 1)).flatten()
            mask = torch.zeros(len(rows), 1, 1, len(column), dtype=like.dtype, device="cpu")
            mask[:, 0, 0].masked_fill_(column >= count, -torch.inf)
            self._padded[key] = Padded(
                torch.tensor([self.segments[i].query for i in rows], device=like.device),
                index.to(like.device),
                mask.to(like.device) if min(counts) < max(counts) else None,
            )
        return self._padded[key]


_current: ContextVar[Ragged | None] = ContextVar("qllm_ragged", default=None)


@contextlib.contextmanager
def ragged(rows: Ragged) -> Iterator[None]:
    """Attend, and take positions, by rows inside the body, in this thread."""
    token = _current.set(rows)
    try:
        with positions_of([Row(s.query, s.length, max(s.total, s.reach)) for s in rows.segments]):
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
            model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
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


def cache_argument(model: torch.nn.Module) -> str:
    """What a model's forward calls its cache: "past_key_values", or "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class RaggedCache(Cache):
    """What a model writes its keys and values to during one iteration."""

    def __init__(self, pool: KVPool, rows: Ragged):
        super().__init__(layers=[])
        self.pool, self.rows = pool, rows
        self._decoding: tuple[torch.Tensor, torch.Tensor] | None = None  # query and slot of every such row

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Store the new keys and values, (1, heads, T, size).

        Returns those of all rows, (1, heads, S, size), or, to a model that does not look at them, the
        new ones again.
        """
        rows, layer = self.rows, self.pool.layers[layer_idx]
        self._store(layer, (key_states[0], value_states[0]))
        if self.pool.expands:
            key_states, value_states = (
                torch.cat([of[:, s.slot : s.slot + s.total] for s in rows.segments], dim=1)[None]
                for of in layer
            )
        rows.layer, rows.returned = layer, key_states
        return key_states, value_states

    def _store(self, layer: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...]) -> None:
        segments, decoding = self.rows.segments, self.rows.decoding()
        if decoding:
            if self._decoding is None:
                where = [(segments[i].query, segments[i].slot + segments[i].past) for i in decoding]
                self._decoding = torch.tensor(where, device=new[0].device).t().unbind()
            query, slot = self._decoding
            for to, of in zip(layer, new, strict=True):
                to.index_copy_(1, slot, of.index_select(1, query))
        for i, s in enumerate(segments):
            if i not in decoding:
                for to, of in zip(layer, new, strict=True):
                    to[:, s.slot + s.past : s.slot + s.total] = of[:, s.query : s.query + s.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(s.past for s in self.rows.segments)


def ragged_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of (1, heads, T, d) queries, each row over its own keys; outside an iteration of ours,
    transformers' own sdpa attention, or products where that has none, so that the model can still be used
    directly."""
    rows = _current.get()
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    extended = sinks is not None or softcap is not None
    if rows is None and not extended:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} needs 'position_bias' in attention, which is not supported"
        )
    if rows is None:
        return _attend_outside(query, key, value, attention_mask, scaling, sinks, softcap), None
    attend = partial(_attend_with, sinks=sinks, softcap=softcap) if extended else scaled_dot_product_attention
    block_scores = min(rows.block_scores, BLOCK_SCORES) if extended else rows.block_scores
    window = kwargs.get("sliding_window") or 0
    keys, values, starts = rows.keys_and_values(key, value)
    if rows.launch is not None and softcap is None and flash.takes(query, keys, values):
        out, lse = rows.launch(query[0], keys, values, rows.at_once(starts, keys), window, scaling)
        if sinks is not None:
            out = _sink(out.transpose(0, 1)[None], lse[None], sinks)[0].transpose(0, 1)
        return out.unsqueeze(0), None
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    together = rows.decoding(rows.padded_bytes // keys[:, 0].nbytes, window)
    if together:
        batch = rows.padded(together, starts, window, query)
        out[batch.query] = _attend_padded(attend, query[0], keys, values, batch, scaling)
    for i, segment in enumerate(rows.segments):
        if i in together:
            continue
        k, v = (of[None, :, starts[i] : starts[i] + segment.total] for of in (keys, values))
        # Positions are counted in the row: its queries are [past, past + length).
        start = segment.past
        while start < segment.total:
            if start > segment.past and rows.gate is not None:
                rows.gate()
            block = _block(start, segment.total, window, block_scores)
            low = max(0, start - window + 1) if window else 0
            q0 = segment.query + start - segment.past
            q = query[:, :, q0 : q0 + block]
            k_block, v_block = k[:, :, low : start + block], v[:, :, low : start + block]
            out[q0 : q0 + block] = _attend(attend, q, k_block, v_block, start - low, window, scaling)
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


def largest_block(scores: int) -> int:
    """Queries of the first block of a prompt. Blocks are powers of two and never grow, so that one begins at
    every multiple of this, whatever came before it."""
    return _block(0, 2**62, 0, scores)


def _attend_padded(attend, query, keys, values, batch: Padded, scaling: float | None) -> torch.Tensor:
    """(heads, T, d) queries, (kv heads, N, d) keys and values -> (B, heads, d)."""
    heads, kv_heads, rows = query.shape[0], keys.shape[0], len(batch.query)
    q = query.index_select(1, batch.query).transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, -1)
    k, v = (
        of.index_select(1, batch.index).view(kv_heads, rows, -1, of.shape[2]).transpose(0, 1)
        for of in (keys, values)
    )
    out = attend(q, k, v, attn_mask=batch.mask, scale=scaling)
    return out.reshape(rows, heads, -1)


def _attend(attend, q, k, v, past: int, window: int, scaling: float | None) -> torch.Tensor:
    """(1, heads, n, d) queries at positions [past, past + n) of the given keys -> (n, heads, d)."""
    _, heads, n, size = q.shape
    if size * q.element_size() % ROW_BYTES or v.shape[-1] * v.element_size() % ROW_BYTES:
        q, k, v = (of.clone(memory_format=torch.contiguous_format) for of in (q, k, v))
    if n == 1:  # all keys that were given are in its window
        # Heads that share keys are laid out as queries of one head: the keys are read once.
        q = q.reshape(1, k.shape[1], heads // k.shape[1], size)
        out = attend(q, k, v, scale=scaling)
        return out.reshape(heads, 1, v.shape[-1]).transpose(0, 1)
    mask = None
    if past > 0 or window:
        position = torch.arange(past, past + n, device=q.device)[:, None]
        column = torch.arange(k.shape[2], device=q.device)[None, :]
        mask = column <= position
        if window:
            mask &= column > position - window
    out = attend(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _attend_with(
    q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, *, sinks=None, softcap=None
) -> torch.Tensor:
    """scaled_dot_product_attention with ``sinks`` (heads,) and ``softcap`` as the models that have them
    define them: a score is capped to ``softcap * tanh(score / softcap)``, and a head's sink is the score
    of one more key, never capped nor masked, whose value is zero.

    Queries are (B, heads, n, d), or (B, kv heads, heads // kv heads, d) with the heads that share keys
    as queries of one head.
    """
    if softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        # The kernel that scaled_dot_product_attention runs here, asked for what that one drops.
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = q.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=is_causal, attn_mask=attn_mask, scale=scale
        )
    else:
        out, lse = _products(q, k, v, attn_mask, is_causal, scale, softcap)
    return out if sinks is None else _sink(out, lse, sinks)


def _sink(out, lse, sinks) -> torch.Tensor:
    """What is left of the output (B, heads, n, d) when part of each softmax, whose logarithm of the sum
    is ``lse`` (B, heads, n), goes to the sink: e^lse / (e^lse + e^sink) of it."""
    kept = (lse - sinks.view(out.shape[1], -1)).sigmoid()
    return out * kept[..., None].to(out.dtype)


def _products(q, k, v, mask, is_causal, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as two products around a softmax in float32, and the logarithm of the softmax's sum: for
    what no kernel of torch computes. All scores are in memory at once: callers take queries in blocks."""
    batch, heads, n, size = q.shape
    kv_heads, keys = k.shape[1:3]
    scores = q.reshape(batch, kv_heads, -1, size) @ k.mT  # heads that share keys, as rows of one product
    scores = scores.view(batch, heads, n, keys).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if is_causal:
        mask = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # Not infinity: of a row that is all padding, that would make NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).to(v.dtype).view(batch, kv_heads, -1, keys)
    return (weights @ v).view(batch, heads, n, -1), scores.logsumexp(-1)


def _attend_outside(query, key, value, mask, scaling, sinks, softcap) -> torch.Tensor:
    """What a model with sinks or a soft cap gets where no iteration of ours runs, any batch, (B, n, heads,
    d): sdpa has neither. By products, through which gradients flow."""
    causal = mask is None and query.shape[2] > 1
    out, lse = _products(query, key, value, mask, causal, scaling, softcap)
    if sinks is not None:
        out = _sink(out, lse, sinks)
    return out.transpose(1, 2).contiguous()


def _mask(*args, **kwargs):
    return None if _current.get() is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, _mask)

"""Ragged attention against attention written out, and the cache that feeds it."""

import dataclasses
import types

import pytest
import torch
from attended import rows, written_out
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler import attention
from qllm_ops.scheduler.attention import (
    BLOCK_SCORES,
    KVPool,
    Ragged,
    RaggedCache,
    Segment,
    ragged,
    ragged_attention,
)

SIZE = 8


@given(
    rows(),
    st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    st.sampled_from([None, 1, 5, 64]),
    st.integers(1, 20_000),
    st.sampled_from([0, 40, 2**20]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.sampled_from([SIZE, SIZE // 2]),
    st.integers(0, 2**32 - 1),
)
def test_rows_attend_to_their_own_keys_only(
    case, heads, window, block_scores, padded_keys, expands, has_sinks, softcap, value_size, seed
):
    segments, slots = case
    heads, kv_heads = heads
    random = torch.Generator().manual_seed(seed)
    pool = KVPool.__new__(KVPool)
    pool.expands = expands
    sizes = (SIZE, value_size)
    pool.layers = [tuple(torch.randn(kv_heads, slots, size, generator=random) for size in sizes)]
    total = sum(s.length for s in segments)
    q = torch.randn(1, heads, total, SIZE, generator=random)
    k, v = (torch.randn(1, kv_heads, total, size, generator=random) for size in sizes)
    sinks = 3 * torch.randn(heads, generator=random) if has_sinks else None

    batch = Ragged(segments, block_scores=block_scores, padded_bytes=padded_keys * kv_heads * SIZE * 4)
    before = [layer.clone() for layer in pool.layers[0]]
    with ragged(batch):
        keys, values = RaggedCache(pool, batch).update(k, v, 0)
        if expands:  # what multi-head latent attention does: other tensors, of the same positions
            keys, values = keys * 1, values * 1
        out, _ = ragged_attention(
            types.SimpleNamespace(),
            q,
            keys,
            values,
            None,
            scaling=0.3,
            sliding_window=window,
            s_aux=sinks,
            softcap=softcap,
        )

    assert out.shape == (1, total, heads, value_size)
    for s in segments:
        for layer, old, new in zip(pool.layers[0], before, (k, v), strict=True):
            expected = torch.cat(
                [old[:, s.slot : s.slot + s.past], new[0, :, s.query : s.query + s.length]], 1
            )
            torch.testing.assert_close(layer[:, s.slot : s.slot + s.total], expected, rtol=0, atol=0)
        k_row, v_row = (layer[:, s.slot : s.slot + s.total] for layer in pool.layers[0])
        q_row = q[0, :, s.query : s.query + s.length]
        expected = written_out(q_row, k_row, v_row, s.past, window, 0.3, sinks, softcap)
        torch.testing.assert_close(out[0, s.query : s.query + s.length], expected, rtol=1e-4, atol=1e-5)


def test_slots_outside_the_rows_are_left_alone():
    pool = KVPool.__new__(KVPool)
    pool.expands = False
    pool.layers = [(torch.full((1, 10, SIZE), 7.0), torch.full((1, 10, SIZE), 7.0))]
    batch = Ragged([Segment(0, 2, 1, 4)])
    RaggedCache(pool, batch).update(torch.zeros(1, 1, 2, SIZE), torch.zeros(1, 1, 2, SIZE), 0)
    for layer in pool.layers[0]:
        assert layer[0, :, 0].tolist() == [7, 7, 7, 7, 7, 0, 0, 7, 7, 7]


@pytest.mark.parametrize(("window", "sinks"), [(None, None), (4, None), (4, torch.zeros(2))])
def test_rows_that_see_few_keys_are_one_batch(window, sinks, monkeypatch):
    """Through a window, however many keys they have."""
    calls = []
    monkeypatch.setattr(attention, "_attend_padded", lambda *args: calls.append("padded") or 0.0)
    monkeypatch.setattr(attention, "_attend", lambda *args: calls.append("alone") or 0.0)
    q, k = torch.randn(1, 2, 3, SIZE), torch.randn(1, 2, 45, SIZE)
    segments = [Segment(0, 1, 3, 0), Segment(1, 1, 3, 4), Segment(2, 1, 36, 8)]
    with ragged(Ragged(segments, padded_bytes=4 * k[0, :, 0].nbytes)):
        ragged_attention(types.SimpleNamespace(), q, k, k, None, sliding_window=window, s_aux=sinks)
    assert calls == (["padded"] if window else ["padded", "alone"])


@pytest.mark.parametrize("extended", [{}, {"s_aux": torch.zeros(3)}, {"softcap": 0.5}], ids=str)
@pytest.mark.parametrize("size", [5, 8, 17, 20, 36])
def test_a_row_does_not_depend_on_where_it_lies(size, extended):
    """Neither on its slot in the pool nor on its place among the rows that decode, bit by bit."""
    random = torch.Generator().manual_seed(0)
    row = [torch.randn(1, heads, length, size, generator=random) for heads, length in ((3, 1), (1, 38))]
    seen = []
    for place in range(8):
        q, k = (torch.randn(1, heads, 60, size, generator=random) for heads in (3, 1))
        q[:, :, place : place + 1], k[:, :, place : place + 38] = row
        segments = [*(Segment(i, 1, 0, i) for i in range(place)), Segment(place, 1, 37, place)]
        pool = KVPool.__new__(KVPool)
        pool.expands, pool.layers = False, [(k[0], k[0])]
        batch = Ragged(segments, padded_bytes=0)
        new = torch.stack([k[:, :, s.slot + s.past] for s in segments], 2)
        with ragged(batch):
            keys, values = RaggedCache(pool, batch).update(new, new, 0)
            out, _ = ragged_attention(types.SimpleNamespace(), q, keys, values, None, **extended)
        seen.append(out[0, place])
    assert [place for place, out in enumerate(seen) if not torch.equal(out, seen[0])] == []


EXTENDED = [{}, {"s_aux": torch.tensor([1.0, -2.0, 0.5, 3.0])}, {"softcap": 0.5}]
"""What some models ask for beside plain attention, of four heads."""


@pytest.mark.parametrize("extended", EXTENDED, ids=str)
@pytest.mark.parametrize("padded_bytes", [0, 2**20])
def test_a_row_of_nans_stays_alone(padded_bytes, extended):
    """Whatever a failed request left in the pool, and however short the others are."""
    pool = KVPool.__new__(KVPool)
    pool.expands = False
    random = torch.Generator().manual_seed(0)
    pool.layers = [tuple(torch.randn(2, 40, SIZE, generator=random) for _ in range(2))]
    for of in pool.layers[0]:
        of[:, 10:20] = torch.nan  # the second row's past, between the first and the third row's
        of[:, 26:] = torch.nan  # memory that belongs to nobody
    q, k, v = (torch.randn(1, heads, 3, SIZE, generator=random) for heads in (4, 2, 2))
    segments = [Segment(0, 1, 9, 0), Segment(1, 1, 9, 10), Segment(2, 1, 5, 20)]
    batch = Ragged(segments, padded_bytes=padded_bytes)
    with ragged(batch):
        keys, values = RaggedCache(pool, batch).update(k, v, 0)
        out, _ = ragged_attention(types.SimpleNamespace(), q, keys, values, None, **extended)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    assert out[0, 2].isfinite().all()


@pytest.mark.parametrize("extended", EXTENDED, ids=str)
def test_the_gate_is_passed_between_blocks_of_queries(extended):
    visits = []
    segments = [Segment(0, 300, 0, 0), Segment(300, 1, 20, 300)]
    total = sum(s.total for s in segments)
    batch = Ragged(segments, gate=lambda: visits.append(1), block_scores=64 * 64)
    q, k = torch.randn(1, 4, 301, SIZE), torch.randn(1, 2, total, SIZE)
    with ragged(batch):
        gated, _ = ragged_attention(types.SimpleNamespace(), q, k, k, None, **extended)
    assert len(visits) == 4  # 300 queries in blocks of 64, of the first row alone
    with ragged(dataclasses.replace(batch, gate=None)):
        free, _ = ragged_attention(types.SimpleNamespace(), q, k, k, None, **extended)
    assert torch.equal(gated, free)


def test_keys_that_belong_to_no_row_are_an_error():
    q = torch.randn(1, 2, 3, SIZE)
    with (
        ragged(Ragged([Segment(0, 3, 4, 0)])),
        pytest.raises(RuntimeError, match=r"3 keys for rows of \[7\]"),
    ):
        ragged_attention(types.SimpleNamespace(), q, q, q, None)


@pytest.mark.parametrize("extended", EXTENDED[1:], ids=str)
def test_scores_that_are_held_at_once_are_bounded_on_a_gpu_too(extended):
    visits = []
    batch = Ragged([Segment(0, 2000, 0, 0)], gate=lambda: visits.append(1), block_scores=2**62)
    q = torch.randn(1, 4, 2000, SIZE)
    blocks = {}
    with ragged(batch):
        for name, options in (("plain", {}), ("extended", extended)):
            visits.clear()
            ragged_attention(types.SimpleNamespace(), q, q, q, None, **options)
            blocks[name] = len(visits) + 1
    assert blocks == {"plain": 2, "extended": 6}  # of 1024 queries; of 512, then of 256
    assert max(512 * 512, 256 * 2000) <= BLOCK_SCORES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_size", [SIZE, SIZE // 2])
@pytest.mark.parametrize("extended", EXTENDED[1:], ids=str)
def test_in_half_precision(extended, value_size, dtype):
    """To the roundings of scores, weights, output and what the sink leaves of it, each by half an eps at
    most. A sink may be kept in another dtype than the queries."""
    random = torch.Generator().manual_seed(0)
    segments = [Segment(0, 1, 40, 0), Segment(1, 100, 30, 41), Segment(101, 1, 7, 171)]
    q = torch.randn(1, 4, 102, SIZE, generator=random).to(dtype)
    k, v = (torch.randn(1, 2, 179, size, generator=random).to(dtype) for size in (SIZE, value_size))
    with ragged(Ragged(segments)):
        out, _ = ragged_attention(types.SimpleNamespace(), q, k, v, None, scaling=0.3, **extended)
    assert out.dtype == dtype
    for s in segments:
        q_row = q[0, :, s.query : s.query + s.length].float()
        k_row, v_row = (of[0, :, s.slot : s.slot + s.total].float() for of in (k, v))
        sinks, softcap = extended.get("s_aux"), extended.get("softcap")
        expected = written_out(q_row, k_row, v_row, s.past, 0, 0.3, sinks, softcap)
        error = out[0, s.query : s.query + s.length].float() - expected
        assert error.square().mean().sqrt() <= torch.finfo(dtype).eps * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("gpt_oss", "s_aux"), ("granitemoe_swa", "s_aux"), ("flint", "s_aux"), ("gemma2", "softcap")],
)
@pytest.mark.parametrize("queries", [1, 9])
def test_outside_an_iteration_it_is_the_attention_of_the_model(folder, name, queries):
    """With gradients, and for a batch that is padded on the left."""
    eager = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}").eager_attention_forward
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, SIZE, generator=random, requires_grad=True)
    k, v = (torch.randn(2, 2, 9, SIZE, generator=random, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, generator=random, requires_grad=True)
    module = types.SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks, head_dim=SIZE)
    options = {"scaling": 0.3, name: 0.7 if name == "softcap" else sinks}
    wanted = [q, k, v] if name == "softcap" else [q, k, v, sinks]
    causal = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    padded = causal & (torch.arange(9) >= torch.tensor([0, 3])[:, None, None])[:, None]
    for mask in (padded, None):
        seen = causal if mask is None else mask
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        real = seen.any(-1).transpose(-1, -2)[..., None] if mask is not None else True
        got, expected = (
            (attend(module, q, k, v, m, **options)[0] * real)
            for attend, m in ((ragged_attention, mask), (eager, bias))
        )
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(of.square().sum(), wanted) for of in (got, expected)]
        torch.testing.assert_close(*grads)


def test_what_it_does_not_compute_is_refused():
    q = torch.randn(1, 2, 1, SIZE)
    with ragged(Ragged([Segment(0, 1, 0, 0)])), pytest.raises(NotImplementedError, match="position_bias"):
        ragged_attention(types.SimpleNamespace(), q, q, q, None, position_bias=torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize("preset", ["tiny", "tiny-deepseek-v3"])
def test_the_pool_fits_what_the_model_caches(preset):
    model = make_preset(preset)
    pool = KVPool(model, 33)
    assert len(pool.layers) == model.config.num_hidden_layers
    assert all(k.shape[1] == v.shape[1] == 33 for k, v in pool.layers)
    assert pool.nbytes == sum(4 * (k.numel() + v.numel()) for k, v in pool.layers)

"""Ragged attention against attention written out, and the cache that feeds it."""

import dataclasses
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler.attention import KVPool, Ragged, RaggedCache, Segment, ragged, ragged_attention

SIZE = 8


def written_out(q, k, v, past, window, scaling):
    """(heads, n, d) queries at positions past.. over (kv heads, past + n, d), one query at a time."""
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1])
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = max(0, past + i - window + 1) if window else 0
            keys, values = (x[h // groups, first : past + i + 1] for x in (k, v))
            weights = (keys @ q[h, i] * scaling).softmax(0)
            out[i, h] = weights @ values
    return out


@st.composite
def rows(draw):
    segments, query, slot = [], 0, 0
    for _ in range(draw(st.integers(1, 6))):
        length, past = draw(st.just(1) | st.integers(1, 70)), draw(st.just(30) | st.integers(0, 90))
        segments.append(Segment(query, length, past, slot))
        query, slot = query + length, slot + past + length + draw(st.integers(0, 3))
    return segments, slot


@given(
    rows(),
    st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    st.sampled_from([None, 1, 5, 64]),
    st.integers(1, 20_000),
    st.sampled_from([0, 40, 2**20]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_rows_attend_to_their_own_keys_only(case, heads, window, block_scores, padded_keys, expands, seed):
    segments, slots = case
    heads, kv_heads = heads
    random = torch.Generator().manual_seed(seed)
    pool = KVPool.__new__(KVPool)
    pool.expands = expands
    pool.layers = [tuple(torch.randn(kv_heads, slots, SIZE, generator=random) for _ in range(2))]
    total = sum(s.length for s in segments)
    q = torch.randn(1, heads, total, SIZE, generator=random)
    k, v = (torch.randn(1, kv_heads, total, SIZE, generator=random) for _ in range(2))

    batch = Ragged(segments, block_scores=block_scores, padded_bytes=padded_keys * kv_heads * SIZE * 4)
    before = [layer.clone() for layer in pool.layers[0]]
    with ragged(batch):
        keys, values = RaggedCache(pool, batch).update(k, v, 0)
        if expands:  # what multi-head latent attention does: other tensors, of the same positions
            keys, values = keys * 1, values * 1
        out, _ = ragged_attention(
            types.SimpleNamespace(), q, keys, values, None, scaling=0.3, sliding_window=window
        )

    assert out.shape == (1, total, heads, SIZE)
    for s in segments:
        for layer, old, new in zip(pool.layers[0], before, (k, v), strict=True):
            expected = torch.cat(
                [old[:, s.slot : s.slot + s.past], new[0, :, s.query : s.query + s.length]], 1
            )
            torch.testing.assert_close(layer[:, s.slot : s.slot + s.total], expected, rtol=0, atol=0)
        k_row, v_row = (layer[:, s.slot : s.slot + s.total] for layer in pool.layers[0])
        q_row = q[0, :, s.query : s.query + s.length]
        expected = written_out(q_row, k_row, v_row, s.past, window, 0.3)
        torch.testing.assert_close(out[0, s.query : s.query + s.length], expected, rtol=1e-4, atol=1e-5)


def test_slots_outside_the_rows_are_left_alone():
    pool = KVPool.__new__(KVPool)
    pool.expands = False
    pool.layers = [(torch.full((1, 10, SIZE), 7.0), torch.full((1, 10, SIZE), 7.0))]
    batch = Ragged([Segment(0, 2, 1, 4)])
    RaggedCache(pool, batch).update(torch.zeros(1, 1, 2, SIZE), torch.zeros(1, 1, 2, SIZE), 0)
    for layer in pool.layers[0]:
        assert layer[0, :, 0].tolist() == [7, 7, 7, 7, 7, 0, 0, 7, 7, 7]


@pytest.mark.parametrize("padded_bytes", [0, 2**20])
def test_a_row_of_nans_stays_alone(padded_bytes):
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
        out, _ = ragged_attention(types.SimpleNamespace(), q, keys, values, None)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    assert out[0, 2].isfinite().all()


def test_the_gate_is_passed_between_blocks_of_queries():
    visits = []
    segments = [Segment(0, 300, 0, 0), Segment(300, 1, 20, 300)]
    total = sum(s.total for s in segments)
    batch = Ragged(segments, gate=lambda: visits.append(1), block_scores=64 * 64)
    q, k = torch.randn(1, 2, 301, SIZE), torch.randn(1, 2, total, SIZE)
    with ragged(batch):
        gated, _ = ragged_attention(types.SimpleNamespace(), q, k, k, None)
    assert len(visits) == 4  # 300 queries in blocks of 64, of the first row alone
    with ragged(dataclasses.replace(batch, gate=None)):
        free, _ = ragged_attention(types.SimpleNamespace(), q, k, k, None)
    assert torch.equal(gated, free)


def test_keys_that_belong_to_no_row_are_an_error():
    q = torch.randn(1, 2, 3, SIZE)
    with (
        ragged(Ragged([Segment(0, 3, 4, 0)])),
        pytest.raises(RuntimeError, match=r"3 keys for rows of \[7\]"),
    ):
        ragged_attention(types.SimpleNamespace(), q, q, q, None)


@pytest.mark.parametrize("argument", ["s_aux", "softcap"])
def test_what_it_does_not_compute_is_refused(argument):
    q = torch.randn(1, 2, 1, SIZE)
    with ragged(Ragged([Segment(0, 1, 0, 0)])), pytest.raises(NotImplementedError, match=argument):
        ragged_attention(types.SimpleNamespace(), q, q, q, None, **{argument: 1.0})


@pytest.mark.parametrize("preset", ["tiny", "tiny-deepseek-v3"])
def test_the_pool_fits_what_the_model_caches(preset):
    model = make_preset(preset)
    pool = KVPool(model, 33)
    assert len(pool.layers) == model.config.num_hidden_layers
    assert all(k.shape[1] == v.shape[1] == 33 for k, v in pool.layers)
    assert pool.nbytes == sum(4 * (k.numel() + v.numel()) for k, v in pool.layers)

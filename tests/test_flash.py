"""All rows in one launch: what the kernel is given, and when it is not used. On a CPU, where there is no
such kernel, one stands in for it that computes what torch's documentation says, and checks what it is given
as torch does."""

import functools
import types

import pytest
import torch
from attended import rows, written_out
from hypothesis import given
from hypothesis import strategies as st
from served import generated, prompt, served
from tiny_models import gpt_oss_with_sinks

from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler import flash
from qllm_ops.scheduler.attention import KVPool, Ragged, RaggedCache, Segment, ragged, ragged_attention
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.request import BE, LS

SIZE = 8
WAIT_S = 60.0
LIMITS = Limits(kv_tokens=4096, kv_reserve=512, prefill_tokens=256)


def kernel(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, num_splits=None,
    uses=lambda used: used, left=lambda window: window, causal_from=lambda n, keys: keys - n, log=torch.log,
):  # fmt: skip
    """`aten::_flash_attention_forward` for sequences of different lengths; the last line is what a kernel
    might get wrong."""
    count, size = len(cu_q) - 1, query.shape[-1]
    for tensor, shape in ((cu_q, count + 1), (cu_k, count + 1), (seqused_k, count)):
        assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (torch.int32, (shape,), True)
    assert all(of.stride(-1) == 1 and of.shape[-1] == size for of in (query, key, value))
    assert key.shape == value.shape
    assert dropout_p == 0.0
    assert not return_debug_mask
    queries, keys, used = cu_q.tolist(), cu_k.tolist(), seqused_k.tolist()
    assert queries == sorted(queries)
    assert (queries[0], queries[-1]) == (0, len(query))
    assert keys == sorted(keys)
    assert keys[-1] <= len(key)
    groups = query.shape[1] // key.shape[1]
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for i in range(count):
        rows = slice(queries[i], queries[i + 1])
        n = queries[i + 1] - queries[i]
        assert 1 <= n <= max_q
        assert 1 <= used[i] <= min(keys[i + 1] - keys[i], max_k)
        total = uses(used[i])
        q, k, v = (
            of.float().transpose(0, 1).repeat_interleave(times, 0)
            for of, times in (
                (query[rows], 1),
                (key[keys[i] :][:total], groups),
                (value[keys[i] :][:total], groups),
            )
        )
        position = (torch.arange(n) + causal_from(n, total))[:, None]
        column = torch.arange(total)
        seen = torch.ones(n, total, dtype=torch.bool)
        if is_causal or window_size_right == 0:
            seen &= column <= position
        if window_size_left is not None and 0 <= window_size_left < max_k:
            seen &= column >= position - left(window_size_left)
        scores = (q @ k.mT * (size**-0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
        lse[:, rows] = log(scores.exp().sum(-1))
    return out, lse, None, None, None


@pytest.fixture
def standing_in(monkeypatch):
    """Engines on a CPU attend in one launch, in float32 as well, so that tokens are those of transformers."""
    calls = []

    def noted(*args, **kwargs):
        calls.append((len(args[3]) - 1, args[5], kwargs))  # rows, max_q
        return kernel(*args, **kwargs)

    def takes_float32(*of):
        return takes(*(x.to(torch.bfloat16) for x in of))

    takes = flash.takes
    monkeypatch.setattr(flash, "kernel", noted)
    monkeypatch.setattr(flash, "refusal", lambda device: None)
    monkeypatch.setattr(flash, "takes", takes_float32)
    return calls


# -- what the kernel is given ----------------------------------------------------------------------------


@given(
    rows(),
    st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    st.sampled_from([None, 1, 5, 64, 1000]),
    st.sampled_from([SIZE, SIZE // 2]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_every_row_attends_to_its_own_keys(
    case, heads, window, value_size, expands, has_sinks, batch_invariant, seed
):
    segments, slots = case
    heads, kv_heads = heads
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(torch.bfloat16)

    pool = KVPool.__new__(KVPool)
    sizes = (SIZE, value_size)
    pool.expands, pool.layers = expands, [tuple(normal(kv_heads, slots, size) for size in sizes)]
    total = sum(s.length for s in segments)
    q = normal(1, heads, total, SIZE)
    k, v = (normal(1, kv_heads, total, size) for size in sizes)
    sinks = 3 * torch.randn(heads, generator=random) if has_sinks else None
    launch = functools.partial(flash.attend_rows, batch_invariant=batch_invariant)
    batch = Ragged(segments, launch=launch)
    with pytest.MonkeyPatch.context() as patch, ragged(batch):
        patch.setattr(flash, "kernel", kernel)
        keys, values = RaggedCache(pool, batch).update(k, v, 0)
        if expands:
            keys, values = keys * 1, values * 1
        out, _ = ragged_attention(
            types.SimpleNamespace(), q, keys, values, None, scaling=0.3, sliding_window=window, s_aux=sinks
        )
    assert (out.shape, out.dtype) == ((1, total, heads, value_size), torch.bfloat16)
    for s in segments:
        k_row, v_row = (layer[:, s.slot : s.slot + s.total].float() for layer in pool.layers[0])
        q_row = q[0, :, s.query : s.query + s.length].float()
        expected = written_out(q_row, k_row, v_row, s.past, window, 0.3, sinks)
        torch.testing.assert_close(
            out[0, s.query : s.query + s.length].float(), expected, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(("max_q", "window"), [(1, 0), (9, 0), (1, 4), (9, 4)])
def test_which_kernel_runs_is_not_left_to_the_other_rows(max_q, window, monkeypatch):
    """The library looks at the longest row: whether it has one query, whether its keys exceed the window,
    and for how many parts it has enough of them."""
    given = []

    def note(q, k, v, cu_q, cu_k, *rest, **options):
        given.append((*rest, options["num_splits"], options.get("window_size_left")))
        return kernel(q, k, v, cu_q, cu_k, *rest, **options)

    monkeypatch.setattr(flash, "kernel", note)
    q, k = torch.randn(2, 12, SIZE).bfloat16(), torch.randn(2, 90, SIZE).bfloat16()
    for lengths, totals in (([1], [3]), ([1, max_q], [3, 50])):
        at = flash.Rows.of(lengths, [0, 20][: len(lengths)], totals, k)
        flash.attend_rows(q[:, : sum(lengths)], k, k, at, window, batch_invariant=True)
    (alone_q, alone_k, *alone), (beside_q, beside_k, *beside) = given
    assert alone == beside
    assert alone[-2] == 1  # num_splits
    assert min(alone_q, beside_q) > 1
    assert alone_k == beside_k > window


def test_layers_that_hand_on_other_keys_have_rows_of_their_own():
    """A model may attend to the pool in one layer, and in another to what it makes of all rows' latents."""
    batch = Ragged([Segment(0, 1, 2, 5), Segment(1, 2, 0, 10)])
    pool, latents = torch.empty(2, 20, SIZE), torch.empty(2, 5, SIZE)
    first, second = batch.at_once([5, 10], pool), batch.at_once([0, 3], latents)
    assert (first.cu_k.tolist(), second.cu_k.tolist()) == ([5, 10, 20], [0, 3, 5])
    assert first.used.tolist() == second.used.tolist() == [3, 2]
    assert batch.at_once([5, 10], pool) is first


def test_rows_that_do_not_lie_one_behind_the_other_are_an_error():
    keys = torch.randn(2, 30, SIZE)
    flash.Rows.of([1, 2], [5, 10], [5, 20], keys)
    for starts, totals in (([10, 5], [5, 5]), ([5, 10], [6, 20]), ([5, 10], [5, 21])):
        with pytest.raises(RuntimeError, match="one behind the other"):
            flash.Rows.of([1, 2], starts, totals, keys)


def test_what_the_kernel_is_not_made_for_is_attended_row_by_row():
    def takes(size=64, value_size=64, dtype=torch.bfloat16, value_dtype=torch.bfloat16):
        q, k = (torch.empty(2, 3, size, dtype=dtype) for _ in range(2))
        return flash.takes(q, k, torch.empty(2, 3, value_size, dtype=value_dtype))

    assert takes()
    assert takes(dtype=torch.float16, value_dtype=torch.float16)
    assert takes(256, 256)
    assert not takes(dtype=torch.float32, value_dtype=torch.float32)
    assert not takes(value_dtype=torch.float16)
    assert takes(192, 128)  # multi-head latent attention
    assert not takes(128, 192)
    assert not takes(36, 36)
    assert not takes(264, 264)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_a_soft_cap_is_attended_row_by_row(softcap):
    launched = []
    batch = Ragged(
        [Segment(0, 3, 0, 0)], launch=lambda *args: launched.append(1) or (args[0].transpose(0, 1), None)
    )
    q = torch.randn(1, 2, 3, SIZE).bfloat16()
    with ragged(batch):
        ragged_attention(types.SimpleNamespace(), q, q, q, None, softcap=softcap)
    assert launched == ([1] if softcap is None else [])


# -- whether it can be had -------------------------------------------------------------------------------


def test_a_kernel_that_does_what_is_meant_is_taken(monkeypatch):
    monkeypatch.setattr(flash, "kernel", kernel)
    assert flash.disagreement(torch.device("cpu")) is None


WRONG = {
    "a key too many": {"uses": lambda used: used + 1},
    "all keys up to the next row": {"uses": lambda used: used + 7},
    "a key too few": {"uses": lambda used: max(used - 1, 1)},
    "a window of one more": {"left": lambda window: window + 1},
    "a window of one less": {"left": lambda window: window - 1},
    "queries as the first tokens": {"causal_from": lambda n, keys: 0},
    "sums to the base of two": {"log": torch.log2},
    "no numbers": {"log": lambda of: of * torch.nan},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_does_something_else_is_not(wrong, monkeypatch):
    monkeypatch.setattr(flash, "kernel", functools.partial(kernel, **WRONG[wrong]))
    assert "off by" in flash.disagreement(torch.device("cpu"))


def test_where_there_is_none(monkeypatch):
    cuda = torch.device("cuda", 0)
    refusal = flash.refusal.__wrapped__
    assert "cpu" in refusal(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "build of torch" in refusal(cuda)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in refusal(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "ARGUMENTS", flash.ARGUMENTS - {"seqused_k"})
    assert "seqused_k" in refusal(cuda)
    monkeypatch.setattr(flash, "ARGUMENTS", flash.ARGUMENTS | {"seqused_k"})
    monkeypatch.setattr(flash, "disagreement", lambda device: None)
    assert refusal(cuda) is None

    def refuse(device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(flash, "disagreement", refuse)
    assert "no kernel image" in refusal(cuda)


# -- in an engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "tile"])
@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek-v3", "gpt_oss"])
def test_tokens_are_those_of_generate(standing_in, name, policy):
    """Wherever rows lie in the pool: requests end and others take their place."""
    model = gpt_oss_with_sinks() if name == "gpt_oss" else make_preset(name)
    requests = [(prompt(n, i), p) for i, (n, p) in enumerate(
        [(700, BE), (5, LS), (40, BE), (300, LS), (1, BE), (64, LS), (9, BE)]
    )]  # fmt: skip
    expected = [generated(model, ids, 6) for ids, _ in requests]
    with Engine(model, policy=policy, limits=LIMITS) as engine:
        standing_in.clear()
        handles = [engine.submit(ids, priority=p, max_new_tokens=6) for ids, p in requests]
        assert [handle.result(WAIT_S) for handle in handles] == expected
    assert {count > 1 for count, _, _ in standing_in} == {True, False}
    assert min(max_q for count, max_q, _ in standing_in if count == 1) > 1  # a token alone: another kernel's


def test_a_batch_invariant_engine(standing_in):
    model = make_preset("tiny")
    prompts = [prompt(n, n) for n in (700, 5, 40, 300, 1)]
    options = {"limits": Limits(kv_tokens=4096, kv_reserve=512, prefill_tokens=512), "batch_invariant": True}
    alone = served(model, prompts, 5, together=False, **options)
    assert served(model, prompts, 5, together=True, **options) == alone
    assert {max_q > 1 for _, max_q, _ in standing_in} == {True}
    assert {options["num_splits"] for _, _, options in standing_in} == {1}


@pytest.mark.parametrize("wrong", ["raises", "is wrong"])
def test_a_model_for_which_it_does_not_do_is_attended_row_by_row(standing_in, monkeypatch, wrong):
    def not_for_this_model(*args, **kwargs):
        if wrong == "raises":
            raise RuntimeError("head dimension")
        out, *rest = kernel(*args, **kwargs)
        return (out * 2, *rest)

    monkeypatch.setattr(flash, "kernel", not_for_this_model)
    model = make_preset("tiny")
    with (
        pytest.warns(UserWarning, match="one after the other: in one launch, .*(head dimension|differ)"),
        Engine(model, limits=LIMITS) as engine,
    ):
        assert engine.submit(prompt(9), max_new_tokens=4).result(WAIT_S) == generated(model, prompt(9), 4)


# -- on a card -------------------------------------------------------------------------------------------

SHAPES = {"Qwen3": (32, 4, 128, 0), "OLMoE": (16, 16, 128, 0), "gpt-oss": (64, 8, 64, 128)}
"""Heads, heads of keys, their size, and the window."""


@pytest.mark.gpu
def test_a_card_has_it():
    assert flash.refusal(torch.device("cuda", 0)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", SHAPES)
def test_rows_on_a_card(model, dtype):
    """Each as written out, and with the bits that it has alone where that is asked for."""
    heads, kv_heads, size, window = SHAPES[model]
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda", dtype=dtype)

    k, v = normal(kv_heads, 9000, size), normal(kv_heads, 9000, size)
    for lengths in ([1, 1, 1, 1], [1, 300, 1, 90], [700, 1, 1, 1]):
        starts, totals = [0, 1000, 2000, 4000], [1000, 517, 1999, 5000]
        q = normal(heads, sum(lengths), size)
        rows = flash.Rows.of(lengths, starts, totals, k)
        invariant, sums = flash.attend_rows(q, k, v, rows, window, batch_invariant=True)
        for out, lse in (flash.attend_rows(q, k, v, rows, window), (invariant, sums)):
            for i, (start, total) in enumerate(zip(starts, totals, strict=True)):
                row = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
                of_row = (of[:, start : start + total] for of in (k, v))
                expected = flash._attend_row(q[:, row], *of_row, window, size**-0.5)
                got = out[row].transpose(0, 1).float()
                torch.testing.assert_close(got, expected["outputs"], rtol=2e-2, atol=2e-2)
                torch.testing.assert_close(lse[:, row], expected["sums"], rtol=1e-3, atol=1e-3)
        for i in range(4):
            row = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
            alone = flash.Rows.of([lengths[i]], [starts[i]], [totals[i]], k)
            out, _ = flash.attend_rows(q[:, row], k, v, alone, window, batch_invariant=True)
            assert torch.equal(out, invariant[row])

"""The torch backend: right, whole, and the same in every bit however it is preempted."""

import itertools
import random
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import qllm_ops
from qllm_ops import MoeRun, PriorityFlag, torch_moe
from qllm_ops.quantized import FORMATS
from qllm_ops.testing import (
    CLAMPED,
    MoeCase,
    assert_close,
    assert_preemptible,
    assert_same_bits,
    flipping,
    moe_cases,
    poisoned_empty,
    schedules,
    telling,
)


@pytest.fixture(autouse=True, scope="module", params=["small tiles", "shipped tiles"])
def tiles(request):
    """Layers as small as these are one tile as shipped, so there is little to preempt."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "small tiles":
            patched.setattr(torch_moe, "MIN_ROWS", 1)
            patched.setattr(torch_moe, "MAX_ROWS", 8)
            patched.setattr(torch_moe, "GROUP_BYTES", 20_000)
            patched.setattr(torch_moe, "COMBINE_BYTES", 5000)
        yield request.param


def alone(case: MoeCase) -> torch.Tensor:
    return qllm_ops.moe(**case.tensors(), backend="torch")


@telling()
@given(case=moe_cases(formats=(None, *FORMATS)), schedule=schedules())
def test_any_layer_under_any_schedule(case, schedule):
    flag = PriorityFlag()
    with poisoned_empty():
        expected = alone(case)
        assert_close(expected, case)
        make_run = lambda: MoeRun(**case.tensors(), flag=flag, backend="torch")  # noqa: E731
        assert_preemptible(make_run, expected, schedule, flag)


@given(
    case=moe_cases(max_tokens=200, max_size=64, formats=(None, *FORMATS)),
    seed=st.integers(0, 2**31),
    quanta=st.booleans(),
)
def test_a_second_thread_flips_the_flag(case, seed, quanta):
    expected, flag, rng = alone(case), PriorityFlag(), random.Random(seed)
    with poisoned_empty():
        run = MoeRun(**case.tensors(), flag=flag, backend="torch")
        with flipping(flag, seed=seed):
            seen = [0]
            while not run.step(rng.randint(1, 4) if quanta else None):
                seen.append(run.tiles_done)
                assert run.tiles_taken == run.tiles_done
                flag.wait(0)
        assert seen == sorted(seen)
        assert run.tiles_done == run.tiles_total
        assert_same_bits(run.output, expected)


def assert_batch_invariant(case: MoeCase, chosen: list[int]) -> None:
    """Some of the tokens, in any order, have the bits that they have in the whole batch."""
    tensors, whole = case.tensors(), alone(case)
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        tensors[name] = tensors[name][chosen]
    assert_same_bits(qllm_ops.moe(**tensors, backend="torch"), whole[chosen])


@given(moe_cases(formats=(None, *FORMATS)), st.lists(st.integers(0, 47), unique=True))
def test_batch_invariance(case, chosen):
    case = replace(case, batch_invariant=True)
    assert_batch_invariant(case, [token for token in chosen if token < case.num_tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", CLAMPED[0]])
def test_batch_invariance_of_larger_layers(dtype, activation, tiles):
    """Blocks of many rows, sizes that threads and vectors divide badly, and the bits differ without it."""
    if tiles == "small tiles":
        pytest.skip("larger tiles are meant")
    case = MoeCase(700, 160, 1000, 3, 2, dtype, activation, biases=True, batch_invariant=True)
    for chosen in ([5], [699, 0], list(range(1, 700, 50)), list(range(37, 680))):
        assert_batch_invariant(case, chosen)
    if dtype == torch.float32 and torch.backends.mkl.is_available():
        with pytest.raises(AssertionError):
            assert_batch_invariant(replace(case, batch_invariant=False), [5])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch groups no products before 2.10")
def test_batch_invariance_where_experts_would_be_grouped(tiles, monkeypatch):
    """Many experts with few rows each are one call, unless a row's bits must not depend on the others."""
    if tiles == "small tiles":
        pytest.skip("larger tiles are meant")
    case = MoeCase(60, 64, 96, 16, 2, batch_invariant=True)
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs)
    )
    alone(replace(case, batch_invariant=False))
    assert calls
    calls.clear()
    assert_batch_invariant(case, [59, 3, 7])
    assert not calls


LARGE = MoeCase(700, 64, 96, 6, 2)


def test_moe_waits_through_pauses():
    flag = PriorityFlag()
    expected = alone(LARGE)
    with flipping(flag):
        for _ in range(20):
            assert_same_bits(qllm_ops.moe(**LARGE.tensors(), flag=flag), expected)
    assert flag.read() == (qllm_ops.FULL, qllm_ops.FULL)


def test_several_runs_at_once_on_shared_weights():
    """Threads of both classes, some paused by others, each with its own tokens and the same weights."""
    shared = LARGE.tensors()
    flag = PriorityFlag()
    tokens = [MoeCase(300 + i, 64, 96, 6, 2, seed=i).tensors() for i in range(4)]
    layers = [{**t, "gate_up_proj": shared["gate_up_proj"], "down_proj": shared["down_proj"]} for t in tokens]
    expected = [qllm_ops.moe(**layer) for layer in layers]
    outputs = [[] for _ in layers]
    errors = []

    def work(i):
        try:
            for _ in range(5):
                if i % 2:
                    with flag.urgent(1):
                        outputs[i].append(qllm_ops.moe(**layers[i], flag=flag, priority=1))
                else:
                    outputs[i].append(qllm_ops.moe(**layers[i], flag=flag, priority=0))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    for got, want in zip(outputs, expected, strict=True):
        assert len(got) == 5
        for output in got:
            assert_same_bits(output, want)
    assert flag.read() == (qllm_ops.FULL, qllm_ops.FULL)


def test_steps_on_different_threads_and_grad_modes():
    """What one thread began in inference mode, another one that records gradients finishes; and so on."""
    expected = alone(LARGE)
    for make, finish in itertools.product((torch.inference_mode, torch.enable_grad), repeat=2):
        with make():
            run = MoeRun(**LARGE.tensors())
            run.step(2)
        caught = []

        def rest(run=run, finish=finish, caught=caught):
            try:
                with finish():
                    assert run.step()
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=rest)
        thread.start()
        thread.join()
        assert not caught
        assert_same_bits(run.output, expected)
        # The output is an ordinary tensor, which autograd may save.
        (run.output * torch.ones(1, requires_grad=True)).sum().backward()


def test_a_pause_leaves_after_the_tile_in_hand(monkeypatch):
    """Paused during its n-th tile, the step returns with exactly n tiles done."""
    case = LARGE
    total = MoeRun(**case.tensors()).tiles_total
    assert total > 2
    original = torch_moe.TorchMoe._compute
    for n in range(1, total, 1 + total // 12):
        flag = PriorityFlag()
        run = MoeRun(**case.tensors(), flag=flag)

        def compute(self, tile, flag=flag, n=n):
            if tile == n - 1:
                flag.pause(0)
            original(self, tile)

        with monkeypatch.context() as patched:
            patched.setattr(torch_moe.TorchMoe, "_compute", compute)
            assert not run.step()
        assert run.tiles_done == n
        assert not run.step()
        assert run.tiles_done == n


def test_nan_weights_reach_only_the_tokens_that_use_them():
    case = MoeCase(60, 17, 13, 5, 2)
    tensors = case.tensors()
    clean = qllm_ops.moe(**tensors)
    for name in ("gate_up_proj", "down_proj"):
        poisoned = {**tensors, name: tensors[name].clone()}
        poisoned[name][3] = float("nan")
        output = qllm_ops.moe(**poisoned)
        uses = (tensors["top_k_index"] == 3).any(1)
        assert uses.any()
        assert not uses.all()
        assert output[uses].isnan().all()
        assert_same_bits(output[~uses], clean[~uses])


def test_a_skipped_pair_has_no_part_in_the_sum():
    """Not even with weights or experts that are NaN, and whatever is in the other pairs' rows."""
    tensors = MoeCase(40, 16, 12, 4, 3).tensors()
    skipped = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    here = tensors["top_k_index"]
    there = {
        **tensors,
        "top_k_index": torch.where(skipped, torch.tensor([-1, 4, 2**40])[torch.arange(3)], here),
        "top_k_weights": tensors["top_k_weights"].masked_fill(skipped, float("nan")),
    }
    zeroed = {**tensors, "top_k_weights": tensors["top_k_weights"].masked_fill(skipped, 0)}
    output = qllm_ops.moe(**there)
    assert output.isfinite().all()
    assert torch.allclose(output, qllm_ops.moe_reference(**zeroed), atol=1e-5)


def test_layouts_agree():
    """How a tile's products are laid out depends on its rows; every way gives the reference's numbers."""
    for tokens, experts, top_k, size in (
        (1, 2, 1, 32),
        (3, 7, 5, 32),
        (20, 40, 3, 8),  # tiles of many experts with one or two rows each
        (30, 8, 8, 32),
        (60, 4, 1, 32),
        (90, 4, 2, 32),
        (300, 3, 1, 32),
        (4, 8, 8, 200),  # one token's pairs are more than a small tile of the combine
    ):
        # Rows of 32 numbers start at multiples of 16 bytes, rows of 31 do not. Skipped rows may come first.
        for odd, routing in itertools.product((0, 1), ("distinct", "out_of_range")):
            case = MoeCase(tokens, size - odd, size - odd, experts, top_k, routing=routing)
            assert_close(alone(case), case)


# -- how the tiles are cut -----------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(0, 9) | st.integers(0, 700), min_size=1, max_size=60),
    hidden=st.sampled_from((1, 16, 256, 512, 2048, 7168)),
    intermediate=st.sampled_from((1, 16, 256, 1024, 14336)),
)
def test_groups_cover_every_row_once_and_are_bounded(counts, hidden, intermediate):
    edges = list(itertools.accumulate(counts, initial=5))
    most = torch_moe.group_rows(hidden, intermediate)
    groups = torch_moe.make_groups(edges, hidden, intermediate)
    blocks = [block for group in groups for block in group]
    row = 5
    for expert, start, stop in blocks:
        assert start == row < stop
        assert edges[expert] <= start
        assert stop <= edges[expert + 1]
        row = stop
    assert row == edges[-1]
    for group in groups:
        assert group[-1][2] - group[0][1] <= most
        assert len(group) == 1 or 12 * hidden * intermediate * len(group) <= torch_moe.GROUP_BYTES
    for group, (first, *_) in itertools.pairwise(groups):  # nothing is a group of its own for no reason
        too_many = 12 * hidden * intermediate * (len(group) + 1) > torch_moe.GROUP_BYTES
        assert too_many or first[2] - group[0][1] > most


def test_rows_of_a_tile_keep_within_its_work(tiles):
    if tiles == "small tiles":
        pytest.skip("about the shipped numbers")
    for hidden, intermediate in ((16, 16), (512, 1024), (4096, 14336), (2048, 768), (7168, 2048)):
        rows = torch_moe.group_rows(hidden, intermediate)
        assert torch_moe.MIN_ROWS <= rows <= torch_moe.MAX_ROWS
        work = 4 * hidden * intermediate  # of one row in the larger of its two tiles
        assert rows == torch_moe.MIN_ROWS or rows * work <= torch_moe.TILE_FLOPS
        assert rows == torch_moe.MAX_ROWS or (rows + 1) * work > torch_moe.TILE_FLOPS
    # A small layer is not cut at all: a tile for each of the products, and one for the sums.
    assert MoeRun(**MoeCase(40, 16, 12, 4, 2).tensors()).tiles_total == 3

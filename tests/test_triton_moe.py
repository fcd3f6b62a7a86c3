"""The Triton kernels under the interpreter: tickets, masks, leaving and resuming.

The interpreter runs the programs of a launch one after the other, so a flag that is flipped at the n-th
atomic operation is flipped at a known place inside a launch: every such place can be tried.
"""

import contextlib
import copy
import os
import random
import threading
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; tests/test_triton_gpu.py is for GPUs", allow_module_level=True)

from triton import language as tl
from triton.runtime.interpreter import interpreter_builder

from qllm_ops import FULL, PriorityFlag, moe, moe_reference, warm_up
from qllm_ops.activation import ACTIVATIONS, Activation
from qllm_ops.inputs import MoeInputs, check_inputs
from qllm_ops.kernels import moe as kernels
from qllm_ops.kernels import quantized as quantized_kernels
from qllm_ops.kernels import tickets
from qllm_ops.quantized import QuantizedWeight
from qllm_ops.testing import CLAMPED, LAYOUTS, QUANTIZED, MoeCase, in_float32, own_gate, own_norm, quantize
from qllm_ops.tiles import INTERPRETER, TileConfig
from qllm_ops.triton_moe import ROUNDS, TritonMoe, tiles_for

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

TILES = (
    None,
    {  # More row blocks and column blocks, and the sums in parts, the last of which may be empty.
        "gate_up": TileConfig(4, 8, 8, 1, 1, 3),
        "down": TileConfig(2, 16, 4, 1, 1, 2, split_k=3),
        "combine": TileConfig(2, 8, 1, 1, 1, 5),
    },
    {**INTERPRETER, "down": TileConfig(16, 8, 16, 1, 1, 1, split_k=2)},
    {  # Left inside of a tile, by more programs than there are tiles of one phase at times.
        "gate_up": TileConfig(4, 8, 2, 1, 1, 5, exit_k=4),
        "down": TileConfig(4, 8, 2, 1, 1, 3, split_k=2, exit_k=2),
        "combine": TileConfig(4, 8, 1, 1, 1, 2),
    },
)
SIZES = (1, 3, 8, 13, 21)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN, so that an element that no tile wrote cannot hide."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(
    tokens=5, hidden=16, intermediate=13, experts=3, top_k=2, *, dtype=torch.float32, activation="silu",
    routing="any", index_dtype=torch.int64, seed=0, layout="concatenated", biases=False, expert_norm=None,
    weights_on_input=False, quantized=None,
) -> MoeInputs:  # fmt: skip
    """A layer of random numbers. ``routing`` is "any" (skipped pairs too), "one" expert, or "all" of them."""
    case = MoeCase(
        tokens, hidden, intermediate, experts, top_k, dtype=dtype, layout=layout, biases=biases, seed=seed,
        quantized=quantized, routing="any",
    )  # fmt: skip
    weights = {
        name: value for name, value in case.tensors().items() if "proj" in name or name.endswith("bias")
    }
    g = torch.Generator().manual_seed(seed)
    low = 0 if index_dtype == torch.uint8 else -2
    index = torch.randint(low, experts + 1, (tokens, top_k), generator=g)
    if routing == "one":
        index.fill_(seed % experts)
    elif routing == "all":
        index = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :top_k]
    return check_inputs(
        hidden_states=torch.randn(tokens, hidden, generator=g).to(dtype),
        top_k_index=index.to(index_dtype),
        top_k_weights=torch.rand(tokens, top_k, generator=g),
        activation=activation,
        expert_norm=expert_norm,
        weights_on_input=weights_on_input,
        **weights,
        **LAYOUTS[layout],
    )


@st.composite
def layers(draw, fused: bool = False) -> MoeInputs:
    """``fused``: nothing that torch computes between the kernels."""
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(experts, 3)) | st.just(experts))
    layout = draw(st.sampled_from(("concatenated", *LAYOUTS)))
    own = () if fused else (torch.tanh if "ungated" in layout else own_gate,)
    formats = (None,) if "transposed" in layout else (None, None, *QUANTIZED)
    return layer(
        draw(st.integers(0, 6)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)), experts, top_k,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        activation=draw(st.sampled_from((*ACTIVATIONS, *CLAMPED, *own))),
        layout=layout, biases=draw(st.booleans()),
        expert_norm=None if fused else draw(st.sampled_from((None, None, own_norm))),
        routing=draw(st.sampled_from(("any", "any", "one", "all"))),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32, torch.uint8))),
        quantized=draw(st.sampled_from(formats)),
        seed=draw(st.integers(0, 2**16)),
        weights_on_input=draw(st.booleans()),
    )  # fmt: skip


def width(inputs: MoeInputs, tiles) -> int | None:
    """One column block of the output after the other, where memory would not ask for it."""
    return None if inputs.expert_norm else min(inputs.hidden_size, (tiles or INTERPRETER)["down"].block_n)


def uninterrupted(inputs: MoeInputs, tiles=None) -> torch.Tensor:
    run = TritonMoe(inputs, None, 0, tiles=tiles)
    run.launch_all()
    return run.output


def assert_close(inputs: MoeInputs, output: torch.Tensor) -> None:
    """Design tolerances, against the reference in float32."""
    assert output.dtype == inputs.hidden_states.dtype
    reference = moe_reference(**in_float32(vars(inputs)))
    if not reference.any():
        assert not output.any()
        return
    error = output.float() - reference
    rms = error.square().mean().sqrt() / reference.square().mean().sqrt()
    if inputs.hidden_states.dtype == torch.float32:
        assert rms <= 1e-5
        return
    assert error.abs().max() / reference.abs().max() <= 2e-2
    if reference.numel() >= 64:  # of fewer, one unlucky rounding decides
        assert rms <= 4e-3


def finish(run: TritonMoe, flag: PriorityFlag | None = None, quanta=(None,)):
    """Step until the run is done, resuming the class after each step that left; yields after every step."""
    may_give_back = sum(run._grid(phase)[0] for phase in run._phases if run.tiles[phase.kernel].exit_k)
    thrown_away = 0
    for i in range(1000):
        finished = run.step(quanta[i % len(quanta)])
        thrown_away, before = run.tiles_taken - run.tiles_done, thrown_away
        assert 0 <= thrown_away - before <= may_give_back  # a tile for each program that leaves
        assert finished == (run.tiles_done == run.tiles_total)
        yield quanta[i % len(quanta)]
        if finished:
            return
        if flag is not None:
            flag.resume(0, "test")
    pytest.fail(f"a run makes no progress: {run.tiles_done} of {run.tiles_total} tiles")


@contextlib.contextmanager
def hooked(name: str, before):
    """Call ``before(*args)`` ahead of every operation ``name`` of the interpreter."""
    original = getattr(interpreter_builder, name)

    def hook(*args, **kwargs):
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(interpreter_builder, name, hook)
    try:
        yield
    finally:
        delattr(interpreter_builder, name)


def flipping(flag: PriorityFlag, gaps):
    """Pause the class if it runs, else resume it, after each of these numbers of atomic operations."""
    gaps = iter(gaps)
    left = next(gaps, None)

    def before(*_):
        nonlocal left
        if left is None:
            return
        if left == 0:
            flag.resume(0, "test") if flag.paused(0) else flag.pause(0, "test")
            left = next(gaps, None)
        else:
            left -= 1

    return hooked("create_atomic_rmw", before)


# -- properties --------------------------------------------------------------------------------------


@given(
    layers(),
    st.sampled_from(TILES),
    st.lists(st.integers(0, 12), max_size=12),
    st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from((1, 2, 2**31 - 1)),
    st.booleans(),
    st.booleans(),
)
def test_preemption_changes_no_bit(inputs, tiles, gaps, quanta, share, in_chunks, counted):
    expected = uninterrupted(inputs, tiles)
    assert_close(inputs, expected)
    flag = PriorityFlag()
    flag.share(0, share)
    with mock.patch("qllm_ops.triton_moe.COUNTED_PAIRS", 512 if counted else 0):
        run = TritonMoe(inputs, flag, 0, tiles=tiles, width=width(inputs, tiles) if in_chunks else None)
    done = 0
    with flipping(flag, gaps):
        for quantum in finish(run, flag, quanta):
            assert done <= run.tiles_done <= run.tiles_total
            assert quantum is None or run.tiles_done <= done + quantum
            done = run.tiles_done
    assert torch.equal(run.output, expected)
    assert not run.output.isnan().any()


@given(layers(), st.sampled_from(TILES), st.lists(st.integers(0, 12), max_size=8), st.booleans())
def test_every_element_is_written_once(inputs, tiles, gaps, in_chunks):
    written = []
    flag = PriorityFlag()
    run = TritonMoe(inputs, flag, 0, tiles=tiles, width=width(inputs, tiles) if in_chunks else None)
    intermediate = run._intermediate  # what the kernel writes; a function's result may take its place
    with (
        flipping(flag, gaps),
        hooked("create_masked_store", lambda ptrs, _, mask, *rest: written.append(ptrs.data[mask.data])),
    ):
        list(finish(run, flag))
    addresses = np.sort(np.concatenate([np.empty(0, np.uint64), *written]))

    here = ((inputs.top_k_index.long() >= 0) & (inputs.top_k_index.long() < inputs.num_experts)).view(-1)
    first, count = int((inputs.top_k_index.long() < 0).sum()), int(here.sum())
    rows = [
        elements(run._output, range(inputs.num_tokens)),
        elements(intermediate, range(first, first + count)),
        *(
            elements(part, here.nonzero().view(-1).tolist(), phase.size)
            for phase in run._phases
            if phase.kernel == "down"
            for part in run._partial
        ),
    ]
    assert np.array_equal(addresses, np.sort(np.concatenate(rows)))


def elements(matrix: torch.Tensor, rows, columns: int | None = None) -> np.ndarray:
    """Addresses of the elements of some rows, or of their first columns."""
    columns = np.arange(matrix.shape[1] if columns is None else columns)
    offsets = (np.array(list(rows), dtype=np.int64)[:, None] * matrix.shape[1] + columns).reshape(-1)
    return (offsets * matrix.element_size() + matrix.data_ptr()).astype(np.uint64)


@given(layers(fused=True), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_launches_resume_without_the_host_knowing(inputs, gaps):
    """What a gate on the stream does: launches one after another, and nobody reads how far they came."""
    expected = uninterrupted(inputs)
    flag = PriorityFlag()
    run = TritonMoe(inputs, flag, 0)
    if inputs.num_tokens:
        with flipping(flag, gaps):
            for _ in range(len(gaps) + 2):
                for phase in run._phases:
                    run._launch(phase)
                flag.resume(0, "test")
        run._read()
    assert run.tiles_done == run.tiles_total
    assert torch.equal(run.output, expected)


class StreamGate(PriorityFlag):
    """A stream gate that opens as soon as something is held by it.

    What really waits is a stream. Here launches run where they are enqueued, so nobody else would open it.
    """

    def __init__(self):
        super().__init__(gate="stream")
        self.held = 0

    def hold(self, priority):
        self.held += self.paused(priority)
        self.resume(priority, "test")
        super().hold(priority)


@given(
    layers(), st.sampled_from(TILES), st.lists(st.integers(0, 12), max_size=30), st.booleans(),
    st.sampled_from((1, 2, 2**31 - 1)),
)  # fmt: skip
def test_a_gated_layer_is_whole_however_often_it_is_paused(inputs, tiles, gaps, in_chunks, share):
    expected = uninterrupted(inputs, tiles)
    flag = StreamGate()
    flag.share(0, share)
    run = TritonMoe(inputs, flag, 0, tiles=tiles, width=width(inputs, tiles) if in_chunks else None)
    with flipping(flag, gaps):
        run.launch_all(gated=True)
    assert torch.equal(run.output, expected)
    assert run.tiles_done == run.tiles_total


def test_the_last_launch_of_a_gated_phase_ignores_the_flag():
    """Paused again and again: every launch that may be left is, and none after the last is waited for."""
    inputs = layer(9, 29, 19, 3, 2)
    flag = StreamGate()
    run = TritonMoe(inputs, flag, 0, tiles=TILES[1])
    launches, launch = [], run._launch

    def paused_at_once(phase, poll=True):
        launches.append((phase.kernel, poll))
        flag.pause(0, "test")
        launch(phase, poll=poll)

    run._launch = paused_at_once
    run.launch_all(gated=True)
    assert torch.equal(run.output, uninterrupted(inputs, TILES[1]))
    assert {kernel: launches.count((kernel, True)) for kernel in ROUNDS} == ROUNDS
    assert [launches.count((kernel, False)) for kernel in ROUNDS] == [1, 1, 1]
    assert flag.held == len(launches) - 1  # before each but the first it was paused


def test_moe_stands_still_before_it_launches_anything():
    flag = PriorityFlag(gate="stream")
    flag.pause(0, "test")
    threading.Timer(0.2, flag.resume, (0, "test")).start()
    began = time.monotonic()
    inputs = layer(5)
    output = moe(
        inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj, inputs.top_k_index, inputs.top_k_weights,
        flag=flag, backend="triton",
    )  # fmt: skip
    assert time.monotonic() - began > 0.15
    assert torch.equal(output, uninterrupted(inputs))


# -- cases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=["default", "small", "uneven", "exits"])
def test_every_activation_and_dtype(activation, dtype, tiles):
    inputs = layer(9, 29, 19, 3, 2, dtype=dtype, activation=activation)
    assert_close(inputs, uninterrupted(inputs, tiles))


QUANTIZED_TILES = (
    TILES[3],
    {  # Turns of the sums that are longer than a group of 16 and of 32 numbers, and shorter.
        "gate_up": TileConfig(4, 8, 64, 1, 1, 3),
        "down": TileConfig(4, 8, 32, 1, 1, 2),
        "combine": TileConfig(4, 8, 1, 1, 1, 2),
    },
)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("tiles", QUANTIZED_TILES, ids=["exits", "long"])
@pytest.mark.parametrize("sizes", [(32, 32), (35, 19)], ids=["even", "uneven"])
def test_every_format_of_quantised_weights(format, tiles, sizes):
    """Sizes that blocks and groups divide, and others; with the layout and the clamp of gpt-oss."""
    inputs = layer(
        3, *sizes, 2, 2, dtype=torch.bfloat16, quantized=format, layout="interleaved", biases=True,
        activation=CLAMPED[0],
    )  # fmt: skip
    expected = uninterrupted(inputs, tiles)
    assert_close(inputs, expected)
    flag = PriorityFlag()
    run = TritonMoe(inputs, flag, 0, tiles=tiles, width=width(inputs, tiles))
    with flipping(flag, [3, 1, 5, 2]):
        list(finish(run, flag, quanta=(3, None)))
    assert torch.equal(run.output, expected)


def test_every_code_and_the_ends_of_the_scales():
    """What the kernel widens, bit by bit: one row per code, times 1 and -1."""
    codes = torch.arange(256, dtype=torch.uint8)
    ends = {
        "fp8": (torch.tensor([2.0**-120, 1.0, 1.5 * 2.0**100]), codes[(codes & 0x7F) != 0x7F][:, None]),
        "mxfp4": (torch.tensor([0, 1, 127, 240], dtype=torch.uint8), codes[:, None]),
        "int4": (torch.tensor([2.0**-100, 1.0, 2.0**90]).bfloat16(), codes[:, None]),
    }
    for format, (scales, values) in ends.items():
        # (1, codes, 16) numbers: the code, then zeros.
        rows, zero = len(values), 0x88 if format == "int4" else 0
        wide = 16 if format == "fp8" else 16 // 2
        values = torch.nn.functional.pad(values, (0, wide - 1), value=zero)[None]
        if format == "fp8":
            values = values.view(torch.float8_e4m3fn)
        for scale in scales:
            block = (1, 32 if format == "mxfp4" else 16)
            first = QuantizedWeight(values, scale.expand(1, rows, 1).contiguous(), format, block, 16)
            second = quantize(torch.ones(1, 16, rows), format)  # any
            units = torch.cat([torch.eye(16)[:2], -torch.eye(16)[:2]])
            nobody_else = (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
            inputs = check_inputs(units, first, second, *nobody_else, Activation("relu"), gated=False)
            run = TritonMoe(inputs, None, 0)
            run.launch_all()
            numbers = first.dequantize()[0, :, :2].T
            assert torch.equal(run._intermediate, torch.cat([numbers, -numbers]).clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_of_int4_in_any_dtype(dtype):
    inputs = layer(5, 64, 48, 3, 2, quantized="int4")
    other = {
        name: replace(getattr(inputs, name), scales=getattr(inputs, name).scales.to(dtype))
        for name in ("gate_up_proj", "down_proj")
    }
    inputs = replace(inputs, **other)
    assert_close(inputs, uninterrupted(inputs))


@pytest.mark.parametrize(
    "case",
    {
        "one_token": layer(1, 8, 8, 4, 1),
        "one_of_everything": layer(1, 1, 1, 1, 1),
        "one_expert": layer(7, 13, 3, 1, 1, routing="one"),
        "all_on_one_expert": layer(19, 8, 8, 4, 2, routing="one"),
        "every_expert": layer(6, 8, 8, 5, 5, routing="all"),
        "experts_without_tokens": layer(3, 8, 8, 40, 2, routing="all"),
        "power_of_two_experts": layer(9, 8, 8, 16, 2, routing="all"),
        "int8_index": layer(4, 8, 8, 3, 2, index_dtype=torch.int8),
    }.items(),
    ids=lambda case: case[0],
)
def test_edge_case(case):
    inputs = case[1]
    expected = uninterrupted(inputs)
    assert_close(inputs, expected)
    run = TritonMoe(inputs, None, 0)
    list(finish(run, quanta=(1,)))
    assert torch.equal(run.output, expected)


def test_more_row_blocks_than_a_group_holds():
    inputs = layer(68, 33, 17, 2, 2, routing="one")  # 17 row blocks, 2 column blocks
    assert_close(inputs, uninterrupted(inputs))


@given(
    st.integers(1, 40), st.sampled_from((torch.int64, torch.int32, torch.uint8)), st.integers(1, 8),
    st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, 9), min_size=1, max_size=600),
)  # fmt: skip
def test_counting_sorts_as_torch_does(experts, dtype, top_k, values):
    info = torch.iinfo(dtype)
    values = [min(max(value, info.min), info.max) for value in values]
    tokens = -(-len(values) // top_k)
    inputs = layer(tokens, 1, 1, experts, top_k)
    index = torch.tensor(values).repeat(tokens * top_k)[: tokens * top_k].view(tokens, top_k).to(dtype)
    runs = []
    for counted in (0, 1024):
        with mock.patch("qllm_ops.triton_moe.COUNTED_PAIRS", counted):
            runs.append(TritonMoe(replace(inputs, top_k_index=index), None, 0))
    assert torch.equal(runs[0]._state, runs[1]._state)
    first, end = runs[0]._state[tickets.OFFSETS.value :][[0, experts]].tolist()
    assert torch.equal(runs[0]._order[first:end], runs[1]._order[first:end])


@pytest.mark.parametrize("value", [-1, 3, -(2**40), 2**40])
def test_pairs_outside_of_the_experts_are_skipped(value):
    inputs = layer(6, routing="all")
    inputs.top_k_index[2:4] = value
    inputs.top_k_index[5, 0] = value
    inputs.top_k_weights[2] = float("nan")  # of a skipped pair: never read
    output = uninterrupted(inputs)
    assert not output[2:4].any()
    inputs.top_k_weights[2] = 0
    assert_close(inputs, output)


def test_no_tokens_is_done_at_once():
    run = TritonMoe(layer(0), PriorityFlag(), 0)
    assert (run.tiles_done, run.tiles_taken, run.tiles_total) == (0, 0, 0)
    assert run.step(None)
    assert run.output.shape == (0, 16)
    assert uninterrupted(layer(0)).shape == (0, 16)


def test_nan_weights_reach_only_the_tokens_that_use_them():
    inputs = layer(8, top_k=1, routing="all")
    inputs.down_proj[1, 0, 0] = float("nan")
    output = uninterrupted(inputs)
    uses = inputs.top_k_index[:, 0] == 1
    assert 0 < uses.sum() < 8
    assert torch.equal(output[:, 0].isnan(), uses)
    assert not output[:, 1:].isnan().any()


def test_inputs_are_not_changed():
    inputs = layer(5, dtype=torch.bfloat16)
    tensors = [value for value in vars(inputs).values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    uninterrupted(inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_quantum_is_used_up_exactly_across_phases():
    inputs = layer(9, 29, 19, 3, 2)
    run = TritonMoe(inputs, PriorityFlag(), 0, tiles=TILES[1])
    counts = [run.tiles_done for _ in finish(run, quanta=(7,))]
    assert counts == [*range(7, run.tiles_total, 7), run.tiles_total]
    assert torch.equal(run.output, uninterrupted(inputs, TILES[1]))


def test_a_paused_class_does_nothing():
    flag = PriorityFlag()
    flag.pause(0)
    inputs = layer()
    run = TritonMoe(inputs, flag, 0)
    assert not run.step(None)
    assert run.tiles_done == run.tiles_taken == 0
    other = TritonMoe(inputs, flag, 1)
    assert other.step(None)
    flag.resume(0)
    assert run.step(None)
    flag.pause(0)
    assert run.step(None)  # nothing left to be paused
    assert torch.equal(run.output, other.output)


def test_a_pause_past_its_deadline_ends_at_the_next_step():
    now = [0.0]
    flag = PriorityFlag(clock=lambda: now[0])
    flag.pause(0, timeout_s=1.0)
    run = TritonMoe(layer(), flag, 0)
    assert not run.step(None)
    now[0] = 2.0
    assert run.step(None)


def test_a_flag_leaves_within_one_tile():
    """Paused at any atomic operation of a launch, no program takes another tile."""
    inputs = layer(9, 29, 19, 3, 2)
    whole = TritonMoe(inputs, None, 0, tiles=TILES[1])
    whole.launch_all()
    assert whole.tiles_total == whole.tiles_done
    for place in range(0, 2 * whole._totals[0], 5):
        flag = PriorityFlag()
        run = TritonMoe(inputs, flag, 0, tiles=TILES[1])
        with flipping(flag, [place]):
            run.step(None)
        # Atomics come in pairs, a poll and a ticket; a pause between the two comes too late for that tile.
        assert run.tiles_done == -(-place // 2)


def test_an_exit_inside_of_a_tile_gives_it_back():
    """Paused at any atomic operation: what was begun is left, and the next step takes it first."""
    inputs = layer(9, 29, 19, 3, 2)
    expected = uninterrupted(inputs, TILES[3])
    halfway = 0
    for place in range(0, 60, 3):
        flag = PriorityFlag()
        run = TritonMoe(inputs, flag, 0, tiles=TILES[3])
        with flipping(flag, [place]):
            run.step(None)
        returned = run._state[-run._slots :]
        waiting = returned[returned >= 0].tolist()
        assert len(waiting) == run.tiles_taken - run.tiles_done <= 1  # programs run one after another
        halfway += len(waiting)
        # A quantum of one takes a fresh tile only if none waits.
        flag.resume(0, "test")
        taken = run._state[tickets.TICKETS.value].item()
        run.step(1)
        if waiting:
            assert run._state[tickets.TICKETS.value].item() == taken
            assert not (run._state[-run._slots :] >= 0).any()
        list(finish(run, flag))
        assert torch.equal(run.output, expected)
        assert run.tiles_taken == run.tiles_total + len(waiting)
    assert halfway > 5


@pytest.mark.parametrize("tiles", TILES, ids=["default", "small", "uneven", "exits"])
def test_a_share_that_grows_is_taken_up_by_the_next_launch(tiles):
    inputs = layer(9, 29, 19, 3, 2)
    flag = PriorityFlag()
    flag.share(0, 1)
    run = TritonMoe(inputs, flag, 0, tiles=tiles)
    seen = []

    def before(*_):
        seen.append(1)
        if len(seen) == 6:
            flag.share(0, FULL)

    with hooked("create_atomic_rmw", before):
        assert not run.step(None)  # the one program that ran has left for the others' sake
        assert 0 < run.tiles_done < run._totals[0]
        list(finish(run))
    assert torch.equal(run.output, uninterrupted(inputs, tiles))
    # Shrinking needs no new launch: those that have to go go, and the others stay.
    run = TritonMoe(inputs, flag, 0, tiles=tiles)
    seen.clear()
    with hooked("create_atomic_rmw", lambda *_: flag.share(0, 1)):
        assert run.step(None)


def test_a_phase_that_may_not_begin_gives_out_no_ticket():
    flag = PriorityFlag()
    run = TritonMoe(layer(9), flag, 0)
    # Paused at the second ticket, and running again when the four programs have all left.
    with flipping(flag, [3, 8]):
        run.step(None)
    assert flag.read()[0] > 0
    taken = run._state[tickets.TICKETS.value :][:3].tolist()
    assert taken[0] == 2 < run._totals[0]
    assert taken[1:] == [0, 0]


@pytest.mark.parametrize("gated", [False, True])
def test_launch_all_never_asks_the_device(monkeypatch, gated):
    expected = uninterrupted(layer(7))

    def refuse(*_, **__):
        raise AssertionError("this waits for the device")

    inputs = layer(7)
    run = TritonMoe(inputs, None, 0)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "bincount", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        run = TritonMoe(inputs, PriorityFlag(gate="stream"), 0)
        run.launch_all(gated)
    assert torch.equal(run.output, expected)


def test_memory_and_grids_do_not_depend_on_the_routing():
    runs = [TritonMoe(layer(9, experts=4, routing=routing), None, 0) for routing in ("one", "all", "any")]
    for attribute in ("_intermediate", "_partial", "_state", "_output"):
        assert len({getattr(run, attribute).shape for run in runs}) == 1
    for phases in zip(*(run._phases for run in runs), strict=True):
        assert len({run._grid(phase) for run, phase in zip(runs, phases, strict=True)}) == 1


@given(layers(fused=True), st.sets(st.integers(0, 5)), st.integers(0, 2**16))
def test_batch_invariance(inputs, chosen, seed):
    """Some of the tokens in another order give the bits that they have in the whole batch."""
    inputs = replace(inputs, batch_invariant=True)
    expected = uninterrupted(inputs)
    chosen = [token for token in chosen if token < inputs.num_tokens]
    random.Random(seed).shuffle(chosen)
    batch = ("hidden_states", "top_k_index", "top_k_weights")
    few = replace(inputs, **{name: vars(inputs)[name][chosen] for name in batch})
    assert torch.equal(uninterrupted(few), expected[chosen])


def test_tiles_of_a_batch_invariant_layer_do_not_depend_on_its_tokens(monkeypatch):
    # Past the cache, which must not remember another device's tiles.
    monkeypatch.setattr("qllm_ops.triton_moe.tiles_for", tiles_for.__wrapped__)
    monkeypatch.setattr("qllm_ops.triton_moe.arch_of", lambda device: "sm_90")
    monkeypatch.setattr(TritonMoe, "_route", lambda self: None)
    for hidden, intermediate, experts, top_k in ((64, 96, 4, 2), (256, 64, 40, 8), (32, 32, 1, 1)):
        runs = {
            invariant: [
                TritonMoe(
                    replace(layer(tokens, hidden, intermediate, experts, top_k), batch_invariant=invariant),
                    None, 0,
                ).tiles
                for tokens in (1, 9, 50, 700)
            ]
            for invariant in (True, False)
        }  # fmt: skip
        assert all(tiles == runs[True][0] for tiles in runs[True])
        assert any(tiles != runs[False][0] for tiles in runs[False])  # which is what it costs


def test_max_exit_us_chooses_the_tiles(monkeypatch):
    monkeypatch.setattr("qllm_ops.triton_moe.arch_of", lambda device: "sm_90")
    sizes = (4096, 2, 8, 4096, 14336)
    short, default, fast = (
        tiles_for.__wrapped__(sizes, torch.bfloat16, torch.device("cpu"), us)
        for us in (10.0, 30.0, float("inf"))
    )
    assert short["down"].block_n <= default["down"].block_n <= fast["down"].block_n
    assert short != default != fast
    with pytest.raises(ValueError, match=r"max_exit_us must be a positive number.*got 0"):
        moe(**vars(replace(layer(), max_exit_us=0)), backend="triton")


@given(layers())
def test_memory_is_what_the_docstring_says(inputs):
    run = TritonMoe(inputs, None, 0)
    pairs, size = inputs.num_tokens * inputs.top_k, inputs.hidden_states.element_size()
    own = not isinstance(inputs.activation, Activation)
    first = 4 * inputs.gate_up_size if own else size * inputs.intermediate_size
    float_parts = inputs.expert_norm is not None or (
        inputs.weight_format is not None and inputs.hidden_states.dtype == torch.bfloat16
    )
    second = inputs.hidden_size * run.tiles["down"].split_k * (4 if float_parts else size)
    assert run._intermediate.nbytes + run._partial.nbytes == pairs * (first + second)
    assert run._state.nbytes == 4 * (98 + 3 * (inputs.num_experts + 1))
    if inputs.num_tokens and not inputs.weights_on_input:
        assert run._weights_of_sum is inputs.top_k_weights
    known = ("_intermediate", "_partial", "_state", "_order", "_weights_of_sum", "_output")
    assert {name for name, x in vars(run).items() if isinstance(x, torch.Tensor)} <= set(known)


def test_warm_up_computes_nothing_and_leaves_the_flag_alone():
    flag = PriorityFlag()
    inputs = layer(1, 8, 8, 2, 2)
    before = {name: x.clone() for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
    assert warm_up(**vars(inputs), flag=flag, backend="triton") is None
    assert all(torch.equal(getattr(inputs, name), value) for name, value in before.items())
    assert flag.read() == (2**31 - 1,) * 2


@pytest.mark.parametrize(
    ("activation", "expert_norm"), [("silu", None), (own_gate, None), ("silu", own_norm)]
)
@pytest.mark.parametrize("paused", [False, True])
def test_warm_up_launches_every_kernel_with_a_flag_and_without(monkeypatch, paused, activation, expert_norm):
    """Also those that come after a function of yours, where no token has an expert to do anything with."""
    launched, launch = set(), TritonMoe._launch

    def note(run, phase, *, poll=True, **options):
        launched.add((phase.kernel, poll and run._word is not None))
        launch(run, phase, poll=poll, **options)

    monkeypatch.setattr(TritonMoe, "_launch", note)
    inputs = layer(1, 8, 8, 2, 2, activation=activation, expert_norm=expert_norm)
    flag = PriorityFlag()
    if paused:
        flag.pause(0)
    warm_up(**vars(inputs), flag=flag, backend="triton")
    assert launched == {
        (kernel, polls) for kernel in ("gate_up", "down", "combine") for polls in (False, True)
    }


def test_warm_up_loads_every_kernel_that_torch_sorts_by(monkeypatch):
    """One for up to 1024, 2048 and 4096 numbers each, and some for more; up to 512 are not sorted by it."""
    sizes, sort = [], torch.sort

    def note(x, **options):
        sizes.append(len(x))
        return sort(x, **options)

    monkeypatch.setattr(torch, "sort", note)
    warm_up(**vars(layer(1, 8, 8, 2, 2)), backend="triton")

    def kernel(pairs):
        return min(pairs - 1, 4096).bit_length()

    assert {kernel(pairs) for pairs in range(513, 20000)} <= {kernel(pairs) for pairs in sizes}


def test_the_first_product_waits_for_an_activation_on_another_stream(monkeypatch):
    """Else the stream that the run was made on may overwrite what the activation still reads."""
    run = TritonMoe(layer(3, 8, 8, 2, 2, activation=own_gate), None, 0)
    first, waited_for = run._intermediate, []
    monkeypatch.setattr(run, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "another stream")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: waited_for.append((x, stream)))
    run._activate()
    assert [(x is first, stream) for x, stream in waited_for] == [(True, "another stream")]


@pytest.mark.parametrize("module", [kernels, quantized_kernels, tickets])
def test_names_that_kernels_use_are_compared_quickly(module):
    """Triton does so at every launch, 36 times a layer; two of tl.constexpr compare to a third, slowly."""
    names = {name: value for name, value in vars(module).items() if isinstance(value, tl.constexpr)}
    assert names
    for name, value in names.items():
        assert (value != copy.deepcopy(value)) is False, name
        assert (value != type(value)(12345)) is True, name


# -- a second thread ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["host", "stream"])
@pytest.mark.parametrize("seed", range(2))
def test_a_thread_that_flips_the_flag_at_random_changes_no_bit(seed, gate):
    inputs = layer(9, 29, 19, 3, 2, dtype=torch.bfloat16, seed=seed)
    expected = uninterrupted(inputs)
    flag = PriorityFlag(gate=gate)
    flag.pause(0, "thread")
    rng, finished = random.Random(seed), threading.Event()

    def flip():
        while not finished.is_set():
            rng.choice((flag.pause, flag.resume, flag.resume))(0, "thread")
            flag.share(0, rng.choice((1, 2, 2**31 - 1)))
            time.sleep(rng.random() * 0.02)
        flag.resume(0, "thread")

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(3):
            output = moe(
                inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj, inputs.top_k_index,
                inputs.top_k_weights, flag=flag, backend="triton",
            )  # fmt: skip
            assert torch.equal(output, expected)
    finally:
        finished.set()
        thread.join()

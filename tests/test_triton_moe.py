"""What the Triton kernels compute, under the interpreter: tickets, masks, layouts, memory."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; tests/test_triton_gpu.py is for GPUs", allow_module_level=True)

from interpreted import TILES, assert_close, finish, flipping, hooked, layer, layers, uninterrupted, width

from qllm_ops import PriorityFlag, moe, moe_reference, warm_up
from qllm_ops.activation import ACTIVATIONS, Activation
from qllm_ops.inputs import check_inputs
from qllm_ops.kernels import tickets
from qllm_ops.plan import SORTED_PAIRS, plan_of, signature_of, tiles_for
from qllm_ops.quantized import QuantizedWeight
from qllm_ops.testing import CLAMPED, QUANTIZED, assert_same_bits, in_float32, own_gate, own_norm, quantize
from qllm_ops.tiles import INTERPRETER, TileConfig
from qllm_ops.triton_moe import TritonMoe

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@given(layers(), st.sampled_from(TILES), st.lists(st.integers(0, 12), max_size=8), st.booleans())
def test_every_element_is_written_once(inputs, tiles, gaps, in_chunks):
    written = []
    flag = PriorityFlag()
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, tiles, width(inputs, tiles) if in_chunks else None))
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
            for phase in run.plan.phases
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


@given(layers(fused=True), st.sampled_from(TILES))
def test_what_lies_around_the_arguments_reaches_no_result(inputs, tiles):
    moved = {}
    for name, x in vars(inputs).items():
        if isinstance(x, torch.Tensor):
            moved[name] = among_nan(x)
        elif isinstance(x, QuantizedWeight):
            rest = x.scales, x.format, x.block, x.columns, x.zeros, x.largest
            moved[name] = QuantizedWeight.checked(among_nan(x.values), *rest)
    moved = replace(inputs, **moved)
    assert_same_bits(uninterrupted(moved, tiles), uninterrupted(inputs, tiles))
    assert_same_bits(moe(**vars(moved), backend="torch"), moe(**vars(inputs), backend="torch"))


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """A copy between bytes of 255, which are NaN in every dtype. Aligned as tensors of their own are."""
    around = torch.full((x.nbytes + 192,), 255, dtype=torch.uint8)
    start = 64 - around.data_ptr() % 64
    return around[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


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
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, tiles, width(inputs, tiles)))
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
    st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, 9), min_size=1, max_size=300),
)  # fmt: skip
def test_the_routing_program_sorts_as_torch_does(experts, dtype, top_k, values):
    info = torch.iinfo(dtype)
    values = [min(max(value, info.min), info.max) for value in values]
    tokens = -(-len(values) // top_k)
    inputs = layer(tokens, 1, 1, experts, top_k)
    index = torch.tensor(values).repeat(tokens * top_k)[: tokens * top_k].view(tokens, top_k).to(dtype)
    runs = []
    for sizes in ((), SORTED_PAIRS):
        plan = plan_of(inputs, INTERPRETER)
        plan.sorted_pairs = next((n for n in sizes if plan.pairs <= n), 0)
        runs.append(TritonMoe(replace(inputs, top_k_index=index), None, 0, plan=plan))
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


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001])
def test_every_nan_stays_one_in_bfloat16(bits):
    """Memory of all ones is such a number; rounded as others are, it would be 0."""
    inputs = layer(4, dtype=torch.bfloat16, routing="all", biases=True)
    bias = torch.full((3, 16), bits).to(torch.int32).view(torch.float32)
    assert uninterrupted(replace(inputs, down_bias=bias)).isnan().all()


@pytest.mark.parametrize("quantized", [None, "int4"])
def test_the_least_numbers_of_bfloat16_are_not_lost(quantized):
    """Below 2 ** -126, where the mantissa has no leading 1."""
    inputs = layer(
        6,
        32,
        32,
        dtype=torch.bfloat16,
        routing="all",
        activation="relu",
        layout="ungated",
        quantized=quantized,
    )
    inputs.hidden_states.mul_(1e-38)
    expected = moe_reference(**in_float32(vars(inputs)))
    error = (uninterrupted(inputs).float() - expected).abs().max()
    assert 1e-39 < expected.abs().max() < 1e-35
    assert error <= 1e-2 * expected.abs().max() + 2.0**-133


def test_inputs_are_not_changed():
    inputs = layer(5, dtype=torch.bfloat16)
    tensors = [value for value in vars(inputs).values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    uninterrupted(inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_memory_and_grids_do_not_depend_on_the_routing():
    runs = [TritonMoe(layer(9, experts=4, routing=routing), None, 0) for routing in ("one", "all", "any")]
    for attribute in ("_intermediate", "_partial", "_state", "_output"):
        assert len({getattr(run, attribute).shape for run in runs}) == 1
    for phases in zip(*(run.plan.phases for run in runs), strict=True):
        assert len({run.plan.programs(phase) for run, phase in zip(runs, phases, strict=True)}) == 1


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
    monkeypatch.setattr("qllm_ops.plan.arch_of", lambda device: "sm_90")
    for hidden, intermediate, experts, top_k in ((64, 96, 4, 2), (256, 64, 40, 8), (32, 32, 1, 1)):
        runs = {
            invariant: [
                tiles_for(signature_of(replace(a_layer, batch_invariant=invariant)))
                for a_layer in (
                    layer(tokens, hidden, intermediate, experts, top_k) for tokens in (1, 9, 50, 700)
                )
            ]
            for invariant in (True, False)
        }
        assert all(tiles == runs[True][0] for tiles in runs[True])
        assert any(tiles != runs[False][0] for tiles in runs[False])  # which is what it costs


def test_max_exit_us_chooses_the_tiles(monkeypatch):
    monkeypatch.setattr("qllm_ops.plan.arch_of", lambda device: "sm_90")
    sizes = {
        "num_tokens": 4096,
        "top_k": 2,
        "num_experts": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
    }
    mixtral = signature_of(layer(dtype=torch.bfloat16))._replace(**sizes)
    short, default, fast = (tiles_for(mixtral._replace(max_exit_us=us)) for us in (10.0, 30.0, float("inf")))
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
    second = inputs.hidden_size * run.plan.tiles["down"].split_k * (4 if float_parts else size)
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
    """One for up to 4096 numbers, and some for more; up to 2048 are not sorted by it."""
    sizes, sort = [], torch.sort

    def note(x, **options):
        sizes.append(len(x))
        return sort(x, **options)

    monkeypatch.setattr(torch, "sort", note)
    warm_up(**vars(layer(1, 8, 8, 2, 2)), backend="triton")

    def kernel(pairs):
        return min(pairs - 1, 4096).bit_length()

    assert {kernel(pairs) for pairs in range(SORTED_PAIRS[-1] + 1, 20000)} <= set(map(kernel, sizes))


def test_the_first_product_waits_for_an_activation_on_another_stream(monkeypatch):
    """Else the stream that the run was made on may overwrite what the activation still reads."""
    run = TritonMoe(layer(3, 8, 8, 2, 2, activation=own_gate), None, 0)
    first, waited_for = run._intermediate, []
    monkeypatch.setattr(run, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "another stream")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: waited_for.append((x, stream)))
    run._activate()
    assert [(x is first, stream) for x, stream in waited_for] == [(True, "another stream")]

"""Activations in float8: how rows are quantised, what `moe` makes of them in both backends, what is refused.

Rounding is not continuous: where two backends add up a first product in another order, one of its float8 in
some hundred thousand comes out a step apart. So what is compared on random cases has first products that
are exact in any order (`exact`), and from there on the same float8.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm_ops
from qllm_ops import Activation, MoeRun, PriorityFlag, QuantizedWeight, moe, moe_reference, quantize_fp8
from qllm_ops.device import FLOAT8_CAPABILITY
from qllm_ops.inputs import check_inputs
from qllm_ops.kernels.quantized import keep_in_float16, round_to_float8
from qllm_ops.kernels.quantized import quantize_rows as quantize_in_registers
from qllm_ops.plan import plan_of
from qllm_ops.quantized import quantize_rows, rounded_rows
from qllm_ops.testing import (
    MoeCase,
    Step,
    assert_close,
    assert_preemptible,
    assert_same_bits,
    poisoned_empty,
    quantize,
    schedules,
)
from qllm_ops.tiles import TileConfig
from qllm_ops.triton_moe import TritonMoe

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
HALVES = (torch.bfloat16, torch.float16)
FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


# -- rows ------------------------------------------------------------------------------------------------


def rows_of(shape, dtype, power=0, seed=0):
    """Random rows; some of their numbers are zero, and all of the first row's first group."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw).log().exp2() * 2.0**power
    x[:, ::7] = 0
    x[0, :128] = 0
    return x.to(dtype)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    dtype=st.sampled_from((*HALVES, torch.float32)),
    power=st.sampled_from((-140, -120, -20, 0, 10, 120)),
    seed=st.integers(0, 999),
)
def test_a_row_becomes_the_nearest_float8(shape, dtype, power, seed):
    """One number after the other: of all float8, none is nearer, and of two as near the even one is taken."""
    x = rows_of(shape, dtype, min(max(power, -14), 10) if dtype == torch.float16 else power, seed)
    values, scales = quantize_rows(x)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (shape[0], -(-shape[1] // 128)))
    finite = FLOAT8.double()[~FLOAT8.double().isnan()]
    for row in range(shape[0]):
        for group, piece in enumerate(x[row].float().split(128)):
            scale = scales[row, group]
            assert scale == max(piece.abs().max() / 448, torch.tensor(2.0**-126))
            wanted = (piece * (1 / scale)).double()
            got = values[row, 128 * group :][: len(piece)]
            distance = (wanted[:, None] - finite).abs()
            least = distance.amin(1)
            assert torch.equal((wanted - got.double()).abs(), least)
            tied = ((distance == least[:, None]) & (finite != 0)).sum(1) > 1
            assert not (got.view(torch.uint8)[tied] % 2).any()
    assert torch.equal(rounded_rows(x), values.float() * scales.repeat_interleave(128, 1)[:, : shape[1]])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_stays_so(value):
    x = torch.ones(2, 130).bfloat16()
    x[0, 3] = value
    rounded = rounded_rows(x)
    assert rounded[0, 3].isnan()
    assert rounded[0, 128:].isfinite().all()
    assert torch.equal(rounded[1], rounded_rows(x[1:])[0])


@triton.jit
def _round(x_ptr, rounded_ptr, kept_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(rounded_ptr + places, round_to_float8(x))
    tl.store(kept_ptr + places, keep_in_float16(x))


@triton.jit
def _quantize(x_ptr, values_ptr, scales_ptr, columns, BLOCK: tl.constexpr):
    rows, places = tl.arange(0, BLOCK), tl.arange(0, 128)
    inside = tl.broadcast_to((places < columns)[None, :], (BLOCK, 128))
    values, scales = quantize_in_registers(
        tl.load(x_ptr + rows[:, None] * columns + places[None, :], mask=inside, other=0.0)
    )
    tl.store(values_ptr + rows[:, None] * 128 + places[None, :], values.to(tl.float32))
    tl.store(scales_ptr + rows, scales)


@interpreted
def test_rounding_by_hand_is_rounding_to_float8():
    """Every bfloat16 of at most 448, every middle of two float8 and its neighbours, and NaN."""
    halves = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float()
    numbers = FLOAT8.float()[FLOAT8.float() >= 0].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    middles = torch.cat([middles, *(torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 999.0))])
    x = torch.cat([halves[~(halves.abs() > 448)], middles, -middles])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096))
    rounded, kept = torch.empty_like(x), torch.empty_like(x)
    _round[(len(x) // 4096,)](x, rounded, kept, BLOCK=4096)
    cut = (kept.view(torch.int32) & ~0x1FFF).view(torch.float32)  # to the bits of float16
    expected = x.to(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert numbers.sum() > 30000
    for result in (rounded, cut.to(torch.float8_e4m3fn).float()):
        assert torch.equal(result.isnan(), ~numbers)
        assert_same_bits(result[numbers], expected[numbers])


@interpreted
@pytest.mark.parametrize("columns", [128, 5])
@pytest.mark.parametrize(
    ("dtype", "power"),
    # The interpreter misreads bfloat16 numbers without a leading 1, hence float32 for the least scale.
    [
        (torch.bfloat16, 0),
        (torch.bfloat16, -90),
        (torch.float16, 0),
        (torch.float16, -14),
        (torch.float32, -130),
    ],
)
def test_the_kernels_quantise_as_the_definition_does(dtype, power, columns):
    x = rows_of((64, columns), dtype, power)
    values, scales = torch.empty(64, 128), torch.empty(64)
    _quantize[(1,)](x, values, scales, columns, BLOCK=64)
    expected, expected_scales = quantize_rows(x)
    assert_same_bits(scales, expected_scales[:, 0])
    assert_same_bits(values[:, :columns].contiguous(), expected.float())
    assert not values[:, columns:].any()


# -- layers ----------------------------------------------------------------------------------------------


def exact(case: MoeCase) -> dict:
    """The case with first products of few bits: whole numbers times a power of two.

    One number of every group of a row is 448, so that its scale is 1.
    """
    tensors = case.tensors()
    draw = torch.Generator().manual_seed(case.seed)

    def whole(most, shape):
        return torch.randint(-most, most + 1, tuple(shape), generator=draw)

    hidden = whole(8, tensors["hidden_states"].shape)
    hidden[:, ::128] = 448
    rows, columns = tensors["gate_up_proj"].shape[1:]
    scales = 2.0 ** (whole(1, (case.num_experts, -(-rows // 12), -(-columns // 128))) - 9)
    values = whole(2, tensors["gate_up_proj"].shape).to(torch.float8_e4m3fn)
    return {
        **tensors,
        "hidden_states": hidden.to(case.dtype),
        "gate_up_proj": QuantizedWeight(values, scales, "fp8", (12, 128), columns),
        "top_k_weights": 2.0 ** whole(1, tensors["top_k_weights"].shape).to(case.weights_dtype),
    }


ANY_SIZE, EDGES = st.integers(1, 300), st.sampled_from((1, 16, 127, 128, 129, 260))


@st.composite
def exact_cases(draw, most_tokens=20, sizes=ANY_SIZE):
    experts = draw(st.integers(1, 5))
    layout = draw(st.sampled_from(("concatenated", "interleaved", "ungated")))
    return MoeCase(
        draw(st.integers(0, most_tokens)), draw(sizes), draw(sizes), experts, draw(st.integers(1, experts)),
        dtype=draw(st.sampled_from(HALVES)),
        activation=draw(st.sampled_from(("relu", Activation("relu", limit=0.5, up_offset=1.0)))),
        layout=layout, biases=draw(st.booleans()), weights_on_input=draw(st.booleans()),
        routing=draw(st.sampled_from(("distinct", "one_expert", "empty_expert", "out_of_range"))),
        quantized="fp8", fp8_activations=True, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


def close(output: torch.Tensor, tensors: dict) -> None:
    """The operator's tolerances, against the reference."""
    expected = moe_reference(**tensors)
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    error = (output.float() - expected.float()).abs()
    size = expected.float().square().mean().sqrt()
    if expected.any():
        assert error.max() <= 2e-2 * expected.float().abs().max()
        # Of fewer elements, one unlucky rounding decides.
        assert expected.numel() < 64 or error.square().mean().sqrt() <= 4e-3 * size
    else:
        assert not error.any()


@given(case=exact_cases(), schedule=schedules())
def test_any_layer_under_any_schedule(case, schedule):
    tensors, flag = exact(case), PriorityFlag()
    with poisoned_empty():
        expected = moe(**tensors, backend="torch")
        close(expected, tensors)
        make_run = lambda: MoeRun(**tensors, flag=flag, backend="torch")  # noqa: E731
        assert_preemptible(make_run, expected, schedule, flag)


@pytest.mark.parametrize("routing", ["distinct", "empty_expert", "one_expert", "out_of_range"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_preemption_at_every_tile(routing, dtype):
    gpt_oss = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    case = MoeCase(
        37, 149, 135, 5, 2, dtype=dtype, routing=routing, quantized="fp8", fp8_activations=True,
        activation=gpt_oss, layout="interleaved", biases=True,
    )  # fmt: skip
    with poisoned_empty():
        expected = moe(**case.tensors(), backend="torch")
        assert_close(expected, case)
        flag = PriorityFlag()
        make_run = lambda: MoeRun(**case.tensors(), flag=flag, backend="torch")  # noqa: E731
        assert_preemptible(make_run, expected, [Step(1)] * make_run().tiles_total, flag)


def test_functions_of_yours_and_norms():
    def gate(gate_up):
        return gate_up.chunk(2, 1)[0].relu() * gate_up.chunk(2, 1)[1]

    case = MoeCase(9, 140, 130, 3, 2, torch.bfloat16, gate, expert_norm=torch.tanh, fp8_activations=True,
                   quantized="fp8")  # fmt: skip
    tensors = exact(case)
    for backend in ("torch", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch",):
        close(moe(**tensors, backend=backend), tensors)


TILES = {
    "default": None,
    # Several row and column blocks; the sums in parts, the last of which is empty where I is below 257.
    "parts": {
        "gate_up": TileConfig(2, 64, 128, 1, 1, 3),
        "down": TileConfig(2, 128, 128, 1, 1, 2, split_k=3),
        "combine": TileConfig(4, 256, 1, 1, 1, 5),
    },
    "exits": {
        "gate_up": TileConfig(4, 64, 128, 1, 1, 5, exit_k=128),
        "down": TileConfig(4, 64, 128, 1, 1, 3, split_k=2, exit_k=128),
        "combine": TileConfig(4, 256, 1, 1, 1, 2),
    },
}


@interpreted
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.bfloat16, (256, 128)), (torch.float16, (257, 130)), (torch.bfloat16, (35, 300))],
    ids=str,
)
def test_the_kernels_at_every_tile(tiles, dtype, sizes):
    """Columns that groups divide, and others, of one group and of several, in every form of the sums."""
    case = MoeCase(
        5, *sizes, 2, 2, dtype=dtype, layout="interleaved", biases=True, quantized="fp8",
        activation=Activation("relu", limit=0.5, up_offset=1.0), fp8_activations=True,
    )  # fmt: skip
    inputs = check_inputs(**exact(case))
    whole = TritonMoe(inputs, None, 0, plan=plan_of(inputs, tiles))
    whole.launch_all()
    close(whole.output, exact(case))
    run = TritonMoe(inputs, PriorityFlag(), 0, plan=plan_of(inputs, tiles))
    steps = 0
    while not run.step(1):
        steps += 1
    assert steps == run.tiles_total - 1
    assert_same_bits(run.output, whole.output)


@interpreted
@settings(max_examples=max(8, settings().max_examples // 3))
@given(case=exact_cases(5, EDGES), schedule=schedules(6))
def test_any_layer_in_the_kernels_under_any_schedule(case, schedule):
    tensors, flag = exact(case), PriorityFlag()
    with poisoned_empty():
        expected = moe(**tensors, backend="triton")
        close(expected, tensors)
        make_run = lambda: MoeRun(**tensors, flag=flag, backend="triton")  # noqa: E731
        assert_preemptible(make_run, expected, schedule, flag)


@interpreted
def test_a_block_of_weights_may_be_longer_than_a_group():
    tensors = exact(MoeCase(5, 300, 140, 2, 1, torch.bfloat16, "relu", quantized="fp8", fp8_activations=True))
    for columns in (256, 512):
        down = quantize_fp8(tensors["down_proj"].dequantize(), (32, columns))
        longer = {**tensors, "down_proj": down}
        close(moe(**longer, backend="triton"), longer)
        close(moe(**longer, backend="torch"), longer)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 40, 100, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_a_gpu(tokens, dtype):
    """With few rows for each expert, and with many; and the same float8 as on a CPU."""
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("this device has no products of float8")
    x = rows_of((64, 128), dtype).cuda()
    values, scales = torch.empty(64, 128, device="cuda"), torch.empty(64, device="cuda")
    _quantize[(1,)](x, values, scales, 128, BLOCK=64)
    expected, expected_scales = quantize_rows(x.cpu())
    assert_same_bits(scales.cpu(), expected_scales[:, 0])
    assert_same_bits(values.cpu(), expected.float())
    case = MoeCase(
        tokens, 520, 390, 2, 2, dtype=dtype, layout="interleaved", biases=True, quantized="fp8",
        activation=Activation("relu", limit=0.5, up_offset=1.0), fp8_activations=True,
    )  # fmt: skip
    tensors = exact(case)
    there = {name: value.to("cuda") if hasattr(value, "to") else value for name, value in tensors.items()}
    close(moe(**there, backend="triton").cpu(), tensors)


def test_what_quantised_activations_cost():
    """Relative RMS of a layer's output on Gaussian data, against 16-bit activations with the same weights."""
    case = MoeCase(32, 1024, 512, 4, 2, torch.bfloat16, quantized="fp8", fp8_activations=True)
    tensors = case.tensors()
    ours = moe(**tensors, backend="torch").float()
    wide = moe(**{**tensors, "fp8_activations": False}, backend="torch").float()
    error = float((ours - wide).square().mean().sqrt() / wide.square().mean().sqrt())
    print(f"relative RMS error of quantised activations: {error:.4f}")
    assert 0.03 < error < 0.05


# -- what is refused -------------------------------------------------------------------------------------


def arguments(**changes):
    case = MoeCase(5, 140, 48, 2, 1, torch.bfloat16, quantized="fp8", fp8_activations=True)
    return {**case.tensors(), **changes}


DENSE = {
    "gate_up_proj": torch.zeros(2, 96, 140).bfloat16(), "down_proj": torch.zeros(2, 140, 48).bfloat16(),
}  # fmt: skip
SHORT = quantize(torch.ones(2, 140, 48), "fp8")  # blocks of 16 columns


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"fp8_activations": 1}, TypeError, ["fp8_activations", "True or False", "1"]),
        ({"hidden_states": torch.zeros(5, 140)}, TypeError, ["hidden_states", "16", "float32"]),
        ({"down_proj": SHORT}, ValueError, ["down_proj", "multiple of 128", "(12, 16)"]),
        ({name: quantize(w, "int4") for name, w in DENSE.items()}, TypeError, ["gate_up_proj", "int4"]),
        (DENSE, TypeError, ["gate_up_proj", "quantize_fp8", "dense"]),
    ],
)
def test_bad_calls_are_refused_by_name(changes, kind, words):
    tensors = arguments(**changes)
    for call in (moe, MoeRun, moe_reference, qllm_ops.warm_up):
        with pytest.raises(kind) as caught:
            call(**tensors)
        for word in words:
            assert word in str(caught.value)


def test_weights_that_float16_does_not_have_are_multiplied_as_they_are():
    """They become no float16 here."""
    huge = quantize_fp8(torch.full((1, 4, 128), 1e6), (4, 128))
    down = quantize_fp8(torch.full((1, 128, 2), 1.0), (4, 128))
    hidden, index = torch.full((1, 128), 1e-6).half(), torch.zeros(1, 1, dtype=torch.int64)
    tensors = (hidden, huge, down, index, torch.ones(1, 1))
    with pytest.raises(ValueError, match="float16 does not have"):
        moe(*tensors)
    for backend in ("torch", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch",):
        output = moe(*tensors, fp8_activations=True, activation="relu", backend=backend)
        assert torch.equal(output, moe_reference(*tensors, fp8_activations=True, activation="relu"))


def test_calls_break_a_compiled_graph_and_are_right():
    tensors = arguments()
    call = lambda x: 2 * moe(**{**tensors, "hidden_states": x})  # noqa: E731
    compiled = torch.compile(call, backend="eager")(tensors["hidden_states"])
    assert torch.equal(compiled, call(tensors["hidden_states"]))


def test_a_compiler_does_not_lose_the_switch():
    """Dense weights could be traced, but not with float8 activations."""
    dense = MoeCase(5, 16, 16, 2, 1, torch.bfloat16).tensors()
    with pytest.raises(TypeError, match="gate_up_proj must be quantised"):
        torch.compile(lambda: moe(**dense, fp8_activations=True), backend="eager")()
    assert torch.is_grad_enabled()  # which a context manager inside of the compiled call would have left off

"""Quantised weights: what they stand for, what they cost, what is refused, and `moe` with them."""

import copy
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qllm_ops
from qllm_ops import MoeRun, PriorityFlag, QuantizedWeight, quantize_fp8, quantize_int4, quantize_mxfp4
from qllm_ops.quantized import CODES, QUANTIZERS
from qllm_ops.testing import (
    QUANTIZED,
    MoeCase,
    Step,
    assert_close,
    assert_preemptible,
    moe_cases,
    poisoned_empty,
    quantize,
    schedules,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "perf"))

import quantization_error
from quantization_error import GAUSSIAN, HEAVY


def weights(kind=GAUSSIAN, shape=(2, 256, 512), dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=draw)
    if kind == HEAVY:  # Student's t of three degrees of freedom
        normal /= torch.randn(*shape, 3, generator=draw).square().mean(-1).sqrt()
    return (0.02 * normal).to(dtype)


def error(weight: QuantizedWeight | torch.Tensor, dense: torch.Tensor) -> float:
    """Relative RMS."""
    wide = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
    return float((wide - dense.float()).square().mean().sqrt() / dense.float().square().mean().sqrt())


# -- what they stand for ---------------------------------------------------------------------------------


def by_hand(weight: QuantizedWeight) -> torch.Tensor:
    """One number after the other."""
    result = torch.empty(weight.shape)
    for e, n, k in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape)).tolist():
        scale = weight.scales[e, n // weight.block[0], k // weight.block[1]]
        scale = 2.0 ** (int(scale) - 127) if weight.format == "mxfp4" else float(scale)
        if weight.format == "fp8":
            value = float(weight.values[e, n, k])
        else:
            value = CODES[weight.format][int(weight.values[e, n, k // 2]) >> (4 * (k % 2)) & 15]
            if weight.zeros is not None:
                value += 8 - int(weight.zeros[e, n, k // weight.block[1]])
        result[e, n, k] = value * scale
    return result


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 13, 16), (1, 25, 49), (3, 4, 97)], ids=str)
def test_the_definition(format, shape):
    weight = quantize(weights(shape=shape), format)
    assert weight.shape == shape
    assert torch.equal(weight.dequantize(), by_hand(weight))
    for expert in range(shape[0]):
        assert torch.equal(weight.dequantize(expert), weight.dequantize()[expert])


@given(
    format=st.sampled_from(QUANTIZED),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    power=st.integers(-30, 30),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_no_number_is_further_off_than_half_a_step(format, shape, power, dtype):
    """Within the range; what is cut off at its end is off by less than the largest step would be."""
    dense = (torch.randn(shape, generator=torch.Generator().manual_seed(power)) * 2.0**power).to(dtype)
    dense[:, ::3] = 0
    weight = quantize(dense, format)
    off = (weight.dequantize() - dense.float()).abs()
    assert not off[:, ::3].any()
    peaks = dense.float().abs().amax((1, 2), keepdim=True)
    steps = {"fp8": 17 / 448, "mxfp4": 1 / 3, "int4": 0.3}
    assert (off <= peaks * steps[format.partition("_")[0]]).all()
    assert dense.float().abs().max() <= weight.largest * 1.5


def test_what_can_be_represented_is_kept():
    scales = torch.tensor([2.0**-20, 1.0, 2.0**30])[:, None, None]
    for format, numbers in (
        ("fp8", torch.arange(-448.0, 449, 32)),
        ("mxfp4", torch.tensor(CODES["mxfp4"])),
        ("int4", torch.arange(-8.0, 8)),
    ):
        dense = torch.nn.functional.pad(numbers, (0, 32 - len(numbers))).expand(3, 2, 32) * scales
        assert torch.equal(quantize(dense, format).dequantize(), dense)


def test_mxfp4_is_what_transformers_makes_of_a_checkpoint():
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=draw, dtype=torch.uint8)
    ours = QuantizedWeight.from_mxfp4(blocks, scales)
    assert ours.shape == (2, 6, 96)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # which it transposes
    assert torch.equal(ours.dequantize(), theirs.mT)


def test_the_ends_of_the_exponents():
    values = torch.full((1, 2, 16), 0x22, dtype=torch.uint8)  # all are 1
    weight = QuantizedWeight(values, torch.tensor([[[0], [254]]], dtype=torch.uint8), "mxfp4", (1, 32), 32)
    assert weight.dequantize()[0, :, 0].tolist() == [2.0**-127, 2.0**127]


def test_int4_is_read_from_a_checkpoint():
    """As compressed-tensors packs: eight numbers of a row in an int32, the first lowest, each 8 too large."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (2, 3, 64), generator=draw)
    shifts = 4 * torch.arange(8)
    packed = ((numbers + 8).unflatten(2, (-1, 8)) << shifts).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    scales = torch.rand(2, 3, 2, generator=draw).bfloat16() + 0.1
    weight = QuantizedWeight.from_compressed_tensors(packed, scales)
    assert (weight.block, weight.shape) == ((1, 32), (2, 3, 64))
    assert torch.equal(weight.dequantize(), numbers * scales.float().repeat_interleave(32, 2))


def in_int32(codes):
    """Eight of a row's numbers, 0 to 15, in an int32, the first lowest."""
    packed = (torch.nn.functional.pad(codes, (0, -codes.shape[2] % 8)).unflatten(2, (-1, 8)) << SHIFTS).sum(
        -1
    )
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


SHIFTS = 4 * torch.arange(8)


@pytest.mark.parametrize("rows", [3, 8, 13])
def test_zero_points_are_read_from_a_checkpoint(rows):
    """As compressed-tensors packs those of groups (`pack_to_int32` with packed_dim=0 in its pack_quantized
    compressor): eight rows of the output in an int32, the first lowest, each 8 too large, rows padded."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (2, rows, 64), generator=draw)
    zeros = torch.randint(-8, 8, (2, rows, 2), generator=draw)
    scales = torch.rand(2, rows, 2, generator=draw).bfloat16() + 0.1
    packed_zeros = in_int32((zeros + 8).mT).mT.contiguous()
    assert packed_zeros.shape == (2, -(-rows // 8), 2)
    weight = QuantizedWeight.from_compressed_tensors(in_int32(numbers + 8), scales, packed_zeros)
    wide = [tensor.float().repeat_interleave(32, 2) for tensor in (zeros, scales)]
    assert torch.equal(weight.dequantize(), (numbers - wide[0]) * wide[1])
    with pytest.raises(ValueError, match=r"weight_zero_point must be \(E, ceil.*got shape"):
        QuantizedWeight.from_compressed_tensors(in_int32(numbers + 8), scales, packed_zeros[..., :1])
    with pytest.raises(TypeError, match=r"weight_zero_point must be int32.*int64"):
        QuantizedWeight.from_compressed_tensors(in_int32(numbers + 8), scales, packed_zeros.long())


def test_what_compressed_tensors_packs_is_what_it_was():
    name = "compressed_tensors.compressors.pack_quantized.helpers"
    theirs = pytest.importorskip(name, reason="compressed-tensors is not installed", exc_type=ImportError)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (13, 64), generator=draw, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (13, 2), generator=draw, dtype=torch.int8)
    scales = torch.rand(13, 2, generator=draw) + 0.1
    packed = [theirs.pack_to_int32(numbers, 4), scales, theirs.pack_to_int32(zeros, 4, packed_dim=0)]
    weight = QuantizedWeight.from_compressed_tensors(*(tensor[None].contiguous() for tensor in packed))
    expected = (numbers - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize()[0], expected)


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(len(shape)))


def test_what_lies_between_rows_of_scales_is_never_the_callers():
    """Kernels read it: an exponent of 255 there is infinite, and zero times that no number."""
    memory = torch.full((2, 3, 4), 255, dtype=torch.uint8)
    memory[..., :3] = 127
    weight = QuantizedWeight(torch.zeros(2, 3, 48, dtype=torch.uint8), memory[..., :3], "mxfp4", (1, 32), 96)
    assert weight.scales.stride() == (12, 4, 1)
    assert weight.scales.as_strided((2, 3, 4), (12, 4, 1))[..., 3].tolist() == [[0] * 3] * 2


def test_awq_is_read_as_compressed_tensors_converts_it():
    name = "compressed_tensors.entrypoints.convert.converters.autoawq"
    theirs = pytest.importorskip(name, reason="compressed-tensors with its converter is not installed")
    qweight, qzeros = random_words(2, 64, 3).int(), random_words(2, 2, 3).int()
    scales = torch.rand(2, 2, 24, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = QuantizedWeight.from_awq(qweight, qzeros, scales)
    assert (weight.block, weight.shape) == ((1, 32), (2, 24, 64))
    convert = theirs.AutoAWQConverter(group_size=32)._convert_gemm_module
    for expert in range(2):
        numbers, scale, zeros = convert(qweight[expert], scales[expert], qzeros[expert])
        zeros, scale = (of.float().repeat_interleave(32, 1) for of in (zeros, scale))
        assert torch.equal(weight.dequantize(expert), (numbers - zeros) * scale)


@pytest.mark.parametrize("v2", [False, True])
def test_gptq_is_read_from_a_checkpoint(v2):
    """As AutoGPTQ packs: eight inputs of an output in an int32, or zero points of eight outputs."""
    draw = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(0, 16, shape, generator=draw) for shape in ((2, 16, 64), (2, 16, 2)))
    zeros = zeros.clamp(min=1)  # of which a zero cannot be stored less 1
    scales = torch.rand(2, 2, 16, generator=draw) + 0.1
    stored = in_int32(codes).mT, in_int32((zeros if v2 else zeros - 1).mT), scales
    order = (torch.arange(64) // 32).expand(2, 64)
    weight = QuantizedWeight.from_gptq(*stored, order, v2=v2)
    wide = [of.float().repeat_interleave(32, 2) for of in (zeros, scales.mT)]
    assert torch.equal(weight.dequantize(), (codes - wide[0]) * wide[1])
    assert (weight.block, weight.zeros is None) == ((1, 32), False)
    symmetric = torch.full_like(stored[1], -0x77777778 if v2 else 0x77777777)
    weight = QuantizedWeight.from_gptq(stored[0], symmetric, scales, v2=v2)
    assert torch.equal(weight.dequantize(), (codes - 8) * wide[1])
    assert weight.zeros is None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"qweight": random_words(2, 8, 16)}, TypeError, r"qweight must be int32.*int64"),
        (
            {"qweight": random_words(8, 16).int()},
            ValueError,
            r"qweight must be .* experts first, got \(8, 16\)",
        ),
        ({"qzeros": None}, ValueError, r"qzeros must be .* got NoneType"),
        (
            {"qzeros": random_words(2, 2, 3).int()},
            ValueError,
            r"qzeros must be .*16 / 8\), got .*\(2, 2, 3\)",
        ),
        ({"scales": torch.ones(2, 2, 15)}, ValueError, r"scales must be .* N = 16 .*\(2, 2, 15\)"),
        ({"scales": torch.ones(2, 3, 16)}, ValueError, r"scales must be .* K = 64 .*\(2, 3, 16\)"),
        ({"scales": torch.zeros(2, 2, 16)}, ValueError, r"scales must be positive and finite, got 0"),
        (
            {"g_idx": torch.zeros(2, 64)},
            ValueError,
            r"g_idx must be groups in order, input k in group k // 32",
        ),
        ({"g_idx": [0, 1]}, TypeError, "g_idx must be a tensor or None, got list"),
        ({"qzeros": torch.full((2, 2, 2), -1).int()}, ValueError, "qzeros must be at most 14"),
    ],
)
def test_what_is_no_gptq_is_named(changes, kind, message):
    zeros = torch.full((2, 2, 2), 0x77777777).int()
    arguments = {"qweight": random_words(2, 8, 16).int(), "qzeros": zeros, "scales": torch.ones(2, 2, 16)}
    QuantizedWeight.from_gptq(**arguments)
    with pytest.raises(kind, match=message):
        QuantizedWeight.from_gptq(**(arguments | changes))


def test_what_is_no_awq_is_named():
    qweight, qzeros, scales = random_words(2, 64, 2).int(), random_words(2, 2, 2).int(), torch.ones(2, 2, 16)
    QuantizedWeight.from_awq(qweight, qzeros, scales)
    with pytest.raises(ValueError, match=r"scales must be .* K = 64 and N = 16 .*\(2, 2, 8\)"):
        QuantizedWeight.from_awq(qweight, qzeros, scales[..., :8])
    with pytest.raises(TypeError, match=r"qzeros must be int32.*int64"):
        QuantizedWeight.from_awq(qweight, qzeros.long(), scales)
    with pytest.raises(ValueError, match=r"qweight must be of a multiple of 8 inputs.*\(2, 60, 2\)"):
        QuantizedWeight.from_awq(qweight[:, :60], qzeros, scales)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 70)),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_zero_points_never_make_it_worse(shape, shift, seed):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
    ours = quantize_int4(dense, 16, symmetric=False)
    assert error(ours, dense) <= error(quantize_int4(dense, 16), dense) * (1 + 1e-6)


def test_zero_points_halve_the_error_of_numbers_of_one_sign():
    dense = weights().abs()
    assert error(quantize_int4(dense, symmetric=False), dense) < 0.6 * error(quantize_int4(dense), dense)


def test_an_asymmetric_weight_says_so_and_moves_whole():
    weight = quantize_int4(weights(shape=(2, 5, 40)), 16, symmetric=False)
    assert str(weight) == "int4 (2, 5, 40), a scale and a zero point for 1 x 16"
    assert torch.equal(weight.to("cpu").zeros, weight.zeros)
    assert weight.zeros.stride() == (20, 4, 1)
    assert weight.zero_words is weight.zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_long_groups_a_zero_point_shares_a_word_with_its_scale(dtype):
    scales, zeros = 1 + torch.rand(2, 5, 3).to(dtype), torch.randint(0, 16, (2, 5, 3), dtype=torch.uint8)
    values = torch.randint(0, 256, (2, 5, 150), dtype=torch.uint8)
    weight = QuantizedWeight(values, scales, "int4", (1, 128), 300, zeros)
    assert torch.equal(weight.scales, scales)
    assert torch.equal(weight.zeros, zeros)
    assert weight.zero_words is weight.scales
    words = torch.as_strided(weight.scales, (2, 5, 6), (30, 6, 1)).view(torch.int32)
    assert torch.equal(words, scales.view(torch.int16).int() & 0xFFFF | zeros.int() << 16)
    assert weight.nbytes == values.numel() + 4 * scales.numel()
    again = QuantizedWeight(values, weight.scales, "int4", (1, 128), 300, weight.zeros)
    assert again.scales.data_ptr() == weight.scales.data_ptr()
    # One of the two from elsewhere, as after a module has moved its buffers: they are put together again.
    for apart in (weight.scales.clone(), weight.zeros), (weight.scales, weight.zeros.clone()):
        again = QuantizedWeight(values, apart[0], "int4", (1, 128), 300, apart[1])
        assert again.zero_words is again.scales
        assert torch.equal(again.dequantize(), weight.dequantize())
    copied = copy.deepcopy(weight)
    assert copied.zero_words is copied.scales
    wide = QuantizedWeight(values, scales.float(), "int4", (1, 128), 300, zeros)
    assert wide.zero_words is wide.zeros
    assert torch.equal(wide.dequantize(), weight.dequantize())


def test_fp8_scales_may_be_exponents():
    dense = weights()
    weight = quantize_fp8(dense)
    rounded = weight.scales.to(torch.float8_e8m0fnu)
    read = QuantizedWeight.from_fp8(weight.values, rounded)
    assert read.scales.dtype == torch.float32
    assert torch.equal(read.scales, rounded.float())


def test_a_copy_elsewhere_is_the_same():
    weight = quantize_int4(weights(), 32)
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())


# -- what they cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GAUSSIAN, HEAVY])
@pytest.mark.parametrize(
    ("format", "most"), [("fp8", (0.027, 0.027)), ("mxfp4", (0.114, 0.15)), ("int4", (0.105, 0.25))]
)
def test_the_error_is_no_larger_than_of_published_implementations(format, most, kind):
    dense = weights(kind)
    ours = error(QUANTIZERS[format](dense), dense)
    assert ours <= most[kind == HEAVY]
    for name, theirs in quantization_error.FORMATS[format].published.items():
        if name == "compressed-tensors":
            pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        assert ours <= error(theirs(dense), dense) * (1 + 1e-6), name


@pytest.mark.parametrize("kind", [GAUSSIAN, HEAVY])
@pytest.mark.parametrize("format", quantization_error.FORMATS.values(), ids=quantization_error.FORMATS)
def test_the_measured_errors_are_those_of_the_formats(format, kind):
    """`perf/quantization_error.py` on a small layer: one product after the other adds its error."""
    shape = quantization_error.Shape("small", 256, 128, 2, 1)
    found = quantization_error.measure(shape, kind, format)
    assert found["bits"] == pytest.approx(format.bits, rel=0.03)
    measured = [theirs for theirs in found["published"].values() if not isinstance(theirs, str)]
    assert 0 < found["weights"] <= min(measured) * (1 + 1e-6)
    assert found["weights"] < found["output"] < 3 * found["weights"]


def test_a_library_that_is_missing_is_said():
    def missing(dense):
        raise ImportError("no module named x")

    format = replace(quantization_error.FORMATS["fp8"], published={"x": missing})
    shape = quantization_error.Shape("small", 64, 32, 1, 1)
    found = quantization_error.measure(shape, GAUSSIAN, format)
    assert found["published"] == {"x": "not installed: no module named x"}


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (quantize_fp8, 8 + 32 / 128**2),
        (quantize_mxfp4, 4.25),
        (lambda w: quantize_int4(w, 32), 4 + 16 / 32),
        (lambda w: quantize_int4(w, 128), 4 + 16 / 128),
        # Zero points of 4 bits have a byte here, which is less than is allowed for.
        (lambda w: quantize_int4(w, 64, symmetric=False), 4 + (16 + 4) / 64),
        (lambda w: quantize_int4(w, 128, symmetric=False), 4 + (16 + 4) / 128),
        (lambda w: quantize_int4(w.half(), 128), 4 + 16 / 128),
        (lambda w: quantize_int4(w.float(), 128), 4 + 16 / 128),
    ],
)
def test_memory_is_the_arithmetic_of_the_format(make, bits):
    for shape in ((2, 256, 512), (3, 200, 2880), (1, 5760, 1000)):
        dense = weights(shape=shape)
        assert make(dense).nbytes == pytest.approx(dense.numel() * bits / 8, rel=0.03)


# -- what is refused -------------------------------------------------------------------------------------

INT4 = quantize_int4(weights(shape=(2, 8, 64)), 16)
ZEROS = quantize_int4(weights(shape=(2, 8, 64)), 16, symmetric=False)
MXFP4 = quantize_mxfp4(weights(shape=(2, 8, 64)))
FP8 = quantize_fp8(weights(shape=(2, 8, 64)), (4, 16))


def changed(tensor, value):
    tensor = tensor.clone()
    tensor.flatten()[5] = value
    return tensor


BAD = [
    # a good one, what is changed, error, words of the message besides the field's name
    (INT4, {"format": "int3"}, ValueError, ["fp8, mxfp4, int4", "'int3'"]),
    (INT4, {"values": INT4.values[..., :-1].contiguous()}, ValueError, ["ceil(K / 2)", "64", "(2, 8, 31)"]),
    (INT4, {"values": INT4.values[0]}, ValueError, ["(E, N, ceil(K / 2))", "(8, 32)"]),
    (INT4, {"values": INT4.values.int()}, TypeError, ["uint8", "int32"]),
    (INT4, {"values": None}, TypeError, ["dense tensor", "NoneType"]),
    (INT4, {"values": INT4.values.to("meta")}, ValueError, ["in memory", "meta"]),
    (INT4, {"values": INT4.values.mT.contiguous().mT}, ValueError, ["contiguous", "strides"]),
    (FP8, {"values": FP8.values.float()}, TypeError, ["float8_e4m3fn", "float32"]),
    (FP8, {"values": FP8.values[..., ::2].contiguous()}, ValueError, ["K = 64", "(2, 8, 32)"]),
    (
        FP8,
        {"values": changed(FP8.values.view(torch.uint8), 0xFF).view(torch.float8_e4m3fn)},
        ValueError,
        ["NaN"],
    ),
    (INT4, {"scales": INT4.scales[..., :-1].contiguous()}, ValueError, ["(2, 8, 4)", "(2, 8, 3)"]),
    (INT4, {"scales": INT4.scales.mT.contiguous()}, ValueError, ["(2, 8, 4)", "(2, 4, 8)"]),
    (INT4, {"scales": INT4.scales.double()}, TypeError, ["bfloat16", "float64"]),
    *(
        (good, {"scales": changed(good.scales, value)}, ValueError, ["positive and finite", word])
        for good in (INT4, FP8)
        for value, word in ((0.0, "0.0"), (-0.5, "-0.5"), (float("nan"), "nan"), (float("inf"), "inf"))
    ),
    (MXFP4, {"scales": changed(MXFP4.scales, 255)}, ValueError, ["0 to 254", "255"]),
    (MXFP4, {"scales": MXFP4.scales.float()}, TypeError, ["uint8", "float32"]),
    (FP8, {"scales": FP8.scales.bfloat16()}, TypeError, ["float32", "bfloat16"]),
    (FP8, {"block": (8, 16)}, ValueError, ["scales", "(2, 1, 4)", "(2, 2, 4)"]),
    (INT4, {"block": (1, 24)}, ValueError, ["power of two", "(1, 24)"]),
    (INT4, {"block": (1, 8)}, ValueError, ["at least 16", "(1, 8)"]),
    (INT4, {"block": (2, 16)}, ValueError, ["1 row", "(2, 16)"]),
    (MXFP4, {"block": (1, 64)}, ValueError, ["(1, 32)", "(1, 64)"]),
    (INT4, {"block": 16}, TypeError, ["(rows, columns)", "16"]),
    (ZEROS, {"zeros": ZEROS.zeros[..., :-1]}, ValueError, ["zeros", "(2, 8, 4)", "(2, 8, 3)"]),
    (ZEROS, {"zeros": ZEROS.zeros.int()}, TypeError, ["zeros", "uint8", "int32"]),
    (ZEROS, {"zeros": ZEROS.zeros.to("meta")}, ValueError, ["zeros", "in memory", "meta"]),
    (ZEROS, {"zeros": changed(ZEROS.zeros, 16)}, ValueError, ["zeros", "0 to 15", "16"]),
    (MXFP4, {"zeros": MXFP4.scales}, ValueError, ["zeros", "None", "mxfp4"]),
    (FP8, {"zeros": FP8.scales.byte()}, ValueError, ["zeros", "None", "fp8"]),
    (INT4, {"columns": 62}, ValueError, ["values", "K = 62"]),
    (INT4, {"columns": "64"}, TypeError, ["columns", "'64'"]),
    (INT4, {"columns": 64.0}, TypeError, ["columns", "64.0"]),
]


@pytest.mark.parametrize(("good", "change", "kind", "words"), BAD)
def test_a_bad_description_is_refused_when_it_is_made(good, change, kind, words):
    with pytest.raises(kind) as caught:
        replace(good, **change)
    for word in [*change] * (change.keys() & {"values", "scales", "format"} != set()) + words:
        assert word in str(caught.value)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values())
def test_what_cannot_be_quantised(quantizer):
    for weight, kind, word in (
        (None, TypeError, "NoneType"),
        (torch.ones(2, 8, 16, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(8, 16), ValueError, "(8, 16)"),
        (torch.ones(2, 0, 16), ValueError, "(2, 0, 16)"),
        (torch.full((2, 8, 16), float("nan")), ValueError, "NaN"),
        (torch.full((2, 8, 16), 1e300, dtype=torch.float64), ValueError, "finite in float32"),
        (torch.ones(2, 8, 16).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (torch.ones(2, 8, 16, device="meta"), ValueError, "in memory, got a meta tensor"),
        (FakeTensorMode().from_tensor(torch.ones(2, 8, 16)), ValueError, "in memory, got a fake tensor"),
        (torch.ones(2, 8, 16).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    ):
        with pytest.raises(kind, match="weight must be") as caught:
            quantizer(weight)
        assert word in str(caught.value)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values())
def test_float64_is_quantised_as_float32(quantizer):
    weight = weights(shape=(2, 8, 64)).double()
    got, expected = quantizer(weight), quantizer(weight.float())
    assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(got.scales, expected.scales)
    # What float32 has no numbers for is zero, and its neighbours are none the worse.
    weight[0, 0, 1:] = 1e-300
    assert torch.equal(quantizer(weight).dequantize(), quantizer(weight.float()).dequantize())


def test_copies_and_what_is_shown_of_a_weight():
    for weight in (INT4, ZEROS, MXFP4, FP8):
        torch.save(weight, saved := io.BytesIO())
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for other in (copy.deepcopy(weight), loaded, weight.to("cpu")):
            assert torch.equal(other.dequantize(), weight.dequantize())
            assert other.largest == weight.largest
    assert repr(ZEROS) == "<QuantizedWeight int4 (2, 8, 64), a scale and a zero point for 1 x 16>"
    with pytest.raises(TypeError, match=r"device must be a device, got torch.float16"):
        INT4.to(torch.float16)


def test_groups_that_are_refused_by_name():
    for group in (True, 16.0, "16"):
        with pytest.raises(TypeError, match=f"group_size must be an integer, got {group!r}"):
            quantize_int4(weights(), group)
    with pytest.raises(TypeError, match=r"block must be \(rows, columns\), two integers, got 128"):
        QuantizedWeight.from_fp8(FP8.values, FP8.scales, 128)
    with pytest.raises(ValueError, match=r"block.*power of two.*\(1, 100\)"):
        quantize_int4(weights(), 100)
    with pytest.raises(ValueError, match=r"block.*power of two.*\(128, 100\)"):
        quantize_fp8(weights(), (128, 100))
    packed = torch.zeros(2, 3, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weight_scale must be .* K = 64 .*\(2, 3, 5\)"):
        QuantizedWeight.from_compressed_tensors(packed, torch.ones(2, 3, 5))
    with pytest.raises(TypeError, match=r"weight_packed must be int32.*got torch.uint8"):
        QuantizedWeight.from_compressed_tensors(packed.byte(), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"blocks must be .*16.*got \(2, 3, 8\)"):
        QuantizedWeight.from_mxfp4(packed, packed)
    with pytest.raises(ValueError, match=r"blocks must be .*16.*got NoneType"):
        QuantizedWeight.from_mxfp4(None, packed)
    for name, tensors in (("weight_packed", (None, packed)), ("weight_scale", (packed, 1.0))):
        with pytest.raises(ValueError, match=rf"{name} must be .* got (NoneType|float)"):
            QuantizedWeight.from_compressed_tensors(*tensors)
    with pytest.raises(TypeError, match=r"values must be .* got NoneType"):
        QuantizedWeight.from_fp8(None, packed)


def arguments(**changes):
    case = MoeCase(5, 32, 48, 2, 1, dtype=torch.bfloat16, quantized="int4")
    return {**case.tensors(), **changes}


HUGE = torch.full((2, 96, 32), 1e6)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"down_proj": torch.zeros(2, 32, 48).bfloat16()}, TypeError, ["gate_up_proj", "int4", "dense"]),
        ({"gate_up_proj": torch.zeros(2, 96, 32).bfloat16()}, TypeError, ["down_proj", "dense", "int4"]),
        ({"down_proj": quantize_mxfp4(torch.ones(2, 32, 48))}, TypeError, ["alike", "int4 and mxfp4"]),
        ({"down_proj": quantize_int4(torch.ones(2, 48, 32))}, ValueError, ["down_proj", "H = 32"]),
        ({"gate_up_proj": quantize_int4(torch.ones(2, 96, 33))}, ValueError, ["gate_up_proj", "(2, 96, 33)"]),
        ({"transposed": True}, ValueError, ["transposed", "quantised"]),
        (
            {"hidden_states": torch.zeros(5, 32).half(), "gate_up_proj": quantize_int4(HUGE)},
            ValueError,
            ["gate_up_proj", "float16", "wanted bfloat16 or float32"],
        ),
        ({"hidden_states": torch.zeros(5, 32).double()}, TypeError, ["hidden_states", "float64"]),
    ],
)
def test_bad_calls_are_refused_by_name(changes, kind, words):
    for call in (qllm_ops.moe, MoeRun):
        with pytest.raises(kind) as caught:
            call(**arguments(**changes))
        for word in words:
            assert word in str(caught.value)


def test_a_group_of_one_weight_may_differ_from_the_others():
    tensors = arguments()
    other = quantize_int4(tensors["down_proj"].dequantize(), 32)
    expected = qllm_ops.moe_reference(**{**tensors, "down_proj": other})
    output = qllm_ops.moe(**{**tensors, "down_proj": other})
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-3)


# -- what `moe` computes with them -----------------------------------------------------------------------


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("routing", ["distinct", "empty_expert", "one_expert", "out_of_range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_preemption_at_every_tile(format, routing, dtype):
    gpt_oss = qllm_ops.Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    case = MoeCase(
        37, 49, 35, 5, 2, dtype=dtype, routing=routing, quantized=format, activation=gpt_oss,
        layout="interleaved", biases=True,
    )  # fmt: skip
    with poisoned_empty():
        expected = qllm_ops.moe(**case.tensors(), backend="torch")
        assert_close(expected, case)
        flag = PriorityFlag()
        make_run = lambda: MoeRun(**case.tensors(), flag=flag, backend="torch")  # noqa: E731
        assert_preemptible(make_run, expected, [Step(1)] * make_run().tiles_total, flag)


@given(case=moe_cases(), format=st.sampled_from(QUANTIZED), schedule=schedules())
def test_any_quantised_layer_under_any_schedule(case, format, schedule):
    layout = case.layout.removeprefix("transposed_").removesuffix("_transposed")
    case = replace(case, quantized=format, layout="concatenated" if layout == "transposed" else layout)
    flag = PriorityFlag()
    with poisoned_empty():
        expected = qllm_ops.moe(**case.tensors(), backend="torch")
        assert_close(expected, case)
        make_run = lambda: MoeRun(**case.tensors(), flag=flag, backend="torch")  # noqa: E731
        assert_preemptible(make_run, expected, schedule, flag)

"""Quantised weights widened two at a time, as on NVIDIA's cards: on one, or in an emulator."""

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops import QuantizedWeight, moe, plan, quantize_fp8, quantize_int4, quantize_mxfp4
from qllm_ops.kernels.by_two import FUSED, WIDENING, by_two
from qllm_ops.kernels.quantized import dequantize, quantized_rows, zero_rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, BLOCK_K = 16, 128
KINDS = {"bf16": "bf16", "fp16": "f16"}  # what PTX calls them

dtypes = pytest.mark.parametrize("dtype", DTYPES)


# -- the emulator ----------------------------------------------------------------------------------------


@dtypes
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_the_emulator_rounds_as_torch_does(dtype, bits):
    numbers = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    # Ties, numbers next to them and what is subnormal in 16 bits are among those of few digits.
    numbers = torch.cat(
        [numbers, numbers.to(torch.bfloat16).float(), numbers * 2.0**-110, numbers % 65536 / 4096]
    )
    numbers = numbers[numbers.isfinite()]
    wanted = numbers.to(DTYPES[dtype]).view(torch.int16).numpy().astype(np.uint16)
    assert (ptx.round_to_bits(numbers.double().numpy(), KINDS[dtype]) == wanted).all()


def test_the_emulator_moves_bits_as_the_manual_says():
    def run(lines):
        threads = ptx.Threads(1, {"$1": np.uint32([0x33221100]), "$2": np.uint32([0x77665544])})
        threads.run(lines)
        return int(threads.read("$0", "b32")[0])

    assert run("prmt.b32 $0, $1, $2, 0x7250;") == 0x77225500
    assert run("{ .reg .b32 h; shl.b32 h, $1, 2; prmt.b32 $0, h, $2, 0xf2b3; }") == 0x0088FFCC  # signs
    assert run("lop3.b32 $0, $1, 0x0f0f0f0f, $2, 0xea;") == 0x33221100 & 0x0F0F0F0F | 0x77665544
    assert run("mul.lo.u32 $0, $1, 0x104;") == 0x33221100 * 0x104 % 2**32
    assert run("{ .reg .b32 h; shl.b32 h, $1, 4; shr.u32 $0, h, 8; }") == 0x322110
    with pytest.raises(NotImplementedError, match="no such instruction"):
        run("vote.sync.any.pred $0, $1, $2;")


@pytest.mark.parametrize("text", [*WIDENING.values(), *FUSED.values()])
def test_nothing_but_what_is_emulated_is_used(text):
    ptx.Threads(1, {f"${i}": np.uint32([0x12345678]) for i in range(1, 5)}).run(text)


# -- widening --------------------------------------------------------------------------------------------


@triton.jit
def dequantize_rows(
    value_ptr, scale_ptr, zero_ptr, output_ptr, rows, row_bytes, scale_columns, zero_columns, columns,
    FORMAT: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, SCALED: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, N)
    value_ptrs, scale_ptrs = quantized_rows(
        value_ptr, scale_ptr, tl.program_id(0), n, rows, row_bytes, scale_columns, GROUP_N
    )
    zero_ptrs = None
    if zero_ptr is not None:
        zero_ptrs = zero_rows(zero_ptr, scale_ptrs, tl.program_id(0), n, rows, zero_columns)
    for k in tl.range(0, columns, K):
        weights = dequantize(
            value_ptrs, scale_ptrs, zero_ptrs, k, columns, output_ptr.dtype.element_ty,
            FORMAT, GROUP_K, SCALED, True, False, K,
        )  # fmt: skip
        ks = k + tl.arange(0, K)
        tl.store(output_ptr + n[:, None] * columns + ks[None, :], weights, mask=(ks < columns)[None, :])


def widened(weight: QuantizedWeight, dtype: torch.dtype, scaled: bool = True) -> torch.Tensor:
    """What the kernels make of it, two numbers at a time."""
    weight, output = weight.to(DEVICE), torch.empty(ROWS, weight.columns, dtype=dtype, device=DEVICE)
    zeros = weight.zero_words
    strides = weight.scales.stride(1), None if zeros is None else zeros.stride(1)
    with ptx.emulated():
        dequantize_rows[(1,)](
            weight.values.view(torch.uint8), weight.scales, zeros, output, ROWS,
            weight.values.shape[2], *strides, weight.columns, weight.format, *weight.block,
            scaled, ROWS, BLOCK_K,
        )  # fmt: skip
    return output.cpu()


def every_byte(
    format: str, scales: list[float] | torch.Tensor, block=(1, 32), zeros=False
) -> QuantizedWeight:
    """Rows of all bytes, each at every place of a register, with these scales by turns."""
    values = torch.stack([torch.arange(256, dtype=torch.uint8).roll(row) for row in range(ROWS)])[None]
    columns = 256 if format == "fp8" else 512
    if format == "fp8":
        values = torch.where((values & 0x7F) == 0x7F, 0, values).to(torch.uint8).view(torch.float8_e4m3fn)
    shape = (1, -(-ROWS // block[0]), columns // block[1])
    scales = torch.as_tensor(scales).repeat(shape[1] * shape[2])[: shape[1] * shape[2]].view(shape)
    generator = torch.Generator().manual_seed(0)
    zeros = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator) if zeros else None
    return QuantizedWeight(values, scales.contiguous(), format, block, columns, zeros)


def scales_of(dtype: torch.dtype) -> torch.Tensor:
    """Of int4: the least number, the least normal one, usual ones, and one whose products are finite."""
    info = torch.finfo(dtype)
    usual = 0.02 * torch.rand(13, generator=torch.Generator().manual_seed(1)) + 1e-3
    extreme = torch.tensor([info.smallest_normal * info.eps, info.smallest_normal, info.max / 16])
    return torch.cat([usual, extreme]).to(dtype)


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor):
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))


@dtypes
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_is_the_product_rounded_once(dtype, group, zeros):
    weight = every_byte("int4", scales_of(DTYPES[dtype]), (1, group), zeros)
    assert_same_bits(widened(weight, DTYPES[dtype]), weight.dequantize(0).to(DTYPES[dtype]))


@dtypes
def test_mxfp4_is_the_product_rounded_once_with_every_exponent_that_is_taken(dtype):
    exponents = [n for n in range(255) if by_two("mxfp4", dtype, 2.0 ** (n - 127))]
    assert exponents == list(range(129))
    for some in torch.tensor(exponents, dtype=torch.uint8).split(16):
        weight = every_byte("mxfp4", some)
        assert_same_bits(widened(weight, DTYPES[dtype]), weight.dequantize(0).to(DTYPES[dtype]))


@dtypes
@pytest.mark.parametrize(("format", "block"), [("fp8", (1, 32)), ("fp8", (4, 16)), ("int4", (1, 32))])
def test_a_scale_of_more_digits_is_off_by_a_64th_of_the_last_bit_at_most(dtype, format, block):
    usual = 0.02 * torch.rand(29, generator=torch.Generator().manual_seed(2)) + 1e-3
    weight = every_byte(format, usual, block)
    got, exact = widened(weight, DTYPES[dtype]).double(), weight.dequantize(0).double()
    info = torch.finfo(DTYPES[dtype])
    least = info.smallest_normal * info.eps
    last_bit = (info.eps * 2.0 ** (torch.frexp(exact)[1] - 1)).clamp(min=least)
    # The term of the scale's second part is rounded too, which shows where it is below the least number.
    # Triton's interpreter cuts both parts where a card rounds them: four times as much is lost.
    assert ((got - exact).abs() <= (0.5 + 1 / 64) * last_bit + least / 2).all()


@dtypes
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_without_scales_every_number_is_exact(dtype, format):
    ones = torch.ones(1) if format == "fp8" else torch.ones(1, dtype=DTYPES[dtype])
    weight = every_byte(format, ones, (128, 128) if format == "fp8" else (1, 128))
    assert torch.equal(widened(weight, DTYPES[dtype], scaled=False).float(), weight.dequantize(0))


# -- what is widened so ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype", "largest", "taken"),
    [
        ("fp8", "bf16", 127.0, True), ("fp8", "bf16", 256.0, False), ("fp8", "fp16", 146.0, True),
        ("mxfp4", "bf16", 2.0, True), ("mxfp4", "bf16", 4.0, False), ("mxfp4", "fp16", 4.0, False),
        ("int4", "bf16", 1e37, True), ("int4", "fp16", 8000.0, True), ("int4", "fp32", 1.0, False),
    ],
)  # fmt: skip
def test_scales_must_be_numbers_once_they_are_lifted(format, dtype, largest, taken):
    assert by_two(format, dtype, largest) == taken


@pytest.mark.parametrize(
    ("arch", "dtype", "scale", "taken"),
    [
        ("sm_90", torch.bfloat16, 128, True), ("sm_80", torch.float16, 128, True),
        ("sm_90", torch.float32, 128, False), ("gfx942", torch.bfloat16, 128, False),
        ("interpreter", torch.bfloat16, 128, False), ("sm_90", torch.bfloat16, 129, False),
    ],
)  # fmt: skip
def test_a_run_widens_so_on_nvidia_in_16_bits(monkeypatch, arch, dtype, scale, taken):
    monkeypatch.setattr(plan, "arch_of", lambda device: arch)
    weight = every_byte("mxfp4", torch.tensor([120, scale], dtype=torch.uint8))
    assert plan.widened_by_two(weight, dtype, torch.device("cpu")) == taken


@pytest.mark.parametrize(
    ("format", "columns", "first_byte", "taken"),
    [
        ("mxfp4", 40, 0, True), ("mxfp4", 36, 0, False), ("fp8", 36, 0, True), ("fp8", 38, 0, False),
        ("mxfp4", 40, 4, True), ("mxfp4", 40, 2, False),
    ],
)  # fmt: skip
def test_rows_are_widened_so_where_they_are_whole_words(monkeypatch, format, columns, first_byte, taken):
    monkeypatch.setattr(plan, "arch_of", lambda device: "sm_90")
    row_bytes = columns if format == "fp8" else columns // 2
    memory = torch.zeros(256, dtype=torch.uint8)
    first_byte += -memory.data_ptr() % 16
    values = memory[first_byte : first_byte + 2 * row_bytes].view(1, 2, row_bytes)
    if format == "fp8":
        values, scales, block = values.view(torch.float8_e4m3fn), torch.ones(1, 1, 1), (128, 128)
    else:
        scales, block = torch.full((1, 2, 2), 127, dtype=torch.uint8), (1, 32)
    weight = QuantizedWeight(values, scales, format, block, columns)
    assert plan.widened_by_two(weight, torch.bfloat16, torch.device("cpu")) == taken


QUANTIZERS = {
    "fp8": quantize_fp8, "fp8 of small blocks": lambda w: quantize_fp8(w, (16, 16)), "mxfp4": quantize_mxfp4,
    "int4 of 16": lambda w: quantize_int4(w, 16), "int4 of 128": lambda w: quantize_int4(w, 128),
    "asymmetric int4": lambda w: quantize_int4(w, 16, symmetric=False),
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="there the two ways add up in different orders")
@dtypes
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_layer_has_the_bits_of_one_that_is_widened_in_float32(monkeypatch, dtype, name):
    draw = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=draw).to(DTYPES[dtype])

    gate_up, down = (QUANTIZERS[name](0.1 * randn(*shape)) for shape in ((3, 96, 80), (3, 80, 48)))
    arguments = (
        randn(5, 80), gate_up, down, torch.randint(0, 3, (5, 2), generator=draw),
        torch.rand(5, 2, generator=draw).to(DTYPES[dtype]),
    )  # fmt: skip
    wanted = moe(*arguments, backend="triton")
    calls = []
    monkeypatch.setattr(plan, "widened_by_two", lambda weight, *_: calls.append(weight) or True)
    with ptx.emulated():
        got = moe(*arguments, backend="triton")
    assert calls, "nothing was widened two at a time"
    if name == "fp8 of small blocks":  # Its scales have more digits than the weights.
        torch.testing.assert_close(
            got.float(), wanted.float(), rtol=2**-7, atol=2**-7 * wanted.abs().max().item()
        )
    else:
        assert_same_bits(got, wanted)

"""Runs the few PTX instructions of qllm_ops.kernels.by_two on a CPU, by their definition in the PTX manual.

For Triton's interpreter, which refuses inline assembly: `with emulated():` kernels that have some run there.
"""

import re
from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

FLOATS = {"bf16": (8, -126), "f16": (11, -14)}  # bits of the significand, exponent of the least normal number


@contextmanager
def emulated():
    """Triton's interpreter with inline assembly."""
    with mock.patch.object(InterpreterBuilder, "create_inline_asm", _create_inline_asm):
        yield


def run(ptx: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the registers (uint32 arrays by name, operands as $0 and on) hold after these lines."""
    registers = dict(registers)
    for line in re.sub(r"[{}]", "", ptx).split(";"):
        line = line.strip()
        if line and not line.startswith(".reg"):
            name, operands = line.split(maxsplit=1)
            target, *sources = (operand.strip() for operand in operands.split(","))
            values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
            registers[target] = _execute(name, *values)
    return registers


def _execute(name: str, a, b=None, c=None, d=None) -> np.ndarray:
    if name == "mov.b32":
        return a
    if name == "shr.u32":
        return a >> b
    if name == "shl.b32":
        return a << b
    if name == "and.b32":
        return a & b
    if name == "mul.lo.u32":
        return (a.astype(np.uint64) * b).astype(np.uint32)
    if name == "prmt.b32":
        return permute_bytes(a, b, int(c))
    if name == "lop3.b32":
        return lookup_bits(a, b, c, int(d))
    if match := re.fullmatch(r"fma\.rn\.(bf16|f16)x2", name):
        return fma_of_halves(a, b, c, match[1])
    raise NotImplementedError(f"{name}: no such instruction here")


def permute_bytes(a, b, selector: int):
    """Four bytes out of eight: those of a, then those of b, each chosen by four bits of the selector."""
    result = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), np.uint32)
    for place in range(4):
        which = selector >> 4 * place & 15
        assert which < 8, "a repeated sign: not implemented"
        source = (a, b)[which // 4]
        result |= (source >> np.uint32(8 * (which % 4)) & np.uint32(255)) << np.uint32(8 * place)
    return result


def lookup_bits(a, b, c, table: int):
    """Bit by bit, what the table has at the number that the three bits are, a's the highest."""
    result = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for index in range(8):
        if table >> index & 1:
            bits = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result |= bits
    return result


def fma_of_halves(a, b, c, kind: str):
    """a * b + c of the two halves of registers, rounded once, subnormal numbers included."""
    halves = []
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (to_float64(value >> shift & np.uint32(0xFFFF), kind) for value in (a, b, c))
        # Exact in float64 as long as the sum's two terms are not 37 binary digits apart.
        halves.append(round_to_bits(x * y + z, kind))
    return halves[0] | halves[1] << np.uint32(16)


def to_float64(bits, kind: str) -> np.ndarray:
    bits = np.asarray(bits, np.uint32)
    if kind == "bf16":
        return (bits << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def round_to_bits(numbers, kind: str) -> np.ndarray:
    """The 16 bits of the nearest numbers, ties to even."""
    digits, least = FLOATS[kind]
    exponents = np.frexp(numbers)[1] - 1
    steps = np.ldexp(1.0, np.maximum(exponents, least) - (digits - 1))
    with np.errstate(over="ignore"):
        rounded = np.copysign(np.rint(numbers / steps) * steps, numbers)
        if kind == "f16":
            return rounded.astype(np.float16).view(np.uint16).astype(np.uint32)
        return rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)


# -- in the place of the interpreter's builder -------------------------------------------------------------


class _Results:
    def __init__(self, handles):
        self.get_result = handles.__getitem__


def _create_inline_asm(self, ptx, constraints, values, types, is_pure, pack):
    """As Triton runs it: once for ``pack`` neighbours of each operand, small ones in one register."""
    constraints = constraints.split(",")
    outputs = sum(constraint.startswith("=") for constraint in constraints)
    inputs = [register for value in values for register in _registers_of(value.data, pack)]
    assert len(constraints) == outputs + len(inputs), "as many constraints as registers"
    after = run(ptx, {f"${outputs + i}": register for i, register in enumerate(inputs)})
    registers = [after[f"${i}"] for i in range(outputs)]
    results, shape = [], values[0].data.shape
    for type in types:
        size = type.scalar.primitive_bitwidth // 8
        mine = [registers.pop(0) for _ in range(pack * size // 4)]
        numbers = np.stack(mine, axis=-1).reshape(-1).view(_get_np_dtype(type)).reshape(shape)
        results.append(TensorHandle(numbers, type.scalar))
    assert not registers
    return _Results(results)


def _registers_of(data: np.ndarray, pack: int) -> list[np.ndarray]:
    words = np.ascontiguousarray(data).reshape(-1).view(np.uint32).reshape(-1, pack * data.itemsize // 4)
    return list(words.T)

"""Runs PTX on a CPU: the instructions that the kernels of `qllm_ops` are made of, by NVIDIA's PTX manual.

Two things are run: inline assembly under Triton's interpreter, which refuses it (`with emulated():`), and
what Triton has compiled for a card that this machine does not have (`launch`). The threads of a block go in
step; blocks take turns at their atomic operations. What is not implemented raises; nothing is guessed, and no
memory is touched but that of the arguments.
"""

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

TYPES = {
    "pred": np.uint8, "b8": np.uint8, "u8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f32": np.float32,
}  # fmt: skip
DTYPES = {name: np.dtype(type) for name, type in TYPES.items()}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
FLOATS = {"bf16": (8, -126), "f16": (11, -14)}  # bits of the significand, exponent of the least normal number
SIMPLE = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "neg": np.negative,
    "min": np.minimum, "max": np.maximum, "not": np.bitwise_not,
}  # fmt: skip
COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
           "ne": np.not_equal}  # fmt: skip


COLLECTIVE = ("bar.", "mma.", "ldmatrix.", "stmatrix.", "shfl.", "redux.", "vote.")
"""What the threads of a warp, or all of a block, do together."""


# -- numbers of 16 bits ----------------------------------------------------------------------------------


def to_float64(bits, kind: str) -> np.ndarray:
    bits = np.asarray(bits).astype(np.uint16)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def round_to_bits(numbers, kind: str) -> np.ndarray:
    """The 16 bits of the nearest numbers, ties to even, subnormal ones included."""
    digits, least = FLOATS[kind]
    exponents = np.frexp(numbers)[1] - 1
    steps = np.ldexp(1.0, np.maximum(exponents, least) - (digits - 1))
    with np.errstate(over="ignore"):
        rounded = np.copysign(np.rint(numbers / steps) * steps, numbers)
        if kind == "f16":
            return rounded.astype(np.float16).view(np.uint16)
        return (rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def both_halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Registers of 32 bits that hold these 16 each."""
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def to_float8(numbers: np.ndarray) -> np.ndarray:
    """The bits of the nearest float8_e4m3fn, the largest one for all that is larger."""
    limited = torch.from_numpy(numbers).clamp(-448, 448)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def of_float8(bits: np.ndarray) -> np.ndarray:
    """The bits of the same numbers in float16."""
    return (
        torch.from_numpy(bits)
        .view(torch.float8_e4m3fn)
        .to(torch.float16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


# -- threads that run in step ----------------------------------------------------------------------------


class Memory:
    """The arrays that a kernel may touch, at addresses of their own, far from each other."""

    GAP = 1 << 32

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = [array.reshape(-1).view(np.uint8) for array in arrays]

    def address(self, number: int) -> int:
        """As aligned as the array is, up to 256 bytes."""
        return (number + 1) * self.GAP + self.arrays[number].ctypes.data % 256

    def find(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The one array that all of these are in, and where."""
        number = int(addresses[0]) // self.GAP - 1
        assert 0 <= number < len(self.arrays), f"an address that is no argument's: {addresses}"
        where = addresses - self.address(number)
        inside = (where >= 0) & (where + size <= len(self.arrays[number]))
        assert np.all(inside), f"{size} bytes outside of the arguments, or of two at once: {addresses}"
        assert np.all(addresses % size == 0), f"{size} bytes that are not aligned: {addresses}"
        return self.arrays[number], where

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(N,) addresses -> (N, size) bytes."""
        if not len(addresses):
            return np.zeros((0, size), np.uint8)
        array, where = self.find(addresses, size)
        return array[where[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        if len(addresses):
            array, where = self.find(addresses, data.shape[1])
            array[where[:, None] + np.arange(data.shape[1])] = data


class Threads:
    """Threads with the same program counter: registers are arrays with a number for each of them."""

    def __init__(self, count: int, registers: dict[str, np.ndarray] | None = None):
        self.count, self.block = count, 0
        self.registers: dict[str, np.ndarray] = {}  # their bits, as uint64
        self.active = np.ones(count, bool)  # who executes this instruction
        self.parameters: list[int] = []
        self.memory = Memory([])  # of the device
        self.shared = np.zeros(0, np.uint8)
        self.copies: list[tuple] = []  # asked for since the last group
        self.groups: deque[list[tuple]] = deque()
        self.executed: dict[str, int] = {}
        self.conflicts = 0  # how often lanes of a load had to wait for others, who read from the same bank
        for name, value in (registers or {}).items():
            self.write(name, value)

    def run(self, ptx: str) -> None:
        for _ in self.turns(*_parse(ptx)):
            pass

    def turns(self, code: list[tuple[str, str, list[str]]], labels: dict[str, int]) -> Iterator[None]:
        """Run, and stop before whatever other blocks may see or change meanwhile.

        Threads that part go on one after the other, those that are behind first, until they meet again.
        """
        at, together, apart = 0, np.ones(self.count, bool), {}
        while at < len(code):
            if apart and min(apart) <= at:
                apart[at] = together | apart.get(at, False)
                at = min(apart)
                together = apart.pop(at)
            guard, name, operands = code[at]
            at += 1
            self.executed[name] = self.executed.get(name, 0) + 1
            self.active = together
            if guard:
                self.active = together & (
                    self.registers[guard.lstrip("!")].astype(bool) ^ guard.startswith("!")
                )
            for_all = name.startswith(("atom.", "red.")) or ".relaxed." in name or ".volatile." in name
            if for_all and ".shared." not in name:
                yield
            if name == "ret" and self.active.any():
                assert self.active.all(), "some threads end before others: not implemented"
                return
            if not name.startswith(("ret", "bra")):
                assert self.active.all() or not name.startswith(COLLECTIVE), f"{name}: without some threads"
                self.execute(name, operands, self.active)
            elif self.active.any():
                stay, there = together & ~self.active, labels[operands[0]]
                if stay.any():
                    apart[there] = self.active | apart.get(there, False)
                    together = stay
                else:
                    at = there

    def execute(self, name: str, operands: list[str], active) -> None:
        base, *modifiers = name.split(".")
        kind = modifiers[-1] if modifiers else ""
        target, *sources = operands or [""]

        def read(i, kind=kind):
            return self.read(sources[i], kind)

        if name.startswith("cp.async"):
            self.copy_ahead(name, operands, active)
        elif base in ("bar", "griddepcontrol"):
            pass  # They are together, and go in step; and the previous launch has ended.
        elif base in ("atom", "red"):
            self.change(base, modifiers, operands, active)
        elif base == "shfl":
            self.shuffle(modifiers[1], operands)
        elif name == "vote.sync.ballot.b32":
            self.ballot(operands)
        elif base == "redux":
            self.reduce(modifiers[1], kind, operands)
        elif base == "ld" and modifiers[0] == "param":
            number = self.parameters[int(re.search(r"param_(\d+)", sources[0])[1])]
            self.write(target, np.full(self.count, number).astype(TYPES[kind]))
        elif base in ("ld", "st"):
            space = modifiers[modifiers[0] == "volatile"].partition("::")[0]
            self.move(base, space, operands, np.dtype(TYPES[kind]).itemsize, active)
        elif base == "ldmatrix":
            self.load_matrices(target, sources[0], "trans" in modifiers)
        elif base == "stmatrix":
            self.store_matrices(target, sources[0], "trans" in modifiers)
        elif base == "mma":
            self.multiply_matrices(operands, modifiers[-2])
        elif base == "mov":
            self.copy(target, sources[0], kind)
        elif base == "cvt":
            self.convert(target, sources, *modifiers[-2:])
        elif name in ("ex2.approx.f32", "ex2.approx.ftz.f32"):
            self.write(target, np.exp2(read(0)))
        elif base == "div" and kind == "f32":
            self.write(target, read(0) / read(1))
        elif base == "abs" and kind == "f32":
            self.write(target, np.abs(read(0)))
        elif base == "mul" and modifiers[0] == "hi" and kind in ("s32", "u32"):
            wide = {"s32": np.int64, "u32": np.uint64}[kind]
            product = read(0).astype(wide) * read(1).astype(wide)
            self.write(target, (product >> wide(32)).astype(TYPES[kind]))
        elif base in ("div", "rem"):
            self.write(target, divide(base, read(0), read(1)))
        elif base == "setp":
            assert len(modifiers) == 2, f"{name}: no such instruction here"
            x, y, unordered = read(0), read(1), modifiers[0].endswith("u")
            result = COMPARE[modifiers[0].removesuffix("u")](x, y)
            if unordered:
                result |= np.isnan(x) | np.isnan(y)
            self.write(target, result.astype(np.uint64))
        elif base == "selp":
            self.write(target, np.where(self.registers[sources[2]].astype(bool), read(0), read(1)))
        elif base == "bfe":
            size = np.dtype(TYPES[kind]).itemsize * 8
            high = read(0) << np.array(size - int(sources[1]) - int(sources[2])).astype(TYPES[kind])
            self.write(target, high >> np.array(size - int(sources[2])).astype(TYPES[kind]))
        elif base == "not" and kind == "pred":
            self.write(target, read(0) ^ 1)
        elif base == "popc":
            self.write(target, np.bitwise_count(read(0)).astype(np.uint32))
        elif base == "prmt":
            self.write(target, permute_bytes(read(0), read(1), int(sources[2], 0)))
        elif base == "lop3":
            self.write(target, lookup_bits(read(0), read(1), read(2), int(sources[3], 0)))
        elif base == "fma" and kind.endswith("x2"):
            self.write(target, fma_of_halves(read(0), read(1), read(2), kind.removesuffix("x2")))
        elif base == "fma":
            x, y, z = (read(i).astype(np.float64) for i in range(3))
            self.write(target, (x * y + z).astype(np.float32))
        elif base in ("mul", "mad") and modifiers[0] in ("lo", "wide"):
            wide = {"u32": "u64", "s32": "s64"}[kind] if modifiers[0] == "wide" else kind
            product = read(0).astype(TYPES[wide]) * read(1).astype(TYPES[wide])
            self.write(target, product + read(2, wide) if base == "mad" else product)
        elif base in SIMPLE and (modifiers[:-1] in ([], ["rn"])):
            self.write(target, SIMPLE[base](*(read(i) for i in range(len(sources)))))
        else:
            raise NotImplementedError(f"{name}: no such instruction here")

    # -- registers and memory --------------------------------------------------------------------

    def read(self, operand: str, kind: str) -> np.ndarray:
        dtype = DTYPES.get(kind, DTYPES["b32"])
        bits = self.registers.get(operand)
        if bits is not None:
            return bits.astype(UNSIGNED[dtype.itemsize]).view(dtype)
        if operand == "%tid.x":
            bits = np.arange(self.count)
        else:
            known = {"global_smem": 0, "%ctaid.x": self.block}
            literal = "0x" + operand[2:] if operand.startswith("0f") else operand
            number = known[operand] if operand in known else int(literal, 0)
            bits = np.full(self.count, number % 2**64, np.uint64)
        return bits.astype(UNSIGNED[dtype.itemsize]).view(dtype)

    def write(self, name: str, value: np.ndarray) -> None:
        if name == "_":
            return
        value = np.ascontiguousarray(value)
        bits = value.view(UNSIGNED[value.itemsize]).astype(np.uint64)
        if not self.active.all():
            bits = np.where(self.active, bits, self.registers.get(name, np.uint64(0)))
        self.registers[name] = bits if bits.ndim else np.full(self.count, bits)

    def copy(self, target: str, source: str, kind: str) -> None:
        if target.startswith("{"):
            low, high = _names(target)
            bits = self.read(source, "b32")
            self.write(low, bits.astype(np.uint16))
            self.write(high, (bits >> np.uint32(16)).astype(np.uint16))
        elif source.startswith("{"):
            low, high = (self.read(name, "b16") for name in _names(source))
            self.write(target, both_halves(low, high))
        else:
            self.write(target, self.read(source, kind))

    def convert(self, target: str, sources: list[str], to: str, of: str) -> None:
        source = sources[0]
        if to.removesuffix("x2") in FLOATS and to.endswith("x2") and of == "f32":
            high, low = (
                round_to_bits(self.read(name, "f32").astype(np.float64), to.removesuffix("x2"))
                for name in sources
            )
            self.write(target, both_halves(low, high))
        elif to == "e4m3x2" and of == "f32":
            high, low = (to_float8(self.read(name, "f32")).astype(np.uint16) for name in sources)
            self.write(target, low | high << np.uint16(8))
        elif to == "f16x2" and of == "e4m3x2":
            bits = self.read(source, "b16")
            low, high = (of_float8((bits >> np.uint16(shift)).astype(np.uint8)) for shift in (0, 8))
            self.write(target, both_halves(low, high))
        elif to in FLOATS and of == "f32":
            self.write(target, round_to_bits(self.read(source, "f32").astype(np.float64), to))
        elif of in FLOATS and to == "f32":
            self.write(target, to_float64(self.read(source, "b16"), of).astype(np.float32))
        elif "f" not in to + of:
            self.write(target, self.read(source, of).astype(TYPES[to]))
        else:
            raise NotImplementedError(f"cvt.{to}.{of}: no such instruction here")

    def addresses(self, operand: str, shared: bool) -> np.ndarray:
        register, _, offset = operand.strip("[] ").partition("+")
        addresses = self.read(register.strip(), "b32" if shared else "b64").astype(np.int64)
        return addresses + int(offset or 0)

    def move(self, base: str, space: str, operands: list[str], size: int, active) -> None:
        place, names = (operands[1], operands[0]) if base == "ld" else operands
        memory = Memory([self.shared]) if space == "shared" else self.memory
        first = self.addresses(place, space == "shared") + (memory.address(0) if space == "shared" else 0)
        names = _names(names)
        assert np.all(first[active] % (size * len(names)) == 0), f"{place} is not aligned"
        if base == "ld" and space == "shared" and active.all():
            self.count_conflicts(first - memory.address(0), size * len(names))
        for i, name in enumerate(names):
            where = first[active] + i * size
            if base == "ld":
                loaded = np.zeros((self.count, size), np.uint8)
                loaded[active] = memory.load(where, size)
                self.write(name, loaded.view(f"u{size}")[:, 0])
            else:
                bits = np.ascontiguousarray(self.read(name, f"b{8 * size}")[active])
                memory.store(where, bits[:, None].view(np.uint8))

    def count_conflicts(self, addresses: np.ndarray, size: int) -> None:
        """As many lanes at a time as read 128 bytes, one word of 4 bytes from each of 32 banks."""
        words = addresses[:, None] // 4 + np.arange(max(size // 4, 1))
        words = np.sort(words.reshape(-1, min(128 // size, 32) * words.shape[1]), axis=1)
        first = np.diff(words, axis=1, prepend=-1) != 0  # All who want the same word get it at once.
        banks = words % 32 + 32 * np.arange(len(words))[:, None]
        in_bank = np.bincount(banks[first], minlength=32 * len(words)).reshape(-1, 32)
        self.conflicts += int((in_bank.max(axis=1) - 1).sum())

    def change(self, base: str, modifiers: list[str], operands: list[str], active) -> None:
        """An atomic operation, one thread after the other."""
        *_, operation, kind = modifiers
        place, number = operands[-2:]
        dtype, shared = np.dtype(TYPES[kind]), "shared" in modifiers
        memory = Memory([self.shared]) if shared else self.memory
        addresses, numbers = self.addresses(place, shared), self.read(number, kind)
        addresses += memory.address(0) if shared else 0
        before = np.zeros(self.count, dtype)
        for thread in np.flatnonzero(active):
            where = addresses[thread : thread + 1]
            before[thread] = memory.load(where, dtype.itemsize).view(dtype)[0, 0]
            with np.errstate(over="ignore"):
                after = {"add": before[thread] + numbers[thread], "exch": numbers[thread]}[operation]
            memory.store(where, np.array([[after]], dtype).view(np.uint8))
        if base == "atom":
            self.write(operands[0], before)

    def copy_ahead(self, name: str, operands: list[str], active) -> None:
        """Copies arrive when they are waited for, not before: who reads too soon sees what was there."""
        if name == "cp.async.commit_group":
            self.groups.append(self.copies)
            self.copies = []
        elif name == "cp.async.wait_group":
            while len(self.groups) > int(operands[0]):
                for to, of, size, sizes in self.groups.popleft():
                    whole = sizes == size
                    assert np.all(whole | (sizes == 0)), "part of a copy: not implemented"
                    places = to[:, None] + np.arange(size)
                    self.shared[places] = 0
                    self.shared[places[whole]] = self.memory.load(of[whole], size)
        else:
            to, of, size = self.addresses(operands[0], True), self.addresses(operands[1], False), operands[2]
            sizes = self.read(operands[3] if len(operands) > 3 else size, "b32")
            self.copies.append((to[active], of[active], int(size, 0), sizes[active]))

    # -- what the threads of a warp do together --------------------------------------------------

    def load_matrices(self, targets: str, place: str, transposed: bool) -> None:
        """Matrices of 8 x 8 numbers; lanes 8 i to 8 i + 7 have the addresses of the i-th's rows. A lane gets
        two neighbours of a row, or of a column."""
        for i, name in enumerate(_names(targets)):
            rows = self.addresses(place, True).reshape(-1, 32)[:, 8 * i : 8 * i + 8]
            self.count_conflicts(rows.reshape(-1), 16)
            low, high = (
                self.shared[at[:, None] + np.arange(2)].view(np.uint16)[:, 0]
                for at in self.neighbours(place, i, transposed)
            )
            self.write(name, both_halves(low, high))

    def store_matrices(self, place: str, names: str, transposed: bool) -> None:
        for i, name in enumerate(_names(names)):
            halves = self.read(name, "b32")[:, None].view(np.uint16)
            for half, at in enumerate(self.neighbours(place, i, transposed)):
                self.shared[at[:, None] + np.arange(2)] = halves[:, half, None].copy().view(np.uint8)

    def neighbours(self, place: str, matrix: int, transposed: bool) -> list[np.ndarray]:
        """Where a lane's two numbers of a matrix lie."""
        thread, rows = np.arange(self.count), self.addresses(place, True)
        lane = thread % 32
        first = thread - lane + 8 * matrix
        if transposed:
            return [rows[first + 2 * (lane % 4) + half] + 2 * (lane // 4) for half in (0, 1)]
        return [rows[first + lane // 4] + 4 * (lane % 4) + 2 * half for half in (0, 1)]

    def shuffle(self, direction: str, operands: list[str]) -> None:
        """Each lane gets another one's number, and whether there is such a lane in its part of the warp."""
        target, source, distance, clamp, members = operands
        assert int(members, 0) & 2**32 - 1 == 2**32 - 1
        lane, distance, clamp = (
            np.arange(self.count) % 32,
            self.read(distance, "s32"),
            self.read(clamp, "s32"),
        )
        parts = clamp >> 8 & 31
        least, most = lane & parts, lane & parts | clamp & ~parts & 31
        of = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance,
              "idx": least | distance & ~parts}[direction]  # fmt: skip
        there = of >= most if direction == "up" else of <= most
        numbers = self.read(source, "b32")[np.arange(self.count) - lane + np.where(there, of, lane)]
        target, _, inside = target.partition("|")
        self.write(target, numbers)
        if inside:
            self.write(inside, there.astype(np.uint8))

    def ballot(self, operands: list[str]) -> None:
        """A bit for each lane of the warp that votes for it."""
        target, source, members = operands
        assert int(members, 0) & 2**32 - 1 == 2**32 - 1
        votes = self.read(source, "pred").astype(np.uint32).reshape(-1, 32) << np.arange(32, dtype=np.uint32)
        self.write(target, np.repeat(votes.sum(axis=1, dtype=np.uint32), 32))

    def reduce(self, operation: str, kind: str, operands: list[str]) -> None:
        """Over the lanes of the warp that a lane's mask names."""
        target, source, members = operands
        among = self.read(members, "b32")[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1) == 1
        assert among[np.arange(self.count), np.arange(self.count) % 32].all()
        numbers = np.repeat(self.read(source, kind).reshape(-1, 32), 32, axis=0)
        limits = np.iinfo(numbers.dtype)
        function, nothing = {"add": (np.add, 0), "min": (np.minimum, limits.max)}[operation]
        with np.errstate(over="ignore"):
            result = function.reduce(np.where(among, numbers, numbers.dtype.type(nothing)), axis=1)
        self.write(target, result.astype(numbers.dtype))

    def multiply_matrices(self, operands: list[str], kind: str) -> None:
        """m16n8k16: d = a b + c. A register has two neighbours of a row of a, or of a column of b."""
        assert kind in FLOATS
        d, a, b, c = (_names(operand) for operand in operands)
        warp, lane = np.divmod(np.arange(self.count), 32)
        group, member = np.divmod(lane, 4)
        left, right = np.zeros((self.count // 32, 16, 16)), np.zeros((self.count // 32, 16, 8))
        sums = np.zeros((self.count // 32, 16, 8))

        def number(name, half):
            return to_float64(self.read(name, "b32") >> np.uint32(16 * half), kind)

        for half in (0, 1):
            for i in range(4):
                left[warp, group + i % 2 * 8, 2 * member + half + i // 2 * 8] = number(a[i], half)
            for i in range(2):
                right[warp, 2 * member + half + 8 * i, group] = number(b[i], half)
        for i in range(4):
            sums[warp, group + i // 2 * 8, 2 * member + i % 2] = self.read(c[i], "f32")
        sums += left @ right
        for i in range(4):
            self.write(d[i], sums[warp, group + i // 2 * 8, 2 * member + i % 2].astype(np.float32))


def divide(base: str, a, b):
    """Integers, towards zero."""
    assert np.all(b != 0)
    quotient = np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b)).astype(a.dtype)
    return quotient if base == "div" else a - quotient * b


def permute_bytes(a, b, selector: int):
    """Four bytes out of eight: those of a, then those of b, each chosen by three bits of the selector, or
    where a fourth bit is set, the byte's sign eight times."""
    result = np.zeros_like(a)
    for place in range(4):
        which = selector >> 4 * place & 15
        byte = (a, b)[which % 8 // 4] >> np.uint32(8 * (which % 4)) & np.uint32(255)
        if which >= 8:
            byte = byte // np.uint32(128) * np.uint32(255)
        result |= byte << np.uint32(8 * place)
    return result


def lookup_bits(a, b, c, table: int):
    """Bit by bit, what the table has at the number that the three bits are, a's the highest."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def fma_of_halves(a, b, c, kind: str):
    """a * b + c of the two halves of registers, rounded once."""
    halves = []
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (to_float64(value >> shift, kind) for value in (a, b, c))
        # Exact in float64 as long as the sum's two terms are not 37 binary digits apart.
        halves.append(round_to_bits(x * y + z, kind))
    return both_halves(*halves)


def _parse(ptx: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Instructions (guard, name, operands), and where the labels are."""
    code, labels = [], {}
    body = ptx[ptx.index(".entry") :].partition("{")[2] if ".entry" in ptx else ptx
    body = re.sub(
        r"//[^\n]*|^\s*\.(loc|file|section|pragma)\b[^\n]*|\.reg\b[^;]*;", "", body, flags=re.MULTILINE
    )
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip()
        if statement in ("{", "}"):  # of a scope
            continue
        if match := re.fullmatch(r"(\$\w+):", statement):
            labels[match[1]] = len(code)
        elif match := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement.lstrip("{ ")):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", re.sub(r"\b(0x\w+)U\b", r"\1", match[3]))
            code.append((match[1] or "", match[2], operands))
        elif statement:
            assert statement.startswith((".", "}")), f"not understood: {statement}"
            break  # what follows the kernel
    return code, labels


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


# -- a kernel ----------------------------------------------------------------------------------------------


def launch(
    ptx: str, threads: int, shared_bytes: int, arguments: list[np.ndarray | int], blocks: int = 1,
    seed: int = 0, between: Callable[[], None] = lambda: None,
) -> list[Threads]:  # fmt: skip
    """Run a kernel; arrays are its pointers. Which block goes on to its next atomic operation is drawn, and
    ``between`` is called before it does."""
    memory = Memory([argument for argument in arguments if isinstance(argument, np.ndarray)])
    pointers = map(memory.address, range(len(memory.arrays)))
    parameters = [next(pointers) if isinstance(a, np.ndarray) else a for a in arguments] + [0, 0]
    grid, running, draw = [], [], random.Random(seed)
    code = _parse(ptx)
    for number in range(blocks):
        block = Threads(threads)
        block.block, block.memory, block.parameters = number, memory, parameters
        block.shared = np.full(shared_bytes, 0x7F, np.uint8)
        grid.append(block)
        running.append(block.turns(*code))
    while running:
        between()
        block = draw.choice(running)
        if next(block, running) is running:
            running.remove(block)
    return grid


# -- in the place of the interpreter's builder -------------------------------------------------------------


@contextmanager
def emulated():
    """Triton's interpreter with inline assembly, and with constants of bfloat16, which 3.9 brought."""
    with (
        mock.patch.object(InterpreterBuilder, "create_inline_asm", _create_inline_asm),
        mock.patch.object(InterpreterBuilder, "get_bf16", _get_bf16, create=True),
    ):
        yield


def _get_bf16(self, value):
    return TensorHandle(round_to_bits(np.array([value]), "bf16"), tl.bfloat16)


class _Results:
    def __init__(self, handles):
        self.get_result = handles.__getitem__


def _create_inline_asm(self, text, constraints, values, types, is_pure, pack):
    """As Triton runs it: once for ``pack`` neighbours of each operand, small ones in one register."""
    constraints = constraints.split(",")
    outputs = sum(constraint.startswith("=") for constraint in constraints)
    inputs = [register for value in values for register in _registers_of(value.data, pack)]
    assert len(constraints) == outputs + len(inputs), "as many constraints as registers"
    threads = Threads(len(inputs[0]), {f"${outputs + i}": register for i, register in enumerate(inputs)})
    threads.run(text)
    registers = [threads.read(f"${i}", "b32") for i in range(outputs)]
    results, shape = [], values[0].data.shape
    for type in types:
        mine = [registers.pop(0) for _ in range(pack * type.scalar.primitive_bitwidth // 32)]
        numbers = np.stack(mine, axis=-1).reshape(-1).view(_get_np_dtype(type)).reshape(shape)
        results.append(TensorHandle(numbers, type.scalar))
    assert not registers
    return _Results(results)


def _registers_of(data: np.ndarray, pack: int) -> list[np.ndarray]:
    words = np.ascontiguousarray(data).reshape(-1).view(np.uint32).reshape(-1, pack * data.itemsize // 4)
    return list(words.T)

"""Runs PTX on a CPU: the instructions that products of quantised weights are made of, by NVIDIA's PTX manual.

Two things are run: inline assembly under Triton's interpreter, which refuses it (`with emulated():`), and
what Triton has compiled for a card that this machine does not have (`launch`), one block of threads in step.
What is not implemented raises; nothing is guessed.
"""

import re
from collections import deque
from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

TYPES = {
    "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32,
}  # fmt: skip
FLOATS = {"bf16": (8, -126), "f16": (11, -14)}  # bits of the significand, exponent of the least normal number
SIMPLE = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "neg": np.negative,
}  # fmt: skip
COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
           "ne": np.not_equal}  # fmt: skip


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


# -- threads that run in step ----------------------------------------------------------------------------


class Threads:
    """Threads with the same program counter: registers are arrays with a number for each of them."""

    def __init__(self, count: int, registers: dict[str, np.ndarray] | None = None):
        self.count = count
        self.registers: dict[str, np.ndarray] = {}  # their bits, as uint64
        self.parameters: list[int] = []
        self.memory, self.base = np.zeros(0, np.uint8), 0  # of the device, and the address of its first byte
        self.shared = np.zeros(0, np.uint8)
        self.copies: list[tuple] = []  # asked for since the last group
        self.groups: deque[list[tuple]] = deque()
        self.executed: dict[str, int] = {}
        for name, value in (registers or {}).items():
            self.write(name, value)

    def run(self, ptx: str) -> None:
        code, labels = _parse(ptx)
        at = 0
        while at < len(code):
            guard, name, operands = code[at]
            at += 1
            self.executed[name] = self.executed.get(name, 0) + 1
            active = np.ones(self.count, bool)
            if guard:
                active = self.registers[guard.lstrip("!")].astype(bool) ^ guard.startswith("!")
            if name == "ret":
                return
            if name.startswith("bra"):
                assert active.all() or not active.any(), "threads part here: not implemented"
                at = labels[operands[0]] if active.any() else at
                continue
            assert active.all() or name.startswith(("cp.async.c", "st.")), f"{name}: a guard"
            self.execute(name, operands, active)

    def execute(self, name: str, operands: list[str], active) -> None:
        base, *modifiers = name.split(".")
        kind = modifiers[-1] if modifiers else ""
        target, *sources = operands or [""]

        def read(i, kind=kind):
            return self.read(sources[i], kind)

        if name.startswith("cp.async"):
            self.copy_ahead(name, operands, active)
        elif base == "bar":
            pass  # They are always together.
        elif base == "ld" and modifiers[0] == "param":
            number = self.parameters[int(re.search(r"param_(\d+)", sources[0])[1])]
            self.write(target, np.full(self.count, number).astype(TYPES[kind]))
        elif base in ("ld", "st"):
            self.move(base, modifiers[0], operands, np.dtype(TYPES[kind]).itemsize, active)
        elif base == "ldmatrix":
            self.load_matrices(target, sources[0])
        elif base == "mma":
            self.multiply_matrices(operands, modifiers[-2])
        elif base == "mov":
            self.copy(target, sources[0], kind)
        elif base == "cvt":
            self.convert(target, sources[0], *modifiers[-2:])
        elif base == "setp":
            self.write(target, COMPARE[modifiers[0]](read(0), read(1)).astype(np.uint64))
        elif base == "selp":
            self.write(target, np.where(self.registers[sources[2]].astype(bool), read(0), read(1)))
        elif base == "bfe":
            size = np.dtype(TYPES[kind]).itemsize * 8
            high = read(0) << np.array(size - int(sources[1]) - int(sources[2])).astype(TYPES[kind])
            self.write(target, high >> np.array(size - int(sources[2])).astype(TYPES[kind]))
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
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand in ("%tid.x", "global_smem", "%ctaid.x"):
            bits = np.arange(self.count, dtype=np.uint64) if operand == "%tid.x" else np.uint64(0)
        elif operand.startswith("0f"):
            bits = np.uint64(int(operand[2:], 16))
        else:
            bits = np.uint64(int(operand, 0) % 2**64)
        dtype = np.dtype(TYPES.get(kind, np.uint32))
        bits = np.broadcast_to(bits, (self.count,)).astype(f"u{dtype.itemsize}")
        return bits.view(dtype)

    def write(self, name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        self.registers[name] = value.view(f"u{value.itemsize}").astype(np.uint64)

    def copy(self, target: str, source: str, kind: str) -> None:
        if target.startswith("{"):
            low, high = _names(target)
            bits = self.read(source, "b32")
            self.write(low, bits.astype(np.uint16))
            self.write(high, (bits >> np.uint32(16)).astype(np.uint16))
        elif source.startswith("{"):
            low, high = (self.read(name, "b16").astype(np.uint32) for name in _names(source))
            self.write(target, low | high << np.uint32(16))
        else:
            self.write(target, self.read(source, kind))

    def convert(self, target: str, source: str, to: str, of: str) -> None:
        if to in FLOATS and of == "f32":
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
        return addresses + int(offset or 0) - (0 if shared else self.base)

    def move(self, base: str, space: str, operands: list[str], size: int, active) -> None:
        place, names = (operands[1], operands[0]) if base == "ld" else operands
        memory = self.shared if space == "shared" else self.memory
        first = self.addresses(place, space == "shared")
        for i, name in enumerate(_names(names)):
            where = first[:, None] + i * size + np.arange(size)
            if base == "ld":
                self.write(name, memory[where].view(f"u{size}")[:, 0])
            else:
                memory[where[active]] = self.read(name, f"b{8 * size}")[:, None].view(np.uint8)[active]

    def copy_ahead(self, name: str, operands: list[str], active) -> None:
        """Copies arrive when they are waited for, not before: who reads too soon sees what was there."""
        if name == "cp.async.commit_group":
            self.groups.append(self.copies)
            self.copies = []
        elif name == "cp.async.wait_group":
            while len(self.groups) > int(operands[0]):
                for to, of, size, sizes in self.groups.popleft():
                    for target, source, some in zip(to, of, sizes, strict=True):
                        self.shared[target : target + size] = 0
                        self.shared[target : target + some] = self.memory[source : source + some]
        else:
            to, of, size = self.addresses(operands[0], True), self.addresses(operands[1], False), operands[2]
            sizes = self.read(operands[3] if len(operands) > 3 else size, "b32")
            self.copies.append((to[active], of[active], int(size, 0), sizes[active]))

    # -- what the threads of a warp do together --------------------------------------------------

    def load_matrices(self, targets: str, place: str) -> None:
        """Matrices of 8 x 8 numbers; lanes 8 i to 8 i + 7 have the addresses of the i-th's rows."""
        thread, rows = np.arange(self.count), self.addresses(place, True)
        for i, name in enumerate(_names(targets)):
            lane = thread % 32
            where = rows[thread - lane + 8 * i + lane // 4] + 4 * (lane % 4)
            self.write(name, self.shared[where[:, None] + np.arange(4)].view(np.uint32)[:, 0])

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


def permute_bytes(a, b, selector: int):
    """Four bytes out of eight: those of a, then those of b, each chosen by four bits of the selector."""
    result = np.zeros_like(a)
    for place in range(4):
        which = selector >> 4 * place & 15
        assert which < 8, "a repeated sign: not implemented"
        source = (a, b)[which // 4]
        result |= (source >> np.uint32(8 * (which % 4)) & np.uint32(255)) << np.uint32(8 * place)
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
        halves.append(round_to_bits(x * y + z, kind).astype(np.uint32))
    return halves[0] | halves[1] << np.uint32(16)


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


# -- a kernel of one block -------------------------------------------------------------------------------


def launch(ptx: str, threads: int, shared_bytes: int, arguments: list[np.ndarray | int]) -> Threads:
    """Run a kernel; arrays are its pointers, and hold afterwards what it has stored."""
    base, parts, places = 1 << 20, [], []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            places.append(base + sum(part.size for part in parts))
            parts.append(argument.reshape(-1).view(np.uint8))
            parts.append(np.full(-argument.nbytes % 256 + 256, 0xEE, np.uint8))
    block = Threads(threads)
    block.memory, block.base = np.concatenate(parts), base
    block.shared = np.full(shared_bytes, 0x7F, np.uint8)
    pointers = iter(places)
    block.parameters = [next(pointers) if isinstance(a, np.ndarray) else a for a in arguments] + [0, 0]
    block.run(ptx)
    for argument, place in zip((a for a in arguments if isinstance(a, np.ndarray)), places, strict=True):
        stored = block.memory[place - base :][: argument.nbytes]
        argument.reshape(-1).view(np.uint8)[:] = stored
    return block


# -- in the place of the interpreter's builder -------------------------------------------------------------


@contextmanager
def emulated():
    """Triton's interpreter with inline assembly."""
    with mock.patch.object(InterpreterBuilder, "create_inline_asm", _create_inline_asm):
        yield


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

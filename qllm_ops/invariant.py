"""Torch operations whose rows do not depend on how many rows there are.

A library's matrix product takes another way for 1 row than for 4 and for 500: it adds in another order, and
the last bits of a row change with what else is in the batch. Here, rows go through the library in blocks of a
few sizes only, and each size is used where it was proven, on this machine and for this shape, to give a row
the bits that the smallest one gives, at every place in the block:

    rows      0 ... 255 | 256 ... 287 | 288 ... 299 + 4 of zeros
    block        256           32              16

The proof is a product or two: of a block that is the same row again and again, all rows must come out the
same. Which way the library takes depends on shapes, strides and alignment and not on the numbers, so numbers
are multiplied that give every order of adding away.

`batch_invariant` does so with the torch functions that a model calls. (The idea of making a model's
operations batch invariant one by one: Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025.)
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SMALLEST, SMALLEST_ON_CPU = 128, 16
"""Rows of the smallest block: for so many, reading the weights takes about as long as multiplying by them. On
a GPU that is true of 200 to 300 rows, by the datasheets of an A100 and an H200."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The sizes of blocks, in smallest ones."""

CALL = 1.5
"""What a call costs beside its rows, in smallest blocks: MKL takes 8.8, 12.5 and 19 ms for 16, 32 and 64 rows
by (2880, 5760) on two cores of an AMD EPYC, so 5 ms beside its rows, or 23 rows."""

VECTOR = 64
"""A multiple of the numbers that torch's CPU loops take in one turn (AVX-512: 32 of float32, 64 of 16 bits).
What is left at the end of a loop goes through other code, whose exponential has other last bits."""

DIVIDED = 32768
"""From so many numbers on, such a loop is divided among threads, at least so many for each."""

UNIT = 16
"""Rows, columns and sums come in multiples of this: MKL has ways of its own for the last 1 to 8 columns."""

DRAWS = 2
"""Rows that a proof multiplies by."""

SPREAD = 6
"""A proof's numbers differ in size by up to 2 ** (2 * SPREAD)."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of products that are ours."""

ALIGNMENT = 64
"""Bytes. MKL promises the same bits for the same call only if its operands lie alike."""


class NotInvariantError(RuntimeError):
    """The library's product of this shape gives a row different bits at different places."""


# -- products ----------------------------------------------------------------------------------------------


def multiply(x: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ right + bias``, where a row's bits depend on that row, ``right`` and ``bias`` only.

    Args:
        x: (M, K).
        right: (K, N), any strides, dtype of x.
        bias: (N,) or None.
        out: (M, N), contiguous, for the result.

    Raises:
        NotInvariantError: no way was found to have the library do that.
    """
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    if not len(x):
        return out
    if right.shape[0] % UNIT:
        x, right = _pad(x), _pad(right.T).T
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    columns = right.shape[1]
    whole = columns - columns % UNIT
    if whole == columns:
        return _multiply(x, right, bias, out)
    if whole:
        out[:, :whole] = _multiply(x, right[:, :whole], None if bias is None else bias[:whole])
    # The last columns by themselves: copying those is cheap.
    last = _multiply(x, _pad(right[:, whole:]), None if bias is None else _pad(bias[whole:]))
    out[:, whole:] = last[:, : columns - whole]
    return out


def _multiply(x: Tensor, right: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    for start, stop, size in blocks(len(x), _proven(right, bias)):
        if stop - start == size and out.data_ptr() % ALIGNMENT == 0:
            _product(x[start:stop], right, bias, out[start:stop])
        else:
            rows = x.new_zeros(size, x.shape[1])
            rows[: stop - start] = x[start:stop]
            out[start:stop] = _product(rows, right, bias)[: stop - start]
    return out


def smallest_block(device: torch.device) -> int:
    return SMALLEST_ON_CPU if device.type == "cpu" else SMALLEST


def blocks(rows: int, sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Cut ``rows`` into blocks, (start, stop, size) each, the cheapest way if a call costs as much as CALL
    more of the smallest blocks. Only the last block may have fewer rows than its size."""
    most, cut, start = sizes[-1], [], 0
    for size in (most,) * (rows // most) + _cheapest(rows % most, sizes)[1]:
        cut.append((start, min(start + size, rows), size))
        start += size
    return cut


@functools.cache
def _cheapest(rows: int, sizes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """The cost of a way to cut so many rows, and its sizes, the largest first."""
    if rows == 0:
        return 0, ()
    ways = []
    for size in sizes:
        cost, rest = _cheapest(max(rows - size, 0), sizes)
        ways.append((cost + size + CALL * sizes[0], (size, *rest)))
        if size >= rows:
            break
    return min(ways, key=lambda way: (way[0], len(way[1]), [-size for size in way[1]]))


def _product(x: Tensor, right: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, right, out=out) if bias is None else torch.addmm(bias, x, right, out=out)


def _pad(x: Tensor) -> Tensor:
    """Zeros after the last dimension, up to a multiple of UNIT."""
    return F.pad(x, (0, -x.shape[-1] % UNIT))


_known: dict[tuple, tuple[int, ...]] = {}


def _proven(right: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """The sizes of blocks that give a row the same bits."""
    place = (right.device, right.dtype, right.data_ptr() % ALIGNMENT)
    key = (*place, right.shape, right.stride(), bias is None, torch.get_num_threads())
    if key not in _known:
        _known[key] = _prove(right, bias)
    return _known[key]


def _prove(right: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    smallest = smallest_block(right.device)
    rows, stand_in, stand_in_bias = _cancelling(right, bias)
    expected, sizes = [], []
    for size in (smallest * many for many in SIZES):
        got = [_product(row.expand(size, -1).contiguous(), stand_in, stand_in_bias) for row in rows]
        expected = expected or [of[:1] for of in got]
        if all(_same_bits(a, b.expand_as(a)) for a, b in zip(got, expected, strict=True)):
            sizes.append(size)
        elif size == smallest:
            raise NotInvariantError(
                f"the product of {smallest} rows by ({right.shape[0]}, {right.shape[1]}), {right.dtype} on "
                f"{right.device}, gives equal rows different bits: batch invariance cannot be had here"
            )
    return tuple(sizes)


def _cancelling(right: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (DRAWS, 1, K), a matrix that lies in memory like ``right``, and a bias if there is one, whose
    products are zero.

    Each term comes once more, at another place, with the other sign; for one of them, that is the bias. What
    is left of such a sum is what was rounded on the way, and that shows the order of adding in every dtype;
    of a sum that is not zero, rounding to 16 bits would hide nearly all of it.
    """
    generator = torch.Generator(right.device).manual_seed(0)  # the user's random numbers are not ours to take
    options = {"generator": generator, "device": right.device}
    terms = len(right)
    extent = 1 + sum((n - 1) * step for n, step in zip(right.shape, right.stride(), strict=True))
    memory = right.new_zeros(extent + ALIGNMENT // right.element_size())
    shift = (right.data_ptr() - memory.data_ptr()) % ALIGNMENT // right.element_size()
    matrix = memory.as_strided(right.shape, right.stride(), shift).normal_(generator=generator)
    one, other = torch.randperm(terms, **options).view(2, -1)
    matrix[other] = matrix[one]
    # Terms of sizes that are far apart, or few of them would be rounded where there are 16.
    spread = torch.randint(-SPREAD, SPREAD + 1, (DRAWS, 1, terms // 2), **options)
    rows = right.new_empty(DRAWS, 1, terms)
    rows[..., one] = (torch.randn(spread.shape, **options) * torch.exp2(spread.float())).to(right.dtype)
    rows[..., other] = -rows[..., one]
    if bias is None:
        return rows, matrix, None
    rows[..., one[0]], rows[..., other[0]] = 1, 0
    return rows, matrix, -matrix[one[0]]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_bits), b.contiguous().view(as_bits))


# -- what torch computes in loops of its own ---------------------------------------------------------------


def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` of tensors of one shape, element by element, where an element's bits do not
    depend on its place."""
    like = tensors[0]
    if like.device.type != "cpu" or not like.numel():
        return function(*tensors)
    numbers, flat = like.numel(), [tensor.reshape(-1) for tensor in tensors]
    # As many as give every thread whole vectors; then, piece by piece, what one thread does alone.
    together = numbers - numbers % (DIVIDED * torch.get_num_threads())
    edges = [*([0] if together else []), *range(together, numbers, DIVIDED // 2), numbers]
    results = []
    for start, stop in itertools.pairwise(edges):
        part = [F.pad(tensor[start:stop], (0, (start - stop) % VECTOR)) for tensor in flat]
        results.append(function(*part)[: stop - start])
    return (results[0] if len(results) == 1 else torch.cat(results)).view(like.shape)


def reduce_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` of (..., N) -> (..., 1), which reduces each row by itself, in blocks of one size: how
    torch divides a row among threads of a GPU depends on how many rows there are."""
    rows = x.reshape(-1, x.shape[-1])
    size = smallest_block(x.device)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % size))
    parts = [function(part) for part in padded.split(size)]
    return torch.cat(parts)[: len(rows)].view(*x.shape[:-1], 1)


# -- the torch functions that a model calls ----------------------------------------------------------------


def _linear(function: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _matmul(function, input, weight.t() if _is_matrix(weight) else weight, bias)


def _mm(function: Callable, input: Any, mat2: Any, **kwargs: Any) -> Any:
    return _matmul(function, input, mat2, **kwargs) if _is_matrix(input) else NotImplemented


def _addmm(function: Callable, input: Any, mat1: Any, mat2: Any, **kwargs: Any) -> Any:
    return _matmul(function, mat1, mat2, input, **kwargs) if _is_matrix(mat1) else NotImplemented


def _matmul(function: Callable, input: Any, other: Any, bias: Any = None, **kwargs: Any) -> Any:
    """(..., M, K) by (K, N). Products of two batches, such as those of attention, stay as they are, and what
    does not fit is left to torch to refuse."""
    if kwargs or not isinstance(input, Tensor) or not _is_matrix(other):
        return NotImplemented
    tensors = (input, other) if bias is None else (input, other, bias)
    if not all(_is_like(tensor, input) for tensor in tensors) or input.dtype not in DTYPES:
        return NotImplemented
    if not input.numel() or not other.numel() or input.shape[-1:] != other.shape[:1]:
        return NotImplemented
    if bias is not None and bias.shape != other.shape[1:]:
        if bias.shape not in ((), (1,)):
            return NotImplemented
        bias = bias.expand(other.shape[1])
    if torch.is_autocast_enabled(input.device.type):
        raise RuntimeError("batch_invariant does not know autocast; convert the model instead")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("batch_invariant records no gradients; call it inside of torch.no_grad()")
    rows = input.reshape(-1, input.shape[-1])
    return multiply(rows, other, bias).view(*input.shape[:-1], other.shape[1])


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def _is_like(x: Any, input: Tensor) -> bool:
    """Whether they may be multiplied: both have memory, on one device, and one dtype."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
        return False
    return (x.dtype, x.device) == (input.dtype, input.device)


def _curve(function: Callable, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
    if not isinstance(input, Tensor) or "out" in kwargs:
        return NotImplemented
    result = elementwise(lambda x: function(x, *args, **kwargs), input)
    return input.copy_(result) if inplace else result


def _power(function: Callable, input: Any, exponent: Any, **kwargs: Any) -> Any:
    """What is a product or a root is rounded right by itself."""
    if not isinstance(exponent, (int, float)) or exponent in (0.5, 1, 2):
        return NotImplemented
    return _curve(function, input, exponent, **kwargs)


def _reduction(
    function: Callable,
    input: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    last = (-1, input.dim() - 1)
    of_rows = dim in last or (isinstance(dim, (tuple, list)) and len(dim) == 1 and dim[0] in last)
    if kwargs or not of_rows or not input.dim() or not input.numel():
        return NotImplemented
    result = reduce_rows(lambda x: function(x, -1, True, dtype=dtype), input)
    return result if keepdim else result.squeeze(-1)


_ACTIVATIONS = (F.silu, F.gelu, F.softplus, F.mish, F.elu, F.selu, F.celu, F.sigmoid)
_CURVES = ("sigmoid", "rsqrt", "exp2", "sinh", "cosh")

_HANDLERS: dict[Callable, Callable] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.mean, Tensor.mean, torch.sum, Tensor.sum), _reduction),
    **dict.fromkeys(
        (*_ACTIVATIONS, *(getattr(of, name) for of in (torch, Tensor) for name in _CURVES)), _curve
    ),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
}


class _OfThread(threading.local):
    depth = 0


_inside = _OfThread()


def is_batch_invariant() -> bool:
    """Whether this thread is inside of a body of `batch_invariant`."""
    return _inside.depth > 0


class batch_invariant(TorchFunctionMode):
    """Inside the body, in this thread, a token's bits do not depend on what else is in the batch.

        with qllm_ops.batch_invariant():
            hidden_states = block(hidden_states)

    That holds for :func:`qllm_ops.moe`, products by a matrix (`linear`, `matmul`, `mm`, `addmm`, `@`), means
    and sums over the last dimension, and activations, exponentials and powers. Other functions that torch
    computes row by row, such as `softmax`, `layer_norm`, `tanh` and `exp`, were found to be so by themselves,
    on a CPU. It does not hold for products of batches (`bmm`, `einsum`), nor for attention, where the rows'
    lengths matter: :class:`qllm_ops.scheduler.Engine` sees to that.

    What decides how torch multiplies (its number of threads, TF32) must stay as it is. Nothing is compiled
    inside of the body: what `torch.compile` made runs as if it had not been.

    A single row takes as long as 16 of them in a product on a CPU, and as 128 on a GPU. The first product of
    a shape is preceded by its proof, which takes as long as 3500 rows (on a GPU 28,000), needs the memory of
    one more such weight meanwhile, and waits for the device.

    Raises:
        NotInvariantError: in the body, where the library's product is not so at any size.
    """

    def __enter__(self):
        _inside.depth += 1
        return super().__enter__()

    def __exit__(self, *exc):
        _inside.depth -= 1
        return super().__exit__(*exc)

    @torch.compiler.disable(reason="inside of batch_invariant, nothing is compiled")
    def __torch_function__(self, func, types, args=(), kwargs=None):
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))

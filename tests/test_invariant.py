"""Operations whose rows do not depend on how many rows there are."""

import asyncio
import contextlib
import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from qllm_ops import Activation, MoeRun, NotInvariantError, batch_invariant, invariant, moe
from qllm_ops.invariant import (
    ALIGNMENT,
    SIZES,
    blocks,
    elementwise,
    is_batch_invariant,
    multiply,
    reduce_rows,
)
from qllm_ops.testing import MoeCase, assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 5, 8, 16, 30, 47, 100, 384, 1000)
PARTS = (slice(0, 1), slice(6, 7), slice(3, 20), slice(299, 300), slice(130, 300))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextlib.contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_rows_alone(function, x: torch.Tensor) -> None:
    """Some of the rows have the bits that they have among all of them."""
    whole = function(x)
    for part in PARTS:
        assert_same_bits(function(x[part].clone()), whole[part])


# -- products ----------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 700),
    terms=st.sampled_from(WIDTHS),
    columns=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
    biased=st.booleans(),
    data=st.data(),
)
def test_a_row_of_a_product_depends_on_nothing_else(rows, terms, columns, dtype, turned, biased, data):
    x = normal(rows, terms, dtype=dtype)
    right = normal(columns, terms, dtype=dtype).T if turned else normal(terms, columns, dtype=dtype)
    bias = normal(columns, dtype=dtype) if biased else None
    whole = multiply(x, right, bias)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=40))
    assert_same_bits(multiply(x[chosen], right, bias), whole[chosen])
    expected = x.double() @ right.double() + (0 if bias is None else bias.double())
    error = (whole.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


def test_where_operands_lie_does_not_matter():
    right, wide = normal(48, 80), normal(300, 99)
    expected = multiply(wide[:, 3:51].clone(), right)
    assert_same_bits(multiply(wide[:, 3:51], right), expected)  # neither contiguous nor aligned
    memory = torch.empty(300 * 80 + 1)
    out = memory[1:].view(300, 80)
    assert multiply(wide[:, 3:51], right, out=out) is out
    assert_same_bits(out, expected)


def test_no_rows():
    assert multiply(normal(0, 8), normal(8, 5)).shape == (0, 5)


def test_nan_stays_in_its_row():
    x = normal(40, 32)
    expected = multiply(x, normal(32, 24))
    x[7] = torch.nan
    got = multiply(x, normal(32, 24))
    assert got[7].isnan().all()
    others = torch.arange(40) != 7
    assert_same_bits(got[others], expected[others])


@given(st.integers(1, 5000), st.sets(st.sampled_from(SIZES)))
def test_blocks_hold_every_row_once(rows, more):
    sizes = tuple(16 * size for size in sorted({1, *more}))
    cut = blocks(rows, sizes)
    assert [start for start, _, _ in cut] == [0, *(stop for _, stop, _ in cut[:-1])]
    assert cut[-1][1] == rows
    assert all(size in sizes for _, _, size in cut)
    assert all(stop - start == size for start, stop, size in cut[:-1])
    assert 0 < cut[-1][1] - cut[-1][0] <= cut[-1][2]


def test_few_blocks_are_made():
    sizes = tuple(16 * size for size in SIZES)
    assert blocks(60, sizes) == [(0, 60, 64)]
    assert blocks(1, sizes) == [(0, 1, 16)]
    assert blocks(1100, sizes) == [(0, 512, 512), (512, 1024, 512), (1024, 1100, 96)]
    assert blocks(129, sizes) == [(0, 128, 128), (128, 129, 16)]


# -- the proof ---------------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """Put another library's product in the place of torch's."""

    def use(product) -> None:
        def call(x, right, bias, out=None):
            result = product(x, right) if bias is None else product(x, right, bias)
            return result if out is None else out.copy_(result)

        monkeypatch.setattr(invariant, "_product", call)
        monkeypatch.setattr(invariant, "_known", {})

    return use


def in_order(x: torch.Tensor, right: torch.Tensor, order: range, first: float | torch.Tensor = 0.0):
    """The sum of the terms in this order, after ``first``, in float32, rounded at the end."""
    sums = torch.zeros(len(x), right.shape[1]) + first
    for k in order:
        sums = sums + x[:, k, None].float() * right[k].float()
    return sums.to(x.dtype)


def forward(x, right):
    return in_order(x, right, range(x.shape[1]))


def backward(x, right):
    return in_order(x, right, range(x.shape[1])[::-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 16, 100])
def test_the_proof_sees_rows_that_are_added_in_another_order(library, dtype, columns):
    """The last row of a block. Sums of ordinary numbers would mostly be alike when rounded to 16 bits."""
    library(lambda x, right: torch.cat([forward(x[:-1], right), backward(x[-1:], right)]))
    with pytest.raises(NotInvariantError, match=r"16 rows by \(32, (16|96)\).*equal rows different bits"):
        multiply(normal(20, 32, dtype=dtype), normal(32, columns, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_leaves_out_sizes_that_are_added_in_another_order(library, dtype):
    sizes = []

    def product(x, right):
        sizes.append(len(x))
        return (forward if len(x) <= 64 else backward)(x, right)

    library(product)
    x, right = normal(300, 32, dtype=dtype), normal(32, 16, dtype=dtype)
    multiply(x, right)
    sizes.clear()
    got = multiply(x, right)
    assert sizes == [64, 64, 64, 64, 48]
    assert_same_bits(got, forward(x, right))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_sees_where_the_bias_is_added(library, dtype):
    """Before the first term in small blocks, after the last one in others."""
    sizes = []

    def product(x, right, bias):
        sizes.append(len(x))
        sums = in_order(x.float(), right, range(x.shape[1]), bias.float() if len(x) <= 64 else 0.0)
        return (sums if len(x) <= 64 else sums + bias.float()).to(dtype)

    library(product)
    x, right, bias = normal(300, 32, dtype=dtype), normal(32, 16, dtype=dtype), normal(16, dtype=dtype)
    multiply(x, right, bias)
    sizes.clear()
    multiply(x, right, bias)
    assert sizes == [64, 64, 64, 64, 48]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_shows_the_order_in_most_columns(dtype, biased):
    right, bias = torch.empty(32, 500, dtype=dtype), torch.empty(500, dtype=dtype) if biased else None
    rows, matrix, bias = invariant._cancelling(right, bias)
    differ = torch.zeros(500, dtype=torch.bool)
    for row in rows:
        first = bias.float() if biased else 0.0
        one, other = (in_order(row, matrix, order, first) for order in (range(32), range(32)[::-1]))
        differ |= (one != other)[0]
    assert differ.float().mean() >= 0.8


def test_every_way_to_lie_in_memory_has_a_proof_of_its_own(monkeypatch):
    """The proof's matrix lies as the one that is multiplied; the other operands begin at ALIGNMENT."""
    calls, product = [], invariant._product

    def call(x, right, bias, out=None):
        others = (x,) if out is None else (x, out)
        aligned = [of.is_contiguous() and of.data_ptr() % ALIGNMENT == 0 for of in others]
        calls.append((*aligned, right.stride(), right.data_ptr() % ALIGNMENT, bias is None))
        return product(x, right, bias, out)

    def unaligned(rows: int, columns: int, numbers: int = 1) -> torch.Tensor:
        return torch.zeros(rows * columns + numbers)[numbers:].view(rows, columns)

    monkeypatch.setattr(invariant, "_product", call)
    monkeypatch.setattr(invariant, "_known", {})
    for numbers, turned, biased, of_threads in itertools.product((0, 1, 5), (0, 1), (0, 1), (1, 2)):
        calls.clear()
        right = unaligned(32, 48, numbers).T if turned else unaligned(48, 32, numbers)
        with threads(of_threads):
            multiply(unaligned(64, 48), right, torch.ones(32) if biased else None, unaligned(64, 32))
            multiply(unaligned(64, 48), right, torch.ones(32) if biased else None, torch.empty(64, 32))
        assert len(calls) == invariant.DRAWS * len(SIZES) + 2
        assert set(calls) == {
            (*alike, right.stride(), 4 * numbers, not biased) for alike in ((True,), (True, True))
        }


def test_the_proof_takes_nothing_from_the_users_random_numbers(monkeypatch):
    monkeypatch.setattr(invariant, "_known", {})
    state = torch.get_rng_state()
    multiply(normal(3, 16), normal(16, 16))
    assert invariant._known
    assert torch.equal(torch.get_rng_state(), state)


# -- what torch computes in loops of its own ---------------------------------------------------------------

CURVES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "exp2": torch.exp2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "pow": lambda x: torch.pow(x.abs() + 1, -0.5),
    "x ** 1.5": lambda x: x.abs() ** 1.5,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_an_element_does_not_depend_on_its_place(name, dtype, number):
    """Threads that divide the numbers badly, vectors that are not full, and both."""
    with threads(number):
        for width in (1, 8, 48, 100, 1440):
            assert_rows_alone(lambda x: elementwise(CURVES[name], x), normal(300, width, dtype=dtype))


def test_elementwise_of_several_tensors():
    gate, up = normal(300, 2 * 77).chunk(2, dim=1)
    got = elementwise(Activation("silu"), gate, up)
    torch.testing.assert_close(got, F.silu(gate) * up)
    assert_same_bits(elementwise(Activation("silu"), gate[7:9], up[7:9]), got[7:9])
    assert elementwise(torch.sigmoid, normal(0, 5)).shape == (0, 5)


def test_rows_are_reduced_in_blocks_of_one_size():
    seen = []

    def mean(x):
        seen.append(x.shape)
        return x.mean(-1, keepdim=True)

    x = normal(2, 50, 7)
    torch.testing.assert_close(reduce_rows(mean, x), x.mean(-1, keepdim=True))
    reduce_rows(mean, x[0, :1])
    assert set(seen) == {(16, 7)}


# -- inside of a model ---------------------------------------------------------------------------------------

WEIGHT, BIAS = normal(36, 48), normal(36)
CALLS = {
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
    "linear without bias": lambda x: F.linear(x, WEIGHT),
    "matmul": lambda x: torch.matmul(x, WEIGHT.T),
    "@": lambda x: x @ WEIGHT.T,
    "x.matmul": lambda x: x.matmul(WEIGHT.T),
    "mm": lambda x: torch.mm(x, WEIGHT.T),
    "x.mm": lambda x: x.mm(WEIGHT.T),
    "addmm": lambda x: torch.addmm(BIAS, x, WEIGHT.T),
    "bias.addmm": lambda x: BIAS.addmm(x, WEIGHT.T),
    "one number as bias": lambda x: torch.addmm(BIAS[:1], x, WEIGHT.T),
    "mean": lambda x: x.pow(2).mean(-1, keepdim=True),
    "torch.mean": lambda x: torch.mean(x, dim=(1,), dtype=torch.float64),
    "sum": lambda x: x.sum(-1),
    "torch.sum": lambda x: torch.sum(x, 1, True),
    "in place": lambda x: (y := x.clone(), F.silu(y, inplace=True))[0],
    "x.sigmoid": lambda x: x.sigmoid(),
    **CURVES,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_inside_of_the_body(name, monkeypatch):
    """They are batch invariant, one of ours computes them, and what comes out is what torch says."""
    plain, used = CALLS[name](normal(300, 48)), []
    for each in ("multiply", "elementwise", "reduce_rows"):
        ours = getattr(invariant, each)
        monkeypatch.setattr(invariant, each, lambda *args, ours=ours: used.append(args) or ours(*args))
    with batch_invariant():
        assert_rows_alone(CALLS[name], normal(300, 48))
        got = CALLS[name](normal(300, 48))
    assert len(used) == 2 + len(PARTS)
    assert got.dtype == plain.dtype
    torch.testing.assert_close(got, plain)


def test_leading_dimensions():
    x = normal(2, 30, 48)
    with batch_invariant():
        got = F.linear(x, WEIGHT, BIAS)
        assert_same_bits(F.linear(x[1, 4], WEIGHT, BIAS), got[1, 4])
        assert_same_bits(x.mean(-1)[1], x[1].mean(-1))
    torch.testing.assert_close(got, F.linear(x, WEIGHT, BIAS))


def into(out: torch.Tensor, function, *args) -> torch.Tensor:
    function(*args, out=out)
    return out


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[:3, None] @ x[:3, :, None],  # a product of two batches
        lambda x: into(torch.empty(300, 36), torch.mm, x, WEIGHT.T),
        lambda x: into(torch.empty(300, 48), torch.sigmoid, x),
        lambda x: into(torch.empty(300), torch.mean, x, -1),
        lambda x: torch.addmm(BIAS, x, WEIGHT.T, beta=0.5),
        lambda x: x.sum(0),
        lambda x: x.mean(),
        lambda x: x.long() @ WEIGHT.T.long(),
        lambda x: F.linear(x[:, :0], WEIGHT[:, :0]),
        lambda x: F.linear(x[:0], WEIGHT),
        lambda x: x[:0].mean(-1),
        lambda x: x[0, 0].sum(-1),
        lambda x: x**2,
        lambda x: torch.mm(x, WEIGHT.T.to_sparse()),
        lambda x: F.linear(x, WEIGHT[0]),
        lambda x: torch.addmm(x[:, :36], x, WEIGHT.T),
    ],
)
def test_other_calls_are_torchs(call):
    expected = call(normal(300, 48))
    with batch_invariant():
        assert_same_bits(call(normal(300, 48)), expected)


def test_what_torch_refuses_stays_refused():
    with batch_invariant():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(normal(3, 47), WEIGHT)
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(normal(3, 48).double(), WEIGHT)
        for bias in (BIAS[:35], normal(49)):
            with pytest.raises(RuntimeError, match="must match the existing size"):
                F.linear(normal(3, 48), WEIGHT, bias)
        with pytest.raises(RuntimeError, match="must be a matrix"):
            torch.mm(normal(2, 3, 48), WEIGHT.T)
    assert F.linear(normal(3, 48).to("meta"), WEIGHT.to("meta")).shape == (3, 36)


def test_gradients_and_autocast_are_refused():
    layer = torch.nn.Linear(48, 36)
    with batch_invariant():
        with pytest.raises(RuntimeError, match="records no gradients"):
            layer(normal(3, 48))
        with torch.no_grad():
            assert layer(normal(3, 48)).shape == (3, 36)
            with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast"):
                layer(normal(3, 48))


def test_moe_inside_of_the_body():
    case = MoeCase(300, 48, 80, 3, 2)
    tensors = case.tensors()
    for inside, expected in ((False, False), (True, True)):
        with batch_invariant() if inside else contextlib.nullcontext():
            assert MoeRun(**tensors)._layer.inputs.batch_invariant == expected
            whole = moe(**tensors)
    assert_same_bits(whole, moe(**tensors, batch_invariant=True))


def test_the_body_is_of_one_thread_and_may_be_nested():
    seen = []
    mode = batch_invariant()
    with mode:
        with mode, contextlib.suppress(ZeroDivisionError), batch_invariant():
            assert is_batch_invariant()
            raise ZeroDivisionError
        assert is_batch_invariant()
        thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
        thread.start()
        thread.join()
        seen.append(asyncio.run(asyncio.to_thread(is_batch_invariant)))  # which takes context along
        for again in (copy.deepcopy(mode), pickle.loads(pickle.dumps(mode))):
            with again:
                assert is_batch_invariant()
    assert seen == [False, False]
    assert not is_batch_invariant()


def test_modes_of_others_see_the_calls_too():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func in (torch.mm, torch.addmm, F.linear)
            return func(*args, **(kwargs or {}))

    for modes in ((Counting(), batch_invariant()), (batch_invariant(), Counting())):
        with modes[0], modes[1]:
            assert_rows_alone(CALLS["linear"], normal(300, 48))
        assert sum(getattr(mode, "calls", 0) for mode in modes) > len(PARTS)


@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_compiled_inside_of_the_body(before):
    """Compiled loops are other loops, divided in other ways: the function runs as it is."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def block(x):
        return F.softmax(F.silu(F.linear(x, WEIGHT)), -1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend)
    if before:
        compiled(normal(300, 48))
    graphs = len(seen)
    with batch_invariant():
        assert_rows_alone(compiled, normal(300, 48))
    assert len(seen) == graphs
    torch.compiler.reset()
    compiled(normal(300, 48))
    assert len(seen) == graphs + 1
    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with batch_invariant(), pytest.raises(RuntimeError, match="batch_invariant, nothing is compiled"):
        compiled(normal(300, 48))

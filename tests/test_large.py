"""Layers with tensors of more than 2 ** 31 elements, under the interpreter: what is at their far end has the
bits that it has in a small layer. The memory in between is never touched, so there need not be any."""

import math
import mmap
import os
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from interpreted import layer

from qllm_ops import QuantizedWeight
from qllm_ops.inputs import check_inputs
from qllm_ops.kernels import tickets
from qllm_ops.plan import MOST_COUNTED, MOST_EXPERTS, Phase, Plan, signature_of
from qllm_ops.testing import MoeCase, assert_same_bits
from qllm_ops.tiles import TileConfig
from qllm_ops.triton_moe import TritonMoe

NORESERVE = 0x4000  # of Linux's mmap, which Python does not name


def sparse(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, of which the system gives us the pages that are written to."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def computed(given: dict, tiles: dict[str, TileConfig]) -> torch.Tensor:
    inputs = check_inputs(**given)
    run = TritonMoe(inputs, None, 0, plan=Plan(signature_of(inputs), tiles))
    run.launch_all()
    return run.output


# -- many experts ----------------------------------------------------------------------------------------


def with_experts_before(x: torch.Tensor, experts: int) -> torch.Tensor:
    """``experts`` of them, the last ones being those of ``x``; its strides."""
    whole = sparse(experts * x.stride(0), dtype=x.dtype).as_strided((experts, *x.shape[1:]), x.stride())
    whole[-len(x) :] = x
    return whole


def tiles_of(gate_up: tuple[int, int], down: tuple[int, int], parts: int = 1) -> dict[str, TileConfig]:
    """Blocks of (n, k), large ones: the interpreter takes milliseconds for each operation."""
    return {
        "gate_up": TileConfig(4, *gate_up, 1, 1),
        "down": TileConfig(4, *down, 1, 1, split_k=parts),
        "combine": TileConfig(4, down[0], 1, 1, 1),
    }


LAYERS = {
    "dense": (MoeCase(3, 176, 192, 2, 2, torch.float16), tiles_of((256, 128), (256, 128))),
    "transposed": (
        MoeCase(3, 176, 192, 2, 2, torch.float16, layout="transposed"), tiles_of((256, 128), (256, 128))
    ),
    "many rows": (
        MoeCase(3, 16, 2**14 + 10, 2, 2, torch.float16, biases=True), tiles_of((2**14, 16), (16, 2**14))
    ),
    "many columns": (
        MoeCase(3, 2**15 + 10, 2, 2, 2, torch.float16, biases=True), tiles_of((16, 2**14), (2**14, 16))
    ),
    "fp8": (
        MoeCase(3, 176, 192, 2, 2, torch.float16, quantized="fp8"), tiles_of((256, 128), (256, 128))
    ),
    # More than 2 ** 31 scales, and zero points, each of 16 numbers of a row.
    "int4": (
        MoeCase(2, 528, 512, 2, 1, torch.float16, quantized="int4_asymmetric"),
        tiles_of((512, 512), (512, 512)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_many_experts(name):
    case, tiles = LAYERS[name]
    given = case.tensors()
    expected = computed(given, tiles)
    experts, sizes = MOST_EXPERTS, {}

    def move(which: str, x: torch.Tensor) -> torch.Tensor:
        moved = with_experts_before(x, experts)
        sizes[which] = experts * x.stride(0)
        return moved

    moved = dict(given, top_k_index=given["top_k_index"].long() + experts - case.num_experts)
    for which in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        x = given.get(which)
        if isinstance(x, QuantizedWeight):
            values = move(which, x.values.view(torch.uint8)).view(x.values.dtype)
            scales = move(f"{which}'s scales", x.scales)
            zeros = None if x.zeros is None else move(f"{which}'s zero points", x.zeros)
            moved[which] = QuantizedWeight.checked(
                values, scales, x.format, x.block, x.columns, zeros, x.largest
            )
        elif x is not None:
            moved[which] = move(which, x)
    assert max(sizes.values()) > 2**31
    assert_same_bits(computed(moved, tiles), expected)


# -- one large expert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 2**15])
def test_the_last_rows_of_a_large_expert(width):
    """Only the last tile of both products is computed. ``width``: columns of the output at once."""
    hidden, intermediate, last = 2**16 + 10, 2**15 + 8, 8
    tiles = tiles_of((16, 2**14), (16, 2**14))
    layers = [
        MoeCase(3, *sizes, 1, 1, torch.float16, layout="ungated", routing="distinct").tensors()
        for sizes in ((hidden, last), (last, intermediate))
    ]
    large = dict(layers[0])
    for which, shape, given in zip(
        ("gate_up_proj", "down_proj"),
        ((1, intermediate, hidden), (1, hidden, intermediate)),
        layers,
        strict=True,
    ):
        large[which] = sparse(*shape, dtype=torch.float16)
        large[which][:, -last:] = given[which]
        assert large[which].numel() > 2**31
    first, second, run = (
        TritonMoe(inputs, None, 0, plan=Plan(signature_of(inputs), tiles, width if given is large else None))
        for given in (*layers, large)
        for inputs in (check_inputs(**given),)
    )
    launch_last_tile(first, first.plan.phases[0])
    launch_last_tile(run, run.plan.phases[0])
    assert_same_bits(run._intermediate[:, -last:], first._intermediate)

    values = torch.randn(run._intermediate.shape, generator=torch.Generator().manual_seed(0))
    for each in (second, run):
        each._intermediate.copy_(values)
        launch_last_tile(each, each.plan.phases[-2])
    columns = run.plan.phases[-2].size
    assert_same_bits(run._partial[0, :, columns - last : columns], second._partial[0])


def launch_last_tile(run: TritonMoe, phase: Phase) -> None:
    """As if all before it were done."""
    state, done, total = run._state, tickets.DONE.value, tickets.TOTAL.value
    state[done : done + phase.number] = state[total : total + phase.number]
    state[tickets.TICKETS.value + phase.number] = state[total + phase.number] - 1
    run._launch(phase)


# -- many tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_on_input", [False, True])
def test_many_tokens(weights_on_input):
    """Only the last ones have experts, and of the output only the last tile is computed."""
    case = MoeCase(5, 256, 256, 2, 1, torch.float16, routing="distinct", weights_on_input=weights_on_input)
    tiles = tiles_of((256, 256), (256, 64), parts=2)
    few = case.tensors()
    expected = computed(few, tiles)

    tokens = 2**23 + 5
    many = dict(few)
    for name in ("hidden_states", "top_k_weights"):
        many[name] = sparse(tokens, few[name].shape[1], dtype=few[name].dtype)
        many[name][-5:] = few[name]
    many["top_k_index"] = torch.full((tokens, 1), -1, dtype=torch.int8)
    many["top_k_index"][-5:] = few["top_k_index"]
    inputs = check_inputs(**many)
    with (
        mock.patch.object(torch, "empty", lambda *shape, dtype, device: sparse(*shape, dtype=dtype)),
        mock.patch.object(torch, "empty_like", lambda x: sparse(*x.shape, dtype=x.dtype)),
    ):
        run = TritonMoe(inputs, None, 0, plan=Plan(signature_of(inputs), tiles, width=256))
    assert min(map(torch.numel, (run._intermediate, run._partial[0], run._output))) > 2**31
    gate_up, down, combine = run.plan.phases
    run._launch(gate_up)
    run._launch(down)
    launch_last_tile(run, combine)
    assert_same_bits(run.output[-1:], expected[-1:])  # the last of tiles of 4


def test_the_first_rows_of_experts_among_many_pairs():
    """Found by halving, with sums of two rows."""
    pairs = 2**30 + 2**29
    experts = sparse(pairs, dtype=torch.uint8)
    experts[-7:] = torch.tensor([1, 1, 1, 2, 2, 4, 9])
    inputs = layer(1, 16, 16, experts=5, top_k=1)
    plan = Plan(signature_of(inputs)._replace(num_tokens=pairs, top_k=1))
    state = torch.empty(plan.state_words, dtype=torch.int32)
    plan.route((torch.empty(1, dtype=torch.int64), state), (experts,))
    offsets = state[tickets.OFFSETS.value :][:6]
    assert (offsets - pairs).tolist() == [-pairs, -7, -4, -2, -2, -1]


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 2**29, "top_k": 4}, r"top_k_index must have at most \d+ pairs .*\(T \* K\)"),
        ({"hidden_size": 2**31}, r"hidden_states must have at most \d+ columns \(H\)"),
        ({"gate_up_size": 2**31, "intermediate_size": 2**30}, r"gate_up_proj must have at most \d+ rows"),
        (
            {"gate_up_size": 2**16, "intermediate_size": 2**15, "hidden_size": 2**15, "transposed": True},
            r"gate_up_proj must have at most \d+ numbers of an expert",
        ),
        ({"num_experts": 2**16}, "down_proj must have at most 65535 experts"),
        (
            {
                "num_experts": 2**16 - 1,
                "num_tokens": 2**16,
                "gate_up_size": 2**21,
                "intermediate_size": 2**20,
            },
            r"hidden_states must have at most \d+ tiles of a phase",
        ),
    ],
)
def test_what_kernels_cannot_count_is_refused(changes, words):
    signature = signature_of(layer())
    with pytest.raises(ValueError, match=words + '.* for backend="triton", got [0-9]+'):
        Plan(signature._replace(**changes))


def test_the_most_that_is_counted_is_counted():
    signature = signature_of(layer())
    for changes in (
        {"num_tokens": MOST_COUNTED, "top_k": 1},
        {"gate_up_size": 2**16, "intermediate_size": 2**15, "hidden_size": 2**15},
        {"num_experts": MOST_EXPERTS},
    ):
        assert Plan(signature._replace(**changes)).phases

"""Layers, runs and places in launches, for tests of the Triton kernels under the interpreter.

The interpreter runs the programs of a launch one after the other, so a flag that is flipped at the n-th
atomic operation is flipped at a known place inside a launch: every such place can be tried.
"""

import contextlib

import pytest
import torch
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from qllm_ops import PriorityFlag, moe_reference
from qllm_ops.activation import ACTIVATIONS
from qllm_ops.inputs import MoeInputs, check_inputs
from qllm_ops.plan import plan_of
from qllm_ops.testing import CLAMPED, LAYOUTS, QUANTIZED, MoeCase, in_float32, own_gate, own_norm
from qllm_ops.tiles import INTERPRETER, TileConfig
from qllm_ops.triton_moe import TritonMoe

TILES = (
    None,
    {  # More row blocks and column blocks, and the sums in parts, the last of which may be empty.
        "gate_up": TileConfig(4, 8, 8, 1, 1, 3),
        "down": TileConfig(2, 16, 4, 1, 1, 2, split_k=3),
        "combine": TileConfig(2, 8, 1, 1, 1, 5),
    },
    {**INTERPRETER, "down": TileConfig(16, 8, 16, 1, 1, 1, split_k=2)},
    {  # Left inside of a tile, by more programs than there are tiles of one phase at times.
        "gate_up": TileConfig(4, 8, 2, 1, 1, 5, exit_k=4),
        "down": TileConfig(4, 8, 2, 1, 1, 3, split_k=2, exit_k=2),
        "combine": TileConfig(4, 8, 1, 1, 1, 2),
    },
)
SIZES = (1, 3, 8, 13, 21)


def layer(
    tokens=5, hidden=16, intermediate=13, experts=3, top_k=2, *, dtype=torch.float32, activation="silu",
    routing="any", index_dtype=torch.int64, seed=0, layout="concatenated", biases=False, expert_norm=None,
    weights_on_input=False, quantized=None,
) -> MoeInputs:  # fmt: skip
    """A layer of random numbers. ``routing`` is "any" (skipped pairs too), "one" expert, or "all" of them."""
    case = MoeCase(
        tokens, hidden, intermediate, experts, top_k, dtype=dtype, layout=layout, biases=biases, seed=seed,
        quantized=quantized, routing="any",
    )  # fmt: skip
    weights = {
        name: value for name, value in case.tensors().items() if "proj" in name or name.endswith("bias")
    }
    g = torch.Generator().manual_seed(seed)
    low = 0 if index_dtype == torch.uint8 else -2
    index = torch.randint(low, experts + 1, (tokens, top_k), generator=g)
    if routing == "one":
        index.fill_(seed % experts)
    elif routing == "all":
        index = torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :top_k]
    return check_inputs(
        hidden_states=torch.randn(tokens, hidden, generator=g).to(dtype),
        top_k_index=index.to(index_dtype),
        top_k_weights=torch.rand(tokens, top_k, generator=g),
        activation=activation,
        expert_norm=expert_norm,
        weights_on_input=weights_on_input,
        **weights,
        **LAYOUTS[layout],
    )


@st.composite
def layers(draw, fused: bool = False) -> MoeInputs:
    """``fused``: nothing that torch computes between the kernels."""
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(experts, 3)) | st.just(experts))
    layout = draw(st.sampled_from(("concatenated", *LAYOUTS)))
    own = () if fused else (torch.tanh if "ungated" in layout else own_gate,)
    formats = (None,) if "transposed" in layout else (None, None, *QUANTIZED)
    return layer(
        draw(st.integers(0, 6)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)), experts, top_k,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        activation=draw(st.sampled_from((*ACTIVATIONS, *CLAMPED, *own))),
        layout=layout, biases=draw(st.booleans()),
        expert_norm=None if fused else draw(st.sampled_from((None, None, own_norm))),
        routing=draw(st.sampled_from(("any", "any", "one", "all"))),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32, torch.uint8))),
        quantized=draw(st.sampled_from(formats)),
        seed=draw(st.integers(0, 2**16)),
        weights_on_input=draw(st.booleans()),
    )  # fmt: skip


def width(inputs: MoeInputs, tiles) -> int | None:
    """One column block of the output after the other, where memory would not ask for it."""
    return None if inputs.expert_norm else min(inputs.hidden_size, (tiles or INTERPRETER)["down"].block_n)


def uninterrupted(inputs: MoeInputs, tiles=None) -> torch.Tensor:
    run = TritonMoe(inputs, None, 0, plan=plan_of(inputs, tiles))
    run.launch_all()
    return run.output


def assert_close(inputs: MoeInputs, output: torch.Tensor) -> None:
    """Design tolerances, against the reference in float32."""
    assert output.dtype == inputs.hidden_states.dtype
    reference = moe_reference(**in_float32(vars(inputs)))
    if not reference.any():
        assert not output.any()
        return
    error = output.float() - reference
    rms = error.square().mean().sqrt() / reference.square().mean().sqrt()
    if inputs.hidden_states.dtype == torch.float32:
        assert rms <= 1e-5
        return
    assert error.abs().max() / reference.abs().max() <= 2e-2
    if reference.numel() >= 64:  # of fewer, one unlucky rounding decides
        assert rms <= 4e-3


def finish(run: TritonMoe, flag: PriorityFlag | None = None, quanta=(None,)):
    """Step until the run is done, resuming the class after each step that left; yields after every step."""
    may_give_back = sum(
        run.plan.programs(phase) for phase in run.plan.phases if run.plan.tiles[phase.kernel].exit_k
    )
    thrown_away = 0
    for i in range(1000):
        finished = run.step(quanta[i % len(quanta)])
        thrown_away, before = run.tiles_taken - run.tiles_done, thrown_away
        assert 0 <= thrown_away - before <= may_give_back  # a tile for each program that leaves
        assert finished == (run.tiles_done == run.tiles_total)
        yield quanta[i % len(quanta)]
        if finished:
            return
        if flag is not None:
            flag.resume(0, "test")
    pytest.fail(f"a run makes no progress: {run.tiles_done} of {run.tiles_total} tiles")


@contextlib.contextmanager
def hooked(name: str, before):
    """Call ``before(*args)`` ahead of every operation ``name`` of the interpreter."""
    original = getattr(interpreter_builder, name)

    def hook(*args, **kwargs):
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(interpreter_builder, name, hook)
    try:
        yield
    finally:
        delattr(interpreter_builder, name)


@contextlib.contextmanager
def at_shared_words(before):
    """Call ``before()`` ahead of every poll of the flag and of every atomic operation."""

    def poll(ptrs, mask, other, policy, is_volatile):
        if is_volatile:
            before()

    with hooked("create_atomic_rmw", lambda *_: before()), hooked("create_masked_load", poll):
        yield


def flipping(flag: PriorityFlag, gaps):
    """Pause the class if it runs, else resume it, after each of these numbers of polls and atomics."""
    gaps = iter(gaps)
    left = next(gaps, None)

    def before():
        nonlocal left
        if left is None:
            return
        if left == 0:
            flag.resume(0, "test") if flag.paused(0) else flag.pause(0, "test")
            left = next(gaps, None)
        else:
            left -= 1

    return at_shared_words(before)

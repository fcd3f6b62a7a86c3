"""Property tests for an MoE kernel: cases and schedules for Hypothesis, and what must hold under them.

Needs Hypothesis. Everything works without a GPU, and for any kernel that has the small surface of
`qllm_ops.MoeRun` (step, tiles_done, tiles_taken, tiles_total, done, output)::

    @testing.telling()
    @given(case=testing.moe_cases(), schedule=testing.schedules())
    def test_my_kernel(case, schedule):
        flag = qllm_ops.PriorityFlag()
        with testing.poisoned_empty():
            alone = MyRun(**case.tensors())
            alone.step()
            testing.assert_close(alone.output, case)
            make_run = lambda: MyRun(**case.tensors(), flag=flag)
            testing.assert_preemptible(make_run, alone.output, schedule, flag)
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor

from qllm_ops.activation import ACTIVATIONS, Activation
from qllm_ops.flag import FULL, PriorityFlag
from qllm_ops.moe import moe_reference
from qllm_ops.quantized import FORMATS, QuantizedWeight, quantize_fp8, quantize_int4, quantize_mxfp4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROUTINGS = ("distinct", "any", "one_expert", "empty_expert", "out_of_range")
"""How `MoeCase` fills top_k_index: K different experts per token (what routers do); any K experts, repeats
included; all tokens on one expert; all but one expert; and some indices below 0 or from E on."""


LAYOUTS = {
    # what `moe` is told of gate_up_proj and down_proj
    "concatenated": {},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "transposed_interleaved": {"transposed": True, "interleaved": True},
    "ungated": {"gated": False},
    "ungated_transposed": {"gated": False, "transposed": True},
}

CLAMPED = (
    # gpt-oss, DeepSeek-V4; the limits bite on numbers of the size that `MoeCase` makes.
    Activation("silu", alpha=1.702, limit=0.7, up_offset=1.0),
    Activation("silu", limit=0.5),
)


def own_gate(gate_up: Tensor) -> Tensor:
    """An activation that no kernel fuses, (rows, 2I) to (rows, I)."""
    return torch.tanh(gate_up[:, ::2]) * gate_up[:, 1::2]


def own_norm(rows: Tensor) -> Tensor:
    """A norm of each expert's output, (rows, H)."""
    wide = rows.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 0.1)).to(rows.dtype)


QUANTIZED = (*FORMATS, "int4_asymmetric")
"""How `MoeCase` quantises weights: the formats, and int4 once more with zero points."""


def quantize(weight: Tensor, format: str, fp8_activations: bool = False) -> QuantizedWeight:
    """With blocks as small as they come: small layers then have several, and parts of one at their edges."""
    if format == "fp8":
        return quantize_fp8(weight, block=(12, 128 if fp8_activations else 16))
    if format == "mxfp4":
        return quantize_mxfp4(weight)
    return quantize_int4(weight, 16, symmetric=format != "int4_asymmetric")


def in_float32(tensors: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `moe`, with hidden states and weights as the reference has them before any rounding.

    As they are with fp8_activations, where rounding is a part of what is asked for.
    """
    if tensors.get("fp8_activations"):
        return tensors
    wide = {"hidden_states": tensors["hidden_states"].float()}
    for name in ("gate_up_proj", "down_proj"):
        weight = tensors[name]
        wide[name] = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
    return {**tensors, **wide}


class Run(Protocol):
    """What is asked of a run."""

    tiles_done: int
    tiles_taken: int
    tiles_total: int
    done: bool
    output: Tensor

    def step(self, max_tiles: int | None = None) -> bool: ...


# -- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeCase:
    """One MoE layer by its shape and seed; :meth:`tensors` makes it."""

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.float32
    activation: str | Activation | Callable[[Tensor], Tensor] = "silu"
    layout: str = "concatenated"
    biases: bool = False
    expert_norm: Callable[[Tensor], Tensor] | None = None
    weights_on_input: bool = False
    routing: str = "distinct"
    index_dtype: torch.dtype = torch.int64
    weights_dtype: torch.dtype = torch.float32
    quantized: str | None = None
    fp8_activations: bool = False
    batch_invariant: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("routing", self.routing, ROUTINGS),
            ("quantized", self.quantized, (None, *QUANTIZED)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        if self.routing == "distinct" and self.top_k > self.num_experts:
            most = f"num_experts = {self.num_experts}"
            raise ValueError(f"top_k must be at most {most} in {self.routing!r}, got {self.top_k}")

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The arguments of `qllm_ops.moe`, other than defaults. The same at every call."""
        draw = torch.Generator().manual_seed(self.seed)
        t, h, i, e, k = (
            self.num_tokens, self.hidden_size, self.intermediate_size, self.num_experts, self.top_k,
        )  # fmt: skip

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw) * scale).to(device, self.dtype)

        layout = LAYOUTS[self.layout]
        columns = 2 * i if layout.get("gated", True) else i
        turned = layout.get("transposed", False)
        tensors = {
            "hidden_states": normal(t, h),
            "gate_up_proj": normal(e, *((h, columns) if turned else (columns, h)), scale=h**-0.5),
            "down_proj": normal(e, *((i, h) if turned else (h, i)), scale=i**-0.5),
            "top_k_index": self._index(draw).to(device, self.index_dtype),
            # Some models have negative weights, and they need not sum to 1.
            "top_k_weights": (torch.rand(t, k, generator=draw) - 0.25).to(device, self.weights_dtype),
            "activation": self.activation,
            **layout,
        }
        if self.biases:
            tensors |= {"gate_up_bias": normal(e, columns), "down_bias": normal(e, h)}
        if self.expert_norm is not None:
            tensors["expert_norm"] = self.expert_norm
        if self.weights_on_input:
            tensors["weights_on_input"] = True
        if self.quantized is not None:
            for name in ("gate_up_proj", "down_proj"):
                tensors[name] = quantize(tensors[name], self.quantized, self.fp8_activations)
        for switch in ("fp8_activations", "batch_invariant"):
            if getattr(self, switch):
                tensors[switch] = True
        return tensors

    def _index(self, draw: torch.Generator) -> Tensor:
        shape, e = (self.num_tokens, self.top_k), self.num_experts
        if self.routing == "distinct":
            return torch.rand(shape[0], e, generator=draw).argsort(1)[:, : shape[1]]
        chosen = int(torch.randint(e, (), generator=draw))
        if self.routing == "one_expert":
            return torch.full(shape, chosen)
        if self.routing == "out_of_range":
            return torch.randint(-2, e + 3, shape, generator=draw)
        index = torch.randint(e, shape, generator=draw)
        if self.routing == "empty_expert" and e > 1:
            index = torch.where(index == chosen, (index + 1) % e, index)
        return index


@st.composite
def moe_cases(
    draw: st.DrawFn,
    *,
    max_tokens: int = 48,
    max_size: int = 48,
    max_experts: int = 9,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    formats: tuple[str | None, ...] = (None,),
) -> MoeCase:
    """Layers of every kind and size, T = 0, one expert and K = E included; see ROUTINGS for the rest.

    ``formats`` of QUANTIZED make the weights quantised ones, None leaves them dense.
    """
    num_experts = draw(st.integers(1, max_experts))
    routing = draw(st.sampled_from(ROUTINGS))
    most = num_experts if routing == "distinct" else num_experts + 2
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    if "transposed" in layout:  # which no quantised weights are
        formats = (None,)
    activations = (*ACTIVATIONS, *CLAMPED, torch.tanh if "ungated" in layout else own_gate)
    return MoeCase(
        num_tokens=draw(st.integers(0, max_tokens)),
        hidden_size=draw(st.integers(1, max_size)),
        intermediate_size=draw(st.integers(1, max_size)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, most)),
        dtype=draw(st.sampled_from(dtypes)),
        activation=draw(st.sampled_from(activations)),
        layout=layout,
        biases=draw(st.booleans()),
        expert_norm=draw(st.sampled_from((None, None, own_norm))),
        weights_on_input=draw(st.booleans()),
        routing=routing,
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        weights_dtype=draw(st.sampled_from(DTYPES)),
        quantized=draw(st.sampled_from(formats)),
        batch_invariant=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


TOLERANCES = {  # relative RMS error, largest error relative to the output's peak
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (4e-3, 2e-2),
    torch.float16: (4e-3, 2e-2),
}


def assert_close(output: Tensor, case: MoeCase) -> None:
    """The output is the reference's, computed in float32, within the operator's tolerances."""
    expected = moe_reference(**in_float32(case.tensors())).float()
    assert isinstance(output, Tensor), f"the output is a {type(output).__name__}"
    output = output.detach()
    assert output.shape == expected.shape, (output.shape, expected.shape)
    assert output.dtype == case.dtype, (output.dtype, case.dtype)
    assert output.isfinite().all(), "an element is not finite, or was never written"
    if expected.numel() == 0:
        return
    error = output.cpu().float() - expected
    most_rms, most_peak = TOLERANCES[case.dtype]
    # A few elements may happen to cancel to almost nothing; the typical output of a case is 0.1 to 1.
    peak = float(error.abs().max() / expected.abs().max().clamp(min=0.1))
    assert peak <= most_peak, f"largest error {peak:.2e} of the peak"
    if expected.numel() >= 64 and expected.any():
        rms = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
        assert rms <= most_rms, f"relative RMS error {rms:.2e}"


def assert_same_bits(output: Tensor, expected: Tensor) -> None:
    """Equal in every bit, the sign of zero and the payload of NaN included."""
    assert output.shape == expected.shape, (output.shape, expected.shape)
    assert output.dtype == expected.dtype, (output.dtype, expected.dtype)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[output.element_size()]
    differing = int((output.view(bits) != expected.view(bits)).sum())
    assert differing == 0, f"{differing} of {output.numel()} elements differ"


# -- schedules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Step the run by at most ``max_tiles``; None for no limit."""

    max_tiles: int | None


@dataclass(frozen=True)
class Pause:
    owner: str


@dataclass(frozen=True)
class Resume:
    owner: str


@dataclass(frozen=True)
class Share:
    programs: int


Action = Step | Pause | Resume | Share


def schedules(max_size: int = 12) -> st.SearchStrategy[list[Action]]:
    """What happens to a run: steps, and pauses, resumptions and shares of its class by two owners."""
    owners = st.sampled_from(("a", "b"))
    steps = st.builds(Step, st.none() | st.integers(1, 9))
    flips = st.builds(Pause, owners) | st.builds(Resume, owners)
    shares = st.builds(Share, st.integers(1, 3) | st.just(FULL))
    return st.lists(steps | flips | shares, max_size=max_size)


def assert_preemptible(
    make_run: Callable[[], Run],
    expected: Tensor,
    schedule: list[Action],
    flag: PriorityFlag,
    priority: int = 0,
) -> None:
    """Drive a run through the schedule: the bits are those of ``expected`` and no tile is lost.

    Args:
        make_run: makes the run; it polls ``flag`` for class ``priority``.
        expected: the output of an uninterrupted run of the same inputs.
        flag: nobody else may write it meanwhile. Its class is left running, with its share FULL.
    """
    run = make_run()
    paused: set[str] = set()
    try:
        for action in schedule:
            if isinstance(action, Step):
                _checked_step(run, action.max_tiles, paused=bool(paused))
            elif isinstance(action, Pause):
                flag.pause(priority, action.owner)
                paused.add(action.owner)
            elif isinstance(action, Resume):
                flag.resume(priority, action.owner)
                paused.discard(action.owner)
            else:
                flag.share(priority, action.programs)
    finally:
        for owner in ("a", "b"):
            flag.resume(priority, owner)
        flag.share(priority, FULL)
    _checked_step(run, None, paused=False)
    assert run.done
    assert_same_bits(run.output, expected)
    assert run.step(), "a step of a run that is done says so"
    assert run.tiles_done == run.tiles_total


# -- what every run tries ------------------------------------------------------------------------


LEFT_AT_EVERY_TILE: tuple[Action, ...] = (
    Step(1), Pause("a"), Step(None), Resume("a"), Step(1), Pause("a"), Pause("b"), Resume("a"), Step(2),
    Resume("b"), Share(1), Step(1), Resume("a"), Step(2), Share(FULL), Step(1),
)  # fmt: skip
"""A schedule that meets a run early: one tile, a pause, another tile, two owners, a share."""

_small = functools.partial(MoeCase, 6, 9, 7, num_experts=5, top_k=4)

TELLING = (
    MoeCase(37, 41, 35, 5, 4, routing="out_of_range", biases=True),
    _small(routing="any", activation="gelu", layout="interleaved", expert_norm=own_norm),
    _small(activation="gelu_tanh", layout="ungated", top_k=5),
    _small(activation=CLAMPED[0], layout="transposed_interleaved", biases=True, index_dtype=torch.int32),
    _small(activation=CLAMPED[1], routing="empty_expert", weights_on_input=True, biases=True),
    _small(activation="relu", layout="transposed", dtype=torch.float16, weights_dtype=torch.float16),
    _small(activation="relu2", layout="ungated_transposed", routing="out_of_range"),
    _small(activation=own_gate, routing="one_expert", dtype=torch.bfloat16, batch_invariant=True),
    _small(num_experts=1, top_k=1),
    MoeCase(0, 9, 7, 5, 4),
)
"""Layers that tell a broken kernel from a whole one: together they have every layout, activation, option and
routing, and sums of four numbers, whose bits depend on their order."""


def telling(only: Callable[[MoeCase], bool] = lambda case: True) -> Callable[[Callable], Callable]:
    """A decorator: a test of ``case`` and ``schedule`` first tries TELLING, in every run.

    What Hypothesis draws is another one each time: a fault that few layers show is found in some runs only.

    Args:
        only: whether a case is one that the kernel computes.
    """

    def with_examples(test: Callable) -> Callable:
        for case in TELLING:
            if only(case):
                test = example(case=case, schedule=list(LEFT_AT_EVERY_TILE))(test)
        return test

    return with_examples


def _checked_step(run: Run, max_tiles: int | None, paused: bool) -> None:
    before, total = run.tiles_done, run.tiles_total
    finished = run.step(max_tiles)
    taken = run.tiles_done - before
    assert run.tiles_total == total, f"the number of tiles changed from {total} to {run.tiles_total}"
    assert 0 <= taken <= (total if max_tiles is None else max_tiles), f"a step of {max_tiles} took {taken}"
    assert run.tiles_taken == run.tiles_done, f"{run.tiles_taken - run.tiles_done} tiles were thrown away"
    assert finished == run.done == (run.tiles_done == total), (finished, run.done, run.tiles_done, total)
    if paused:
        assert taken == 0, f"a paused class computed {taken} tiles"
    elif max_tiles is None:
        assert finished, f"nothing stopped the step, but it left after {run.tiles_done} of {total}"
    else:
        assert taken == min(max_tiles, total - before), f"a step of {max_tiles} took {taken} for no reason"


# -- disturbances --------------------------------------------------------------------------------


@contextlib.contextmanager
def flipping(flag: PriorityFlag, priority: int = 0, seed: int = 0, pause_s: float = 3e-4) -> Iterator[None]:
    """A second thread pauses and resumes the class at random for the body, and leaves it running."""
    flag.resume(
        priority, "flipping"
    )  # a class that the flag does not have is refused here, not in the thread
    stop = threading.Event()
    rng = random.Random(seed)

    def flip() -> None:
        while not stop.is_set():
            flag.pause(priority, "flipping")
            time.sleep(rng.uniform(0, pause_s))
            flag.resume(priority, "flipping")
            time.sleep(rng.uniform(0, pause_s))

    thread = threading.Thread(target=flip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """What torch allocates without filling it is full of NaN (integers: of their lowest value).

    So an element that nobody wrote, or a scratch value that nobody should have read, cannot hide behind
    a lucky zero. Covers torch.empty, empty_like and empty_strided and Tensor.new_empty.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.iinfo(tensor.dtype).min)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield

"""The layers that are measured on a GPU: shapes, random inputs, the right answer and floors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import checkout  # noqa: F401  (makes qllm_ops importable)
import torch
import torch.nn.functional as F
from timing import Mark, spread, synchronize
from torch import Tensor

from qllm_ops import PriorityFlag
from qllm_ops.inputs import Weight, check_inputs
from qllm_ops.quantized import QUANTIZERS, QuantizedWeight
from qllm_ops.torch_moe import widened

RMS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""Largest relative RMS error against a reference in float32."""

MAX_RELATIVE = 2e-2
"""Largest error of one element, relative to the largest one of the reference."""

Pair = tuple[Weight, Weight]
"""gate_up_proj and down_proj of a layer, dense or quantised."""

Tensors = tuple[Tensor, Weight, Weight, Tensor, Tensor]

DENSE = "bf16"
"""The name of layers that are not quantised, whatever their dtype."""

FORMATS = (DENSE, *QUANTIZERS)


@dataclass(frozen=True)
class Shape:
    """The experts of one layer of a model."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights in 16 bits."""
        return 6 * self.hidden_size * self.intermediate_size

    @property
    def layer_bytes(self) -> int:
        return self.num_experts * self.expert_bytes

    def flops(self, pairs: int) -> int:
        return 6 * pairs * self.hidden_size * self.intermediate_size


QWEN3 = Shape("Qwen3-30B-A3B", 2048, 768, 128, 8)
MIXTRAL = Shape("Mixtral-8x7B", 4096, 14336, 8, 2)
OLMOE = Shape("OLMoE-1B-7B", 2048, 1024, 64, 8)
GPT_OSS = Shape("gpt-oss-20b sizes", 2880, 2880, 32, 4)  # plain SwiGLU, no biases
DEEPSEEK = Shape("DeepSeek-V3", 7168, 2048, 256, 8)
SHAPES = (QWEN3, MIXTRAL, OLMOE, GPT_OSS, DEEPSEEK)
TINY = Shape("tiny", 64, 96, 8, 2)


def layer_name(case: Sequence[Any]) -> str:
    """Of a case that begins with a shape and a number of tokens."""
    return f"{case[0].name} T={case[1]}"


def layer_bytes(case: Sequence[Any]) -> int:
    return case[0].layer_bytes


def weights(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Pair:
    """(E, 2I, H) and (E, H, I) of random numbers, of such a size that activations stay near 1."""
    draw = torch.Generator(device).manual_seed(seed)
    e, i, h = shape.num_experts, shape.intermediate_size, shape.hidden_size
    gate_up = torch.empty(e, 2 * i, h, dtype=dtype, device=device)
    down = torch.empty(e, h, i, dtype=dtype, device=device)
    for expert in range(e):  # one by one: together they may have more elements than 32 bits count
        gate_up[expert].normal_(0, h**-0.5, generator=draw)
        down[expert].normal_(0, i**-0.5, generator=draw)
    return gate_up, down


def quantized(pair: Pair, format: str) -> Pair:
    """A dense pair in a format, as `quantize_...` makes it by default; DENSE leaves it as it is."""
    return pair if format == DENSE else tuple(map(QUANTIZERS[format], pair))


def format_of(pair: Pair) -> str:
    return pair[1].format if isinstance(pair[1], QuantizedWeight) else DENSE


def tokens(
    shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H) hidden states, (T, K) different random experts of each token, and their weights."""
    draw = torch.Generator(device).manual_seed(seed)
    hidden_states = torch.empty(num_tokens, shape.hidden_size, dtype=dtype, device=device)
    hidden_states.normal_(generator=draw)
    logits = torch.empty(num_tokens, shape.num_experts, device=device).normal_(generator=draw)
    top_k_weights, top_k_index = torch.topk(torch.softmax(logits, -1), shape.top_k, dim=-1)
    return hidden_states, top_k_index, (top_k_weights / top_k_weights.sum(-1, keepdim=True)).to(dtype)


def layer_inputs(shape: Shape, num_tokens: int, pair: Pair, seed: int = 1) -> Tensors:
    """The arguments of `moe` for a pair of dense weights."""
    hidden_states, index, weight = tokens(shape, num_tokens, pair[0].dtype, pair[0].device, seed)
    return hidden_states, *pair, index, weight


def with_weights(tensors: Tensors, pair: Pair) -> Tensors:
    """The same tokens for other weights."""
    return tensors[0], *pair, *tensors[3:]


def reference(tensors: Tensors) -> Tensor:
    """The layer in float32, an expert at a time. Waits for the device."""
    hidden_states, gate_up_proj, down_proj, index, weight = tensors
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in index.unique().tolist():
        if 0 <= expert < gate_up_proj.shape[0]:
            rows, k = torch.where(index == expert)
            gate, up = F.linear(hidden_states[rows].float(), widened(gate_up_proj, expert)).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, widened(down_proj, expert))
            # Here every row occurs once, unless a token names an expert twice.
            out.index_add_(0, rows, y * weight[rows, k, None].float())
    return out


def errors(got: Tensor, want: Tensor) -> dict[str, float | bool]:
    """Relative RMS and largest relative error, and whether both are within the contract.

    NaN anywhere (an element that nobody wrote) fails.
    """
    difference = got.float() - want.float()
    peak = want.abs().max().item() if want.numel() else 0.0
    if peak == 0.0:
        good = not bool(difference.count_nonzero())
        return {"rms": 0.0, "max_relative": 0.0, "nan": 0, "passed": good}
    nan = int(got.isnan().sum())
    rms = (difference.double().square().mean() / want.double().square().mean()).sqrt().item()
    largest = difference.abs().max().item() / peak
    good = nan == 0 and rms <= RMS[got.dtype] and largest <= MAX_RELATIVE
    # JSON has no NaN.
    rms, largest = (None if value != value else value for value in (rms, largest))
    return {"rms": rms, "max_relative": largest, "nan": nan, "passed": good}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every torch.empty of the body with NaN, so that an element that no tile writes cannot hide."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills memory; torch.utils.deterministic says so
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def bytes_to_move(shape: Shape, index: Tensor, itemsize: int = 2, expert_bytes: float | None = None) -> float:
    """Bytes that must move: weights of every expert that has a token, hidden states in and out, once each.

    Intermediate activations are not among them: a kernel may keep them.

    Args:
        itemsize: of the hidden states.
        expert_bytes: of one expert's weights, scales included; None for dense ones of the same itemsize.
    """
    if expert_bytes is None:
        expert_bytes = 3 * shape.intermediate_size * shape.hidden_size * itemsize
    hit = index.unique()
    hit = int(((hit >= 0) & (hit < shape.num_experts)).sum())
    return hit * expert_bytes + 2 * index.shape[0] * shape.hidden_size * itemsize


def stored_bytes(pair: Pair) -> int:
    """Bytes of one expert of the pair: of quantised ones the values and their scales."""
    return sum(weight.nbytes for weight in pair) // pair[1].shape[0]


def floor_seconds(
    shape: Shape, index: Tensor, bandwidth: float, flops_per_s: float, itemsize: int = 2,
    expert_bytes: float | None = None,
) -> tuple[float, str]:  # fmt: skip
    """The least time that the layer can take, and what bounds it: "memory" or "arithmetic".

    Quantised weights are widened before they are multiplied, so arithmetic is that of dense ones.
    """
    memory = bytes_to_move(shape, index, itemsize, expert_bytes) / bandwidth
    arithmetic = shape.flops(index.numel()) / flops_per_s
    return max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


# -- the flag and launches, from close by ----------------------------------------------------------------


def settle(flag: PriorityFlag) -> None:
    """Wait until the device has what was last written. (A launch does not wait for it.)"""
    stream = getattr(flag._write_word, "stream", None)
    if stream is not None:
        stream.synchronize()


class Launches:
    """A run whose launches can be enqueued with the poll and not waited for: for timing the kernels alone.

    `MoeRun.step` waits for its launches and looks at the result, so this reaches into the Triton backend
    (`tests/test_gpu_check.py` notices when that changes). Not for the torch backend.
    """

    def __init__(self, tensors: Tensors, flag: PriorityFlag | None, priority: int = 0):
        from qllm_ops.triton_moe import TritonMoe

        self._layer = TritonMoe(check_inputs(*tensors), flag, priority)

    def enqueue(self, poll: bool) -> None:
        """All phases on the current stream; ``poll`` or no poll: two different compilations."""
        for phase in self._layer.plan.phases:
            self._layer._launch(phase, poll=poll)

    def rewind(self) -> None:
        """Back to no tiles done, in stream order."""
        self._layer._rewind()

    @property
    def tiles(self) -> dict[str, dict[str, int]]:
        """What each phase is compiled with."""
        return {phase: asdict(config) for phase, config in self._layer.plan.tiles.items()}

    def compiled(self) -> dict[str, dict[str, Any]]:
        """Launch every phase, and tell of each what the compiler made of it and how many programs it has."""
        found = {}
        for phase in self._layer.plan.phases:
            kernel = self._layer._launch(phase, poll=False)
            row = found[phase.kernel] = {"programs": self._layer.plan.programs(phase)}
            if kernel is not None:  # in the interpreter it is
                row |= {"registers": kernel.n_regs, "spills": kernel.n_spills}
                row["shared_bytes"] = kernel.metadata.shared
        return found

    @property
    def programs(self) -> int:
        """Programs of the largest launch."""
        return max(self._layer.plan.programs(phase) for phase in self._layer.plan.phases)

    def progress(self) -> dict[str, Any]:
        """Tiles done and in all, of each phase, and how often one was given back. Waits for the stream."""
        layer = self._layer
        layer._read()
        return {"done": layer._done, "total": layer._totals, "given_back": layer._given_back}

    @property
    def output(self) -> Tensor:
        return self._layer.output


PHASES = ("route", "gate_up", "down", "combine")

HEAD_START_CYCLES = 10_000_000
"""So many cycles of the device, some 6 ms, the host may enqueue launches before the first one runs: else the
gaps between them would be in the times."""


def phase_times(inputs: Sequence[Tensors], device: torch.device, rounds: int = 10) -> dict[str, Any]:
    """Microseconds of each phase of a layer, all its launches together; the sort is part of "route".

    Each launch is between two events, which take about a microsecond themselves.
    """
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    for number in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)
        layers = [list(_marked(tensors, device)) for tensors in inputs]
        for marks in layers if number else ():  # the first round is a warm-up
            took = dict.fromkeys(PHASES, 0.0)
            for (_, begin), (name, end) in itertools.pairwise(marks):
                took[name] += end.seconds_after(begin) * 1e6
            for name, us in took.items():
                times[name].append(us)
    synchronize(device)
    return {name: spread(us) for name, us in times.items()}


def _marked(tensors: Tensors, device: torch.device) -> Iterator[tuple[str, Mark]]:
    """The name of every launch and a mark behind it; the first mark is where the layer begins."""
    yield "", Mark(device)
    layer = Launches(tensors, None)._layer
    yield "route", Mark(device)
    for phase in layer.plan.phases:
        layer._launch(phase, poll=False)
        yield phase.kernel, Mark(device)


def phase_floors(
    shape: Shape, tensors: Tensors, split_k: int, bandwidth: float, flops_per_s: float
) -> dict[str, dict[str, Any]]:
    """Bytes, operations and the least microseconds of each phase, and what bounds it.

    Other than in `floor_seconds`, what one phase leaves for the next is counted. The parts that down leaves
    are float32 where weights are quantised and activations bfloat16.
    """
    hidden_states, gate_up_proj, down_proj, index, _ = tensors
    itemsize, experts, pairs = hidden_states.element_size(), shape.num_experts, index.numel()
    hit = int(index[(index >= 0) & (index < experts)].unique().numel())
    tokens = index.shape[0] * shape.hidden_size * itemsize
    between = pairs * shape.intermediate_size * itemsize
    wide = format_of((gate_up_proj, down_proj)) != DENSE and hidden_states.dtype == torch.bfloat16
    parts = split_k * pairs * shape.hidden_size * (4 if wide else itemsize)
    gate_up, down = (hit * weight.nbytes // experts for weight in (gate_up_proj, down_proj))
    work = {
        "gate_up": (gate_up + tokens + between, shape.flops(pairs) * 2 // 3),
        "down": (down + between + parts, shape.flops(pairs) // 3),
        "combine": (parts + tokens, 0),
    }
    found = {}
    for name, (nbytes, flops) in work.items():
        memory, arithmetic = nbytes / bandwidth * 1e6, flops / flops_per_s * 1e6
        found[name] = {"bytes": nbytes, "flops": flops, "floor_us": max(memory, arithmetic)}
        found[name]["bound_by"] = "memory" if memory > arithmetic else "arithmetic"
    return found

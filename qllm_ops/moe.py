"""The MoE layer as an operator that can be left at the next tile and taken up again."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qllm_ops.activation import Activation, AnyActivation
from qllm_ops.arguments import is_integer
from qllm_ops.device import broken_interpreter, unsupported
from qllm_ops.flag import PriorityFlag
from qllm_ops.inputs import MoeInputs, Weight, check_inputs
from qllm_ops.library import kept, recorded, traced, uncompiled
from qllm_ops.modes import asked_for_gradients, plain, refusing_gradients
from qllm_ops.quantized import QuantizedWeight, rounded_rows
from qllm_ops.tiles import EXIT_US
from qllm_ops.torch_moe import TorchMoe, checked, widened

BACKENDS = ("auto", "torch", "triton")


def moe(
    hidden_states: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str | AnyActivation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    expert_norm: Callable[[Tensor], Tensor] | None = None,
    weights_on_input: bool = False,
    batch_invariant: bool = False,
    fp8_activations: bool = False,
    max_exit_us: float = EXIT_US,
    flag: PriorityFlag | None = None,
    priority: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Run the experts of one Mixture-of-Experts layer to completion, waiting while paused.

    For every token t, with ``gate, up = gate_up_proj[e] @ hidden_states[t]`` for e = top_k_index[t, k]::

        output[t] = sum over k of top_k_weights[t, k] * (down_proj[e] @ (activation(gate) * up))

    The sum over k is taken in increasing k, in float32, and rounded once. No argument is changed. Autocast
    changes nothing, for functions of yours neither. There is no backward pass: where an argument requires a
    gradient, the output does as well in grad mode, and asking for it raises NotImplementedError. So does an
    argument with a tangent (torch.autograd.forward_ad).

    Args:
        hidden_states: (T, H), float32, bfloat16 or float16. T may be 0.
        gate_up_proj: (E, 2I, H), contiguous, dtype of hidden_states. The first I rows are the gate's.
            Or a :class:`qllm_ops.QuantizedWeight` of that shape, which is widened to the dtype of
            hidden_states as it is multiplied; then down_proj is one of the same format.
        down_proj: (E, H, I), contiguous, dtype of hidden_states. Or quantised.
        top_k_index: (T, K), any integer dtype. A value outside [0, E) means "not here": skipped.
        top_k_weights: (T, K), any floating-point dtype of 16 bits or more.
        activation: "silu", "gelu" (error function), "gelu_tanh", "relu", "relu2", or an
            :class:`qllm_ops.Activation` with the clamps that some models add. Or a function from
            (rows, 2I), in the layout of gate_up_proj, to (rows, I), on float32: right, but not fused, and
            not left halfway; it must treat every row alike.
        gate_up_bias: (E, 2I), added to the first product; a dtype as top_k_weights may have.
        down_bias: (E, H), added to the second one before it is weighted.
        gated: False: gate_up_proj is (E, I, H) and its product is only activated (Nemotron-H).
        interleaved: gate_up_proj's rows alternate, gate 0, up 0, gate 1, up 1, ... (gpt-oss), and so does
            gate_up_bias.
        transposed: the weights are (E, H, 2I) and (E, I, H) (gpt-oss).
        expert_norm: a function from (rows, H) to (rows, H), on float32, applied to each expert's output
            before it is weighted. Not fused; it must treat every row alike.
        weights_on_input: True: top_k_weights multiply what goes into the first product, before its bias, and
            the sum over k has no weights (Llama 4).
        batch_invariant: True: a token's output bits depend on that token, its routing and the weights
            only, and on no other token of the batch. The tiles are then the same for every T, or, in the
            torch backend, rows are multiplied in blocks of a few sizes (`qllm_ops.invariant`), which
            costs speed where others would be better. Functions of yours must keep the promise, too.
            So is every call inside of :class:`qllm_ops.batch_invariant`, where most of torch does.
        fp8_activations: True: both products multiply float8 by float8. The weights have the format "fp8", in
            blocks of a multiple of 128 columns, and hidden_states 16 bits. The left factors (the hidden
            states; then what the activation gave, rounded to their dtype) are quantised on the fly, a scale
            for 128 columns of a row, as :func:`qllm_ops.quantized.quantize_rows` defines. The products of
            128 columns are summed in float32 (inside of a matrix unit of an H100: about 14 bits), times both
            scales, and added in float32 to those before them. So DeepSeek-V3 was trained (arXiv 2412.19437,
            section 3.3), and so transformers' finegrained_fp8 computes. The Triton backend needs compute
            capability 8.9 or newer; the torch backend multiplies the rounded numbers in float32.
        max_exit_us: how long a tile, and so leaving, may take at the device's peak rates, in
            microseconds; float("inf") for the fastest tiles. How sums are cut depends on it, and with
            that their last bits. Triton backend; a tile of the torch backend takes milliseconds.
        flag: whose word for ``priority`` pauses the layer between tiles; None for never. Under
            ``PriorityFlag(gate="stream")`` the call waits for nothing once it has begun (Triton backend).
        priority: class of this work, 0 to flag.classes - 1.
        backend: "torch" (any device), "triton" (CUDA; CPU only under TRITON_INTERPRET=1), or "auto":
            triton for CUDA tensors where it is installed and runs on the device, else torch.

    Returns:
        (T, H) in the dtype of hidden_states. Its bits do not depend on any pause. Of tensors on the meta
        device, or of fake ones, it is one, too: everything is checked and nothing is computed.

    Raises:
        TypeError, ValueError: an argument is refused; the message names it.

    torch.compile and torch.export see one operator, `qllm_ops::moe`. Functions of yours (activation,
    expert_norm) cannot be arguments of an operator: such a call breaks the graph. torch.export and
    torch.jit.trace refuse it, and a flag, too, which belongs to its process.
    """
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
    records = recorded()
    if records and kept():
        _check_kept(activation, expert_norm, flag)
    if records and _traceable(gate_up_proj, down_proj, activation, expert_norm):
        biases, tiles = (gate_up_bias, down_bias), (batch_invariant, max_exit_us)
        layout = (gated, interleaved, transposed, weights_on_input, fp8_activations)
        return traced(tensors, biases, activation, layout, tiles, flag, priority, backend)
    return uncompiled(
        _call,
        *tensors,
        flag=flag,
        priority=priority,
        backend=backend,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        expert_norm=expert_norm,
        weights_on_input=weights_on_input,
        batch_invariant=batch_invariant,
        fp8_activations=fp8_activations,
        max_exit_us=max_exit_us,
    )


def _check_kept(activation: object, expert_norm: object, flag: PriorityFlag | None) -> None:
    """Refuse what cannot be part of a program that may be saved."""
    fits = isinstance(activation, (str, Activation))
    for name, value, wanted, why in (
        ("activation", None if fits else activation, "a name or an Activation", "they hold no function"),
        ("expert_norm", expert_norm, "None", "they hold no function"),
        ("flag", flag, "None", "a process that runs them has other flags"),
    ):
        if value is not None:
            got = getattr(value, "__name__", type(value).__name__)
            raise ValueError(f"{name} must be {wanted} in torch.export and traces ({why}), got {got}")


def _traceable(gate_up_proj: Weight, down_proj: Weight, activation: object, expert_norm: object) -> bool:
    """Whether an operator can have these as arguments."""
    # What is refused is refused by a call outside of the graph.
    alike = getattr(gate_up_proj, "format", None) == getattr(down_proj, "format", None)
    return isinstance(activation, (str, Activation)) and expert_norm is None and alike


def _call(*tensors: Weight, **options: Any) -> Tensor:
    output = _moe(*tensors, **options)
    return refusing_gradients(output, _asked(tensors, options)) if torch.is_grad_enabled() else output


def _asked(tensors: tuple[Weight, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Those of the arguments of `moe` that require a gradient."""
    dense = (x.scales if isinstance(x, QuantizedWeight) else x for x in tensors)
    biases = (options.get("gate_up_bias"), options.get("down_bias"))
    functions = (options.get("activation"), options.get("expert_norm"))
    return asked_for_gradients((*dense, *biases), functions)


@plain
def _moe(*tensors: Weight, flag: PriorityFlag | None, priority: int, backend: str, **experts: Any) -> Tensor:
    inputs = check_inputs(*tensors, **experts)
    check_flag(flag, priority, inputs.hidden_states.device)
    if not inputs.in_memory:
        return torch.empty_like(inputs.hidden_states)
    if _choose(backend, inputs) == "torch":
        layer = TorchMoe(inputs, flag, priority)
    else:
        layer = _backend_class("triton")(inputs, flag, priority, one_stream=True)
        if flag is None:
            layer.launch_all()
            return layer.output
        if flag.gate == "stream":
            # What would stand still need not be launched, and this thread leaves the interpreter to others.
            if not (layer.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                flag.wait(priority)
            layer.launch_all(gated=True)
            return layer.output
    while not layer.step(None):
        flag.wait(priority)
    return layer.output


class MoeRun:
    """One MoE layer with its progress: it can be stepped, left, and stepped again.

    Takes the arguments of :func:`moe`. The tensors are read at every step, so they must not be
    changed before the run is done. Steps may come from different threads, but one at a time.

    A step that raises leaves the run dead: what it had computed so far cannot be trusted on every
    device, so later steps raise RuntimeError and the output stays out of reach.

    Attributes:
        backend: "torch" or "triton".
    """

    def __init__(
        self,
        hidden_states: Tensor,
        gate_up_proj: Weight,
        down_proj: Weight,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        flag: PriorityFlag | None = None,
        priority: int = 0,
        backend: str = "auto",
        **experts: Any,
    ):
        if kept():
            raise RuntimeError("a MoeRun cannot be part of an exported or traced program; qllm_ops.moe can")
        tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
        inputs = check_inputs(*tensors, **experts)
        check_flag(flag, priority, inputs.hidden_states.device)
        if not inputs.in_memory:
            raise ValueError(
                "hidden_states must be in memory for a MoeRun, got a tensor that is "
                f"{'on the meta device' if hidden_states.is_meta else 'fake'}; qllm_ops.moe takes those"
            )
        self.backend = _choose(backend, inputs)
        self._asked = _asked(tensors, experts)
        self._layer = uncompiled(self._make_layer, inputs, flag, priority)
        self._stepping = threading.Lock()
        self._error: BaseException | None = None

    @plain
    def _make_layer(self, inputs: MoeInputs, flag: PriorityFlag | None, priority: int) -> Any:
        # Buffers made in inference mode could not be written by a step from outside of it.
        with torch.inference_mode(False):
            return _backend_class(self.backend)(inputs, flag, priority)

    def step(self, max_tiles: int | None = None) -> bool:
        """Compute until every tile is done, ``max_tiles`` more are done, or the class is paused.

        Deadlines of the flag are looked at first. A step of a paused class does nothing. Waits for the
        device.

        Returns:
            True when every tile is done, False if the step left early.
        """
        if max_tiles is not None and (not is_integer(max_tiles) or max_tiles < 1):
            raise ValueError(f"max_tiles must be a positive integer or None, got {max_tiles!r}")
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is inside step(); a run takes one step at a time")
        try:
            if self._error is not None:
                raise RuntimeError("an earlier step of this run failed; make a new run") from self._error
            try:
                return uncompiled(self._step, max_tiles)
            except BaseException as error:
                self._error = error
                raise
        finally:
            self._stepping.release()

    @plain
    def _step(self, max_tiles: int | None) -> bool:
        return self._layer.step(max_tiles)

    @property
    def tiles_done(self) -> int:
        return self._layer.tiles_done

    @property
    def tiles_taken(self) -> int:
        """tiles_done, and one more for every time a tile was left halfway to be computed again.

        Only tiles that take longer than ``max_exit_us`` are; without such the two are equal between steps.
        """
        return self._layer.tiles_taken

    @property
    def tiles_total(self) -> int:
        return self._layer.tiles_total

    @property
    def done(self) -> bool:
        return self._error is None and self.tiles_done == self.tiles_total

    @property
    def output(self) -> Tensor:
        """(T, H) in the dtype of hidden_states. Raises RuntimeError until the run is done.

        Has no backward pass, as that of :func:`moe`.
        """
        if self._error is not None:
            raise RuntimeError("a step of this run failed; it has no output") from self._error
        if not self.done:
            raise RuntimeError(f"the run is not done: {self.tiles_done} of {self.tiles_total} tiles")
        output = self._layer.output
        if output.is_cuda:
            # It may have been made on another stream, which must not have its memory before this one is done.
            output.record_stream(torch.cuda.current_stream(output.device))
        return uncompiled(refusing_gradients, output, self._asked)


@plain
def warm_up(
    hidden_states: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    flag: PriorityFlag | None = None,
    priority: int = 0,
    backend: str = "auto",
    **experts: Any,
) -> None:
    """Compile and load every kernel that calls of :func:`moe` like this one need, whatever their T.

    Takes the arguments of :func:`moe`; T must be at least 1. With a flag, kernels for calls without one
    are loaded as well. Loading a kernel waits for the whole device, paused work included: so do it
    before anything is paused. Nothing to do for the torch backend.
    """
    inputs = check_inputs(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, **experts)
    check_flag(flag, priority, inputs.hidden_states.device)
    if inputs.num_tokens == 0:
        raise ValueError("hidden_states must hold at least one token to warm up with, got T = 0")
    if not inputs.in_memory:
        return
    layer = _backend_class(_choose(backend, inputs))
    if hasattr(layer, "warm_up"):
        layer.warm_up(inputs, flag, priority)


def moe_reference(
    hidden_states: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: str | AnyActivation = "silu",
    **experts: Any,
) -> Tensor:
    """The same as :func:`moe`, one token and one expert at a time in float32. Slow, to check by eye."""
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
    experts["activation"] = activation
    return refusing_gradients(_reference(check_inputs(*tensors, **experts)), _asked(tensors, experts))


@plain
def _reference(x: MoeInputs) -> Tensor:
    if not x.in_memory:
        return torch.empty_like(x.hidden_states)
    output = torch.zeros(x.hidden_states.shape, dtype=torch.float32, device=x.hidden_states.device)
    for t, k in itertools.product(*map(range, x.top_k_index.shape)):
        e = int(x.top_k_index[t, k])
        if not 0 <= e < x.num_experts:
            continue
        first, second = widened(x.gate_up_proj, e), widened(x.down_proj, e)
        if x.transposed:
            first, second = first.T, second.T
        weight = x.top_k_weights[t, k].float()
        hidden = rounded_rows(x.hidden_states[t : t + 1])[0] if x.fp8_activations else x.hidden_states[t]
        gate_up = first @ hidden.float()
        if x.weights_on_input:
            gate_up, weight = gate_up * weight, 1.0
        if x.gate_up_bias is not None:
            gate_up += x.gate_up_bias[e].float()
        if not isinstance(x.activation, Activation):
            shape = (1, x.intermediate_size)
            gated = checked("activation", x.activation(gate_up[None]), shape, output.device)[0].float()
        elif not x.gated:
            gated = x.activation(None, gate_up)
        elif x.interleaved:
            gated = x.activation(gate_up[::2], gate_up[1::2])
        else:
            gated = x.activation(*gate_up.chunk(2))
        if x.fp8_activations:
            gated = rounded_rows(gated.to(x.hidden_states.dtype)[None])[0]
        down = second @ gated
        if x.down_bias is not None:
            down += x.down_bias[e].float()
        if x.expert_norm is not None:
            down = checked("expert_norm", x.expert_norm(down[None]), (1, x.hidden_size), output.device)[0]
        output[t] += weight * down
    return output.to(x.hidden_states.dtype)


def check_flag(flag: PriorityFlag | None, priority: int, device: torch.device) -> None:
    """Refuse a flag that this work cannot poll."""
    if not is_integer(priority) or priority < 0:
        raise ValueError(f"priority must be an integer of at least 0, got {priority!r}")
    if flag is None:
        return
    if not isinstance(flag, PriorityFlag):
        raise TypeError(f"flag must be a PriorityFlag or None, got {type(flag).__name__}")
    if priority >= flag.classes:
        raise ValueError(f"priority must be an integer from 0 to {flag.classes - 1}, got {priority!r}")
    if flag.words.device != device and device.type != "meta":  # where nothing is computed
        raise ValueError(
            f"flag is on {flag.words.device}, but hidden_states is on {device}; "
            "make the flag on the device where the layer runs"
        )


def _choose(backend: str, inputs: MoeInputs) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    on_gpu = inputs.hidden_states.device.type == "cuda"
    if backend == "auto":
        able = on_gpu and _triton_installed() and unsupported(inputs.hidden_states.device) is None
        backend = "triton" if able else "torch"
    if backend == "triton":
        if not _triton_installed():
            raise ValueError('backend="triton" needs the package triton, which is not installed')
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend="triton" needs CUDA tensors, got {inputs.hidden_states.device}; on a CPU it works '
                "only in Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
            )
        if not on_gpu and (problem := _interpreter_problem()):
            raise ValueError(f'backend="triton" cannot run on a CPU here: {problem}')
    return backend


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreter_problem() -> str | None:
    import numpy
    import triton

    return broken_interpreter(triton.__version__, numpy.__version__)


def _backend_class(backend: str) -> Any:
    if backend == "torch":
        return TorchMoe
    from qllm_ops.triton_moe import TritonMoe  # here, because triton is missing on some systems

    return TritonMoe

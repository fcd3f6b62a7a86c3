"""`qllm_ops::moe`: the operator as torch.compile and torch.export see it, one opaque node.

Opaque, because it polls a flag that others write and may stand still: nothing there is for a compiler to
look into. It changes none of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from qllm_ops.activation import Activation
from qllm_ops.flag import NUMBERED, PriorityFlag
from qllm_ops.inputs import Weight
from qllm_ops.modes import refused_gradient
from qllm_ops.quantized import QuantizedWeight

NO_FLAG = -1


def numbered_flag(number: int) -> PriorityFlag | None:
    """The flag that a number stands for, as an operator's schema knows no objects.

    Raises RuntimeError if that flag is gone: a compiled graph outlived it, or came from another process.
    """
    if number == NO_FLAG:
        return None
    flag = NUMBERED.get(number)
    if flag is None:
        raise RuntimeError(
            f"a compiled call of qllm_ops.moe refers to priority flag {number}, which does not exist in this "
            "process (any more); keep the flag alive, or compile again"
        )
    return flag


def recorded() -> bool:
    """Whether calls are written down to be repeated: by a compiler, an export, make_fx or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def kept() -> bool:
    """Whether what is written down may be saved, and run in another process."""
    return torch.compiler.is_exporting() or (recorded() and not torch.compiler.is_compiling())


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function; a compiler that is at work does not look into it."""
    call = _break_graph if torch.compiler.is_compiling() else _call
    return call(function, *args, **kwargs)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# Costs some microseconds in every call, compiled or not.
_break_graph = torch.compiler.disable(
    _call, reason="a MoeRun, or a function of yours in qllm_ops.moe, cannot be part of a graph"
)


def refuse_gradients(operator: torch.library.CustomOpDef) -> None:
    """Give an operator a backward pass that raises when it runs, not when a compiler traces it."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        needed = zip(inputs, ctx.needs_input_grad, strict=False)  # torch adds an input of its own at the end
        ctx.shapes = [x.shape if needs else None for x, needs in needed]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if shape is None else refused_gradient(grad, shape) for shape in ctx.shapes)

    operator.register_autograd(backward, setup_context=remember)


@torch.library.custom_op("qllm_ops::moe", mutates_args=())
def moe_op(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_zeros: Tensor | None,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    format: str | None,
    gate_up_block: list[int],
    down_block: list[int],
    columns: list[int],
    largest: list[float],
    kind: str,
    alpha: float,
    limit: float | None,
    up_offset: float,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    weights_on_input: bool,
    fp8_activations: bool,
    batch_invariant: bool,
    max_exit_us: float,
    flag: int,
    priority: int,
    backend: str,
) -> Tensor:
    """Of quantised weights gate_up_proj and down_proj are the values; lists are of both, or empty."""
    from qllm_ops.moe import moe  # which imports this module

    if format is not None:
        gate_up = (gate_up_proj, gate_up_scales, format, gate_up_block, columns[0], gate_up_zeros, largest[0])
        down = (down_proj, down_scales, format, down_block, columns[1], down_zeros, largest[1])
        gate_up_proj, down_proj = QuantizedWeight.checked(*gate_up), QuantizedWeight.checked(*down)
    return moe(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        activation=Activation(kind, alpha, limit, up_offset),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        weights_on_input=weights_on_input,
        fp8_activations=fp8_activations,
        batch_invariant=batch_invariant,
        max_exit_us=max_exit_us,
        flag=numbered_flag(flag),
        priority=priority,
        backend=backend,
    )


def traced(
    tensors: tuple[Weight, ...],
    biases: tuple[Tensor | None, Tensor | None],
    activation: str | Activation,
    layout: tuple[bool, bool, bool, bool, bool],
    tiles: tuple[bool, float],
    flag: PriorityFlag | None,
    priority: int,
    backend: str,
) -> Tensor:
    """What `moe` is while it is compiled."""
    if isinstance(activation, str):
        act = (activation, 1.0, None, 0.0)
    else:
        act = (activation.kind, activation.alpha, activation.limit, activation.up_offset)
    hidden_states, gate_up_proj, down_proj, *routing = tensors
    if isinstance(gate_up_proj, QuantizedWeight):
        both = (gate_up_proj, down_proj)
        scales = tuple(tensor for weight in both for tensor in (weight.scales, weight.zeros))
        format, blocks = down_proj.format, [list(weight.block) for weight in both]
        lists = (*blocks, [weight.columns for weight in both], [weight.largest for weight in both])
        tensors = (hidden_states, gate_up_proj.values, down_proj.values, *routing)
    else:
        scales, format, lists = (None,) * 4, None, ([], [], [], [])
    number = NO_FLAG if flag is None else flag.number
    return torch.ops.qllm_ops.moe(
        *tensors, *scales, *biases, format, *lists, *act, *layout, *tiles, number, priority, backend
    )


@moe_op.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


refuse_gradients(moe_op)

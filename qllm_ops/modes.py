"""The modes of torch that a caller may be in, and what an operator of ours does about them.

Autocast is turned off inside: it would make 16-bit products of those that are promised in float32, and
bits would depend on who calls. Grad mode is, too; who asks for a gradient nevertheless is told that there
is none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

NO_GRADIENT = (
    "qllm_ops.moe is for inference and has no backward pass; call it inside of torch.no_grad(), or train a "
    "model with its own experts (qllm_ops.models.uninstall)"
)

NO_TANGENT = "qllm_ops.moe is for inference and has no forward-mode derivative (torch.autograd.forward_ad)"

AUTOCAST_DEVICES = ("cpu", "cuda")


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is without autocast and without recording gradients, whatever the caller's modes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        cast = [kind for kind in AUTOCAST_DEVICES if torch.is_autocast_enabled(kind)]
        if not cast and not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for kind in cast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call


def in_memory(tensor: Tensor) -> bool:
    """False for tensors of the meta device and for fake ones, of which nothing can be computed."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def asked_for_gradients(tensors: Iterable[object], functions: Iterable[object] = ()) -> tuple[Tensor, ...]:
    """Those that require a gradient, in grad mode: among the tensors, and the parameters of modules of which
    the functions are, or are methods. Others than tensors among ``tensors`` require none."""
    if not torch.is_grad_enabled():
        return ()
    modules = (getattr(function, "__self__", function) for function in functions)
    parameters = (x for module in modules if isinstance(module, torch.nn.Module) for x in module.parameters())
    return tuple(x for some in (tensors, parameters) for x in some if getattr(x, "requires_grad", False))


def refuse_tangents(tensors: Mapping[str, object]) -> None:
    """Raise for a tensor with a tangent, of forward-mode differentiation, which would be dropped."""
    if forward_ad._current_level < 0:
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{NO_TANGENT}, got {name} with a tangent")


@torch.library.custom_op("qllm_ops::refused_gradient", mutates_args=())
def refused_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    """What stands in a compiled backward pass for a gradient of this shape. Raises when it is asked for."""
    raise NotImplementedError(NO_GRADIENT)


@refused_gradient.register_fake
def _(grad: Tensor, shape: list[int]) -> Tensor:
    return grad.new_empty(shape)


def refusing_gradients(output: Tensor, asked: tuple[Tensor, ...]) -> Tensor:
    """The output, with a backward pass that raises for those who asked: no gradient would pass for zero."""
    return _NoGradient.apply(output.detach(), *asked) if asked else output


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass in grad mode through, and refuses to make up its gradient. Keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *asked: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in asked]
        ctx.mark_dirty(output)  # So it is returned as it is, and no view: a caller may change it in place.
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(refused_gradient(grad, shape) for shape in ctx.shapes)

"""What an expert does between its two products: an activation, a gate, and some models' clamps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qllm_ops.arguments import is_number

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""SiLU, GELU with the error function, GELU with the tanh approximation, ReLU, and ReLU squared."""


@dataclass(frozen=True)
class Activation:
    """``kind(gate) * (up + up_offset)``, or ``kind(up)`` in experts without a gate.

    The kernels compute it in registers, in float32. ``Activation("silu", alpha=1.702, limit=7.0,
    up_offset=1.0)`` is the clamped SwiGLU of gpt-oss.

    Attributes:
        kind: one of ACTIVATIONS.
        alpha: with "silu", x * sigmoid(alpha * x).
        limit: the gate is cut off above it, up above it and below its negative. None: no clamp. NaN stays.
        up_offset: added to up.
    """

    kind: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.kind!r}")
        for name, value in (("alpha", self.alpha), ("limit", self.limit), ("up_offset", self.up_offset)):
            if not is_number(value) and (name, value) != ("limit", None):
                or_none = " or None" if name == "limit" else ""
                raise TypeError(f"activation: {name} must be a number{or_none}, got {value!r}")
        if self.alpha != 1.0 and self.kind != "silu":
            raise ValueError(f'activation: alpha belongs to "silu", got {self.alpha} with {self.kind!r}')
        if not math.isfinite(self.alpha) or not math.isfinite(self.up_offset):
            raise ValueError(
                f"activation: alpha and up_offset must be finite, got {self.alpha} and {self.up_offset}"
            )
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"activation: limit must be positive or None, got {self.limit!r}")

    @property
    def plain(self) -> bool:
        """Whether it is what its kind alone says."""
        return self == Activation(self.kind)

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The definition, on tensors of one shape. ``gate`` is None in experts without one."""
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
            gate = None if gate is None else gate.clamp(max=self.limit)
        if gate is None:
            return self._act(up)
        return self._act(gate) * (up + self.up_offset)

    def _act(self, x: Tensor) -> Tensor:
        if self.kind == "silu":
            return F.silu(x) if self.alpha == 1.0 else x * torch.sigmoid(self.alpha * x)
        if self.kind == "gelu":
            return F.gelu(x)
        if self.kind == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        return F.relu(x) if self.kind == "relu" else F.relu(x).square()


AnyActivation = Activation | Callable[[Tensor], Tensor]
"""An activation that the kernels compute, or a function of yours from (rows, 2I) to (rows, I)."""


@functools.cache
def _named(kind: str) -> Activation:
    return Activation(kind)


def as_activation(activation: str | AnyActivation) -> AnyActivation:
    """The activation that a name stands for. Raises ValueError, TypeError."""
    if isinstance(activation, str):
        return _named(activation)
    a_class = isinstance(activation, type)  # Calling torch.nn.SiLU makes one.
    if isinstance(activation, Activation) or (callable(activation) and not a_class):
        return activation
    raise TypeError(
        f"activation must be one of {', '.join(ACTIVATIONS)}, an Activation or a function, "
        f"got {f'the class {activation.__name__}' if a_class else type(activation).__name__}"
    )

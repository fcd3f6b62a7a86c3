"""Rotary embeddings that keep no state between calls, so that several threads can run one model.

Where a model's context was extended ("dynamic" and "longrope" scaling), transformers' rotary embedding
chooses its frequencies by the longest position of the call, writes them into a buffer of its own, and then
reads them from there. Two threads that run one model overwrite each other's; and rows of different lengths
in one call get what the longest of them needs. `isolate` puts an `OwnPositions` around each such embedding:
every call, and every row of a call that says where its rows are, computes on a copy of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qllm_ops.library import uncompiled


class Row(NamedTuple):
    """Positions ``[start, start + length)`` of a call belong to a sequence of at most ``reach`` tokens."""

    start: int
    length: int
    reach: int


_rows: ContextVar[Sequence[Row] | None] = ContextVar("qllm_rotary_rows", default=None)


@contextlib.contextmanager
def positions_of(rows: Sequence[Row]) -> Iterator[None]:
    """In this thread's body, the positions that a model is given are those of several sequences, in a row.

    Each sequence gets the frequencies for its ``reach``, from its first token to its last, so that they
    depend neither on its neighbours nor on the chunks in which its prompt is computed.
    """
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


class OwnPositions(nn.Module):
    """Stands where ``rotary`` stood, and gives what a new one of its kind would give."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """cos and sin, (..., T, size) each, for position_ids (..., T); one tensor where the model has one."""
        if torch.compiler.is_compiling() and _kinds(self.rotary) == {"longrope"}:
            return self.rotary(x, position_ids, *args, **kwargs)  # a graph reads its own choice, no buffer
        return uncompiled(self._forward, x, position_ids, *args, **kwargs)

    def _forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = _rows.get()
        if rows is None:
            return _new(self.rotary)(x, position_ids, *args, **kwargs)
        given, wanted = position_ids.shape[-1], sum(row.length for row in rows)
        if given != wanted:
            raise ValueError(f"{type(self.rotary).__name__} was given {given} positions for rows of {wanted}")
        parts = []
        for start, length, reach in rows:
            # One more position, the last that the sequence may have: the longest decides.
            own = nn.functional.pad(position_ids[..., start : start + length], (0, 1), value=reach - 1)
            parts.append(_new(self.rotary)(x, own, *args, **kwargs))
        if isinstance(parts[0], Tensor):
            return torch.cat([part[..., :-1, :] for part in parts], dim=-2)
        return tuple(torch.cat([part[..., :-1, :] for part in of], dim=-2) for of in zip(*parts, strict=True))


def _new(rotary: nn.Module) -> nn.Module:
    """A copy with buffers of its own, as if it had never been called."""
    new = copy.copy(rotary)
    new._buffers = {name: buffer.clone() for name, buffer in rotary._buffers.items()}
    for name in [name for name in vars(new) if name.endswith("max_seq_len_cached")]:
        setattr(new, name, new.original_max_seq_len)  # "dynamic" remembers the longest call so far
    for name in [name for name in new._buffers if name.endswith("original_inv_freq")]:
        new._buffers[name.replace("original_", "")] = new._buffers[name].clone()
    return new


def _kinds(module: nn.Module) -> set[str]:
    """The kinds of scaling of a rotary embedding, one per kind of layer where they differ; else empty."""
    kinds = getattr(module, "rope_type", ())
    return set(kinds.values() if isinstance(kinds, dict) else [kinds] if isinstance(kinds, str) else kinds)


def isolate(model: nn.Module) -> list[str]:
    """Let the rotary embeddings of ``model`` that change themselves keep no state; their names.

    A model with none of them stays as it is.
    """
    stateful: dict[nn.Module, OwnPositions] = {}
    names = []
    for parent_name, parent in list(model.named_modules()):
        if isinstance(parent, OwnPositions):
            continue
        for name, child in parent._modules.items():
            if any("dynamic" in kind or kind == "longrope" for kind in _kinds(child)):
                parent._modules[name] = stateful.setdefault(child, OwnPositions(child))
                names.append(f"{parent_name}.{name}".lstrip("."))
    return names


def restore(model: nn.Module, except_in: Container[nn.Module] = ()) -> None:
    """Undo `isolate`, but in the modules of ``except_in``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, OwnPositions) and parent not in except_in:
                parent._modules[name] = child.rotary

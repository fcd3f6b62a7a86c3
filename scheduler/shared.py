"""Whether two lanes can run one model at once: what a forward pass changes on its modules and configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def changed_by(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """What is other after ``run()`` than before it, as "ClassName.attribute (where)", sorted.

    Looks at attributes, parameters and buffers of every module and at its config: at which object is
    there, at the elements of lists and dicts, and at whether a tensor was written to (not through
    ``.data``, which leaves no trace). An attribute's own attributes are not looked at.
    """
    before = _state(model)
    run()
    after = _state(model)
    gone = object()
    changed = [key for key in before | after if not _same(before.get(key, gone), after.get(key, gone))]
    return sorted({f"{owner}.{attribute} ({where})" for where, owner, attribute in changed})


def _state(model: nn.Module) -> dict[tuple[str, str, str], Any]:
    state, configs = {}, set()
    for name, module in model.named_modules():
        where, owner = name or "the model", type(module).__name__
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                state |= {(where, owner, inner): _snapshot(kept) for inner, kept in value.items()}
            else:
                state[where, owner, attribute] = _snapshot(value)
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__") and id(config) not in configs:
            configs.add(id(config))
            where = f"config of {where}"
            state |= {(where, type(config).__name__, key): _snapshot(v) for key, v in vars(config).items()}
    return state


def _snapshot(value: Any) -> Any:
    """The value as it is now; holds on to objects, so that a new one never gets an old one's id."""
    if isinstance(value, torch.Tensor):
        return value, None if value.is_inference() else value._version
    if isinstance(value, dict):
        return {key: _snapshot(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_snapshot(inner) for inner in value]
    return set(value) if isinstance(value, set) else value


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    return isinstance(old, (str, bytes, int, float, set, frozenset, torch.dtype, torch.device)) and old == new

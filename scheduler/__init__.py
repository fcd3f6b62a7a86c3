"""Serve latency-sensitive and best-effort requests on one MoE model: engine, policies, replay.

    from qllm_ops.scheduler import BE, LS, Engine

Names are imported when they are first used, because the engine brings transformers with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllm_ops.scheduler.core import Limits
    from qllm_ops.scheduler.engine import Engine
    from qllm_ops.scheduler.policies import POLICIES, Plan, Policy, View
    from qllm_ops.scheduler.request import BE, LS, Handle, Request, RequestCancelled, RequestError, State

_HOME = {
    "Limits": "core",
    "Engine": "engine",
    "POLICIES": "policies",
    "Plan": "policies",
    "Policy": "policies",
    "View": "policies",
    "BE": "request",
    "LS": "request",
    "Handle": "request",
    "Request": "request",
    "RequestCancelled": "request",
    "RequestError": "request",
    "State": "request",
}

__all__ = [
    "BE",
    "LS",
    "POLICIES",
    "Engine",
    "Handle",
    "Limits",
    "Plan",
    "Policy",
    "Request",
    "RequestCancelled",
    "RequestError",
    "State",
    "View",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

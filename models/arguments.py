"""What `load` is given, looked at before it reads: a wrong word should not cost the time of 100 GB."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from qllm_ops import MoeRun, PriorityFlag

from .shards import CheckpointError


def as_folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a folder, as a string or a Path, got {type(path).__name__}")
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder}: no such folder, but a file; wanted the folder that it is in")
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.parent.exists()
    raise CheckpointError(
        f"{folder}: no such folder; models are loaded from local folders, never downloaded"
        + f" (huggingface_hub.snapshot_download({str(path)!r}) fetches one and returns its folder)"
        * bool(hub)
    )


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype must be a floating-point dtype of torch or "auto", got {dtype!r}')
    return found


def as_device(device: str | int | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error
    if found.type == "meta":
        raise ValueError("device must have memory, got 'meta'")
    return found


def check_run(device: torch.device, flag: PriorityFlag | None, priority: int, backend: str) -> None:
    """What `install` would refuse when all weights are read."""
    place = {"dtype": torch.float32, "device": device}
    MoeRun(
        torch.empty(0, 16, **place),
        torch.empty(1, 32, 16, **place),
        torch.empty(1, 16, 16, **place),
        torch.empty(0, 1, dtype=torch.int64, device=device),
        torch.empty(0, 1, **place),
        flag=flag,
        priority=priority,
        backend=backend,
    )

"""What a section of `gpu_check.py` is given: where it runs, how long it may, and where its results go."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Skip(Exception):
    """A section that cannot run here; the message says why."""


@dataclass
class Context:
    """One section's surroundings.

    Attributes:
        backend: "triton" or "torch".
        quick: fewer shapes and samples.
        rehearsal: on a CPU, with tiny shapes: to test the script, not the kernels.
        deadline: by time.monotonic(), when the section should have ended.
        results: what the sections before it found, by name.
        keep: called with the section's result so far, so that a killed run leaves it behind.
        begin: called with the name of a case that begins and the seconds that it may take, so that one that
            hangs or takes the process down is known, and ended soon.
        so_far: what an earlier process had kept of this section when it came to grief, or nothing.
        done_before: how many cases it had begun: they are not tried again.
        left_out: what there was no time for.
    """

    device: torch.device
    backend: str
    quick: bool
    rehearsal: bool
    deadline: float
    results: dict[str, Any]
    keep: Callable[[dict[str, Any]], None] = lambda result: None
    begin: Callable[[str, float], None] = lambda name, seconds: None
    so_far: dict[str, Any] = field(default_factory=dict)
    done_before: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def in_time(
        self, cases: Iterable[T], name: Callable[[T], str] = str, parts: Callable[[T], float] = lambda case: 1
    ) -> Iterator[tuple[T, float]]:
        """Each case and the seconds it may take: its part of what is left. At least one is run.

        Args:
            parts: how many parts of the time a case has; one of each by default.
        """
        cases = list(cases)
        for n, case in enumerate(cases[self.done_before :], self.done_before):
            if n and self.left_s <= 0:
                self.left_out += [name(c) for c in cases[n:]]
                self.say(f"no time for {len(cases) - n} of {len(cases)}")
                return
            seconds = self.left_s * parts(case) / sum(map(parts, cases[n:]))
            self.begin(name(case), seconds)
            yield case, seconds


def free_memory(device: torch.device) -> None:
    """Give back what the last shape took, before the next one's weights come."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def that_fit(c: Context, shapes: Iterable[T], nbytes: Callable[[T], int]) -> list[T]:
    """Those cases whose weights leave some memory on the device; the others are left out."""
    if c.device.type != "cuda":
        return list(shapes)
    free, cases = torch.cuda.mem_get_info(c.device)[0], list(shapes)
    c.left_out += [f"{case}: not enough memory" for case in cases if nbytes(case) > 0.7 * free]
    return [case for case in cases if nbytes(case) <= 0.7 * free]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


SMI_FIELDS = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "memory.used", "memory.total", "mig.mode.current"),
)


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the device; it only reads. None where it does not work."""
    fields = ",".join(SMI_FIELDS)
    query = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = done.stdout.strip().split(", ")
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else None


def one_line(error: BaseException) -> str:
    """Kind and message of an error, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}"

"""``qllm doctor``: what this machine has, which backend is chosen and why, and a test of the operator.

The self-test runs a small random MoE layer on every backend that works here: close to the reference,
and bitwise the same after quanta, after pauses, and with a second thread that flips the flag at random.
Without a GPU the Triton kernels run in Triton's interpreter, in a process of their own, because that
is chosen when triton is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.text import Text

from qllm_ops import MoeRun, PriorityFlag, moe, moe_reference, openmp
from qllm_ops.device import broken_interpreter
from qllm_ops.scheduler import flash
from qllm_ops.scheduler.report import device_meta

INTERPRETER_TIMEOUT_S = 300
EXIT_TRIALS = 12

# Relative RMS error against the reference in float32.
RMS_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


@dataclass(frozen=True)
class Check:
    """One line of the self-test. ``passed`` is None where nothing could be tested."""

    name: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """A random MoE layer on one backend. ``exit_tokens``: tokens of the run whose exit is timed; 0: none."""

    backend: str
    device: str
    dtype: torch.dtype
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int = 8
    top_k: int = 2
    exit_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}, {str(self.dtype).removeprefix('torch.')}"

    def tensors(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """The arguments of `moe`. The last expert gets no tokens, where there is another one."""
        draw = torch.Generator().manual_seed(0)
        t, h, i, e, k = tokens, self.hidden_size, self.intermediate_size, self.num_experts, self.top_k
        hidden_states = torch.randn(t, h, generator=draw)
        gate_up_proj = torch.randn(e, 2 * i, h, generator=draw) / h**0.5
        down_proj = torch.randn(e, h, i, generator=draw) / i**0.5
        top_k_index = torch.rand(t, max(k, e - 1), generator=draw).argsort(dim=1)[:, :k]
        top_k_weights = torch.rand(t, k, generator=draw).to(self.device)
        floats = [x.to(self.device, self.dtype) for x in (hidden_states, gate_up_proj, down_proj)]
        return *floats, top_k_index.to(self.device), top_k_weights


INTERPRETED = Case("triton", "cpu", torch.float32, 11, 32, 48, num_experts=4)


def examine(out: Console) -> bool:
    """Print everything to ``out``; whether the software is supported and every test passed."""
    good = True
    for title, lines in (
        ("Software", _software()),
        ("Machine", _machine()),
        ("Choices", _choices()),
        ("Self-test: the operator under preemption", _self_tests()),
    ):
        out.print(Text(title, style="bold"))
        for check in lines:
            out.print(_line(check), soft_wrap=True)
            good = good and check.passed is not False
    out.print(Text("everything is fine" if good else "something is wrong: see FAIL above", style="bold"))
    return good


def _line(check: Check) -> Text:
    mark, style = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("    ", "")}[check.passed]
    return Text.assemble("  ", (mark, style), f"  {check.name}", f": {check.detail}" if check.detail else "")


# -- what is here ------------------------------------------------------------------------------------------


def _software() -> Iterator[Check]:
    """Python and what the distribution requires, against the versions that it says it supports."""
    about = importlib.metadata.metadata("qllm-ops")
    yield _supported("python", platform.python_version(), SpecifierSet(about["Requires-Python"]))
    for text in about.get_all("Requires-Dist") or ():
        required = Requirement(text)
        if required.marker is None or required.marker.evaluate({"extra": ""}):
            yield _supported(required.name, _installed(required.name), required.specifier)
    for name, use in (("matplotlib", "draws report.png"), ("cuda-bindings", "writes the flag on a GPU")):
        yield Check(name, None, f"{_installed(name) or 'not installed'} (optional: {use})")


def _supported(name: str, version: str | None, wanted: SpecifierSet) -> Check:
    if version is None:
        return Check(name, False, f"not installed, wanted {wanted}")
    good = wanted.contains(Version(version), prereleases=True)
    return Check(name, good, version if good else f"{version}, wanted {wanted}")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[Check]:
    meta = device_meta("cpu")
    yield Check("system", None, meta["system"])
    yield Check("CPU", None, f"{meta['device']}, {torch.get_num_threads()} threads per operation")
    yield Check("OpenMP", None, _openmp())
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield Check("CUDA", None, f"no device (torch is {build})")
        return
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        yield Check(
            f"cuda:{i}",
            None,
            f"{device.name}, capability {device.major}.{device.minor}, {device.multi_processor_count} "
            f"multiprocessors, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda}",
        )


def _openmp() -> str:
    """Whether threads that wait take a core from those that work."""
    if torch.get_num_threads() == 1:
        return "one thread per operation, so no workers that wait"
    if not openmp.spinning():
        return "workers that wait sleep"
    back = "gives them back" if openmp.can_release() else "cannot give them back (no GNU OpenMP)"
    return (
        f"workers that wait spin, and a lane that stands still {back}. Set OMP_WAIT_POLICY=PASSIVE before "
        "Python starts, where two lanes or other processes share this CPU"
    )


def _choices() -> Iterator[Check]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        empty = Case("auto", device, torch.float32, 0, 32, 32)
        backend = MoeRun(*empty.tensors(0)).backend
    except Exception as error:
        yield Check("backend", False, f"auto does not work: {type(error).__name__}: {error}")
        return
    if device == "cpu":
        why = "there is no CUDA device"
    elif backend == "triton":
        why = "there is a CUDA device, and triton is installed"
    else:
        why = "there is a CUDA device, but triton is not installed"
    yield Check("backend", None, f"auto takes {backend!r}, because {why}")
    if device == "cpu":
        mode = "set" if os.environ.get("TRITON_INTERPRET") == "1" else "not set"
        yield Check("interpreter", None, f"TRITON_INTERPRET=1 is {mode}: Triton kernels on a CPU need it")
        yield Check("flag", None, "written as a word of shared memory")
        return
    writer = {
        "stream": "cuStreamWriteValue32, through cuda-bindings",
        "copy": "copies from pinned memory on a stream of its own (cuda-bindings does not work here)",
    }
    yield Check("flag", None, f"written by {writer[PriorityFlag(device)._write_word.kind]}")
    try:
        PriorityFlag(device, gate="stream")
        gate = 'works; PriorityFlag(gate="stream") and Engine(gate="stream") use it'
        if int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8")) < 32:
            gate += ". Set CUDA_DEVICE_MAX_CONNECTIONS=32: streams that share a queue are held together"
        if os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
            gate += ". Set CUDA_MODULE_LOADING=EAGER: a kernel's first use may wait for a stream that is held"
    except ValueError as error:
        gate = str(error)
    yield Check("stream gate", None, gate)
    refusal = flash.refusal(torch.device(device, torch.cuda.current_device()))
    attention = f"row by row, because {refusal}" if refusal else "all rows of 16-bit models in one launch"
    yield Check("attention", None, f"an engine attends {attention}")


# -- the self-test -----------------------------------------------------------------------------------------


def _self_tests() -> Iterator[Check]:
    if torch.cuda.is_available():
        backends = ["triton"] if importlib.util.find_spec("triton") else ["torch"]
        for dtype in (torch.float32, torch.bfloat16):
            for backend in backends:
                yield from self_test(Case(backend, "cuda", dtype, 300, 1024, 2048, exit_tokens=16384))
        return
    yield from self_test(Case("torch", "cpu", torch.float32, 300, 256, 512, exit_tokens=8192))
    yield from self_test(Case("torch", "cpu", torch.bfloat16, 100, 256, 512))
    yield from _interpreted()


def self_test(case: Case) -> Iterator[Check]:
    """Run ``case`` in every way; a test that raises is a test that failed."""
    tests: list[tuple[str, Callable[[Case], tuple[bool, str]]]] = [
        ("close to the reference", _close),
        ("same bits after quanta and pauses", _quanta),
        ("same bits with a second thread at the flag", _flips),
    ]
    if case.exit_tokens:
        tests.append(("leaves when paused", _exit_time))
    for name, test in tests:
        try:
            passed, detail = test(case)
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        yield Check(f"{case}, {name}", passed, detail)


def _close(case: Case) -> tuple[bool, str]:
    tensors = case.tensors(case.tokens)
    got = moe(*tensors, backend=case.backend).float()
    want = moe_reference(*(x.float() if x.is_floating_point() else x for x in tensors))
    error = ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item()
    return error <= RMS_ERROR[case.dtype], f"RMS error {error:.1e}, at most {RMS_ERROR[case.dtype]:.0e}"


def _quanta(case: Case) -> tuple[bool, str]:
    """Steps of one, two, ... tiles, with a pause before every other one, in which nothing may happen."""
    tensors = case.tensors(case.tokens)
    want = moe(*tensors, backend=case.backend)
    flag = PriorityFlag(case.device)
    run = MoeRun(*tensors, flag=flag, backend=case.backend)
    steps, wrong = 0, 0
    while not run.done:
        before = run.tiles_done
        if steps % 2:
            flag.pause(0)
            wrong += run.step() or run.tiles_done != before
            flag.resume(0)
        steps += 1
        run.step(max_tiles=steps)
        # A GPU's programs may each finish the tile they have; at least one must come of a step.
        wrong += not before < run.tiles_done or run.tiles_taken != run.tiles_done
    same = torch.equal(run.output, want)
    detail = f"{run.tiles_total} tiles in {steps} steps"
    if wrong:
        detail += f", {wrong} of them lost tiles, did none, or ran while paused"
    return same and not wrong, detail if same else f"{detail}, different output"


def _flips(case: Case) -> tuple[bool, str]:
    """The flag is flipped at random times from another thread while runs go."""
    tensors = case.tensors(case.tokens)
    want = moe(*tensors, backend=case.backend)
    flag = PriorityFlag(case.device)
    stop = threading.Event()

    def flip() -> None:
        rng = random.Random(0)
        while not stop.is_set():
            with flag.urgent(1):
                time.sleep(rng.random() * 5e-4)
            time.sleep(rng.random() * 1e-3)

    thread = threading.Thread(target=flip, daemon=True)
    thread.start()
    left, runs, different = 0, 0, 0
    try:
        deadline = time.monotonic() + 1.0
        while runs < 50 and (runs == 0 or time.monotonic() < deadline):
            run = MoeRun(*tensors, flag=flag, backend=case.backend)
            while not run.step():
                left += 1
                flag.wait(0)
            different += not torch.equal(run.output, want)
            runs += 1
    finally:
        stop.set()
        thread.join()
    return not different, f"{runs} runs, left early {left} times, {different} with a different output"


def _exit_time(case: Case) -> tuple[bool, str]:
    """From the host's order to pause until the step has returned, over pauses at different moments."""
    tensors = case.tensors(case.exit_tokens)
    flag = PriorityFlag(case.device)
    took = min(_timed_step(tensors, flag, case.backend)[1] for _ in range(2))
    exits = []
    for trial in range(EXIT_TRIALS):
        finished, seconds = _timed_step(tensors, flag, case.backend, (trial + 1) / (EXIT_TRIALS + 2) * took)
        if not finished:
            exits.append(seconds)
    if not exits:
        return False, f"no step of {took * 1e3:.1f} ms left early in {EXIT_TRIALS} trials"
    detail = (
        f"a step of {took * 1e3:.1f} ms leaves {_ms(statistics.median(exits))} after the order "
        f"(median; at most {_ms(max(exits))})"
    )
    return True, detail


def _timed_step(
    tensors: tuple[torch.Tensor, ...], flag: PriorityFlag, backend: str, pause_after_s: float | None = None
) -> tuple[bool, float]:
    """One step in a thread of its own: whether it came to the end, and how long after the pause it
    returned (without a pause: after its start)."""
    run = MoeRun(*tensors, flag=flag, backend=backend)
    started, finished, ended = threading.Event(), [], []

    def step() -> None:
        started.set()
        finished.append(run.step())
        ended.append(time.perf_counter())

    thread = threading.Thread(target=step)
    thread.start()
    started.wait()
    since = time.perf_counter()
    if pause_after_s is not None:
        time.sleep(pause_after_s)
        since = time.perf_counter()
        flag.pause(0)
    thread.join()
    flag.resume(0)
    return finished[0], ended[0] - since


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# -- the Triton kernels without a GPU ----------------------------------------------------------------------


def _interpreted() -> Iterator[Check]:
    name = "triton in its interpreter"
    triton, numpy = _installed("triton"), _installed("numpy")
    if triton is None:
        yield Check(name, None, "not tested, triton is not installed")
        return
    if problem := broken_interpreter(triton, numpy):
        yield Check(name, None, f"not tested, {problem}")
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "qllm_ops.scheduler.doctor"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=INTERPRETER_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        yield Check(name, False, f"not done after {INTERPRETER_TIMEOUT_S} s")
        return
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        yield Check(name, False, last)
        return
    for check in json.loads(done.stdout.splitlines()[-1]):
        yield Check(check["name"].replace("on cpu", "in its interpreter"), check["passed"], check["detail"])


if __name__ == "__main__":
    print(json.dumps([asdict(check) for check in self_test(INTERPRETED)]))

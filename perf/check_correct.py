"""Sections "correctness" and "bitwise" of `gpu_check.py`: is the operator right, preempted or not?"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from context import Context, free_memory, one_line, that_fit
from goals import name_of
from layers import (
    DEEPSEEK,
    DENSE,
    FORMATS,
    MAX_RELATIVE,
    MIXTRAL,
    OLMOE,
    QWEN3,
    SHAPES,
    TINY,
    Launches,
    Shape,
    Tensors,
    errors,
    layer_bytes,
    layer_inputs,
    poisoned,
    quantized,
    reference,
    settle,
    tokens,
    weights,
    with_weights,
)
from timing import synchronize

from qllm_ops import FULL, MoeRun, PriorityFlag, moe
from qllm_ops.inputs import check_inputs
from qllm_ops.torch_moe import widened

TOKENS = (1, 8, 32, 256, 2048, 8192)

SOME_TOKENS = (1, 32, 256)
"""For other dtypes and formats."""


# -- correctness -----------------------------------------------------------------------------------------


def correctness(c: Context) -> dict[str, Any]:
    """Every shape and number of tokens against the reference, then the edges.

    Outputs are filled with NaN first. Each case runs without a flag (compiled without the poll) and with
    one that nobody pauses (with the poll); the second must have the bits of the first. Quantised layers
    come last, against the numbers that their weights stand for.
    """
    result = c.so_far or {"cases": [], "passed": True}
    rows = result["cases"]
    plan = that_fit(c, _plan(c), _plan_bytes)
    for (shape, dtype, format), _ in c.in_time(plan, _case_name):
        before = len(rows)
        failed = _one_shape(c, result, shape, dtype, format)
        free_memory(c.device)
        worst = max((r["rms"] or 0.0 for r in rows[before:]), default=0.0)
        c.say(f"{_case_name((shape, dtype, format))}: {'FAILED' if failed else 'fine'}, RMS {worst:.1e}")
    return result


def _case_name(case: tuple[Shape, torch.dtype, str]) -> str:
    shape, dtype, format = case
    return f"{shape.name} {short(dtype)}" + (f" {format}" if format != DENSE else "")


def _one_shape(c: Context, result: dict[str, Any], shape: Shape, dtype: torch.dtype, format: str) -> int:
    """How many cases failed."""
    dense = weights(shape, dtype, c.device)
    pair = quantized(dense, format)
    some = dtype != torch.bfloat16 or format != DENSE
    counts = SOME_TOKENS if some and not c.rehearsal else _token_counts(c)
    cases = [(f"T={t}", functools.partial(layer_inputs, shape, t, dense)) for t in counts]
    if shape in (OLMOE, TINY) and not some:
        cases += edges(shape, dense)

    def case(name: str, make: Callable[[], Tensors]) -> bool:
        return _case(c, result, (shape, dtype, format), name, lambda: with_weights(make(), pair))["passed"]

    return sum(not case(name, make) for name, make in cases)


def _plan(c: Context) -> list[tuple[Shape, torch.dtype, str]]:
    if c.rehearsal:
        dense = [(TINY, dtype, DENSE) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        return dense + [(TINY, torch.bfloat16, format) for format in FORMATS[1:]]
    shapes = (QWEN3, OLMOE) if c.quick else SHAPES
    plan = [(shape, torch.bfloat16, DENSE) for shape in shapes if shape != DEEPSEEK]
    plan += [(OLMOE, torch.float16, DENSE), (OLMOE, torch.float32, DENSE)]
    plan += [(DEEPSEEK, torch.bfloat16, DENSE)] * (DEEPSEEK in shapes)
    few = (QWEN3,) if c.quick else (QWEN3, MIXTRAL)  # as they are compiled ahead
    return plan + [(shape, torch.bfloat16, format) for shape in few for format in FORMATS[1:]]


def _plan_bytes(case: tuple[Shape, torch.dtype, str]) -> float:
    """Of the weights; those that were quantised are there beside the dense ones."""
    shape, dtype, format = case
    return shape.layer_bytes * (dtype.itemsize // 2) * (1 if format == DENSE else 1.5)


def _token_counts(c: Context) -> tuple[int, ...]:
    if c.rehearsal:
        return (1, 8, 70)
    return (1, 32, 2048) if c.quick else TOKENS


def edges(shape: Shape, pair: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[str, Callable[[], Tensors]]]:
    """Routings that a random one hardly ever is."""

    def with_index(change: Callable[[torch.Tensor], None], num_tokens: int = 256) -> Callable[[], Tensors]:
        def make() -> Tensors:
            hidden_states, index, weight = tokens(shape, num_tokens, pair[0].dtype, pair[0].device, seed=2)
            change(index)
            return hidden_states, *pair, index, weight

        return make

    def outside(index: torch.Tensor) -> None:
        index[::3, 0] = -1
        index[1::3, 1] = shape.num_experts
        index[2::3, 1] = 2**40
        index[5] = shape.num_experts + 7  # a token with no expert at all: its output is zero

    return [
        ("T=0", with_index(lambda index: None, 0)),
        ("indices out of range", with_index(outside)),
        ("nobody has a token", with_index(lambda index: index.fill_(-1))),
        ("one expert has all", with_index(lambda index: index.fill_(shape.num_experts - 1))),
        ("two experts have all", with_index(lambda index: index.remainder_(2).mul_(3))),
        ("one token more than a row block", with_index(lambda index: index.fill_(1), 129 // shape.top_k + 1)),
    ]


def _case(
    c: Context, result: dict, layer: tuple[Shape, torch.dtype, str], name: str, make: Callable[[], Tensors]
) -> dict[str, Any]:
    shape, dtype, format = layer
    row = {"shape": shape.name, "dtype": short(dtype), "format": format, "case": name}
    row |= {"rms": None, "max_relative": None, "nan": None, "passed": False}
    result["cases"].append(row)
    result["passed"] = False  # until this one has passed, or whoever ends the process would leave it so
    c.keep(result)
    tensors = None
    try:
        tensors = make()
        want = reference(tensors)
        with poisoned():
            got = moe(*tensors, backend=c.backend)
            polled = MoeRun(*tensors, flag=PriorityFlag(c.device), backend=c.backend)
            finished = polled.step()
        row |= errors(got, want)
        row["same_bits_with_poll"] = finished and torch.equal(got, polled.output)
        row["passed"] = row["passed"] and row["same_bits_with_poll"]
    except Exception as error:
        row["error"] = one_line(error)
    if not row["passed"]:
        row |= _found_out(c, tensors)
        c.say(f"FAILED: {row}")
    synchronize(c.device)  # a device that is broken for good ends the section here
    result["passed"] = all(row["passed"] for row in result["cases"])
    c.keep(result)
    return row


def _found_out(c: Context, tensors: Tensors | None) -> dict[str, Any]:
    """Of a case that failed: its tiles, what was compiled for them, and which phase goes wrong where."""
    if c.backend != "triton" or tensors is None:
        return {}
    found: dict[str, Any] = {}
    try:
        launches = Launches(tensors, None)
        found["tiles"] = launches.tiles
        found["compiled"] = launches.compiled()
        found["where"] = wrong_phases(tensors)
    except Exception as error:
        found["where"] = one_line(error)
    return found


def wrong_phases(tensors: Tensors) -> dict[str, Any]:
    """How far each phase is off what it should make of its own input, in float32, and where.

    Rows are sorted ones of gate_up, (token, k) pairs of down, tokens of combine.
    """
    from qllm_ops.plan import plan_of
    from qllm_ops.triton_moe import TritonMoe

    hidden_states, gate_up_proj, down_proj, index, weight = tensors
    inputs = check_inputs(*tensors)
    plan = plan_of(inputs, width=inputs.hidden_size)
    run = TritonMoe(inputs, None, 0, plan=plan)
    for buffer in (run._intermediate, run._partial, run._output):
        buffer.fill_(float("nan"))
    run.launch_all()
    order = run._order
    expert_of = index.flatten()[order]
    here = (expert_of >= 0) & (expert_of < down_proj.shape[0])
    intermediate, partial = run._intermediate.float(), run._partial.float().sum(0)
    wanted, wanted_partial = torch.zeros_like(intermediate), torch.zeros_like(partial)
    for expert in expert_of[here].unique().tolist():
        rows = torch.where(expert_of == expert)[0]
        tokens = hidden_states[order[rows] // index.shape[1]].float()
        gate, up = F.linear(tokens, widened(gate_up_proj, expert)).chunk(2, -1)
        wanted[rows] = F.silu(gate) * up
        wanted_partial[order[rows]] = F.linear(intermediate[rows], widened(down_proj, expert))
    pairs = torch.zeros_like(here)
    pairs[order] = here
    weighted = torch.where(pairs[:, None], partial, 0.0) * weight.flatten()[:, None].float()
    output = weighted.unflatten(0, index.shape).sum(1)
    everyone = torch.ones_like(index[:, 0], dtype=torch.bool)
    return {
        "order": "sorted" if bool((expert_of[here].diff() >= 0).all()) else "NOT SORTED",
        "gate_up": _where(intermediate, wanted, here),
        "down": _where(partial, wanted_partial, pairs),
        "combine": _where(run._output.float(), output, everyone),
    }


def _where(got: torch.Tensor, want: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    """Of some rows: relative RMS error, and the first rows and columns with a number that is far off."""
    difference = (got - want)[rows]
    far = ~(difference.abs() <= MAX_RELATIVE * want.abs().max())  # of NaN, too
    lost = {"rms": (difference.square().mean() / want[rows].square().mean()).sqrt().item()}
    off_rows = rows.nonzero().flatten()[far.any(1)]
    off_columns = far.any(0).nonzero().flatten()
    lost |= {"numbers": far.numel(), "far_off": int(far.sum()), "nan": int(difference.isnan().sum())}
    lost |= {"rows": len(off_rows), "columns": len(off_columns)}
    return lost | {"first_rows": off_rows[:24].tolist(), "first_columns": off_columns[:24].tolist()}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the same bits, however it is preempted --------------------------------------------------------------


def bitwise(c: Context) -> dict[str, Any]:
    """Runs that are left and taken up again in every way, against the bits of an uninterrupted run.

    Also counted: tiles. After every step all tiles that were taken are done, no step goes back, and at
    the end exactly as many are done as there are: a tile computed twice or never would show here or as a
    NaN in the output, which is poisoned.
    """
    result = c.so_far or {"cases": [], "left_early": 0, "passed": True}
    rows = result["cases"]
    plan = that_fit(c, _bitwise_plan(c), layer_bytes)
    for (shape, num_tokens, format), seconds in c.in_time(plan, _bitwise_name):
        dense = weights(shape, torch.bfloat16, c.device)
        pair = quantized(dense, format)
        tensors = with_weights(layer_inputs(shape, num_tokens, dense), pair)
        del dense
        row: dict[str, Any] = {"shape": shape.name, "format": format, "tokens": num_tokens}
        row |= {"passed": False, "left_early": 0}
        rows.append(row)
        c.keep(result)
        try:
            row |= Preempted(c, tensors).all_ways(time.monotonic() + seconds)
        except Exception as error:
            row["error"] = one_line(error)
            if c.device.type == "cuda":
                torch.cuda.synchronize(c.device)
        del pair, tensors
        free_memory(c.device)
        c.say(f"{name_of(row)}: {'fine' if row['passed'] else 'FAILED'} {_brief(row)}")
        result["left_early"] += row["left_early"]
        result["passed"] = all(r["passed"] for r in rows)
        c.keep(result)
    if not result["left_early"]:
        result["passed"] = False
        result["reason"] = "no step was left early, so nothing was tested"
    return result


def _bitwise_plan(c: Context) -> list[tuple[Shape, int, str]]:
    if c.rehearsal:
        return [(TINY, 8, DENSE), (TINY, 2048, DENSE), *((TINY, 300, format) for format in FORMATS[1:])]
    # Quantised ones take about a quarter of the time.
    few = [(QWEN3, 32, format) for format in FORMATS[1:]]
    if c.quick:
        return [(QWEN3, 32, DENSE), (OLMOE, 2048, DENSE), *few[-1:]]
    plan = [(shape, t, DENSE) for t in (2048, 8) for shape in SHAPES if shape != DEEPSEEK]
    return [*plan, (QWEN3, 8192, DENSE), (DEEPSEEK, 2048, DENSE), *few]


def _bitwise_name(case: tuple[Shape, int, str]) -> str:
    return name_of(dict(zip(("shape", "tokens", "format"), (case[0].name, *case[1:]), strict=True)))


def _brief(row: dict[str, Any]) -> str:
    return row.get("error") or f"({row['runs']} runs, {row['steps']} steps, {row['left_early']} left early)"


class Preempted:
    """The same inputs, run in many ways; counts what went wrong."""

    def __init__(self, c: Context, tensors: Tensors):
        self.c, self.tensors = c, tensors
        with poisoned():
            self.want = moe(*tensors, backend=c.backend)
        self.flag = PriorityFlag(c.device)
        self.runs = self.steps = self.left_early = 0
        self.wrong: list[str] = []

    def all_ways(self, deadline: float) -> dict[str, Any]:
        self.expect("without preemption", not self.want.isnan().any(), "NaN in the output")
        for _ in range(2):
            self.expect("again", torch.equal(moe(*self.tensors, backend=self.c.backend), self.want), "bits")
        self.run("with a flag")
        total = self.new_run().tiles_total
        for quantum in sorted({max(1, total // n) for n in (150, 11, 2)} | {total, total + 5}):
            self.run(f"quantum {quantum}", max_tiles=quantum)
        for programs in (1, 7, 100, FULL):
            self.flag.share(0, programs)
            settle(self.flag)
            self.run(f"share {programs}")
        self.run("paused before every other step", max_tiles=max(1, total // 20), pause_between=True)
        self.flips(deadline)
        return {
            "tiles": total,
            "runs": self.runs,
            "steps": self.steps,
            "left_early": self.left_early,
            "wrong": self.wrong[:10],
            "passed": not self.wrong,
        }

    def new_run(self) -> MoeRun:
        with poisoned():
            return MoeRun(*self.tensors, flag=self.flag, backend=self.c.backend)

    def run(self, way: str, max_tiles: int | None = None, pause_between: bool = False) -> None:
        run, before = self.new_run(), 0
        while not run.done:
            if pause_between:
                self.flag.pause(0)
                settle(self.flag)
                self.expect(way, not run.step() and run.tiles_done == before, "ran while paused")
                self.flag.resume(0)
                settle(self.flag)
            finished = run.step(max_tiles)
            self.left_early += self.flipping and not finished
            done = run.tiles_done
            self.steps += 1
            # A tile that is left halfway was taken for nothing; a quantum leaves none.
            whole = run.tiles_taken == done or (self.flipping and run.tiles_taken > done)
            self.expect(way, whole, f"{run.tiles_taken} tiles taken, {done} done")
            self.expect(way, done >= before, f"from {before} to {done} tiles")
            if done == before and not self.flipping:  # only a pause may do that
                self.expect(way, False, f"a step did nothing at {done} of {run.tiles_total}")
                return
            before = done
            if not run.done:
                self.flag.wait(0)
        self.runs += 1
        self.expect(way, run.tiles_done == run.tiles_total, "tiles done are not tiles in all")
        self.expect(way, torch.equal(run.output, self.want), "different bits")

    flipping = False

    def flips(self, deadline: float) -> None:
        """Runs while another host thread pauses and resumes at random."""
        before, enough = self.runs, 20 if self.c.quick else 100
        with self.flipped():
            while self.runs - before < enough and (self.runs == before or time.monotonic() < deadline):
                self.run("random pauses")

    @contextmanager
    def flipped(self) -> Iterator[None]:
        stop = threading.Event()

        def flip() -> None:
            draw = random.Random(0)
            while not stop.is_set():
                with self.flag.urgent(1):
                    time.sleep(draw.random() * 3e-4)
                time.sleep(draw.random() * 2e-3)

        thread = threading.Thread(target=flip, daemon=True)
        self.flipping = True
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.flipping = False

    def expect(self, way: str, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(f"{way}: {what}")

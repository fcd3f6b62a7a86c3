"""Times tile configurations on this GPU, and writes those that win into its tuned table.

    python perf/tune.py                                        five models, T = 1 to 8192
    python perf/tune.py --models mixtral --tokens 1 32 2048
    python perf/tune.py --max-exit-us inf                      the fastest tiles, however late they leave

One layer of each model in bfloat16, one phase at a time. Around what `qllm_ops.tiles` picks today (the
heuristics, or the table's entry) stand the candidates: what one or two steps of block_n, block_k, stages,
warps, programs and, in down, split_k lead to, if it fits the device and leaves in time. They are compiled in
parallel, checked against the output of the present choice, and timed in turns with it. The best few go
into a final, beside the present choice twice: what these two differ by is noise. Only who wins by more
than the noise, over all numbers of tokens that share the entry, is written; the entry says by how much.

The table is qllm_ops/tuned/DEVICE.json, what was timed is in perf/results/tune-DEVICE.json. Both are
written after every decision: a run that was interrupted goes on with the same command, and one that was not
finds nothing left to do, unless torch, triton or the choice is another. A case that failed is not tried again
until it is deleted there. Exit code: 0; 1 if a case failed or the run was interrupted; 2 without a device
that runs the kernels.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkout
import gpu_check
import torch
from check_speed import TOKENS, rotated
from context import free_memory, one_line
from layers import DEEPSEEK, GPT_OSS, MIXTRAL, OLMOE, QWEN3, Shape, Tensors, errors, weights
from timing import Call, capture, interleaved, spread

from qllm_ops import Activation
from qllm_ops.device import arch_of, unsupported
from qllm_ops.inputs import MoeInputs, check_inputs
from qllm_ops.tiles import (
    EXIT_US,
    MAX_PARTS,
    PHASES,
    TileConfig,
    TileKey,
    entry_key,
    layer_configs,
    leave_us,
    new_entry,
    phase_sizes,
    read_table,
    row_class,
    table_path,
    tiles_problem,
    tuned_table,
    within_exit,
)

MODELS = {"mixtral": MIXTRAL, "qwen3": QWEN3, "olmoe": OLMOE, "gpt-oss": GPT_OSS, "deepseek": DEEPSEEK}
DTYPE = torch.bfloat16
NO_DEVICE = gpu_check.NO_DEVICE

FINALISTS = 3
"""The best of some dozens has been lucky, too: the final is timed anew."""

LEAST_GAIN = 0.01
"""An entry is a kernel more to compile and a line more to keep: less than this is not worth it."""

PROCESSES = 10


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("tune: no CUDA device here; tiles are timed on the device that they are for", file=sys.stderr)
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    if unsupported(device):
        print(f"tune: {unsupported(device)}", file=sys.stderr)
        return NO_DEVICE
    os.environ.pop("TRITON_INTERPRET", None)  # read when our kernels are imported: below
    torch.set_grad_enabled(False)
    try:
        return tune(tuning_of(device, args.max_exit_us, args.seconds), args.models, args.tokens)
    except KeyboardInterrupt:
        print("interrupted; what was decided is kept, and the same command goes on", flush=True)
        return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--max-exit-us", type=float, default=EXIT_US, help="longest time of one tile")
    parser.add_argument("--seconds", type=float, default=4.0, help="timing per entry, compilation excluded")
    args = parser.parse_args()
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    if not args.max_exit_us > 0:
        parser.error("--max-exit-us must be a positive number, or inf")
    return args


# -- what there is to decide -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """The device, the limits, and where the decisions go."""

    device: torch.device
    name: str
    arch: str
    max_exit_us: float
    seconds: float
    dtype: torch.dtype
    progress: Path

    def provenance(self) -> dict[str, Any]:
        # Published with the table: no path of the machine in it.
        command = shlex.join(["python", "perf/tune.py", *sys.argv[1:]])
        return {"date": gpu_check.now(), "versions": versions(), "command": command}


@dataclass(frozen=True)
class Job:
    """One entry of the table, and the layers that decide it."""

    shape: Shape
    key: TileKey
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape.name} T={','.join(map(str, self.tokens))} {self.key.phase}"


def tuning_of(device: torch.device, max_exit_us: float, seconds: float) -> Tuning:
    name = torch.cuda.get_device_name(device)
    progress = gpu_check.HERE / "results" / f"tune-{table_path(name).stem.lower().replace(' ', '-')}.json"
    return Tuning(device, name, arch_of(device), max_exit_us, seconds, DTYPE, progress)


def jobs(shapes: Sequence[Shape], tokens: Sequence[int], dtype: torch.dtype) -> list[Job]:
    """Every entry that layers of these sizes use, once: the first shape decides for those that share it."""
    found: dict[TileKey, Job] = {}
    for shape in shapes:
        sizes = phase_sizes(shape.top_k, shape.hidden_size, shape.intermediate_size)
        for phase in PHASES:
            for num_tokens in sorted(set(tokens)):
                most_rows, _, _ = row_class(num_tokens, shape.top_k, shape.num_experts)
                key = TileKey(phase, most_rows, *sizes[phase], str(dtype).removeprefix("torch."))
                job = found.setdefault(key, Job(shape, key, ()))
                if job.shape == shape:
                    found[key] = replace(job, tokens=(*job.tokens, num_tokens))
    return list(found.values())


def present_tiles(t: Tuning, job: Job) -> dict[str, TileConfig]:
    """What the layers of a job are computed with today, the table included."""
    shape = job.shape
    return layer_configs(
        num_tokens=job.tokens[0], top_k=shape.top_k, num_experts=shape.num_experts,
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, dtype=t.dtype,
        arch=t.arch, max_exit_us=t.max_exit_us, device_name=t.name,
    )  # fmt: skip


# -- candidates ------------------------------------------------------------------------------------------

DOUBLED = {
    "gate_up": ("block_n", "block_k", "num_warps"),
    "down": ("block_n", "block_k", "num_warps", "split_k"),
    "combine": ("block_n", "num_warps"),
}
ADDED = {
    "gate_up": ("num_stages", "programs_per_sm"),
    "down": ("num_stages", "programs_per_sm"),
    "combine": ("programs_per_sm",),
}


def candidates(t: Tuning, job: Job, present: TileConfig) -> list[TileConfig]:
    """What one or two steps from the present choice lead to and the device can run in time."""
    near = list(steps(job.key.phase, present))
    far = [config for step in near for config in steps(job.key.phase, step)]
    return [c for c in dict.fromkeys([*near, *far]) if c != present and allowed(t, job, c, present)]


def steps(phase: str, config: TileConfig) -> Iterator[TileConfig]:
    """``config`` with one field twice or half as large, or one more or less."""
    for field in DOUBLED[phase]:
        value = getattr(config, field)
        yield replace(config, **{field: 2 * value})
        if value > 1:
            yield replace(config, **{field: value // 2})
    for field in ADDED[phase]:
        value = getattr(config, field)
        yield replace(config, **{field: value + 1})
        if value > 1:
            yield replace(config, **{field: value - 1})


def allowed(t: Tuning, job: Job, config: TileConfig, present: TileConfig) -> bool:
    phase, k = job.key.phase, job.key.k
    if tiles_problem(phase, config, t.dtype, t.arch) or not registers_suffice(phase, config):
        return False
    if not 2 <= config.num_warps <= 8:
        return False
    if phase == "combine":
        return config.block_n >= 128  # 16 bytes for each of some threads; its tiles are short anyway
    if config.block_k > 256 or not 2 <= config.num_stages <= 6:
        return False
    if config.split_k > max(1, k // (4 * config.block_k)):
        return False
    # What the rule of the exit would change is not what would run. And where even the smallest tiles are
    # late, more programs side by side would make them later.
    _, _, read_once = row_class(job.tokens[0], job.shape.top_k, job.shape.num_experts)
    estimate = functools.partial(leave_us, k=k, dtype=t.dtype, arch=t.arch, read_once=read_once)
    if estimate(phase, config) > max(t.max_exit_us, estimate(phase, present)):
        return False
    return within_exit(phase, config, k, t.dtype, t.arch, read_once, t.max_exit_us) == config


def registers_suffice(phase: str, config: TileConfig) -> bool:
    """The sums of a tile, and 48 registers for all else, in every thread of the resident programs.

    A rough bound, to leave out what would surely spill; 128 of sums in a thread are the most that do not.
    """
    columns = config.block_n * (2 if phase == "gate_up" else 1)
    threads = 32 * config.num_warps
    sums = config.block_m * columns / threads
    return sums <= 128 and (sums + 48) * threads * config.programs_per_sm <= 65536


def label(config: TileConfig) -> str:
    c = config
    return (
        f"{c.block_m}x{c.block_n}x{c.block_k} warps {c.num_warps} stages {c.num_stages} "
        f"programs {c.programs_per_sm} split {c.split_k} exit {c.exit_k}"
    )


# -- one phase, again and again --------------------------------------------------------------------------


class PhaseRuns:
    """One phase of several layers in turn, with any tiles; what comes before it was computed once.

    It shares buffers between candidates, so it reaches into `TritonMoe` (tests/test_tune.py notices when
    that changes).
    """

    def __init__(self, phase: str, inputs: Sequence[Tensors], present: dict[str, TileConfig]):
        self.phase, self.bases = phase, [self._computed(tensors, present) for tensors in inputs]
        self._want = self._result(self.bases[0]).clone()
        if phase == "down":
            for base in self.bases:
                base._partial = base._partial.new_empty(MAX_PARTS, *base._partial.shape[1:])

    def call(self, config: TileConfig) -> Call:
        """The phase of every layer, as often as it is called. One small copy before each is part of it."""
        runs = [self._with_tiles(base, config) for base in self.bases]

        def launch() -> None:
            for run, start in runs:
                self._launch(run, start)

        return launch

    def check(self, config: TileConfig) -> None:
        """Raises if the phase computes anything else than with the present tiles, or leaves anything out."""
        run, start = self._with_tiles(self.bases[0], config)
        self._written(run).fill_(float("nan"))
        self._launch(run, start)
        off = errors(self._result(run), self._want.float())
        if not off["passed"]:
            raise AssertionError(f"its output is not that of the present tiles: {off}")

    @staticmethod
    def _computed(tensors: Tensors, tiles: dict[str, TileConfig]) -> Any:
        from qllm_ops.plan import plan_of
        from qllm_ops.triton_moe import TritonMoe

        inputs = check_inputs(*tensors)
        run = TritonMoe(inputs, None, 0, plan=plan_of(inputs, tiles, inputs.hidden_size))
        run.launch_all()
        return run

    def _with_tiles(self, base: Any, config: TileConfig) -> tuple[Any, torch.Tensor]:
        """A run with other tiles in the phase, and the state in which only the phase is not done."""
        from qllm_ops.plan import Plan

        run = copy.copy(base)
        run.plan = Plan(base.plan.signature, {**base.plan.tiles, self.phase: config}, base.plan.width)
        run._state = run._state.new_empty(run.plan.state_words)
        run._route()
        run._rewind(PHASES.index(self.phase))
        return run, run._state.clone()

    def _launch(self, run: Any, start: torch.Tensor) -> None:
        run._state.copy_(start)
        run._launch(run.plan.phases[PHASES.index(self.phase)], poll=False)

    def _written(self, run: Any) -> torch.Tensor:
        return {"gate_up": run._intermediate, "down": run._partial, "combine": run._output}[self.phase]

    def _result(self, run: Any) -> torch.Tensor:
        written = self._written(run)
        if self.phase != "down":
            return written
        return written[: run.plan.tiles["down"].split_k].float().sum(0).to(written.dtype)


def compile_tiles(
    device: torch.device, shape: Shape, dtype: torch.dtype, num_tokens: int, tiles: dict[str, TileConfig]
) -> str | None:
    """Launch a layer in which no expert has a token, in a process that only compiles. The error, if any."""
    from qllm_ops.plan import plan_of
    from qllm_ops.triton_moe import TritonMoe

    one = torch.zeros(1, dtype=dtype, device=device)
    inputs = MoeInputs(
        hidden_states=torch.zeros(num_tokens, shape.hidden_size, dtype=dtype, device=device),
        gate_up_proj=one.expand(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size),
        down_proj=one.expand(shape.num_experts, shape.hidden_size, shape.intermediate_size),
        top_k_index=torch.full((num_tokens, shape.top_k), -1, device=device),
        top_k_weights=torch.zeros(num_tokens, shape.top_k, dtype=dtype, device=device),
        activation=Activation("silu"),
    )
    try:
        TritonMoe(inputs, None, 0, plan=plan_of(inputs, tiles)).launch_all()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        return one_line(error)
    return None


# -- timing ----------------------------------------------------------------------------------------------

Times = dict[int, dict[str, list[float]]]
"""Seconds per layer by number of tokens and name, a list with one time of every round."""


def compete(
    t: Tuning,
    job: Job,
    pair: tuple[torch.Tensor, torch.Tensor],
    present: dict[str, TileConfig],
    rivals: dict[str, TileConfig],
) -> tuple[dict[str, float], Times, dict[str, str]]:
    """The first ratios of all, the times of the final, and who failed why."""
    failed: dict[str, str] = {}
    heat: Times = {}
    for num_tokens in job.tokens:
        heat[num_tokens] = times_of(t, job, pair, num_tokens, present, rivals, failed)
    entered = [name for name in rivals if name not in failed]
    ratios = {name: mean_ratio(heat, name) for name in entered}
    best = sorted(ratios, key=ratios.get)[:FINALISTS]
    final: Times = {}
    for num_tokens in job.tokens if best else ():
        few = {name: rivals[name] for name in best}
        final[num_tokens] = times_of(t, job, pair, num_tokens, present, few, failed)
    return ratios, final, failed


def times_of(
    t: Tuning,
    job: Job,
    pair: tuple[torch.Tensor, torch.Tensor],
    num_tokens: int,
    present: dict[str, TileConfig],
    rivals: dict[str, TileConfig],
    failed: dict[str, str],
) -> dict[str, list[float]]:
    """Seconds per layer of the present tiles, of the same again, and of every rival that works."""
    inputs = rotated(job.shape, num_tokens, pair)
    runs = PhaseRuns(job.key.phase, inputs, present)
    ours = present[job.key.phase]
    calls = {name: capture(runs.call(ours), t.device) for name in ("present", "again")}
    for name, config in rivals.items():
        if name in failed:
            continue
        try:
            runs.check(config)
            calls[name] = capture(runs.call(config), t.device)
        except Exception as error:
            failed[name] = one_line(error)
            if gpu_check.broken(t.device):
                raise
    found = interleaved(calls, t.device, t.seconds / 2 / len(job.tokens), least=9, most=200)
    return {name: [s / len(inputs) for s in seconds] for name, seconds in found.items()}


# -- deciding --------------------------------------------------------------------------------------------


def mean_ratio(times: Times, name: str) -> float:
    """Time over that of the present tiles: medians over the rounds, geometric mean over the tokens."""
    return statistics.geometric_mean(ratio_spread(t, name)["p50"] for t in times.values())


def ratio_spread(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Of the ratios within a round."""
    return spread(a / b for a, b in zip(times[name], times["present"], strict=True))


def noise_of(times: Times) -> float:
    """How far from 1 the quartiles of the same tiles against themselves come, at the worst."""
    spreads = [ratio_spread(t, "again") for t in times.values()]
    return max(abs(s[quartile] - 1) for s in spreads for quartile in ("p25", "p75"))


def decide(final: Times) -> tuple[str, dict[str, Any]] | None:
    """Who wins the final, and by what; None if the present tiles stay.

    Better by more than the noise over all numbers of tokens, and worse by more than the noise in none.
    """
    entered = [name for name in next(iter(final.values()), ()) if name not in ("present", "again")]
    entered = [name for name in entered if all(name in times for times in final.values())]
    if not entered:
        return None
    best = min(entered, key=functools.partial(mean_ratio, final))
    ratio, noise = mean_ratio(final, best), noise_of(final)
    by_tokens = {tokens: ratio_spread(times, best) for tokens, times in final.items()}
    if ratio >= 1 - max(noise, LEAST_GAIN) or any(s["p50"] > 1 + noise for s in by_tokens.values()):
        return None
    median = {tokens: {name: statistics.median(t[name]) * 1e6 for name in t} for tokens, t in final.items()}
    return best, {
        "ratio": round(ratio, 4),
        "noise": round(noise, 4),
        "tokens": {
            str(tokens): {
                "us": round(median[tokens][best], 2),
                "before_us": round(median[tokens]["present"], 2),
                "ratio_p25_p50_p75": [round(s[p], 4) for p in ("p25", "p50", "p75")],
                "rounds": s["n"],
            }
            for tokens, s in by_tokens.items()
        },
    }


# -- keeping ---------------------------------------------------------------------------------------------


def merged(table: dict[str, Any] | None, head: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The table with one entry more, or in place of the one that had its key."""
    key = entry_key(entry)
    others = [other for other in (table or {}).get("entries", ()) if entry_key(other) != key]
    in_order = sorted([*others, entry], key=lambda e: _order(entry_key(e)))
    return {**head, "entries": in_order}


def _order(key: TileKey) -> tuple[Any, ...]:
    return key.n * key.k, key.n, PHASES.index(key.phase), key.dtype, key.most_rows


def enter(t: Tuning, job: Job, config: TileConfig, won_by: dict[str, Any]) -> None:
    """Write a winner into the device's table."""
    path = table_path(t.name)
    now = t.provenance()
    limit = None if math.isinf(t.max_exit_us) else t.max_exit_us
    measured = {**won_by, "model": job.shape.name, "max_exit_us": limit}
    measured |= {"date": now["date"], "versions": now["versions"]}
    head = {"device": t.name, "arch": t.arch, **now}
    table = merged(read_table(path) if path.exists() else None, head, new_entry(job.key, config, measured))
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu_check.write(table, path)
    tuned_table.cache_clear()


def read_progress(t: Tuning) -> dict[str, Any]:
    if t.progress.exists():
        return json.loads(t.progress.read_text())
    return {"what": "perf/tune.py", "device": t.name, "arch": t.arch, "cases": []}


def identity(t: Tuning, job: Job, chosen: TileConfig) -> dict[str, Any]:
    """What a decision was about, and what came of it: who finds the same has nothing to decide."""
    asked = {"key": str(job.key), "tokens": list(job.tokens), "max_exit_us": str(t.max_exit_us)}
    return {**asked, "versions": versions(), "chosen": asdict(chosen)}


def decided(t: Tuning, document: dict[str, Any], job: Job) -> bool:
    same = identity(t, job, present_tiles(t, job)[job.key.phase])
    return any({name: case.get(name) for name in same} == same for case in document["cases"])


@functools.cache
def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "triton")}


# -- all of it -------------------------------------------------------------------------------------------


def tune(t: Tuning, models: Sequence[str], tokens: Sequence[int]) -> int:
    document = read_progress(t)
    document |= {**t.provenance(), "commit": checkout.commit()}
    todo = jobs([MODELS[name] for name in models], tokens, t.dtype)
    left = [job for job in todo if not decided(t, document, job)]
    print(f"tune, {t.name}: {len(todo)} entries, {len(todo) - len(left)} of them decided before", flush=True)
    t.progress.parent.mkdir(parents=True, exist_ok=True)
    wrong, loaded, pair = 0, None, None
    workers = max(1, min(PROCESSES, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in left:
            if job.shape != loaded:
                pair = None
                free_memory(t.device)
                pair, loaded = load(t, job.shape), job.shape
            if pair is None:
                print(f"{job}: not enough memory", flush=True)
                wrong += 1
                continue
            case = one_job(t, job, pair, pool)
            document["cases"].append(case)
            gpu_check.write(document, t.progress)
            wrong += "error" in case
            if gpu_check.broken(t.device) or "BrokenProcessPool" in case.get("error", ""):
                # By a candidate, mostly; the case is noted, so that it does not happen again.
                print("the device or a compiler is gone; the same command goes on behind it", flush=True)
                return 1
    return 1 if wrong else 0


def load(t: Tuning, shape: Shape) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The shape's weights, or None where they leave no room for the rest."""
    if t.device.type == "cuda" and shape.layer_bytes > 0.7 * torch.cuda.mem_get_info(t.device)[0]:
        return None
    return weights(shape, t.dtype, t.device)


def one_job(t: Tuning, job: Job, pair: tuple[torch.Tensor, torch.Tensor], pool: Executor) -> dict[str, Any]:
    """Decide one entry, and write it if somebody won. What is returned is for the progress file."""
    present = present_tiles(t, job)
    ours = present[job.key.phase]
    rivals = {label(config): config for config in candidates(t, job, ours)}
    case: dict[str, Any] = {"model": job.shape.name, "present": label(ours), "tried": len(rivals)}
    chosen = ours
    try:
        failed = compile_all(t, job, present, rivals, pool)
        rivals = {name: config for name, config in rivals.items() if name not in failed}
        ratios, final, late = compete(t, job, pair, present, rivals)
        case |= {"failed": failed | late, "first_ratios": {n: round(r, 4) for n, r in ratios.items()}}
        won = decide(final)
        if won is not None:
            chosen, case["won_by"] = rivals[won[0]], won[1]
            enter(t, job, chosen, won[1])
    except Exception as error:
        case["error"] = one_line(error)
    free_memory(t.device)
    told = f"{label(chosen)}, {case['won_by']['ratio']:.3f} of the time" if "won_by" in case else "stays"
    print(f"{job}: {label(ours)}: {case.get('error', told)} ({len(rivals)} tried)", flush=True)
    return {**case, **identity(t, job, chosen)}


def compile_all(
    t: Tuning, job: Job, present: dict[str, TileConfig], rivals: dict[str, TileConfig], pool: Executor
) -> dict[str, str]:
    """Compile all rivals into Triton's cache, side by side; who does not compile, and why."""
    compiler: Callable[..., str | None] = functools.partial(
        compile_tiles, t.device, job.shape, t.dtype, job.tokens[0]
    )
    waiting = {
        name: pool.submit(compiler, {**present, job.key.phase: config}) for name, config in rivals.items()
    }
    results = {name: future.result() for name, future in waiting.items()}
    return {name: error for name, error in results.items() if error}


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can show, in one command: is it right, how fast, how soon does it leave?

    python perf/gpu_check.py                    all sections, within 9 minutes
    python perf/gpu_check.py --quick            fewer shapes and samples, about 3 minutes
    python perf/gpu_check.py --sections correctness bitwise

Runs from a checkout, installed or not; needs torch, triton and numpy, and transformers for its part. The
results go to perf/results/gpu_check-DEVICE-DATE.json (or --out), rewritten as they come, and a short table
is printed at the end. The device's settings are left as they are.

    environment   device, driver, versions, clocks, commit
    compile       machine code of all shapes, in parallel (so that it does not take minutes later)
    ceilings      copy bandwidth and bf16 matrix rate of this device: what the floors below are made of
    correctness   five models' layers, 1 to 8192 tokens, against float32; NaN in every output beforehand;
                  routings at the edge; quantised layers against what their weights stand for. RMS
                  error <= 4e-3 (fp32: 1e-5), largest <= 2e-2 of the peak
    speed         time per layer against transformers' grouped_mm and batched_mm and against the floor; of
                  each phase against its own floor; of quantised layers against dense ones; memory
    latency       from the host's write of the flag until the launch is over: p50 to p99, for each way of
                  writing it, with what an idle device takes beside it
    bitwise       runs that are stepped, shared and paused at random: same bits, every tile once
    polling       what the poll costs a kernel that nobody pauses
    lanes         what a gate costs that nobody closes, both gates under random pauses, and a share of the
                  programs beside urgent work against taking turns
    replay        LS and BE requests on one model under the four policies, and LS alone

Each section has a share of the time and says what it left out. Sections run in a process of their own
that is watched: a case that raises, hangs or takes the process down is noted, and a new process goes on with
the next one.

Exit code: 0; 1 if correctness, bitwise or lanes failed or did not come to an end; 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_table import print_summary  # noqa: E402  (needs nothing that may be missing, as all of this file)

SHARES = {
    "environment": 5,
    "compile": 75,
    "ceilings": 8,
    "correctness": 60,
    "speed": 150,
    "latency": 40,
    "bitwise": 55,
    "polling": 35,
    "lanes": 35,
    "replay": 50,
}
"""The sections in order, and how they share the time. What one leaves goes to those behind it."""

DECISIVE = ("correctness", "bitwise", "lanes")

BUDGET_S, QUICK_BUDGET_S = 520.0, 200.0
GRACE_S = 25.0
"""How long a section, or one case of it, may go on after its time before its process is killed."""

RESTART_S = 15.0
"""What a section is given for the process that goes on with it."""

START_S = 180.0
"""How long a process may take until its first section begins: importing torch from a cold disk."""

FRESH = ("lanes",)
"""Sections that begin in a process of their own: streams that stand still hold up those that share a hardware
queue with them, and earlier sections leave dozens of streams behind."""

NO_DEVICE, ANOTHER_PROCESS = 2, 75


def main() -> int:
    args = parse()
    if args.worker:
        return work(json.loads(args.worker))
    options = {
        "command": shlex.join(["python", *sys.argv]),
        "sections": args.sections,
        "device": args.device,
        "quick": args.quick,
        "out": str(args.out) if args.out else None,
        "deadline": time.time() + args.budget_s,
        "budget_s": args.budget_s,
    }
    return supervise([sys.executable, str(Path(__file__).resolve())], options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SHARES, metavar="SECTION", help="only these")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--budget-s", type=float, help=f"seconds for everything, by default {BUDGET_S:.0f}")
    # A rehearsal on a CPU, for the tests of this script.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cuda" and not args.out and not args.worker:
        parser.error("a rehearsal needs --out: perf/results is for what was measured on a GPU")
    args.budget_s = args.budget_s or (QUICK_BUDGET_S if args.quick else BUDGET_S)
    args.sections = [name for name in SHARES if not args.sections or name in args.sections]
    return args


# -- the process that watches ----------------------------------------------------------------------------


def supervise(command: list[str], options: dict[str, Any]) -> int:
    """Run the sections in a process, and in another one those that are left when it comes to grief."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `watch` then ends the worker
    remaining = list(options["sections"])
    out = Path(options["out"]) if options["out"] else None
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        progress_file = Path(folder) / "progress.json"
        resume = False
        while remaining:
            asked = {**options, "sections": remaining, "progress": str(progress_file), "resume": resume}
            asked["out"] = str(out) if out else None
            code, progress, hung = watch([*command, "--worker", json.dumps(asked)], progress_file)
            out = Path(progress["out"]) if progress.get("out") else out
            if code == NO_DEVICE:
                return NO_DEVICE
            remaining = [name for name in remaining if name not in progress.get("begun", ())]
            running = progress.get("running")
            if running:
                document = json.loads(out.read_text())
                entry = document["sections"][running]
                how = f"hung, killed after {hung:.0f} s" if hung else f"its process ended with code {code}"
                if code == ANOTHER_PROCESS:
                    how = entry.get("error") or "the device does not answer any more"
                if lose_case(entry, "hung" if hung else "crashed", how):
                    remaining.insert(0, running)
                print(f"  {running}: {entry['error']}", flush=True)
                write(document, out)
            elif code == 0:
                break
            elif code != ANOTHER_PROCESS:
                print(f"the sections could not be started (exit code {code})", flush=True)
                break
            resume = True
    if out is None or not out.exists():
        return 1
    document = json.loads(out.read_text())
    for name in remaining:
        document["sections"].setdefault(name, {"status": "not run"})
    document["passed"] = passed(document, options["sections"])
    document["finished"] = now()
    write(document, out)
    print_summary(document)
    print(f"written to {out}", flush=True)
    return 0 if document["passed"] else 1


def lose_case(entry: dict[str, Any], status: str, how: str) -> bool:
    """Note what a section came to grief in. Whether its other cases can be tried, in a new process."""
    case, lost = entry.get("case"), entry.setdefault("lost", [])
    new = case not in (None, *(each["case"] for each in lost))
    lost.append({"case": case, "how": how})
    entry["until"] = entry.get("until", 0.0) + RESTART_S
    entry |= {"status": status, "error": how if case is None else f"{case}: {how}"}
    return new and time.time() < entry["until"]


def watch(command: list[str], progress_file: Path) -> tuple[int, dict[str, Any], float | None]:
    """Run a worker until it ends or is overdue: exit code, its last progress, and the seconds if it hung."""
    progress_file.unlink(missing_ok=True)
    started = time.time()
    process = subprocess.Popen(command, start_new_session=True)
    hung = None
    try:
        while process.poll() is None:
            progress = read_progress(progress_file)
            if time.time() > progress.get("limit", started + START_S):
                hung = time.time() - progress.get("since", started)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it may have started
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
                process.wait(20)
    code = -signal.SIGKILL if process.returncode is None else process.returncode
    return code, read_progress(progress_file), hung


def read_progress(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def passed(document: dict[str, Any], sections: list[str]) -> bool:
    decisive = [name for name in DECISIVE if name in sections]
    return all(document["sections"].get(name, {}).get("status") == "done" for name in decisive)


# -- the process that works ------------------------------------------------------------------------------


def work(options: dict[str, Any]) -> int:
    """Run the sections of ``options`` one after another."""
    if options["device"] == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)  # it is read when triton is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nobody waits for a network
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # for the stream gate; read when CUDA starts
    import torch

    if options["device"] == "cuda" and not torch.cuda.is_available():
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        build = build if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA"
        print(f"gpu_check: no CUDA device here ({build}). Nothing was measured.", file=sys.stderr)
        return NO_DEVICE
    from context import Context

    torch.set_float32_matmul_precision("highest")  # the references' products; some images preset TF32
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if options["device"] == "cuda"
        else torch.device("cpu")
    )
    out = Path(options["out"]) if options["out"] else default_out(torch.cuda.get_device_name(device))
    out.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(out.read_text()) if options["resume"] else new_document(options, device)
    progress: dict[str, Any] = {"out": str(out), "begun": [], "running": None}

    def note(**changes: Any) -> None:
        progress.update(changes)
        write(document, out)
        write(progress, Path(options["progress"]))

    for n, name in enumerate(options["sections"]):
        if name in FRESH and n:
            return ANOTHER_PROCESS
        left = max(0.0, options["deadline"] - time.time())
        share = SHARES[name] / sum(SHARES[other] for other in options["sections"][n:])
        # What another process has begun goes on from its next case, within the time that it had.
        before = document["sections"].get(name, {"until": time.time() + left * share})
        entry = document["sections"][name] = {**before, "status": "running"}
        allowed = max(0.0, entry["until"] - time.time())
        progress["begun"].append(name)
        note(running=name, since=time.time(), limit=time.time() + allowed + GRACE_S)
        print(f"{name} ({allowed:.0f} s)", flush=True)

        def keep(result: dict[str, Any], entry: dict[str, Any] = entry) -> None:
            entry["result"] = result
            write(document, out)

        def begin(case: str, seconds: float, entry: dict[str, Any] = entry) -> None:
            entry |= {"case": case, "cases_begun": entry.get("cases_begun", 0) + 1}
            note(since=time.time(), limit=time.time() + seconds + GRACE_S)

        context = Context(
            device=device,
            backend="torch" if device.type == "cpu" else "triton",
            quick=options["quick"],
            rehearsal=device.type != "cuda",
            deadline=time.monotonic() + allowed,
            results=document["sections"],
            keep=keep,
            begin=begin,
            so_far=before.get("result", {}),
            done_before=before.get("cases_begun", 0),
            left_out=before.get("left_out", []),
        )
        run_section(name, context, entry)
        write(document, out)
        if broken(device):
            print("  the device does not answer any more: what is left gets a new process", flush=True)
            return ANOTHER_PROCESS
        note(running=None, limit=time.time() + START_S)
    return 0


def run_section(name: str, context: Any, entry: dict[str, Any]) -> None:
    """Run one section into ``entry``; nothing that it raises goes further."""
    import gc
    import traceback

    from context import Skip, one_line

    start = time.monotonic()
    try:
        entry["result"] = section(name)(context)
        entry["status"] = "done" if entry["result"].get("passed", True) else "failed"
    except Skip as reason:
        entry |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        entry |= {"status": "error", "error": one_line(error), "traceback": traceback.format_exc()}
        traceback.print_exc()
    if entry.get("lost"):
        entry["status"] = "crashed"
    if context.left_out:
        entry["left_out"] = list(dict.fromkeys(context.left_out))
    entry["seconds"] = time.monotonic() - start
    gc.collect()
    print(f"  {name}: {entry['status']} in {entry['seconds']:.1f} s", flush=True)


def section(name: str) -> Any:
    """The function of a section, imported when it is needed: a missing package costs one section."""
    if name == "environment":
        return environment
    import importlib

    module, function = {
        "compile": ("compile_ahead", "compile_all"),
        "ceilings": ("check_speed", "ceilings"),
        "correctness": ("check_correct", "correctness"),
        "bitwise": ("check_correct", "bitwise"),
        "latency": ("check_latency", "latency"),
        "polling": ("check_speed", "polling"),
        "lanes": ("check_lanes", "lanes"),
        "speed": ("check_speed", "speed"),
        "replay": ("check_replay", "replay"),
    }[name]
    return getattr(importlib.import_module(module), function)


def broken(device: Any) -> bool:
    """Whether an earlier error has left the device's context unusable."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return torch.ones(2, device=device).sum().item() != 2
    except Exception:
        return True


# -- what it ran on --------------------------------------------------------------------------------------

VARIABLES = re.compile(r"CUDA_(DEVICE|LAUNCH|MODULE|VISIBLE)\w*|(TRITON|PYTORCH|OMP)_\w+")


def environment(context: Any) -> dict[str, Any]:
    import importlib.metadata
    import platform

    import checkout
    import torch
    from context import nvidia_smi

    versions = {"python": platform.python_version(), "cuda of torch": torch.version.cuda}
    ours = ("torch", "triton", "transformers", "numpy", "cuda-bindings", "safetensors", "rich")
    for package in (*ours, "vllm", "triton_kernels"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    result: dict[str, Any] = {
        "versions": versions,
        "commit": checkout.commit(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        # A result is published: no variable with a path of the machine in it.
        "variables": {
            key: os.environ[key]
            for key in sorted(os.environ)
            if VARIABLES.fullmatch(key) and "/" not in os.environ[key]
        },
    }
    if context.device.type == "cuda":
        p = torch.cuda.get_device_properties(context.device)
        free, total = torch.cuda.mem_get_info(context.device)
        result["device"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "memory_bytes": total,
            "free_bytes": free,
        }
        result["nvidia_smi"] = nvidia_smi(context.device)
        context.say(f"{p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors")
    context.say(", ".join(f"{key} {value}" for key, value in versions.items() if value))
    return result


def new_document(options: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    return {
        "what": "perf/gpu_check.py",
        "rehearsal": device.type != "cuda",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "date": now(),
        "command": options["command"],
        "quick": options["quick"],
        "budget_s": options["budget_s"],
        "sections": {},
    }


def default_out(device_name: str, script: str = "gpu_check") -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    stem = f"{script}-{slug}-{datetime.date.today().isoformat()}"
    names = (f"{stem}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in (HERE / "results" / name for name in names) if not path.exists())


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(document: dict[str, Any], path: Path) -> None:
    """Write JSON so that a reader, or whoever comes after a kill, finds the old file or the new one."""
    new = path.with_suffix(".part")
    new.write_text(json.dumps(finite(document), indent=1, allow_nan=False, default=str) + "\n")
    new.replace(path)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit(main())

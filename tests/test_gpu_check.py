"""`perf/gpu_check.py` on a CPU: a rehearsal from end to end, its judgements, and the process that watches."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import check_correct  # noqa: E402
import check_lanes  # noqa: E402
import check_latency  # noqa: E402
import check_speed  # noqa: E402
import compile_ahead  # noqa: E402
import goals  # noqa: E402
import gpu_check  # noqa: E402
import gpu_table  # noqa: E402
import layers  # noqa: E402
import timing  # noqa: E402
from context import Context  # noqa: E402

from qllm_ops import MoeRun, PriorityFlag, moe  # noqa: E402
from qllm_ops.plan import SORTED_PAIRS  # noqa: E402

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def run_script(*args: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=100, env=environment, **options
    )


# -- from end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal") / "out.json"
    options = ("--device", "cpu", "--quick", "--budget-s", "60", "--out", str(out))
    done = run_script(str(PERF / "gpu_check.py"), *options)
    return done, json.loads(out.read_text()) if out.exists() else None


def test_a_rehearsal_passes_and_says_what_it_is(rehearsal):
    done, document = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    assert document["rehearsal"] is True
    assert document["passed"] is True
    assert "REHEARSAL" in done.stdout
    assert "PASSED" in done.stdout
    statuses = {name: entry["status"] for name, entry in document["sections"].items()}
    assert statuses == {name: "skipped" if name == "compile" else "done" for name in gpu_check.SHARES}
    assert all(entry["seconds"] >= 0 for entry in document["sections"].values())


def test_a_rehearsal_measures_every_section(rehearsal):
    results = {name: entry.get("result") for name, entry in rehearsal[1]["sections"].items()}
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["ceilings"]["copy_bytes_per_s"]["p50"] > 0
    correct = results["correctness"]["cases"]
    formats = {"bf16", "fp8", "mxfp4", "int4"}
    for section in ("correctness", "bitwise", "speed"):
        assert {case["format"] for case in results[section]["cases"]} == formats
    assert all(case["passed"] and case["nan"] == 0 for case in correct)
    cases = {(case["dtype"], case["case"]): case for case in correct if case["format"] == "bf16"}
    assert ("bfloat16", "T=0") in cases
    assert cases["float32", "T=8"]["rms"] > 0
    assert all(case["passed"] and case["nan"] == 0 for case in cases.values())
    assert results["bitwise"]["left_early"] > 0
    assert all(not case["wrong"] and case["runs"] > 5 for case in results["bitwise"]["cases"])
    (latency,) = results["latency"]["cases"]
    assert latency["writers"]["step"]["left_early"] > 0
    assert 0 < latency["writers"]["step"]["host_us"]["p50"] <= latency["writers"]["step"]["host_us"]["p99"]
    (gates,) = results["lanes"]["gates"]
    assert gates["called_us"].keys() == {"no flag", "host", "stream"}
    for gate in ("host", "stream"):
        assert gates["paused"][gate]["pauses"] > 0
        assert gates["paused"][gate]["wrong"] == 0 < gates["paused"][gate]["passes"]
    (polling,) = results["polling"]["cases"]
    assert {"overhead", "noise"} <= polling.keys()
    for case in results["speed"]["cases"]:
        compared = case["ratio"].get("grouped_mm") or case["times_faster_than_dense"]
        assert compared["n"] >= 7
        assert ("times_faster_than_dense" in case) == (case["format"] != "bf16")
        assert case["host_us"].keys() >= {"qllm", "with flag"}
        assert not case.get("differ")
        assert 0 < case["of_floor"] < 1
    report = results["replay"]["report"]
    assert list(report["policies"]) == ["fcfs", "priority", "layer", "tile"]
    assert report["ls_alone"]["ls"]["completed"] > 0


def test_without_a_cuda_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_script(str(PERF / "gpu_check.py"), "--out", str(tmp_path / "out.json"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_checkout_works_uninstalled_and_without_rich(tmp_path):
    code = f"""
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [path for path in sys.path if path not in ("", {str(PERF.parent)!r})]
assert importlib.util.find_spec("qllm_ops") is None
sys.path.append({str(PERF)!r})

class NoRich:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError(name)

import checkout
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rich" else real(name, *rest)
sys.meta_path.insert(0, NoRich)
with checkout.without_rich():
    from qllm_ops.scheduler import report
assert "rich" not in sys.modules
assert report.build_report({{}}, 1.0, {{}})["policies"] == {{}}
import qllm_ops.scheduler.workload
print(qllm_ops.__file__, real("qllm_ops.models").origin, qllm_ops.scheduler.__file__)
"""
    done = run_script("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = [str(PERF.parent / folder / "__init__.py") for folder in ("qllm_ops", "models", "scheduler")]
    assert done.stdout.split() == wanted


# -- the process that watches ------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
o = json.loads(sys.argv[2])
def write(d, p):
    open(p + ".part", "w").write(json.dumps(d)); os.replace(p + ".part", p)
out = o["out"]
document = json.load(open(out)) if o["resume"] else {"rehearsal": True, "date": "", "sections": {}}
begun = []
for name in o["sections"]:
    begun.append(name)
    document["sections"][name] = {"status": "running", "result": {"partial": name}}
    write(document, out)
    limit = time.time() + (0.3 if name == "speed" else 60)
    progress = {"out": out, "begun": begun, "running": name, "since": time.time(), "limit": limit}
    write(progress, o["progress"])
    if name == "latency": os.abort()
    if name == "speed": time.sleep(60)
    document["sections"][name] = {"status": "failed" if name == "bitwise" else "done"}
    write(document, out)
    write({**progress, "running": None}, o["progress"])
    if name == "polling": sys.exit(75)
"""


def supervised(tmp_path, sections, script=FAKE, **more):
    fake = tmp_path / "fake.py"
    fake.write_text(script)
    out = tmp_path / "out.json"
    options = {"sections": sections, "out": str(out), "deadline": time.time() + 60, **more}
    code = gpu_check.supervise([sys.executable, str(fake)], options)
    return code, json.loads(out.read_text()) if out.exists() else None


def test_a_crash_a_hang_and_a_broken_device_cost_one_section_each(tmp_path, capfd):
    sections = ["environment", "correctness", "latency", "polling", "speed", "replay"]
    start = time.monotonic()
    code, document = supervised(tmp_path, sections)
    assert time.monotonic() - start < 50  # the one that hangs would take 60
    statuses = {name: entry["status"] for name, entry in document["sections"].items()}
    assert statuses == {
        "environment": "done",
        "correctness": "done",
        "latency": "crashed",
        "polling": "done",
        "speed": "hung",
        "replay": "done",
    }
    assert document["sections"]["latency"]["result"] == {"partial": "latency"}
    assert "-6" in document["sections"]["latency"]["error"]
    assert code == 0
    assert "PASSED" in capfd.readouterr().out


CASES = """
import os, sys
sys.path.insert(0, {perf!r})
import json, time
import check_correct, check_latency, check_speed, gpu_check

def section(c):
    result = c.so_far or {{"cases": []}}
    parts = lambda case: 0.05 if case == "hangs" else 1
    for case, seconds in c.in_time(["fine", "dies", "next", "hangs", "last"], str, parts):
        result["cases"].append({{"case": case, "passed": True}})
        c.keep(result)
        if case == "dies":
            os.abort()
        if case == "hangs":
            time.sleep(60)
    return result

def broken_once(c):
    result = c.so_far or {{"cases": []}}
    for case, seconds in c.in_time(["breaks", "other"]):
        if case == "breaks":
            gpu_check.broken = lambda device: True
            raise RuntimeError("illegal address")
        result["cases"].append({{"shape": case, "tokens": 1}})
    return result

gpu_check.GRACE_S = 1.0
names = {{"correctness": section, "speed": broken_once}}
gpu_check.section = lambda name: names.get(name, lambda c: {{"process": os.getpid()}})
sys.exit(gpu_check.work(json.loads(sys.argv[2])))
"""


def test_a_case_that_dies_hangs_or_breaks_the_device_costs_the_others_nothing(tmp_path):
    sections = ["environment", "correctness", "speed", "lanes", "replay"]
    script = CASES.format(perf=str(PERF))
    options = {"device": "cpu", "quick": True, "command": "", "budget_s": 60.0, "deadline": time.time() + 60}
    code, document = supervised(tmp_path, sections, script, **options)
    found = document["sections"]
    assert found["correctness"]["status"] == "crashed"
    cases = [case["case"] for case in found["correctness"]["result"]["cases"]]
    assert cases == ["fine", "dies", "next", "hangs", "last"]
    died, hung = found["correctness"]["lost"]
    assert (died["case"], hung["case"]) == ("dies", "hangs")
    assert "-6" in died["how"]
    assert "hung" in hung["how"]
    assert found["speed"]["status"] == "crashed"
    assert [case["shape"] for case in found["speed"]["result"]["cases"]] == ["other"]
    assert found["speed"]["lost"] == [{"case": "breaks", "how": "RuntimeError: illegal address"}]
    assert found["replay"]["status"] == found["lanes"]["status"] == "done"
    processes = [found[name]["result"]["process"] for name in ("environment", "lanes", "replay")]
    assert processes[0] != processes[1] == processes[2]
    assert (code, document["passed"]) == (1, False)


@pytest.mark.parametrize(("sections", "code"), [(["bitwise", "replay"], 1), (["correctness"], 0)])
def test_exit_code(tmp_path, sections, code):
    found, document = supervised(tmp_path, sections)
    assert found == code
    assert document["passed"] is (code == 0)


def test_a_decisive_section_that_did_not_end_is_not_passed():
    for status in ("crashed", "hung", "running", "error", "failed", "not run"):
        document = {"sections": {"correctness": {"status": status}}}
        assert not gpu_check.passed(document, ["correctness", "speed"])
    assert not gpu_check.passed({"sections": {}}, ["bitwise"])
    assert gpu_check.passed({"sections": {}}, ["speed"])


def test_a_worker_that_never_begins_ends_it(tmp_path, capfd):
    code, document = supervised(tmp_path, ["correctness"], "import sys; sys.exit(3)")
    assert (code, document) == (1, None)
    assert "exit code 3" in capfd.readouterr().out


def test_a_section_that_raises_is_noted(monkeypatch, capfd):
    def broken(context):
        raise ZeroDivisionError("so\nmuch")

    monkeypatch.setattr(gpu_check, "section", lambda name: broken)
    entry = {"status": "running"}
    gpu_check.run_section("speed", context(), entry)
    assert entry["status"] == "error"
    assert entry["error"] == "ZeroDivisionError: so much"
    assert "in broken" in entry["traceback"]


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "x.json"
    gpu_check.write({"a": math.nan, "b": (1.5, math.inf), "c": {2: torch.float32}}, path)
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": {"2": "torch.float32"}}


def test_an_older_result_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    first = gpu_check.default_out("NVIDIA H200")
    assert first.name.startswith("gpu_check-nvidia-h200-2")
    first.write_text("{}")
    assert gpu_check.default_out("NVIDIA H200").name == f"{first.stem}-2.json"


# -- its judgements ----------------------------------------------------------------------------------------


def context(backend="torch", seconds=30.0, **options) -> Context:
    deadline = time.monotonic() + seconds
    settings = {"quick": True, "rehearsal": True, "results": {}, **options}
    return Context(device=CPU, backend=backend, deadline=deadline, **settings)


def test_time_is_shared_and_what_is_left_out_is_said(capfd):
    c = context(seconds=10.0)
    shares = [share for _, share in c.in_time("abc")]
    assert shares[0] == pytest.approx(10 / 3, rel=0.05)
    assert shares[2] == pytest.approx(10, rel=0.05)
    late = context(seconds=-1.0)
    assert [case for case, _ in late.in_time("abc")] == ["a"]
    assert late.left_out == ["b", "c"]


def test_errors_judge_by_the_contract():
    want = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert layers.errors(want.bfloat16(), want)["passed"]
    assert not layers.errors(want * 1.0001, want)["passed"]
    off = want.clone()
    off[3, 4] += 0.1 * want.abs().max()
    assert not layers.errors(off.bfloat16(), want)["passed"]
    off[3, 4] = math.nan
    found = layers.errors(off, want)
    assert not found["passed"]
    assert found["nan"] == 1
    assert layers.errors(torch.zeros(2, 3), torch.zeros(2, 3))["passed"]
    assert not layers.errors(torch.full((2, 3), math.nan), torch.zeros(2, 3))["passed"]


def test_the_reference_is_the_operators():
    tensors = layers.layer_inputs(layers.TINY, 9, layers.weights(layers.TINY, torch.float32, CPU))
    tensors[3][2, 1] = 99
    tensors[3][4] = -1
    assert layers.errors(moe(*tensors), layers.reference(tensors))["passed"]


@pytest.mark.parametrize(
    "spoil", [lambda y: y * 1.01, lambda y: y.index_fill(0, torch.tensor([0]), math.nan), torch.zeros_like]
)
def test_a_wrong_operator_fails_the_correctness_section(monkeypatch, spoil, capfd):
    monkeypatch.setattr(check_correct, "moe", lambda *a, **k: spoil(moe(*a, **k)))
    monkeypatch.setattr(check_correct, "_plan", lambda c: [(layers.TINY, torch.float32, "bf16")])
    assert check_correct.correctness(context())["passed"] is False


class LosesATile(MoeRun):
    """Says that it took one tile more than it did."""

    @property
    def tiles_taken(self):
        return self.tiles_done + 1


class OtherBits(MoeRun):
    """Has another output after it was left early."""

    early = False

    def step(self, max_tiles=None):
        finished = super().step(max_tiles)
        self.early |= not finished
        return finished

    @property
    def output(self):
        return super().output + self.early


class RunsWhilePaused(MoeRun):
    def step(self, max_tiles=None):
        self._layer._word = None
        return super().step(max_tiles)


@pytest.mark.parametrize("broken", [LosesATile, OtherBits, RunsWhilePaused])
def test_a_broken_run_fails_the_bitwise_section(monkeypatch, broken, capfd):
    monkeypatch.setattr(check_correct, "MoeRun", broken)
    monkeypatch.setattr(check_correct, "_bitwise_plan", lambda c: [(layers.TINY, 300, "bf16")])
    result = check_correct.bitwise(context(seconds=2.0))
    assert result["passed"] is False
    assert result["cases"][0]["wrong"]


@pytest.mark.parametrize(
    "broken", [lambda *rest: 1 / 0, lambda *rest: {"passes": 9, "pauses": 9, "wrong": 1}]
)
def test_a_gate_that_fails_fails_the_lanes(monkeypatch, broken, capfd):
    monkeypatch.setattr(check_lanes, "while_paused", broken)
    assert check_lanes.lanes(context())["passed"] is False


def test_bitwise_without_a_preemption_proves_nothing(monkeypatch, capfd):
    monkeypatch.setattr(check_correct.Preempted, "flips", lambda self, deadline: None)
    monkeypatch.setattr(check_correct, "_bitwise_plan", lambda c: [(layers.TINY, 8, "bf16")])
    result = check_correct.bitwise(context())
    assert result["cases"][0]["passed"] is True
    assert result["passed"] is False


def test_floor_is_the_larger_of_memory_and_arithmetic():
    index = torch.zeros(2048, 2, dtype=torch.int64)
    index[:, 1] = 1
    seconds, bound = layers.floor_seconds(layers.MIXTRAL, index, 4.3e12, 790e12)
    assert (round(seconds * 1e6), bound) == (1827, "arithmetic")
    seconds, bound = layers.floor_seconds(layers.MIXTRAL, index[:1], 4.3e12, 790e12)
    assert (round(seconds * 1e6), bound) == (164, "memory")


def test_spread_and_turns():
    assert timing.spread([]) is None
    assert timing.spread(range(101))["p99"] == 99
    ran = []
    times = timing.interleaved({n: lambda n=n: ran.append(n) for n in "ab"}, CPU, 0.0, least=5)
    assert {name: len(t) for name, t in times.items()} == {"a": 5, "b": 5}
    assert ran[:2] == ["a", "b"]
    assert ran.count("a") == 6


# -- what it reaches into the Triton backend for -----------------------------------------------------------


@INTERPRETED
def test_launches_can_be_enqueued_polled_and_rewound():
    shape = layers.Shape("small", 32, 16, 3, 2)
    tensors = layers.layer_inputs(shape, 5, layers.weights(shape, torch.float32, CPU))
    flag = PriorityFlag()
    launches = layers.Launches(tensors, flag)
    flag.pause(0)
    launches.enqueue(poll=True)
    progress = launches.progress()
    assert progress["done"] == (0, 0, 0)
    assert progress["given_back"] == 0
    assert min(progress["total"]) > 0
    for poll in (False, True):
        launches.rewind()
        assert sum(launches.progress()["done"]) == 0
        launches.output.fill_(math.nan)
        launches.enqueue(poll=poll)
        progress = launches.progress()
        assert progress["done"] == progress["total"]
        assert layers.errors(launches.output, layers.reference(tensors))["passed"]
        flag.resume(0)
    flag.share(0, 1)
    launches.rewind()
    launches.enqueue(poll=True)
    assert launches.progress()["done"] == progress["total"]


@INTERPRETED
@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 9, "weights_dtype": "bfloat16"},
        {"num_tokens": 1, "format": "mxfp4"},
        {"num_tokens": 1, "invariant": True},
        {"num_tokens": 9, "format": "fp8", "dtype": "bfloat16", "rounded": True},
    ],
    ids=str,
)
def test_kernels_can_be_compiled_ahead_on_a_layer_without_tokens(options):
    compile_ahead.launch_once(
        CPU, compile_ahead.Job(**{"sizes": (128, 128, 3, 2), "dtype": "float32"} | options)
    )


@pytest.mark.parametrize("quick", [False, True])
def test_what_sections_launch_is_compiled_ahead(monkeypatch, quick):
    """Of every layer of the plans: its tiles, and the way that its pairs are sorted."""
    monkeypatch.setattr(compile_ahead, "arch_of", lambda device: "sm_90")

    def compiled(job):
        pairs = job.num_tokens * job.sizes[3]
        sorts = next((n for n in SORTED_PAIRS if pairs <= n), 0)
        return (job.sizes, job.dtype, job.format, job.rounded, str(compile_ahead._tiles(CPU, job)), sorts)

    jobs = compile_ahead.plan(CPU, quick)
    ahead = {compiled(job) for job in jobs}
    c = context("triton", quick=quick, rehearsal=False)
    launched = [
        (shape, "bfloat16", format, t) for shape, format, counts in check_speed._speed_plan(c) for t in counts
    ]
    for shape, dtype, format in check_correct._plan(c):
        some = dtype != torch.bfloat16 or format != "bf16"
        counts = check_correct.SOME_TOKENS if some else check_correct._token_counts(c)
        launched += [(shape, check_correct.short(dtype), format, t) for t in counts]
    launched += [(shape, "bfloat16", format, t) for shape, t, format in check_correct._bitwise_plan(c)]
    dense = [
        case[:2] for case in (*check_latency._plan(c), *check_speed._polling_plan(c), *check_lanes._plan(c))
    ]
    launched += [(shape, "bfloat16", "bf16", t) for shape, t in dense]
    assert len(launched) > (30 if quick else 100)
    for shape, dtype, format, num_tokens in launched:
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
        for rounded in (False, True) if format == "fp8" and num_tokens <= 32 else (False,):
            job = compile_ahead.Job(sizes, dtype, num_tokens, format, rounded=rounded)
            assert compiled(job) in ahead, job
    assert len(jobs) < 120  # some of which differ in the routing program only


# -- what a case that failed, and one that is slow, leave behind -------------------------------------------


@INTERPRETED
@pytest.mark.parametrize("spoiled", [None, "gate_up", "down", "combine"])
def test_the_phase_that_goes_wrong_is_found(monkeypatch, spoiled):
    from qllm_ops.triton_moe import TritonMoe

    shape = layers.Shape("small", 32, 16, 3, 2)
    tensors = layers.layer_inputs(shape, 5, layers.weights(shape, torch.float32, CPU))
    tensors[3][2, 1] = 99
    launch = TritonMoe._launch

    def wrong(self, phase, **options):
        launch(self, phase, **options)
        if phase.kernel == spoiled:
            buffers = {"gate_up": self._intermediate, "down": self._partial[0], "combine": self._output}
            buffers[spoiled][3, 7] += 9.0

    monkeypatch.setattr(TritonMoe, "_launch", wrong)
    found = check_correct.wrong_phases(tensors)
    assert found.pop("order") == "sorted"
    for phase, where in found.items():
        if phase == spoiled:
            assert (where["far_off"], where["first_rows"], where["first_columns"]) == (1, [3], [7])
        else:
            assert where["far_off"] == where["nan"] == 0
            assert where["rms"] < 1e-5


@INTERPRETED
def test_a_case_that_fails_says_with_which_tiles_and_where(monkeypatch, capfd):
    monkeypatch.setattr(check_correct, "moe", lambda *tensors, **options: moe(*tensors, **options) * 1.5)
    small = layers.Shape("small", 32, 16, 3, 2)
    monkeypatch.setattr(check_correct, "_plan", lambda c: [(small, torch.float32, "bf16")])
    kept = []
    result = check_correct.correctness(context("triton", keep=lambda result: kept.append(dict(result))))
    case = result["cases"][0]
    assert (kept[0]["passed"], result["passed"], case["passed"]) == (False, False, False)
    assert case["tiles"]["gate_up"]["block_m"] > 0
    assert case["compiled"]["down"]["programs"] > 0
    assert case["where"]["gate_up"]["far_off"] == 0


@INTERPRETED
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_each_phase_has_a_time_a_floor_and_its_tiles(format):
    shape = layers.Shape("small", 32, 32, 3, 2)
    dense = layers.weights(shape, torch.bfloat16, CPU)
    pair = layers.quantized(dense, format)
    inputs = [layers.with_weights(layers.layer_inputs(shape, 2, dense), pair) for _ in range(2)]
    for tensors in inputs:
        tensors[3].copy_(torch.tensor([[0, 2], [2, 7]]))  # two experts are hit, and one pair is nobody's
    found = check_speed.phases(shape, inputs, CPU, 1e6, 1e15)
    assert list(found) == ["route", "gate_up", "down", "combine"]
    assert all(phase["us"]["n"] == 20 and phase["us"]["min"] > 0 for phase in found.values())
    per_number = 2 if format == "bf16" else 0.5 + 4 / 32  # a row's scales take a whole word
    tokens, between = 2 * 32 * 2, 4 * 32 * 2
    parts = found["down"]["tiles"]["split_k"] * 4 * 32 * (2 if format == "bf16" else 4)
    assert found["gate_up"]["bytes"] == 2 * 64 * 32 * per_number + tokens + between
    assert found["down"]["bytes"] == 2 * 32 * 32 * per_number + between + parts
    assert found["combine"]["floor_us"] == parts + tokens
    assert found["gate_up"]["flops"] == 2 * found["down"]["flops"] == 2 * 2 * 4 * 32 * 32
    assert found["down"]["programs"] > 0


def test_the_rate_under_load_is_that_of_all_its_products():
    start = time.perf_counter()
    found = check_speed._under_load(context(), 64, 1e9, seconds=0.01)  # 19 products
    assert found["sustained_product_flops_per_s"] > 19 * 2 * 64**3 / (time.perf_counter() - start)


def test_the_goals_of_a_result():
    spread = {"n": 9, "p25": 1.0, "p50": 1.25, "p75": 1.5, "p99": 40.0}
    speed = {"shape": "OLMoE-1B-7B", "tokens": 8192, "graph_us": {"qllm": spread, "grouped_mm": spread}}
    speed |= {"ratio": {"grouped_mm": spread}, "of_matmul": 0.7, "of_copy": 0.1, "memory": None}
    exits = {"samples": 9, "left_early": 9, "lost_tiles": 0, "programs": 4}
    exits["host_us"] = spread | {"max": 50.0}
    exits["device_us"] = spread | {"max": 50.0}
    writers = {"copy": exits, "step": {"error": "no"}}
    results = {
        "speed": {"cases": [speed, {"shape": "a", "tokens": 1, "peers": {}, "error": "bad"}]},
        "polling": {
            "cases": [{"shape": "a", "tokens": 1, "overhead": 0.001, "noise": 0.0, "without_us": spread}]
        },
        "latency": {
            "cases": [{"shape": "a", "tokens": 1, "writers": writers, "expected_us": {"down": 40.4}}]
        },
    }
    sections = {name: {"status": "done", "result": result} for name, result in results.items()}
    document = {"rehearsal": False, "device": "NVIDIA H100", "date": "", "sections": sections}
    verdicts = [goal.verdict for goal in goals.goals(goals.of_gpu_check(document))]
    assert verdicts == ["yes", "yes", *"---", "yes", "yes", "NO", "yes", *"----"]
    text = "\n".join(gpu_table.summary(document))
    assert "at most 40.0 us (a T=1, 9 exits), of 1 case" in text
    assert "lowest 70 % (OLMoE-1B-7B T=8192), of 1 case" in text
    assert "9 of 9 left, at most 40 expected of a tile" in text


# -- exit latency, on a device that is a thread ------------------------------------------------------------

EXIT_S = 0.004


class Device:
    """A stream's work is a thread; a launch leaves EXIT_S after it is told to, or after 60 ms by itself."""

    def __init__(self):
        self.paused = threading.Event()
        self.cuda_stream = 0
        self.work = None
        self.ended = 0.0

    def synchronize(self):
        if self.work:
            self.work.join()

    def launch(self, tell):
        def run():
            early = self.paused.wait(0.06)
            time.sleep(EXIT_S if early else 0)
            tell(early)
            self.ended = time.perf_counter()

        self.work = threading.Thread(target=run)
        self.work.start()


class Event:
    def __init__(self, enable_timing=False):
        self.stream = None

    def record(self, stream=None):
        self.stream, self.recorded = stream or Event.current, time.perf_counter()
        self.work = self.stream.work if self.stream.work and self.stream.work.is_alive() else None

    def query(self):
        time.sleep(1e-4)  # who spins on a real device holds up no launch
        return self.work is None or not self.work.is_alive()

    def synchronize(self):
        if self.work:
            self.work.join()

    def elapsed_time(self, end):
        return ((end.stream.ended if end.work else end.recorded) - self.recorded) * 1e3


def test_enqueued_exits_measure_from_the_order_to_the_end(monkeypatch):
    device, side = Device(), Device()
    Event.current = device

    class Launches:
        programs = 4

        def __init__(self, tensors, flag):
            self.early = None

        def enqueue(self, poll):
            device.launch(lambda early: setattr(self, "early", early))

        def progress(self):
            done = (4, 0, 0) if self.early else (9, 9, 3)
            return {"done": done, "total": (9, 9, 3), "given_back": 2 if self.early else 0}

    class Writer:
        flag, stream, pause, resume = None, side, device.paused.set, device.paused.clear

    monkeypatch.setattr(check_latency, "Launches", Launches)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: Event.current)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    row = check_latency.enqueued_exits(context("triton"), Writer(), (), 12, time.monotonic() + 10)
    assert row["samples"] == 12
    assert row["launch_us"] == pytest.approx(60e3, rel=0.5)
    assert row["left_early"] >= 8
    assert row["lost_tiles"] == 2 * row["left_early"]
    assert row["programs"] == 4
    assert list(row["by_phase"]) == ["gate_up"]
    for name in ("host_us", "device_us"):
        assert row[name]["min"] > EXIT_S * 1e6 * 0.95
        assert row[name]["p50"] < EXIT_S * 1e6 * 4
    assert "left early" in check_latency.brief(row)


def test_an_exit_is_expected_at_the_rates_of_the_device(monkeypatch):
    """Mixtral's down at T = 32: 32 rows of weights x 7168 columns x 2 bytes for each of two programs."""
    monkeypatch.setattr(check_latency, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr("qllm_ops.plan.multiprocessors", lambda device: 132)
    found = {}
    for bandwidth in (4.3e12, 3.0e12):
        ceilings = {"copy_bytes_per_s": {"p50": bandwidth}, "product_flops_per_s": {"p50": 790e12}}
        c = context("triton", results={"ceilings": {"result": ceilings}})
        found[bandwidth] = check_latency.expected_us(c, layers.MIXTRAL, 32)["down"]
    assert found[3.0e12] == pytest.approx(2 * 32 * 7168 * 2 / (3.0e6 / 132))
    assert found[3.0e12] / found[4.3e12] == pytest.approx(4.3 / 3.0)


def test_the_table_shows_errors_and_missing_parts():
    document = {
        "rehearsal": False,
        "device": "NVIDIA H200",
        "date": "2026-11-22",
        "passed": False,
        "sections": {
            "correctness": {"status": "failed", "seconds": 1.0, "result": {"cases": [{"passed": False}]}},
            "latency": {
                "status": "hung",
                "error": "hung, killed after 9 s",
                "result": {
                    "cases": [{"shape": "a", "tokens": 1, "writers": {"stream": {"error": "no driver"}}}]
                },
            },
            "polling": {"status": "done", "result": {"cases": [{"shape": "a", "tokens": 2, "error": "bad"}]}},
            "speed": {"status": "done", "result": {"cases": [{"shape": "a", "tokens": 3, "error": "worse"}]}},
            "replay": {"status": "skipped", "reason": "no transformers"},
        },
    }
    text = "\n".join(gpu_table.summary(document))
    parts = "0 of 1 cases|killed after|no driver|bad|worse|no transformers|NOT PASSED"
    for part in parts.split("|"):
        assert part in text

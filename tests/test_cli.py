"""The command line: a whole replay on a tiny model, and one clear line for every kind of bad input."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model

from qllm_ops.models.presets import make_preset, save_preset
from qllm_ops.scheduler import cli, replay_command
from qllm_ops.scheduler.policies import POLICIES
from qllm_ops.scheduler.records import Finished, RunRecord

TINY = ["--preset", "tiny", "--threads", "1", "--kv-tokens", "2048", "--prefill-tokens", "128"]
SHORT = ["--rate", "25", "--duration", "0.5", "--ls-fraction", "0.4", "--be-prompt", "64", "200"]
SHORT += ["--ls-prompt", "4", "16", "--ls-output", "2", "5", "--be-output", "2", "5", "--seed", "3"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Output as in a wide terminal, so that no line is folded by chance; --threads is undone."""
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def qllm(capsys):
    """Run a command as ``qllm`` does; (exit code, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return call


def write_trace(path, rows):
    """A trace in the Azure format: a row per (second, prompt tokens, output tokens)."""
    lines = [f"2023-11-16 18:15:{second:010.7f},{prompt},{output}" for second, prompt, output in rows]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


# -- a whole replay ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """What all four policies made of a short synthetic load, by the command itself in its own process."""
    folder = tmp_path_factory.mktemp("replay") / "deep" / "out"
    command = [sys.executable, "-m", "qllm_ops.scheduler.cli", "replay", *TINY, *SHORT, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_the_report_has_every_key(replayed):
    report = json.loads((replayed[0] / "report.json").read_text())
    assert list(report["policies"]) == list(POLICIES)
    for run in [*report["policies"].values(), report["ls_alone"]]:
        for cls in ("ls", "be") if run is not report["ls_alone"] else ("ls",):
            for measure in ("ttft_s", "tpot_s", "turnaround_s"):
                values = run[cls][measure]
                assert 0 < values["p50"] <= values["p90"] <= values["p99"]
                assert values["mean"] > 0
        assert run["requests"] == run["ls"]["requests"] + run["be"]["requests"] > 0
        assert run["ls"]["completed"] == run["ls"]["requests"]
        assert run["tokens_per_s"] > 0
        assert 0 <= run["slo_attainment"] <= 1
        pauses = run["preemptions"]
        assert {"p50", "p99"} <= pauses["exit_s"].keys()
        assert pauses["count"] >= 0
        assert pauses["wasted_tiles"] == 0
    assert list(report["versus_fcfs"]) == ["priority", "layer", "tile"]
    for ratios in report["versus_fcfs"].values():
        for name in ("ls_ttft_mean", "ls_turnaround_mean", "be_turnaround_mean", "tokens_per_s"):
            assert 0 < ratios[name] < math.inf
    assert report["ls_alone"]["be"]["requests"] == 0
    assert report["slo_s"] > 0


def test_the_report_says_what_was_run(replayed):
    meta = json.loads((replayed[0] / "report.json").read_text())["meta"]
    assert meta["device_type"] == "cpu"
    assert meta["versions"]["torch"] == torch.__version__
    assert {"qllm-ops", "transformers", "triton", "python"} <= meta["versions"].keys()
    assert meta["seed"] == 3
    assert "--preset tiny" in meta["command"]
    assert "tiny" in meta["model"]
    assert "25/s" in meta["workload"]
    assert meta["limits"]["kv_tokens"] == 2048
    assert meta["limits"]["kv_reserve"] == 256
    assert meta["options"]["policy"] == list(POLICIES)


def test_no_policy_changes_a_token(replayed):
    tokens = json.loads((replayed[0] / "report.json").read_text())["tokens"]
    assert tokens["mismatches"] == 0
    assert {name: v["compared"] > 0 for name, v in tokens["versus"].items()} == dict.fromkeys(
        ("ls_alone", "priority", "layer", "tile"), True
    )


def test_the_timeline_and_the_picture_are_there(replayed):
    folder, _ = replayed
    trace = json.loads((folder / "timeline.json").read_text())
    processes = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert sorted(processes) == sorted([*POLICIES, "LS alone"])
    assert any(event["ph"] == "X" for event in trace["traceEvents"])
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png", "timeline.json"]


def test_stdout_has_progress_the_table_and_the_files(replayed):
    folder, done = replayed
    lines = done.stdout.splitlines()
    for name in ("ls_alone", *POLICIES):
        assert sum(line.startswith(f"{name:<9} LS ") for line in lines) == 1
        assert any(line.strip().startswith("LS alone" if name == "ls_alone" else name) for line in lines)
    assert lines[-1].startswith(f"written to {folder}: report.json, report.png, timeline.json")
    assert "\x1b" not in done.stdout  # no terminal, no escapes
    assert done.stderr == ""


def test_traces_and_a_model_folder(qllm, capsys, tmp_path):
    model = save_preset("tiny-qwen3-moe", tmp_path / "model", seed=2)
    ls = write_trace(tmp_path / "ls.csv", [(0, 8, 3), (0.4, 12, 20), (50, 8, 3)])
    be = write_trace(tmp_path / "be.csv", [(0, 300, 2), (0.2, 5000, 2), (0.4, 300, 9)])
    capsys.readouterr()  # what saving says
    args = (
        "--policy tile --policy fcfs --duration 1 --time-scale 0.5 --max-output 4 --slo 0.25 --kv-tokens 2048"
    )
    files = ("--model", model, "--ls-trace", ls, "--be-trace", be, "--out", tmp_path / "out")
    code, out, err = qllm("replay", *args.split(), *files)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["policies"]) == ["tile", "fcfs"]
    assert report["slo_s"] == 0.25
    run = report["policies"]["tile"]
    assert (run["ls"]["requests"], run["ls"]["completed"], run["ls"]["generated_tokens"]) == (2, 2, 3 + 4)
    # One prompt does not fit the KV budget: refused, said so, and no other is harmed.
    assert (run["be"]["requests"], run["be"]["completed"], run["be"]["refused"]) == (3, 2, 1)
    notes = " ".join(report["notes"])
    assert "tile: be-1 refused: " in notes
    assert "5000 prompt + 2 new tokens are more than the 4096 positions" in notes
    assert "1 of 2 requests cut to 4" in notes
    assert "be-1 refused" in out
    assert report["meta"]["model"].startswith(str(model))
    assert "ls.csv and be.csv" in report["meta"]["workload"]


def test_one_class_only(qllm, tmp_path):
    be = write_trace(tmp_path / "be.csv", [(0, 40, 2), (0.1, 40, 2), (0.2, 40, 2)])
    code, _, err = qllm(
        *(
            "replay",
            *TINY,
            "--be-trace",
            be,
            "--policy",
            "layer",
            "--max-requests",
            "2",
            "--dtype",
            "bfloat16",
        ),
        *("--out", tmp_path / "out"),
    )
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ls_alone"] is None
    assert report["policies"]["layer"]["be"]["completed"] == 2
    assert "bfloat16" in report["meta"]["model"]


@pytest.mark.parametrize("format", ["int4", "fp8"])
@pytest.mark.parametrize("stored", [True, False], ids=["model", "preset"])
def test_quantised_experts(qllm, capsys, tmp_path, format, stored):
    model = TINY
    if stored:
        model = ["--model", save_preset("tiny-qwen3-moe", tmp_path / "model"), "--kv-tokens", "2048"]
    capsys.readouterr()
    options = (*SHORT, "--quantize", format, "--policy", "tile", "--policy", "fcfs")
    code, out, err = qllm("replay", *model, *options, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["meta"]["model"].endswith(f"float32, experts in {format}")
    assert f"experts in {format}" in out
    runs = report["policies"].values()
    assert all(run["be"]["completed"] == run["be"]["requests"] > 0 for run in runs)


# -- bad input ---------------------------------------------------------------------------------------------


BAD = {
    "unknown command": (["replai"], ["replai"]),
    "unknown option": (["replay", "--polisy", "tile"], ["--polisy"]),
    "unknown policy": (["replay", "--policy", "fastest"], ["'fastest'", "fcfs, priority, layer, tile"]),
    "unknown preset": (["replay", "--preset", "huge"], ["'huge'", "demo"]),
    "unknown dtype": (["replay", "--dtype", "float8"], ["--dtype", "float8"]),
    "unknown backend": (["replay", "--backend", "cutlass"], ["--backend", "cutlass"]),
    "unknown format": (["replay", "--quantize", "int3"], ["--quantize", "int3"]),
    "quantised already": (
        ["replay", "--model", "{tmp}/fp8", "--quantize", "int4"], ["{tmp}/fp8", "quantised already (fp8)"]
    ),
    "unknown gate": (["replay", "--gate", "garden"], ["--gate", "garden"]),
    "not a number": (["replay", "--rate", "fast"], ["--rate"]),
    "one bound": (["replay", "--be-prompt", "64"], ["--be-prompt"]),
    "bounds the wrong way": (["replay", "--be-prompt", "64", "32"], ["be_prompt", "(64, 32)"]),
    "zero tokens": (["replay", "--ls-output", "0", "4"], ["ls_output", "0"]),
    "rate 0": (["replay", "--rate", "0"], ["rate", "0.0"]),
    "rate beyond reason": (["replay", "--rate", "1e9"], ["--rate 1e+09 in --duration 13", "at most 1000000"]),
    "rate nan": (["replay", "--rate", "nan"], ["rate", "nan"]),
    "duration negative": (["replay", "--duration", "-3"], ["--duration", "-3"]),
    "duration infinite": (["replay", "--duration", "inf"], ["--duration", "inf"]),
    "no request": (["replay", "--rate", "0.001", "--duration", "0.1"], ["--rate 0.001", "no request"]),
    "no LS request": (
        ["replay", "--duration", "1"],
        ["no LS request arrives in --duration 1 at --rate 1.25 with --ls-fraction 0.2", "--ls-fraction 0"],
    ),
    "no BE request": (
        ["replay", "--duration", "1", "--ls-fraction", "0.99"],
        ["no BE request arrives in --duration 1", "ask for no BE with --ls-fraction 1"],
    ),
    "none among the first": (
        ["replay", "--max-requests", "1"], ["no LS request is among the earliest --max-requests 1"]
    ),
    "none among the traces' first": (
        ["replay", "--ls-trace", "{tmp}/good.csv", "--be-trace", "{tmp}/good.csv", "--max-requests", "1"],
        ["no BE request is among the earliest --max-requests 1"],
    ),
    "fraction": (["replay", "--ls-fraction", "1.5"], ["ls_fraction", "1.5"]),
    "seed": (["replay", "--seed", "-1"], ["--seed", "-1"]),
    "seed too large": (["replay", "--seed", str(2**63)], ["--seed must be below 2**63", str(2**63)]),
    "slo": (["replay", "--slo", "0"], ["--slo", "0.0"]),
    "drain timeout": (["replay", "--drain-timeout", "nan"], ["--drain-timeout", "nan"]),
    "floor": (["replay", "--be-floor", "1"], ["be_floor", "1.0"]),
    "aging": (["replay", "--aging", "0"], ["aging_s", "0.0"]),
    "batch": (["replay", "--max-batch", "0"], ["max_batch", "0"]),
    "threads": (["replay", "--threads", "0"], ["--threads", "0"]),
    "too many threads": (["replay", "--threads", "100000"], ["--threads must be at most", "got 100000"]),
    "max requests": (["replay", "--max-requests", "0"], ["--max-requests", "0"]),
    "device unknown": (["replay", "--device", "abacus"], ["--device", "'abacus'"]),
    "device of another kind": (["replay", "--device", "meta"], ["--device", "'meta'"]),
    "device not there": (["replay", "--device", "cuda:99"], ["--device cuda:99"]),
    "model and preset": (["replay", "--model", "x", "--preset", "tiny"], ["--model", "--preset"]),
    "model missing": (["replay", "--model", "{tmp}/none"], ["{tmp}/none", "no such folder"]),
    "model without config": (["replay", "--model", "{tmp}/empty"], ["{tmp}/empty", "config.json"]),
    "model cut off": (["replay", "--model", "{tmp}/cut"], ["{tmp}/cut/model.safetensors", "cut off"]),
    "model without experts": (["replay", "--model", "{tmp}/dense"], ["LlamaForCausalLM", "no MoE experts"]),
    "model not supported": (["replay", "--model", "{tmp}/doge"], ["DogeCDMoE", "embeddings"]),
    "trace missing": (["replay", "--ls-trace", "{tmp}/none.csv"], ["{tmp}/none.csv", "No such file"]),
    "trace malformed": (["replay", "--be-trace", "{tmp}/bad.csv"], ["{tmp}/bad.csv:3:", "'many'"]),
    "trace empty": (["replay", "--be-trace", "{tmp}/empty.csv"], ["{tmp}/empty.csv", "no rows"]),
    "trace and rate": (["replay", "--ls-trace", "t.csv", "--rate", "2"], ["--rate", "--ls-trace"]),
    "time scale without a trace": (["replay", "--time-scale", "2"], ["--time-scale", "no --ls-trace"]),
    "time scale": (["replay", "--be-trace", "{tmp}/bad.csv", "--time-scale", "0"], ["time_scale", "0.0"]),
    "out is a file": (["replay", "--out", "{tmp}/bad.csv"], ["--out {tmp}/bad.csv", "File exists"]),
    "reserve": (["replay", *TINY, *SHORT, "--kv-reserve", "2048"], ["kv_reserve", "2047", "2048"]),
    "too little memory": (["replay", *TINY, *SHORT, "--kv-tokens", "8"], ["kv_tokens", "8"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder with one thing of every kind that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    cut = save_preset("tiny", folder / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    tiny_model("llama").save_pretrained(folder / "dense")
    tiny_model("doge").save_pretrained(folder / "doge")
    config = save_preset("tiny", folder / "fp8") / "config.json"
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantization))
    write_trace(folder / "bad.csv", [(0, 8, 3), (1, "many", 3)])
    write_trace(folder / "empty.csv", [])
    write_trace(folder / "good.csv", [(0, 8, 3)])
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(qllm, bad_files, tmp_path, monkeypatch, case):
    args, named = BAD[case]
    monkeypatch.chdir(tmp_path)  # where the default --out goes
    code, out, err = qllm(*(arg.replace("{tmp}", str(bad_files)) for arg in args))
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for part in named:
        assert part.replace("{tmp}", str(bad_files)) in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device on this machine")
def test_triton_on_a_cpu_needs_the_interpreter(qllm, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = qllm("replay", *TINY, *SHORT, "--backend", "triton", "--out", tmp_path)
    assert code == 2
    assert "TRITON_INTERPRET=1" in err


def test_no_permission_to_write(qllm, tmp_path, monkeypatch):
    # A fake, because tests may run as root, and typer's own check asks os.access too.
    fake = SimpleNamespace(access=lambda path, mode: False, W_OK=2, cpu_count=lambda: 1)
    monkeypatch.setattr(replay_command, "os", fake)
    code, _, err = qllm("replay", *TINY, "--out", tmp_path)
    assert code == 2
    assert f"--out {tmp_path}: no permission" in err


def test_a_replay_whose_files_cannot_be_written_still_shows_its_figures(qllm, tmp_path):
    (tmp_path / "timeline.json").mkdir()
    code, out, err = qllm("replay", *TINY, *SHORT, "--policy", "tile", "--out", tmp_path)
    assert code == 2
    assert err.startswith("error: ")
    assert f"Is a directory: '{tmp_path}/timeline.json'" in err
    assert "Latency and throughput" in out
    assert "written to" not in out
    assert json.loads((tmp_path / "report.json").read_text())["policies"]["tile"]["requests"] > 0


def test_memory_that_is_not_there(qllm, tmp_path):
    code, _, err = qllm("replay", *TINY, *SHORT, "--kv-tokens", str(2**50), "--out", tmp_path)
    assert code == 2
    assert f"--kv-tokens {2**50} needs more memory" in err


def test_a_model_that_gives_no_numbers(qllm, tmp_path):
    model = make_preset("tiny")
    with torch.no_grad():
        model.get_input_embeddings().weight[100:] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    args = ["replay", "--model", tmp_path / "nan", *TINY[2:], *SHORT, "--policy", "tile"]
    code, _, err = qllm(*args, "--out", tmp_path / "out")
    assert code == 2
    assert "not numbers" in err
    # With the SLO given nothing needs measuring, and the report says what became of the requests.
    code, out, err = qllm(*args, "--slo", "1", "--out", tmp_path / "out")
    assert code == 1
    assert "requests failed" in err
    assert "LogitsError" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["policies"]["tile"]["be"]["failed"] > 0


# -- exit codes ----------------------------------------------------------------------------------------------


def run_record(name: str, tokens: list[int], status: str = "done", margin: float = 1.0) -> RunRecord:
    return RunRecord(name, 0.2, [a_request(tokens, status, margin)])


def a_request(tokens: list[int], status: str = "done", margin: float = 1.0) -> Finished:
    return Finished("ls-0", 1, 0.0, 0.1, 0.2, 8, len(tokens), status, None, tokens, [margin] * len(tokens))


@pytest.mark.parametrize(
    ("other", "code", "said"),
    [
        (run_record("tile", [1, 2]), 0, ""),
        (run_record("tile", [1, 3]), 1, "tile: other tokens than under fcfs for ls-0"),
        (run_record("tile", [1, 3], margin=1e-4), 1, "tile: other tokens"),
        (run_record("tile", [1], "failed"), 1, "tile: 1 of 1 requests failed"),
        (run_record("tile", [1], "cancelled"), 1, "tile: 1 of 1 requests cancelled"),
        (run_record("tile", [], "refused"), 1, "tile: 1 of 1 requests refused, so nothing was measured"),
        (RunRecord("tile", 0.2, [a_request([1, 2]), a_request([], "refused")]), 0, ""),
    ],
    ids=["equal", "mismatch", "tie in one run only", "failed", "cut short", "refused", "one refused"],
)
def test_exit_code_of_a_replay(qllm, tmp_path, monkeypatch, other, code, said):
    runs = {"fcfs": run_record("fcfs", [1, 2]), "tile": other}
    monkeypatch.setattr(replay_command, "run_all", lambda *args, **kwargs: (runs, 1.0))
    monkeypatch.setattr(replay_command, "write_png", lambda *args: None)
    got, _, err = qllm("replay", *TINY, *SHORT, "--out", tmp_path)
    assert got == code
    assert said in err
    assert bool(err) == bool(said)


def test_a_tie_is_no_mismatch(qllm, tmp_path, monkeypatch):
    runs = {name: run_record(name, [1, last], margin=1e-4) for name, last in (("fcfs", 2), ("tile", 3))}
    monkeypatch.setattr(replay_command, "run_all", lambda *args, **kwargs: (runs, 1.0))
    assert qllm("replay", *TINY, *SHORT, "--out", tmp_path)[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["tokens"]["ties"] == 1


def test_without_matplotlib_there_is_no_picture_and_a_note(qllm, tmp_path, monkeypatch):
    find = replay_command.importlib.util.find_spec
    monkeypatch.setattr(
        replay_command.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    monkeypatch.setattr(
        replay_command, "run_all", lambda *args, **kwargs: ({"fcfs": run_record("fcfs", [1])}, 1.0)
    )
    code, out, _ = qllm("replay", *TINY, *SHORT, "--out", tmp_path)
    assert code == 0
    assert "no report.png: matplotlib is not installed" in out
    assert "report.json, timeline.json" in out
    assert not (tmp_path / "report.png").exists()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(replay_command, "run_all", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["replay", *TINY, *SHORT, "--out", str(tmp_path)])


def test_ctrl_c(qllm, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay_command, "run_all", interrupt)
    code, _, err = qllm("replay", *TINY, *SHORT, "--out", tmp_path)
    assert (code, err) == (130, "error: interrupted\n")


def test_a_terminal_sees_how_far_a_run_has_come(monkeypatch, tmp_path):
    console = Console(force_terminal=True, width=100, record=True)
    monkeypatch.setattr(cli, "out", console)
    with pytest.raises(SystemExit) as left:
        cli.main(["replay", *TINY, *SHORT, "--policy", "fcfs", "--slo", "1", "--out", str(tmp_path)])
    assert left.value.code == 0
    assert sum(line.startswith("fcfs      LS ") for line in console.export_text().splitlines()) >= 1


# -- help and version ----------------------------------------------------------------------------------------


def test_version(qllm):
    import qllm_ops

    assert qllm("--version") == (0, f"qllm {qllm_ops.__version__}\n", "")


def test_a_batch_invariant_engine_needs_long_chunks(qllm, tmp_path):
    code, _, err = qllm("replay", *TINY, "--batch-invariant", "--out", tmp_path)
    assert code == 2
    assert re.search(r"prefill_tokens must be at least 512, .*got 128", " ".join(err.split()))


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_names_the_commands(qllm, args):
    code, out, _ = qllm(*args)
    assert code == 0
    assert "replay" in out
    assert "doctor" in out


def test_help_of_replay_names_every_option(qllm):
    code, out, _ = qllm("replay", "--help")
    assert code == 0
    options = (
        *("model", "preset", "ls-trace", "be-trace", "rate", "duration", "seed", "ls-fraction", "time-scale"),
        *("max-requests", "policy", "slo", "out", "kv-tokens", "max-batch", "prefill-tokens", "be-floor"),
        *("aging", "top-up-tokens", "dtype", "device", "backend", "gate", "threads", "quantize"),
    )
    assert [name for name in options if f"--{name} " not in out] == []


def test_help_does_not_import_transformers():
    code = "import sys, qllm_ops.scheduler.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("good", [True, False])
def test_exit_code_of_doctor(qllm, monkeypatch, good):
    from qllm_ops.scheduler import doctor

    monkeypatch.setattr(doctor, "examine", lambda out: good)
    assert qllm("doctor")[0] == (0 if good else 1)

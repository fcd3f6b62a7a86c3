"""`perf/tune.py` without a GPU: its candidates, how it judges given times, what it writes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import layers  # noqa: E402
import tune  # noqa: E402

from qllm_ops import tiles  # noqa: E402
from qllm_ops.tiles import INTERPRETER, PHASES, TileConfig, TileKey, new_entry  # noqa: E402

INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
CPU = torch.device("cpu")
NAME = "a device of the tests"
SHAPES = list(tune.MODELS.values())


def tuning(arch="sm_90", max_exit_us=tiles.EXIT_US, progress=Path("unused")) -> tune.Tuning:
    return tune.Tuning(CPU, NAME, arch, max_exit_us, 0.01, torch.bfloat16, progress)


def all_jobs() -> list[tune.Job]:
    return tune.jobs(SHAPES, tune.TOKENS, torch.bfloat16)


@pytest.fixture
def no_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tuned")
    tiles.tuned_table.cache_clear()
    yield
    tiles.tuned_table.cache_clear()


# -- what there is to decide -------------------------------------------------------------------------------


def test_every_entry_is_decided_once_by_all_its_numbers_of_tokens():
    found = tune.jobs([layers.MIXTRAL], (1, 8, 32, 8, 2048), torch.bfloat16)
    assert [job.key for job in found] == list(dict.fromkeys(job.key for job in found))
    assert {(job.key.phase, job.tokens) for job in found} == {
        (phase, tokens) for phase in PHASES for tokens in ((1, 8), (32,), (2048,))
    }


def test_the_first_model_decides_for_those_that_share_an_entry():
    found = tune.jobs([layers.QWEN3, layers.OLMOE], (1,), torch.bfloat16)
    combines = [job for job in found if job.key.phase == "combine"]
    assert [job.shape for job in combines] == [layers.QWEN3]


def test_an_entry_is_found_by_the_key_that_it_is_written_with(no_tables):
    for job in all_jobs():
        t, config = tuning(max_exit_us=float("inf")), tune.present_tiles(tuning(), job)[job.key.phase]
        tune.enter(t, job, replace(config, num_warps=2), {"ratio": 0.9})
        for num_tokens in job.tokens:
            found = tune.present_tiles(t, replace(job, tokens=(num_tokens,)))
            assert found[job.key.phase] == replace(config, num_warps=2)


# -- candidates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_100", "sm_90", "sm_80", "sm_86", "gfx942"])
@pytest.mark.parametrize("max_exit_us", [10.0, tiles.EXIT_US, float("inf")])
def test_candidates_fit_the_device_and_leave_in_time(arch, max_exit_us):
    t = tuning(arch, max_exit_us)
    for job in all_jobs():
        phase, k = job.key.phase, job.key.k
        present = tune.present_tiles(t, job)[phase]
        found = tune.candidates(t, job, present)
        assert len(found) == len(set(found)) < 100
        assert present not in found
        read_once = tiles.row_class(job.tokens[0], job.shape.top_k, job.shape.num_experts)[2]

        def estimate(config, phase=phase, k=k, read_once=read_once):
            return tiles.leave_us(phase, config, k, torch.bfloat16, t.arch, read_once)

        for config in found:
            assert tiles.tiles_problem(phase, config, torch.bfloat16, arch) is None
            assert config.block_m == present.block_m
            if phase != "combine":
                assert estimate(config) <= max(max_exit_us, estimate(present))
                assert config.programs_per_sm * tiles.shared_bytes(phase, config, torch.bfloat16) <= (
                    tiles.MULTIPROCESSORS[arch].shared_bytes
                )


def test_there_are_candidates_for_every_entry_and_field():
    t, moved = tuning(), {phase: set() for phase in PHASES}
    for job in all_jobs():
        present = tune.present_tiles(t, job)[job.key.phase]
        found = tune.candidates(t, job, present)
        assert len(found) >= 5, job
        for field in (*tune.DOUBLED[job.key.phase], *tune.ADDED[job.key.phase]):
            if any(getattr(c, field) != getattr(present, field) for c in found):
                moved[job.key.phase].add(field)
    assert moved == {phase: {*tune.DOUBLED[phase], *tune.ADDED[phase]} for phase in PHASES}


def test_a_candidate_is_what_would_run_if_it_were_entered(no_tables):
    """The rule of the exit leaves it alone."""
    t = tuning()
    for job in all_jobs():
        key, present = job.key, tune.present_tiles(t, job)[job.key.phase]
        for config in tune.candidates(t, job, present)[:5]:
            tune.enter(t, job, config, {"ratio": 0.9})
            assert tune.present_tiles(t, job)[key.phase] == config


def test_a_step_changes_one_field_only():
    config = TileConfig(64, 64, 64, 4, 3, 2, 2)
    for phase in PHASES:
        for step in tune.steps(phase, config):
            fields = [f for f in vars(config) if getattr(step, f) != getattr(config, f)]
            assert len(fields) == 1
            assert fields[0] in (*tune.DOUBLED[phase], *tune.ADDED[phase])


# -- deciding ----------------------------------------------------------------------------------------------


def rounds(present=1.0, noise=0.002, **rivals) -> dict[str, list[float]]:
    """Nine rounds of times, all with the same swing of the clocks; `again` off by the noise, up and down."""
    swing = [1 + 0.1 * (n % 3) for n in range(9)]
    return {
        "present": [present * s for s in swing],
        "again": [present * s * (1 + noise * (-1) ** n) for n, s in enumerate(swing)],
        **{name: [time * s for s in swing] for name, time in rivals.items()},
    }


def test_who_wins_by_more_than_the_noise_wins():
    name, by = tune.decide({32: rounds(a=0.97, b=0.9), 256: rounds(a=0.97, b=0.95)})
    assert name == "b"
    assert by["ratio"] == pytest.approx((0.9 * 0.95) ** 0.5, abs=1e-4)
    assert by["noise"] == pytest.approx(0.002)
    assert by["tokens"]["32"]["us"] == pytest.approx(0.99e6)
    assert by["tokens"]["32"]["before_us"] == pytest.approx(1.1e6)
    assert by["tokens"]["256"]["ratio_p25_p50_p75"] == [0.95] * 3
    assert by["tokens"]["256"]["rounds"] == 9


@pytest.mark.parametrize(
    "final",
    [
        {},
        {32: rounds()},
        {32: rounds(a=1.0)},
        {32: rounds(a=1.3)},
        {32: rounds(a=1 - tune.LEAST_GAIN / 2)},  # not worth an entry
        {32: rounds(a=0.96, noise=0.05)},  # within the noise
        {32: rounds(a=0.8), 256: rounds(a=1.02)},  # better on average, worse in one
        {32: rounds(a=0.8), 256: rounds()},  # it failed in one
    ],
)
def test_else_the_present_tiles_stay(final):
    assert tune.decide(final) is None


def test_ratios_are_within_a_round_so_that_the_clocks_fall_out():
    times = rounds(a=0.95)
    assert max(times["a"]) > min(times["present"])
    assert tune.decide({1: times})[1]["ratio"] == pytest.approx(0.95)


# -- tables ------------------------------------------------------------------------------------------------

KEY = TileKey("down", 256, 4096, 14336, "bfloat16")
TILES = TileConfig(128, 128, 64, 8, 3, 1, 2)
HEAD = {"device": NAME, "arch": "sm_90", "date": "2", "versions": {"torch": "2"}, "command": "b"}


def entry(key=KEY, **measured):
    return new_entry(key, TILES, measured)


def test_an_entry_takes_the_place_of_the_one_with_its_key():
    other = replace(KEY, most_rows=float("inf"))
    table = {**HEAD, "date": "1", "entries": [entry(ratio=0.9), entry(other)]}
    found = tune.merged(table, HEAD, entry(ratio=0.8))
    assert found == {**HEAD, "entries": [entry(ratio=0.8), entry(other)]}
    assert table["entries"] == [entry(ratio=0.9), entry(other)]


def test_entries_are_in_one_order_however_they_came():
    entries = [entry(job.key) for job in all_jobs()]
    forth, back = None, None
    for one, other in zip(entries, reversed(entries), strict=True):
        forth, back = tune.merged(forth, HEAD, one), tune.merged(back, HEAD, other)
    assert forth == back
    assert len(forth["entries"]) == len(entries)


# -- all of it, with given times ---------------------------------------------------------------------------


@pytest.fixture
def rehearsed(tmp_path, monkeypatch, no_tables):
    """A tuning in which nothing is compiled; the first rival of gate_up is 20 % faster, all others equal."""
    timed = []

    def compete(t, job, pair, present, rivals):
        timed.append(job)
        faster = 0.8 if job.key.phase == "gate_up" and len(timed) <= 3 else 1.0
        first = next(iter(rivals))
        return {first: faster}, {tokens: rounds(**{first: faster}) for tokens in job.tokens}, {}

    monkeypatch.setattr(tune, "compete", compete)
    monkeypatch.setattr(tune, "compile_all", lambda *arguments: {})
    monkeypatch.setattr(tune, "load", lambda t, shape: ())
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1))
    return tuning(progress=tmp_path / "tune.json"), timed


def test_a_winner_is_entered_with_what_it_won_by(rehearsed):
    t, _ = rehearsed
    assert tune.tune(t, ["olmoe"], [4, 32]) == 0
    table = tiles.read_table(tiles.table_path(NAME))
    (written,) = table["entries"]
    assert (table["device"], table["arch"]) == (NAME, "sm_90")
    assert table["versions"] == tune.versions()
    assert written["key"] == {
        "phase": "gate_up", "most_rows": 4, "n": 1024, "k": 2048, "dtype": "bfloat16",
    }  # fmt: skip
    measured = written["measured"]
    assert (measured["ratio"], measured["noise"], measured["model"]) == (0.8, 0.002, "OLMoE-1B-7B")
    assert set(measured["tokens"]) == {"4", "32"}
    assert {"date", "versions", "max_exit_us"} <= set(measured)


def test_a_second_run_finds_nothing_left_to_do(rehearsed):
    t, timed = rehearsed
    assert tune.tune(t, ["olmoe"], [4, 32]) == 0
    assert len(timed) == 3
    assert tune.tune(t, ["olmoe"], [4, 32]) == 0
    assert len(timed) == 3
    tune.tune(replace(t, max_exit_us=100.0), ["olmoe"], [4, 32])
    assert len(timed) == 6


def test_an_interrupted_run_is_continued(rehearsed, monkeypatch):
    t, timed = rehearsed
    compete = tune.compete

    def interrupted(t, job, *rest):
        if job.key.phase == "down":
            raise KeyboardInterrupt
        return compete(t, job, *rest)

    monkeypatch.setattr(tune, "compete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(t, ["olmoe"], [4])
    assert [job.key.phase for job in timed] == ["gate_up"]
    assert tiles.table_path(NAME).exists()
    monkeypatch.setattr(tune, "compete", compete)
    assert tune.tune(t, ["olmoe"], [4]) == 0
    assert [job.key.phase for job in timed] == ["gate_up", "down", "combine"]


def test_a_case_that_fails_is_noted_and_the_others_are_timed(rehearsed, monkeypatch, capsys):
    t, timed = rehearsed
    compete = tune.compete

    def failing(t, job, *rest):
        if job.key.phase == "down":
            raise RuntimeError("out of\nsomething")
        return compete(t, job, *rest)

    monkeypatch.setattr(tune, "compete", failing)
    assert tune.tune(t, ["olmoe"], [4]) == 1
    assert [job.key.phase for job in timed] == ["gate_up", "combine"]
    cases = json.loads(t.progress.read_text())["cases"]
    assert [case.get("error") for case in cases] == [None, "RuntimeError: out of something", None]
    assert "out of something" in capsys.readouterr().out


def test_a_model_that_is_too_large_is_left_out(rehearsed, monkeypatch, capsys):
    t, timed = rehearsed
    monkeypatch.setattr(tune, "load", lambda t, shape: None)
    assert tune.tune(t, ["olmoe"], [4]) == 1
    assert not timed
    assert "not enough memory" in capsys.readouterr().out


# -- the kernels, in the interpreter -----------------------------------------------------------------------

SMALL = layers.Shape("small", 32, 48, 3, 2)
OTHERS = {
    "gate_up": replace(INTERPRETER["gate_up"], block_n=8),
    "down": replace(INTERPRETER["down"], block_n=16, block_k=16, split_k=2),
    "combine": replace(INTERPRETER["combine"], block_m=2, block_n=16),
}


def runs(phase: str) -> tune.PhaseRuns:
    pair = layers.weights(SMALL, torch.float32, CPU)
    inputs = [layers.layer_inputs(SMALL, 5, pair, seed=seed) for seed in (1, 2)]
    return tune.PhaseRuns(phase, inputs, dict(INTERPRETER))


@INTERPRETED
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_can_be_run_again_and_again_with_other_tiles(phase):
    found = runs(phase)
    for config in (OTHERS[phase], INTERPRETER[phase]):
        found.check(config)
        found.check(config)
        call = found.call(config)
        for base in found.bases:
            found._written(base).fill_(float("nan"))
        call()
        call()
        for base in found.bases:
            run = found._with_tiles(base, config)[0]
            assert not found._result(run).isnan().any()


@INTERPRETED
@pytest.mark.parametrize("phase", PHASES)
def test_tiles_that_compute_something_else_are_caught(phase, monkeypatch):
    found = runs(phase)
    monkeypatch.setattr(found, "_launch", lambda run, start: None)
    with pytest.raises(AssertionError, match="not that of the present tiles"):
        found.check(OTHERS[phase])


@INTERPRETED
def test_rivals_are_compiled_by_layers_without_tokens():
    assert tune.compile_tiles(CPU, SMALL, torch.float32, 5, {**INTERPRETER, "down": OTHERS["down"]}) is None
    no_down = {"gate_up": INTERPRETER["gate_up"]}
    assert "KeyError" in tune.compile_tiles(CPU, SMALL, torch.float32, 5, no_down)


@INTERPRETED
def test_a_competition_times_everybody_who_works(monkeypatch):
    monkeypatch.setattr(tune, "rotated", lambda shape, n, pair: [layers.layer_inputs(shape, n, pair)])
    t = replace(tuning("interpreter"), dtype=torch.float32)
    (job,) = (j for j in tune.jobs([SMALL], [2], torch.float32) if j.key.phase == "gate_up")
    rivals = {"good": OTHERS["gate_up"], "bad": replace(OTHERS["gate_up"], block_n=24)}
    pair = layers.weights(SMALL, torch.float32, CPU)
    ratios, final, failed = tune.compete(t, job, pair, dict(INTERPRETER), rivals)
    assert set(ratios) == {"good"}
    assert {name: len(times) for name, times in final[2].items()} == dict.fromkeys(
        ("present", "again", "good"), 9
    )
    assert set(failed) == {"bad"}


# -- the command -------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(PERF / "tune.py"), *arguments], env=environment, capture_output=True, text=True
    )


def test_without_a_device_it_says_so():
    done = command()
    assert done.returncode == 2
    assert "no CUDA device here" in done.stderr


@pytest.mark.parametrize("wrong", [("--tokens", "0"), ("--max-exit-us", "0"), ("--max-exit-us", "nan")])
def test_bad_arguments_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", *wrong])
    with pytest.raises(SystemExit):
        tune.parse()
    assert wrong[0] in capsys.readouterr().err

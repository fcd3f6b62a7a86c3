"""Replays of tiny workloads: every request ends once, the times are the workload's, and nothing hangs."""

import threading
import time
from collections import Counter

import pytest
import torch
from tiny_models import stretched_model

from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler import log
from qllm_ops.scheduler import replay as replay_module
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.policies import POLICIES
from qllm_ops.scheduler.records import LS_ALONE
from qllm_ops.scheduler.replay import measure_slo, replay, request_seed, run_all
from qllm_ops.scheduler.request import BE, LS
from qllm_ops.scheduler.runner import Runner
from qllm_ops.scheduler.workload import Arrival, synthetic

LIMITS = Limits(kv_tokens=2048, kv_reserve=256, prefill_tokens=128)
MIX = synthetic(
    30, 0.6, 3, ls_fraction=0.4, ls_prompt=(4, 16), be_prompt=(64, 256), ls_output=(1, 6), be_output=(2, 8)
)


@pytest.fixture(scope="module")
def model():
    return make_preset("tiny")


def tokens(run) -> dict[str, list[int]]:
    return {f.id: f.tokens for f in run.finished}


def statuses(run) -> dict[str, str]:
    return {f.id: f.status for f in run.finished}


def slow_iterations(monkeypatch, seconds: float) -> None:
    """Make every iteration of a workload's requests last at least ``seconds``."""
    run = Runner.run

    def slow(self, batch, granularity):
        if not batch.rows[0].request.id.startswith("request-"):  # the engine's own names: the warm-up
            time.sleep(seconds)
        return run(self, batch, granularity)

    monkeypatch.setattr(Runner, "run", slow)


# -- what comes of a workload ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(model):
    return {policy: replay(model, MIX, policy, limits=LIMITS, seed=5) for policy in POLICIES}


def test_the_workload_has_both_classes():
    assert min(Counter(a.priority for a in MIX).values()) >= 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_with_the_tokens_it_asked_for(runs, policy):
    run = runs[policy]
    assert run.policy == policy
    assert [f.id for f in run.finished] == [a.id for a in MIX]
    for request, arrival in zip(run.finished, MIX, strict=True):
        assert (request.status, request.error) == ("done", None)
        assert (request.priority, request.arrival_s) == (arrival.priority, arrival.arrival_s)
        assert request.prompt_tokens == arrival.prompt_tokens
        assert request.output_tokens == len(request.tokens) == len(request.margins) == arrival.output_tokens
        assert request.arrival_s < request.first_token_s <= request.finish_s
    assert run.wall_s == max(f.finish_s for f in run.finished)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_record_holds_the_workload_and_not_the_warm_up(runs, policy):
    run = runs[policy]
    computed = Counter()
    for span in run.spans:
        assert 0 <= span.start_s < span.end_s <= run.wall_s
        computed[span.kind] += span.tokens
    assert {id for span in run.spans for id in span.request_ids} == {a.id for a in MIX}
    assert computed["prefill"] == sum(a.prompt_tokens for a in MIX)
    assert computed["decode"] == sum(a.output_tokens - 1 for a in MIX)
    for pause in run.pauses:
        assert 0 <= pause.asked_s <= pause.resumed_s
        assert pause.parked_s is None or pause.asked_s <= pause.parked_s
    assert run.wasted_tiles == 0
    assert run.extra["pauses_expired"] == 0


def test_only_policies_with_two_lanes_use_both(runs):
    lanes = {policy: {span.lane for span in run.spans} for policy, run in runs.items()}
    assert lanes["fcfs"] == lanes["priority"] == {"foreground"}
    assert lanes["layer"] == lanes["tile"] == {"foreground", "background"}


def test_every_policy_gives_the_same_tokens(runs):
    assert all(tokens(run) == tokens(runs["fcfs"]) for run in runs.values())


def test_a_replay_can_be_repeated(model, runs):
    again = replay(model, MIX, "tile", limits=LIMITS, seed=5)
    other = replay(model, MIX, "tile", limits=LIMITS, seed=6)
    assert tokens(again) == tokens(runs["tile"])
    assert tokens(other) != tokens(again)


def test_sampling_has_a_seed_per_request(model, runs):
    one, two, other = (
        replay(model, MIX[:8], "priority", limits=LIMITS, seed=seed, temperature=3.0) for seed in (5, 5, 6)
    )
    assert tokens(one) == tokens(two)
    assert tokens(one) != {a.id: tokens(runs["fcfs"])[a.id] for a in MIX[:8]}
    assert tokens(one) != tokens(other)


def test_request_seed_is_the_same_in_every_process():
    assert request_seed(7, "be-3") == 8378152039616814548
    seeds = {request_seed(seed, id) for seed in (0, 1) for id in ("ls-0", "ls-1", "be-0")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


# -- requests that end badly -----------------------------------------------------------------------------


def test_a_refused_prompt_is_recorded_and_harms_no_other(model, runs):
    long = Arrival("be-long", BE, MIX[2].arrival_s, 3000, 4)
    run = replay(model, [*MIX, long], "tile", limits=LIMITS, seed=5)
    refused = next(f for f in run.finished if f.id == "be-long")
    assert (refused.status, refused.first_token_s, refused.tokens) == ("refused", None, [])
    assert "3000 prompt" in refused.error
    assert "kv_tokens=2048" in refused.error
    assert {id: t for id, t in tokens(run).items() if id != "be-long"} == tokens(runs["tile"])


def test_a_workload_that_is_refused_altogether(model):
    run = replay(model, [Arrival("be-0", BE, 0.0, 5000, 4)], "fcfs", limits=LIMITS)
    assert statuses(run) == {"be-0": "refused"}
    assert run.wall_s == 0.0


def test_a_failed_request_harms_no_other(monkeypatch):
    model = make_preset("tiny")
    with torch.no_grad():
        model.get_input_embeddings().weight[127] = torch.nan
    draw = replay_module.prompt_ids

    def poisoned(arrival, vocab_size, seed):
        ids = [min(token, 126) for token in draw(arrival, vocab_size, seed)]
        return [127] * len(ids) if arrival.id == "be-1" else ids

    monkeypatch.setattr(replay_module, "prompt_ids", poisoned)
    run = replay(model, MIX, "tile", limits=LIMITS)
    failed = [f for f in run.finished if f.status != "done"]
    assert [(f.id, f.status) for f in failed] == [("be-1", "failed")]
    assert "not numbers" in failed[0].error


def test_a_run_that_takes_too_long_is_cut_short(model, monkeypatch):
    slow_iterations(monkeypatch, 0.05)
    load = [
        Arrival("ls-0", LS, 0.0, 8, 2),
        Arrival("be-1", BE, 0.0, 8, 1000),
        Arrival("ls-1", LS, 0.0, 8, 1000),
    ]
    began = time.monotonic()
    run = replay(model, load, "tile", limits=LIMITS, drain_timeout_s=1.0)
    assert time.monotonic() - began < 20
    assert statuses(run) == {"ls-0": "done", "be-1": "cancelled", "ls-1": "cancelled"}
    assert run.extra["timed_out"] == 2
    cut = {f.id: f for f in run.finished}["ls-1"]
    assert 0 < cut.output_tokens < 1000
    assert cut.finish_s >= 1.0


def test_an_iteration_that_never_ends_is_given_up(monkeypatch):
    model, release = make_preset("tiny"), threading.Event()
    warm_up, run, engines = replay_module.warm_up, Runner.run, []

    def hang(self, batch, granularity):
        release.wait(60)
        return run(self, batch, granularity)

    def then_hang(engine, *args):
        engines.append(engine)
        warm_up(engine, *args)
        monkeypatch.setattr(Runner, "run", hang)

    monkeypatch.setattr(replay_module, "warm_up", then_hang)
    monkeypatch.setattr(replay_module, "GRACE_S", 0.2)
    try:
        with pytest.raises(RuntimeError, match=r"policy fcfs: 1 requests are in an iteration"):
            replay(model, [Arrival("be-0", BE, 0.0, 8, 2)], "fcfs", limits=LIMITS, drain_timeout_s=0.2)
    finally:
        release.set()
        engines[0].close()  # which the replay could not wait for


def test_an_empty_workload_is_refused(model):
    with pytest.raises(ValueError, match="arrivals must hold at least one request"):
        replay(model, [], "tile", limits=LIMITS)


def test_a_record_is_of_everything_however_little_an_engine_remembers(model, monkeypatch):
    monkeypatch.setattr(log, "KEEP", 2)
    run = replay(model, MIX, "tile", limits=LIMITS)
    assert {id for span in run.spans for id in span.request_ids} == {a.id for a in MIX}


# -- time ------------------------------------------------------------------------------------------------


def test_requests_are_submitted_on_time_however_busy_the_engine_is(model, monkeypatch):
    slow_iterations(monkeypatch, 0.5)
    load = [Arrival(f"be-{i}", BE, 0.1 * i, 8, 1) for i in range(4)]
    run = replay(model, load, "fcfs", limits=LIMITS)
    # Had be-1 waited for be-0's iteration, it would have been 0.4 s late.
    assert run.extra["submit_late_max_s"] < 0.35
    assert set(run.spans[0].request_ids) == {"be-0"}


def test_a_late_submission_counts_against_the_engine(model, monkeypatch):
    submit = Engine.submit

    def late(self, *args, **kwargs):
        if kwargs.get("id") == "ls-0":
            time.sleep(0.3)
        return submit(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "submit", late)
    load = [Arrival("ls-0", LS, 0.0, 8, 1), Arrival("ls-1", LS, 0.1, 8, 1)]
    run = replay(model, load, "tile", limits=LIMITS)
    first, second = run.finished
    assert first.ttft_s >= 0.3
    assert second.ttft_s >= 0.2
    assert run.extra["submit_late_max_s"] >= 0.2


def test_arrivals_need_not_be_in_order(model):
    load = [Arrival("be-1", BE, 0.1, 8, 1), Arrival("be-0", BE, 0.0, 8, 1)]
    run = replay(model, load, "fcfs", limits=LIMITS)
    assert statuses(run) == {"be-0": "done", "be-1": "done"}


def test_the_slo_is_ten_full_decode_iterations(model, monkeypatch):
    rows = []
    run = Runner.run

    def slow(self, batch, granularity):
        rows.append((batch.kind, len(batch.rows)))
        time.sleep(0.02 if batch.kind == "decode" else 0.2)
        return run(self, batch, granularity)

    monkeypatch.setattr(Runner, "run", slow)
    slo_s = measure_slo(model, limits=LIMITS, steps=6)
    assert 0.2 <= slo_s < 2.0
    assert rows.count(("decode", LIMITS.max_batch)) >= 5


@pytest.mark.parametrize("kv_tokens", [32, 60])
def test_the_slo_can_be_measured_with_little_memory(model, kv_tokens):
    limits = Limits(kv_tokens=kv_tokens, kv_reserve=8)
    assert measure_slo(model, limits=limits) > 0


@pytest.mark.parametrize("longest", [200, 256, 5000])
def test_a_model_with_few_positions_is_warmed_up_within_them(longest):
    """Requests that do not fit are refused one by one, not the whole replay."""
    load = [Arrival("be-0", BE, 0.0, longest, 4), Arrival("ls-0", LS, 0.0, 8, 4)]
    run = replay(stretched_model("longrope"), load, "tile", limits=Limits(2048))  # 256 positions
    assert statuses(run) == {"be-0": "done" if longest == 200 else "refused", "ls-0": "done"}


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_reserve_that_leaves_best_effort_requests_next_to_nothing(model, left):
    limits = Limits(kv_tokens=512, kv_reserve=512 - left)
    load = [Arrival("be-0", BE, 0.0, 40, 4), Arrival("ls-0", LS, 0.0, 8, 4)]
    assert statuses(replay(model, load, "tile", limits=limits)) == {"be-0": "refused", "ls-0": "done"}
    assert measure_slo(model, limits=limits) > 0


# -- leaving -----------------------------------------------------------------------------------------------


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qllm-") and t.is_alive()]


def test_ctrl_c_closes_the_engine(monkeypatch):
    model = make_preset("tiny")
    attention, before = model.config._attn_implementation, engine_threads()
    slow_iterations(monkeypatch, 0.05)
    calls = []

    def interrupt(progress):
        calls.append(progress)
        if progress.elapsed_s > 0.3:
            raise KeyboardInterrupt

    load = [Arrival("be-0", BE, 0.0, 8, 500), Arrival("ls-0", LS, 30.0, 8, 1)]
    with pytest.raises(KeyboardInterrupt):
        replay(model, load, "tile", limits=LIMITS, progress=interrupt)
    assert calls
    assert engine_threads() == before
    assert model.config._attn_implementation == attention
    # The model is free for the next engine.
    assert statuses(replay(model, load[:1], "fcfs", limits=LIMITS, drain_timeout_s=0.5)) == {
        "be-0": "cancelled"
    }


# -- all policies --------------------------------------------------------------------------------------------


def test_run_all_begins_with_ls_alone(model):
    said = []
    runs, slo_s = run_all(
        model,
        MIX[:10],
        ["tile", "fcfs"],
        limits=LIMITS,
        slo_s=0.5,
        progress=lambda name, p: said.append((name, p)),
    )
    assert slo_s == 0.5
    assert {name: run.policy for name, run in runs.items()} == {n: n for n in (LS_ALONE, "tile", "fcfs")}
    assert [name for name, p in said if p.ended] == [LS_ALONE, "tile", "fcfs"]
    urgent = {a.id for a in MIX[:10] if a.priority == LS}
    assert set(tokens(runs[LS_ALONE])) == urgent
    assert {span.be_rows for span in runs[LS_ALONE].spans} == {0}
    assert {id: t for id, t in tokens(runs["tile"]).items() if id in urgent} == tokens(runs[LS_ALONE])
    last = {name: p for name, p in said if p.ended}
    assert (last["tile"].ls_done, last["tile"].be_done) == (last["tile"].ls_total, last["tile"].be_total)
    assert last[LS_ALONE].be_total == 0


def test_progress_comes_at_most_four_times_a_second(model):
    said = []
    load = [Arrival(f"be-{i}", BE, 0.05 * i, 8, 1) for i in range(20)]
    replay(model, load, "fcfs", limits=LIMITS, progress=lambda p: said.append(p.elapsed_s))
    assert len(said) <= 2 + max(said) / replay_module.PROGRESS_S
    assert len(said) >= 3


def test_run_all_without_ls_requests_has_no_ls_alone(model):
    runs, slo_s = run_all(model, [Arrival("be-0", BE, 0.0, 8, 2)], ["priority"], limits=LIMITS)
    assert list(runs) == ["priority"]
    assert slo_s > 0


def test_run_all_names_an_unknown_policy(model):
    with pytest.raises(ValueError, match="unknown policy 'fastest'"):
        run_all(model, MIX, ["fastest"], limits=LIMITS)

"""The engine on tiny models: the same tokens as transformers, whatever is paused, cancelled or broken."""

import contextlib
import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from served import generated, prompt
from tiny_models import STRETCHED, gpt_oss_with_sinks, stretched_model, tiny_model
from transformers.modeling_rope_utils import dynamic_rope_update

from qllm_ops import PriorityFlag
from qllm_ops.invariant import is_batch_invariant
from qllm_ops.models import install, uninstall
from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, POLICIES
from qllm_ops.scheduler.request import BE, LS, RequestCancelled, RequestError
from qllm_ops.scheduler.runner import Routes, Runner

WAIT_S = 60.0
LIMITS = Limits(kv_tokens=4096, kv_reserve=512, prefill_tokens=256)


@pytest.fixture(scope="module")
def model():
    return make_preset("tiny")


def record_logits(engine: Engine) -> dict[tuple[str, int], torch.Tensor]:
    """Every row's logits from now on, by (request, position)."""
    seen, runner, of_lane = {}, engine.runner, threading.local()
    run, forward = runner.run, runner._forward

    def note_forward(ids, rows):
        logits = forward(ids, rows)
        of_lane.logits = {s.slot: row.clone() for s, row in zip(rows.segments, logits, strict=True)}
        return logits

    def note_run(batch, granularity):
        outcomes = run(batch, granularity)
        seen.update({(row.request.id, row.end): of_lane.logits[row.request.region] for row in batch.rows})
        return outcomes

    runner.run, runner._forward = note_run, note_forward
    return seen


def assert_same_logits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("invariant", [False, True])
def test_kernels_are_loaded_before_a_lane_starts(model, monkeypatch, invariant):
    """Loading one waits for the whole device, and so for work that is paused there. Batch-invariant layers
    have tiles of their own."""
    seen = []

    def warm_up(hidden_states, gate_up_proj, *args, flag, priority, **options):
        lanes = [thread.name for thread in threading.enumerate() if thread.name.startswith("qllm-")]
        seen.append((gate_up_proj.shape, flag, priority, lanes, is_batch_invariant()))

    monkeypatch.setattr("qllm_ops.models.experts.warm_up", warm_up)
    with Engine(model, limits=Limits(kv_reserve=0), batch_invariant=invariant) as engine:
        engine.submit(prompt(5), max_new_tokens=2).result(WAIT_S)
        # Once for all layers, as they are alike.
        shape = (model.config.num_local_experts, 2 * model.config.intermediate_size, model.config.hidden_size)
        assert seen == [(shape, engine.flag, BE, [], invariant)]


def test_attention_kernels_for_many_keys_are_loaded_before_a_lane_starts(model):
    """On a GPU, where the library has several. Here: it harms nothing, and reaches all numbers of keys."""
    seen = []
    with Engine(model, limits=LIMITS) as engine:
        forward = engine.runner._forward

        def note(ids, rows):
            seen.append([(s.slot, s.total, s.length) for s in rows.segments])
            return forward(ids, rows)

        engine.runner._forward = note
        engine.runner._load_attention()
        assert engine.submit(prompt(20), max_new_tokens=4).result(WAIT_S) == generated(model, prompt(20), 4)
    loaded = [rows for rows in seen if rows[0][1] >= 128]
    assert {(len(rows), rows[0][1]) for rows in loaded} == {
        (n, total) for n in (1, 2, 4, 8) for total in (128, 256, 512, 1024, 2048, 4096) if n * total <= 4096
    }
    for rows in loaded:
        assert [slot for slot, _, _ in rows] == [i * rows[0][1] for i in range(len(rows))]
        assert {length for _, _, length in rows} == {1}


@pytest.mark.parametrize("slow", [FOREGROUND, BACKGROUND])
def test_no_lane_starts_before_both_are_warm(model, monkeypatch, slow):
    """What a thread makes in its first pass waits for the whole device, so for what the other one paused."""
    seen, run = [], Runner.run

    def warm_up_lane(runner):
        lane = threading.current_thread().name.removeprefix("qllm-")
        time.sleep(0.2 if lane == slow else 0)
        seen.append(lane)

    def note_run(runner, batch, *args):
        seen.append("batch")
        return run(runner, batch, *args)

    monkeypatch.setattr(Runner, "warm_up_lane", warm_up_lane)
    monkeypatch.setattr(Runner, "run", note_run)
    with Engine(model, limits=LIMITS) as engine:
        handles = [engine.submit(prompt(5), priority=priority, max_new_tokens=2) for priority in (BE, LS)]
        assert all(len(handle.result(WAIT_S)) == 2 for handle in handles)
    assert set(seen[:2]) == {FOREGROUND, BACKGROUND}


def test_a_lane_that_cannot_be_warmed_fails_the_requests_and_hangs_nobody(model, monkeypatch):
    submitted = threading.Event()

    def warm_up_lane(runner):
        if threading.current_thread().name == f"qllm-{BACKGROUND}":
            assert submitted.wait(WAIT_S)
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Runner, "warm_up_lane", warm_up_lane)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(5), priority=BE, max_new_tokens=2)
        submitted.set()
        with pytest.raises(RequestError, match="no room"):
            handle.result(WAIT_S)
    assert not any(thread.is_alive() for thread in engine._threads)


def test_an_engine_that_is_closed_at_once_kills_no_lane(model, monkeypatch):
    """One lane may be gone before the other has seen that both were warm."""
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    for _ in range(15):
        Engine(model, limits=LIMITS).close()
    assert died == []


@pytest.mark.parametrize(("device", "passes"), [("cuda", [0]), ("cpu", [])])
def test_a_lane_is_warmed_by_a_prompt_and_a_token_on_a_gpu(device, passes):
    seen = []
    Runner.warm_up_lane(SimpleNamespace(device=torch.device(device), _probe_beside=seen.append))
    assert seen == passes


# -- the same answer as transformers -------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "gate"), [*((policy, "host") for policy in POLICIES), ("tile", "stream")])
def test_mixed_requests_get_the_tokens_of_generate(model, policy, gate):
    requests = [(prompt(n, i), priority) for i, (n, priority) in enumerate(
        [(700, BE), (5, LS), (40, BE), (300, LS), (1, BE), (64, LS)]
    )]  # fmt: skip
    expected = [generated(model, ids, 6) for ids, _ in requests]
    with Engine(model, policy=policy, limits=LIMITS, gate=gate) as engine:
        assert engine.flag.gate == gate
        handles = [engine.submit(ids, priority=p, max_new_tokens=6) for ids, p in requests]
        assert [handle.result(WAIT_S) for handle in handles] == expected
        kinds = {(span.lane, span.kind) for span in engine.log.spans}
    assert (FOREGROUND, "prefill") in kinds
    assert ((BACKGROUND, "prefill") in kinds) == (POLICIES[policy].granularity is not None)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_best_effort_rows_ride_in_an_urgent_decode_batch(model, policy):
    with Engine(model, policy=policy, limits=LIMITS) as engine:
        be = engine.submit(prompt(30), max_new_tokens=200)
        next(be.stream())
        ls = engine.submit(prompt(8), priority=LS, max_new_tokens=5)
        assert ls.result(WAIT_S) == generated(model, prompt(8), 5)
        assert be.result(WAIT_S) == generated(model, prompt(30), 200)
        mixed = [s for s in engine.log.spans if s.kind == "decode" and s.ls_rows and s.be_rows]
    assert [span.tokens for span in mixed] == [2] * 4


@pytest.mark.parametrize("preset", ["tiny-qwen3-moe", "tiny-olmoe", "tiny-deepseek-v3"])
def test_other_architectures(preset):
    model = make_preset(preset)
    requests = [prompt(n) for n in (70, 3, 200)]
    expected = [generated(model, ids, 5) for ids in requests]
    with Engine(model, limits=Limits(kv_tokens=1024, kv_reserve=0, prefill_tokens=64)) as engine:
        handles = [engine.submit(ids, priority=i % 2, max_new_tokens=5) for i, ids in enumerate(requests)]
        assert [handle.result(WAIT_S) for handle in handles] == expected


# -- whatever else is served ---------------------------------------------------------------------------

CHUNK = 512  # of what chunks of a prompt are a multiple where an engine is batch invariant, on a CPU
MIXED = [(700, BE), (5, LS), (40, BE), (300, LS), (1, BE), (64, LS), (CHUNK + 1, BE), (1025, LS), (17, BE)]


def logits_alone(model, requests: dict, **options) -> dict:
    with Engine(model, batch_invariant=True, **options) as engine:
        seen = record_logits(engine)
        for id, (ids, priority) in requests.items():
            engine.submit(ids, priority=priority, max_new_tokens=8, id=id).result(WAIT_S)
    return seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preset", ["tiny", "tiny-deepseek-v3", "gpt_oss"])
def test_batch_invariant_logits_are_those_of_the_request_alone(preset, policy):
    """Bit by bit: in a full decode batch, in chunks, beside other prompts, and preempted."""
    model = tiny_model(preset) if preset == "gpt_oss" else make_preset(preset)
    requests = {f"r{i}": (prompt(n, i), priority) for i, (n, priority) in enumerate(MIXED)}
    options = {"policy": policy, "limits": Limits(kv_tokens=4096, kv_reserve=1100, prefill_tokens=CHUNK)}
    alone = logits_alone(model, requests, **{**options, "policy": "fcfs"})
    draw = random.Random(f"{preset}/{policy}")
    with Engine(model, batch_invariant=True, **options) as engine:
        seen, handles = record_logits(engine), []
        for id, (ids, priority) in requests.items():
            handles.append(engine.submit(ids, priority=priority, max_new_tokens=8, id=id))
            time.sleep(draw.choice([0, 0.02]))
        for handle in handles:
            handle.result(WAIT_S)
        assert any(span.tokens > 1 for span in engine.log.spans if span.kind == "decode")
    for id, (ids, _) in requests.items():
        for end in range(len(ids), len(ids) + 8):
            assert torch.equal(seen[id, end], alone[id, end]), (id, end)


def test_what_is_not_batch_invariant_is_refused(model):
    def mean_of_the_batch(module, args, output):
        return output + 1e-5 * output.mean(dim=1, keepdim=True)

    hook = model.model.norm.register_forward_hook(mean_of_the_batch)
    try:
        with pytest.raises(ValueError, match="batch_invariant=True cannot be had: the logits of a probe"):
            Engine(model, limits=Limits(kv_tokens=1024, kv_reserve=0), batch_invariant=True)
    finally:
        hook.remove()
    with pytest.raises(ValueError, match=f"prefill_tokens must be at least {CHUNK}.*got 511"):
        Engine(model, limits=Limits(prefill_tokens=CHUNK - 1), batch_invariant=True)
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got 1"):
        Engine(model, batch_invariant=1)
    # Nothing is left behind, and no batch has to be invariant that was not asked to.
    with Engine(model, limits=LIMITS) as engine:
        assert engine.submit(prompt(5), max_new_tokens=2).result(WAIT_S) == generated(model, prompt(5), 2)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # It hides a signature.
def test_a_model_that_gives_the_logits_of_every_token():
    """Not every model knows logits_to_keep (Qwen3-Omni does not)."""
    model = make_preset("tiny")
    forward = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(*args, **kwargs)
    requests = [prompt(n) for n in (70, 3, 5)]
    with Engine(model, limits=Limits(kv_tokens=1024, kv_reserve=0, prefill_tokens=32)) as engine:
        handles = [engine.submit(ids, max_new_tokens=5) for ids in requests]
        assert [h.result(WAIT_S) for h in handles] == [generated(model, ids, 5) for ids in requests]


def test_a_sliding_window():
    model = make_preset("tiny")
    model.config.sliding_window = 16
    requests = [prompt(n) for n in (90, 10, 40)]
    expected = [generated(model, ids, 5) for ids in requests]
    with Engine(model, limits=Limits(kv_tokens=1024, kv_reserve=0, prefill_tokens=32)) as engine:
        handles = [engine.submit(ids, max_new_tokens=5) for ids in requests]
        assert [handle.result(WAIT_S) for handle in handles] == expected


def test_attention_sinks_and_windows_with_best_effort_work_interrupted():
    model = gpt_oss_with_sinks()
    requests = [(prompt(n, i), p) for i, (n, p) in enumerate([(700, BE), (5, LS), (40, BE), (300, LS)])]
    expected = [generated(model, ids, 6) for ids, _ in requests]
    with Engine(model, limits=LIMITS) as engine:
        handles = [engine.submit(ids, priority=p, max_new_tokens=6) for ids, p in requests]
        assert [handle.result(WAIT_S) for handle in handles] == expected
        assert preempted_inside_a_layer(engine)
        assert generated(model, requests[0][0], 6) == expected[0]  # the model itself, beside the engine
        logits = record_logits(engine)
        engine.submit(requests[0][0], max_new_tokens=1, id="be").result(WAIT_S)
    with torch.inference_mode():
        wanted = model(torch.tensor([requests[0][0]])).logits[0, -1]
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-torch.inf)
        without = model(torch.tensor([requests[0][0]])).logits[0, -1]
    assert (logits["be", 700] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (without - wanted).abs().max() >= 1e-2 * wanted.abs().max()  # they count


def test_experts_that_are_all_but_equal_do_not_make_attention_look_wrong(monkeypatch):
    """The engine's first tokens are compared with the model's own as if rounding chose no expert."""
    model = make_preset("tiny")
    for layer in model.model.layers:

        def by_the_last_bit(x, route=layer.mlp.gate.forward):
            logits, weights, index = route(x)
            first = x.reshape(len(index), -1).view(torch.int32).sum(-1) % logits.shape[-1]
            return logits, weights, torch.stack([first, (first + 1) % logits.shape[-1]], 1)

        monkeypatch.setattr(layer.mlp.gate, "forward", by_the_last_bit)
    Engine(model, limits=LIMITS).close()
    monkeypatch.setattr(Routes, "again", lambda *_: contextlib.nullcontext())
    with pytest.raises(ValueError, match="the logits of a probe differ"):
        Engine(model, limits=LIMITS)


@pytest.mark.parametrize("kind", STRETCHED)
def test_positions_that_depend_on_the_longest_in_a_call(kind):
    """A row beside longer ones, and a prompt in chunks, get what they would get alone and at once."""
    requests = [prompt(n) for n in (90, 10, 60, 5)]
    new = (
        1 if kind == "dynamic" else 8
    )  # there, generate rotates later keys by other frequencies than the first
    with Engine(
        stretched_model(kind), limits=Limits(kv_tokens=1024, kv_reserve=0, prefill_tokens=64)
    ) as engine:
        assert engine.runner.max_positions == 256  # "dynamic": 32 in the config, times 8
        logits = record_logits(engine)
        engine.flag.pause(BE, "test")  # so that all of them are in one batch
        handles = [engine.submit(ids, max_new_tokens=new, id=str(len(ids))) for ids in requests]
        engine.flag.resume(BE, "test")
        tokens = [handle.result(WAIT_S) for handle in handles]
        assert max(span.be_rows for span in engine.log.spans) >= 3
    for ids, got in zip(requests, tokens, strict=True):
        model = stretched_model(kind)
        assert got == generated(model, ids, new)
        with torch.inference_mode():
            wanted = stretched_model(kind)(torch.tensor([ids])).logits[0, -1]
        assert (logits[str(len(ids)), len(ids)] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_lane_does_not_see_the_other_ones_positions(kind, monkeypatch):
    """Urgent work overtakes while the other lane stands between the choice of its frequencies and their
    use; bits are those of either lane alone."""
    model = stretched_model(kind)
    chosen, overtaken = threading.Event(), threading.Event()
    rotary = type(model.model.rotary_emb)
    use = rotary.forward
    while hasattr(use, "__wrapped__"):
        use = use.__wrapped__

    @dynamic_rope_update
    def forward(self, x, position_ids):
        if threading.current_thread().name == f"qllm-{BACKGROUND}" and not overtaken.is_set():
            chosen.set()
            assert overtaken.wait(WAIT_S)
        return use(self, x, position_ids)

    monkeypatch.setattr(rotary, "forward", forward)

    def run(*requests):
        with Engine(model, limits=Limits(kv_tokens=1024, kv_reserve=512)) as engine:
            logits = record_logits(engine)
            for ids, priority in requests:
                handle = engine.submit(ids, priority=priority, max_new_tokens=3, id=f"{priority}")
                if priority == BE and len(requests) > 1:
                    assert chosen.wait(WAIT_S)
            handle.result(WAIT_S)
            overtaken.set()
            assert engine.drain(WAIT_S)
            return logits

    together = run((prompt(90), BE), (prompt(6), LS))
    assert_same_logits(together, run((prompt(90), BE)) | run((prompt(6), LS)))


def test_the_model_can_be_used_beside_the_engine_and_is_given_back(model):
    ids = prompt(30)
    before = (model.config._attn_implementation, model.config._experts_implementation)
    expected = generated(model, ids, 5)
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(400), max_new_tokens=20)
        assert generated(model, ids, 5) == expected
        handle.result(WAIT_S)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before


# -- several engines, and an install of one's own -----------------------------------------------------


def choices(model):
    return model.config._attn_implementation, model.config._experts_implementation


@pytest.mark.parametrize("share_config", [False, True])
def test_two_engines_on_two_models(share_config):
    """Each has its own flag and memory; and the first to close takes nothing from the other."""
    first = make_preset("tiny")
    second = type(first)(first.config).eval() if share_config else make_preset("tiny-olmoe")
    both, before = (first, second), [choices(first), choices(second)]
    expected = [generated(model, prompt(300), 12) for model in both]
    interval = sys.getswitchinterval()
    engines = [Engine(model, limits=LIMITS) for model in both]
    engines[0].flag.pause(BE, "test")
    waiting = engines[0].submit(prompt(300), max_new_tokens=12)
    assert engines[1].submit(prompt(300), max_new_tokens=12).result(WAIT_S) == expected[1]
    assert not waiting.done
    engines[0].flag.resume(BE, "test")
    handles = [engine.submit(prompt(300), max_new_tokens=12) for engine in engines]
    assert [handle.result(WAIT_S) for handle in handles] == expected
    assert waiting.result(WAIT_S) == expected[0]
    engines[0].close()
    assert choices(second) == ("qllm", "qllm")
    assert sys.getswitchinterval() < interval
    assert preempted_inside_a_layer(engines[1])
    assert engines[1].submit(prompt(300), max_new_tokens=12).result(WAIT_S) == expected[1]
    engines[1].close()
    assert [choices(first), choices(second)] == before
    assert sys.getswitchinterval() == interval


def preempted_inside_a_layer(engine: Engine) -> bool:
    """Whether a best-effort pass of this engine stands still while its class is paused; asked again where
    the pause came between two passes."""
    return any(stood_inside_a_layer(engine) for _ in range(5))


def stood_inside_a_layer(engine: Engine) -> bool:
    handle = engine.submit(prompt(1500), max_new_tokens=1)
    while BACKGROUND not in engine.scheduler.running:
        time.sleep(0.0005)
    with engine.flag.urgent(LS):
        time.sleep(0.3)
        stood = BACKGROUND in engine.scheduler.running
    handle.result(WAIT_S)
    return stood and any(pause.parked_s is not None for pause in engine.log.pauses)


def test_one_engine_at_a_time_on_one_model(model):
    before, expected = choices(model), generated(model, prompt(40), 5)
    for _ in range(2):
        with Engine(model, limits=LIMITS) as engine:
            handle = engine.submit(prompt(40), max_new_tokens=5)
            with pytest.raises(ValueError, match="another engine serves this MixtralForCausalLM; close that"):
                Engine(model, limits=LIMITS)
            assert handle.result(WAIT_S) == expected
        assert choices(model) == before


def test_an_install_from_before_the_engine_is_there_again_after_it():
    model = make_preset("tiny")
    parked = threading.Event()
    flag = PriorityFlag(on_event=lambda kind, *_: kind == "park" and parked.set())
    install(model, flag)
    before = choices(model)
    flag.pause(BE)
    with Engine(model, limits=LIMITS) as engine:  # which has a flag of its own
        engine.submit(prompt(40), max_new_tokens=5).result(WAIT_S)
    assert not parked.is_set()
    assert choices(model) == before
    thread = threading.Thread(target=generated, args=(model, prompt(4), 1), daemon=True)
    thread.start()
    assert parked.wait(WAIT_S)
    flag.resume(BE)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert uninstall(model)


# -- preemption changes nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy"), [("tiny", "layer"), ("tiny", "tile"), ("gpt_oss", "tile")])
def test_a_paused_pass_resumes_where_it_stood_bit_for_bit(name, policy):
    """A second thread pauses and resumes best-effort work at random while one request runs."""
    model = gpt_oss_with_sinks() if name == "gpt_oss" else make_preset(name)

    def run(disturb: bool):
        with Engine(model, policy=policy, limits=LIMITS) as engine:
            logits = record_logits(engine)
            handle = engine.submit(prompt(1500), max_new_tokens=12, id="be")
            rng = random.Random(1)
            while disturb and not handle.done:
                engine.flag.pause(BE, "test")
                time.sleep(rng.uniform(0, 0.004))
                engine.flag.resume(BE, "test")
                time.sleep(rng.uniform(0, 0.004))
            handle.result(WAIT_S)
            return logits, engine.log

    undisturbed, _ = run(False)
    disturbed, log = run(True)
    assert_same_logits(disturbed, undisturbed)
    places = {pause.where for pause in log.pauses if pause.parked_s is not None}
    assert places & ({"layer"} if policy == "layer" else {"tile", "attention"})
    assert log.wasted_tiles == 0


def test_urgent_work_overtakes_a_pass_that_has_begun(model):
    with Engine(model, limits=Limits(kv_tokens=4096, kv_reserve=512, prefill_tokens=2048)) as engine:
        be = engine.submit(prompt(2000), max_new_tokens=1)
        while BACKGROUND not in engine.scheduler.running:
            time.sleep(0.001)
        ls = engine.submit(prompt(8), priority=LS, max_new_tokens=2)
        ls.result(WAIT_S)
        assert not be.done
        be.result(WAIT_S)
        (pass_of_be,) = (span for span in engine.log.spans if span.lane == BACKGROUND)
        inside = [s for s in engine.log.spans if s.lane == FOREGROUND and s.start_s > pass_of_be.start_s]
    assert len(inside) == 2
    assert inside[-1].end_s < pass_of_be.end_s


# -- sampling, streaming, cancelling --------------------------------------------------------------------


def test_sampled_tokens_do_not_depend_on_the_neighbours(model):
    options = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.9}
    with Engine(model, limits=LIMITS) as engine:
        alone = engine.submit(prompt(50), seed=7, **options).result(WAIT_S)
        handles = [engine.submit(prompt(50), seed=seed, **options) for seed in (7, 8, 9)]
        together = [handle.result(WAIT_S) for handle in handles]
    assert together[0] == alone
    assert len({tuple(tokens) for tokens in together}) == 3


def test_tokens_stream_as_they_are_made(model):
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(20), max_new_tokens=8)
        stream = handle.stream()
        first = next(stream)
        rest = list(stream)
        assert [first, *rest] == handle.result(WAIT_S) == handle.request.tokens
        assert len(handle.request.tokens) == 8


@pytest.mark.parametrize("several", [None, list, tuple])
def test_an_end_of_sequence_token_ends_the_request(model, several):
    """Or each of several, as generation_config.json may have them."""
    expected = generated(model, prompt(20), 8)
    other = next(token for token in range(128) if token not in expected)
    end = several((other, expected[3])) if several else expected[3]
    with Engine(model, limits=LIMITS) as engine:
        tokens = engine.submit(prompt(20), max_new_tokens=8, eos_token_id=end).result(WAIT_S)
    assert tokens == expected[: expected.index(expected[3]) + 1]


def test_cancel_before_and_during(model):
    with Engine(model, limits=LIMITS) as engine:
        running = engine.submit(prompt(1000), max_new_tokens=500)
        assert next(running.stream()) is not None
        engine.flag.pause(BE, "test")
        waiting = engine.submit(prompt(10), max_new_tokens=3)
        waiting.cancel()
        running.cancel()
        engine.flag.resume(BE, "test")
        for handle in (waiting, running):
            with pytest.raises(RequestCancelled):
                handle.result(WAIT_S)
        assert engine.drain(WAIT_S)
        assert engine.scheduler.kv.free_tokens == LIMITS.kv_tokens


# -- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "tile"])
def test_a_request_that_breaks_a_pass_fails_alone(model, policy):
    poison = [5, 5, 5, 5]
    with Engine(model, policy=policy, limits=LIMITS) as engine:
        forward = engine.runner._forward

        def sometimes(ids, rows):
            if any(ids[i : i + 4] == poison for i in range(len(ids))):
                raise MemoryError("poisoned")
            return forward(ids, rows)

        engine.runner._forward = sometimes
        engine.flag.pause(BE, "test")  # so that all of them are in one batch
        good = [engine.submit(prompt(n), max_new_tokens=4) for n in (10, 20, 30)]
        bad = engine.submit(poison, max_new_tokens=4)
        engine.flag.resume(BE, "test")
        with pytest.raises(RequestError, match="poisoned"):
            bad.result(WAIT_S)
        results = [handle.result(WAIT_S) for handle in good]
    assert results == [generated(model, prompt(n), 4) for n in (10, 20, 30)]


def test_a_pass_that_fails_is_waited_for_before_its_memory_is_given_away(model, monkeypatch):
    """On a GPU what it has enqueued still writes keys, where another lane may have a request by then."""
    with Engine(model, limits=LIMITS) as engine:
        seen, complete_failure = [], engine.scheduler.fail

        def broken(module, args, kwargs):
            raise MemoryError("no room")

        def fail(*args):
            seen.append("given away")
            complete_failure(*args)

        monkeypatch.setattr(Runner, "_settle", lambda runner: seen.append("waited"))
        monkeypatch.setattr(engine.scheduler, "fail", fail)
        hook = model.register_forward_pre_hook(broken, with_kwargs=True)
        try:
            with pytest.raises(RequestError, match="no room"):
                engine.submit(prompt(5), max_new_tokens=2).result(WAIT_S)
        finally:
            hook.remove()
    assert seen[:2] == ["waited", "given away"]


def test_settling_waits_for_the_lanes_own_stream(monkeypatch):
    stream, waited = SimpleNamespace(synchronize=lambda: waited.append("stream")), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for device in ("cpu", "cuda"):
        Runner._settle(SimpleNamespace(device=torch.device(device)))
    assert waited == ["stream"]


def test_logits_that_are_not_numbers_fail_their_row_only(model):
    with Engine(model, limits=LIMITS) as engine:
        forward = engine.runner._forward

        def break_the_first(ids, rows):
            logits = forward(ids, rows)
            if len(logits) > 1:
                logits[0] = float("nan")
            return logits

        engine.runner._forward = break_the_first
        engine.flag.pause(BE, "test")
        bad, good = (engine.submit(prompt(n), max_new_tokens=3) for n in (10, 11))
        engine.flag.resume(BE, "test")
        with pytest.raises(RequestError, match="not numbers"):
            bad.result(WAIT_S)
        assert good.result(WAIT_S) == generated(model, prompt(11), 3)


def test_a_hung_foreground_lane_does_not_stop_best_effort_work(model):
    limits = Limits(kv_tokens=4096, kv_reserve=512, pause_timeout_s=0.3, prefill_tokens=2048)
    with Engine(model, limits=limits) as engine:
        run, hang = engine.runner.run, threading.Event()

        def hang_in_front(batch, granularity):
            if batch.lane == FOREGROUND:
                hang.wait(WAIT_S)
            return run(batch, granularity)

        engine.runner.run = hang_in_front
        be = engine.submit(prompt(1500), max_new_tokens=3)
        while BACKGROUND not in engine.scheduler.running:
            time.sleep(0.001)
        ls = engine.submit(prompt(5), priority=LS, max_new_tokens=2)
        assert len(be.result(WAIT_S)) == 3
        assert engine.flag.expired >= 1
        assert not ls.done
        hang.set()
        ls.result(WAIT_S)


@pytest.mark.parametrize("lane", [FOREGROUND, BACKGROUND])
def test_a_lane_that_dies_leaves_nobody_waiting(model, lane, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with Engine(model, limits=LIMITS) as engine:
        complete, run, submitted = engine.scheduler.complete, engine.runner.run, threading.Event()

        def die(batch, outcomes):
            if batch.lane == lane:
                raise RuntimeError("a bug")
            return complete(batch, outcomes)

        engine.scheduler.complete = die
        # Not before all are submitted: a closed engine takes none.
        engine.runner.run = lambda *args: submitted.wait(WAIT_S) and run(*args)
        handles = [engine.submit(prompt(600), priority=p, max_new_tokens=4) for p in (BE, LS, BE, LS)]
        submitted.set()
        for handle in handles:
            if lane == BACKGROUND and handle.request.priority == LS:
                continue  # may have been done before
            with pytest.raises(RequestError, match=rf"the {lane} lane died: RuntimeError\('a bug'\)"):
                handle.result(WAIT_S)
        assert engine.drain(WAIT_S)
        assert engine.flag.read()[BE] > 0
        with pytest.raises(RuntimeError, match=rf"engine is closed, because the {lane} lane died: .*a bug"):
            engine.submit(prompt(3))


def test_closing_ends_what_is_left(model):
    engine = Engine(model, limits=LIMITS)
    handles = [engine.submit(prompt(800, i), max_new_tokens=300) for i in range(3)]
    engine.close()
    for handle in handles:
        with pytest.raises(RequestError, match="closed"):
            handle.result(WAIT_S)
    engine.close()  # once more is harmless
    with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
        engine.submit(prompt(3))

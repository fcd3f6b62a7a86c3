"""What users do with an engine: what it refuses, when it is made, asked or left, and what it bears."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import generated, prompt
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

from qllm_ops import PriorityFlag
from qllm_ops.models import install, preemptible, quantize_experts, uninstall
from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler import attention, log
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND
from qllm_ops.scheduler.request import BE, LS, RequestCancelled, RequestError

WAIT_S = 60.0
LIMITS = Limits(kv_tokens=4096, kv_reserve=512, prefill_tokens=256)


SWITCH = {
    "d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_experts": 8, "vocab_size": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_preset("tiny")


def choices(model):
    return model.config._attn_implementation, model.config._experts_implementation


# -- a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": [3, 128]}, "token id 128 is outside the vocabulary of 128"),
        ({"prompt": [-1]}, "token id -1 is outside"),
        ({"prompt": [1] * 4090}, r"4090 prompt \+ 16 new tokens are more than the 4096 positions"),
        ({"prompt": [1] * 3600}, "need 3616 tokens of KV memory; its class can have 3584"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": [1], "priority": 2}, "priority must be from 0 to 1, got 2"),
        ({"prompt": [1], "temperature": -1.0}, "temperature must be 0 or more"),
        ({"prompt": [1], "top_p": 0.0}, "top_p must be in"),
        ({"prompt": "hello"}, "prompt must be one sequence of token ids, got 'hello'"),
        ({"prompt": [1], "max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"prompt": [1], "eos_token_id": [0, None]}, "eos_token_id must be an integer, several or None"),
        ({"prompt": [1], "eos_token_id": 128}, "eos_token_id: token id 128 is outside the vocabulary of 128"),
        ({"prompt": [1], "eos_token_id": [0, -1]}, "eos_token_id: token id -1 is outside the vocabulary"),
    ],
)
def test_a_bad_request_is_refused_and_harms_nobody(model, arguments, message):
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(30), max_new_tokens=3)
        with pytest.raises(ValueError, match=message):
            engine.submit(**arguments)
        assert len(handle.result(WAIT_S)) == 3


def test_numbers_of_numpy_are_numbers(model):
    expected = generated(model, prompt(100), 40)
    with Engine(model, limits=LIMITS) as engine:
        # Not one of 8 bits, to which the length of the prompt could not be added.
        tokens = engine.submit(
            np.array(prompt(100), np.uint8),
            priority=np.int8(LS),
            max_new_tokens=np.int8(40),
            seed=np.int64(3),
            eos_token_id=[np.int64(next(t for t in range(128) if t not in expected))],
        ).result(WAIT_S)
        assert tokens == expected
        drawn = [
            engine.submit(prompt(9), temperature=2.0, seed=seed).result(WAIT_S)
            for seed in (2**40, np.int64(2**40))
        ]
        assert drawn[0] == drawn[1]


def test_requests_without_an_id_take_none_that_a_user_may_give(model):
    with Engine(model, limits=LIMITS) as engine:
        engine.flag.pause(BE)
        ids = [f"request-{n}" for n in range(6)]
        handles = [engine.submit(prompt(5), max_new_tokens=1, id=id) for id in ids[::2]]
        handles += [engine.submit(prompt(5), max_new_tokens=1) for _ in range(3)]
        handles += [engine.submit(prompt(5), max_new_tokens=1, id=id) for id in ids[1::2]]
        assert len({handle.id for handle in handles}) == 9
        engine.flag.resume(BE)
        assert all(len(handle.result(WAIT_S)) == 1 for handle in handles)


@pytest.mark.parametrize("timeout_s", ["5", float("nan"), True])
def test_what_is_no_time_to_wait_is_refused(model, timeout_s):
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(5), max_new_tokens=1)
        for wait in (handle.result, engine.drain, lambda t: asyncio.run(handle.aresult(t))):
            with pytest.raises(ValueError, match="timeout_s must be a number of seconds or None, got"):
                wait(timeout_s)


def test_an_engine_that_serves_for_long_does_not_remember_everything(model, monkeypatch):
    monkeypatch.setattr(log, "KEEP", 5)
    with Engine(model, limits=LIMITS) as engine:
        for i in range(30):
            engine.submit(prompt(5), priority=i % 2, max_new_tokens=3, id=f"r{i}").result(WAIT_S)
        assert 5 <= len(engine.log.spans) <= 10
        assert engine.log.spans[-1].request_ids == ["r29"]
        engine.log.keep = None  # as a replay has it
        for _ in range(5):
            engine.submit(prompt(5), max_new_tokens=3).result(WAIT_S)
        assert len(engine.log.spans) > 15


def test_infinity_is_a_timeout_too(model):
    with Engine(model, limits=LIMITS) as engine:
        handle = engine.submit(prompt(1500), max_new_tokens=30)
        assert engine.drain(float("inf"))
        assert handle.done


def test_tasks_of_one_event_loop_get_what_threads_get(model):
    async def read(handle):
        return [token async for token in handle.astream()]

    async def main(engine):
        handles = [engine.submit(prompt(10 + i), priority=i % 2, max_new_tokens=5) for i in range(20)]
        reads = [read(handle) for handle in handles] + [handle.aresult() for handle in handles]
        return await asyncio.wait_for(asyncio.gather(*reads), WAIT_S)

    with Engine(model, limits=LIMITS) as engine:
        tokens = asyncio.run(main(engine), debug=True)
    assert tokens == [generated(model, prompt(10 + i), 5) for i in range(20)] * 2


def test_an_engine_that_is_closed_tells_the_tasks_that_wait(model):
    """Closed in their own event loop, even, which stands still until it is."""

    async def main(engine):
        engine.flag.pause(BE, "test")
        handle = engine.submit(prompt(800), max_new_tokens=300)
        tasks = [asyncio.ensure_future(read) for read in (anext(handle.astream()), handle.aresult())]
        await asyncio.sleep(0)
        engine.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT_S)

    for error in asyncio.run(main(Engine(model, limits=LIMITS)), debug=True):
        assert isinstance(error, RequestError)
        assert "the engine was closed" in str(error)


def test_an_event_loop_that_was_closed_harms_no_lane(model):
    async def begin(engine):
        handle = engine.submit(prompt(9), max_new_tokens=9)
        reads = anext(handle.astream()), handle.aresult()
        for read in reads:
            read.send(None)  # by hand: a task that is left in a closed loop complains
        return handle, reads

    with Engine(model, limits=LIMITS) as engine:
        engine.flag.pause(BE, "test")
        loop = asyncio.new_event_loop()
        handle, reads = loop.run_until_complete(begin(engine))
        loop.close()
        engine.flag.resume(BE, "test")
        assert handle.result(WAIT_S) == generated(model, prompt(9), 9)
        assert len(engine.submit(prompt(9)).result(WAIT_S)) == 16
        for read in reads:
            read.close()


# -- an engine -----------------------------------------------------------------------------------------


def test_a_bad_engine_is_refused_and_the_model_stays_as_it_was(model, monkeypatch):
    before = choices(model)
    with pytest.raises(ValueError, match="unknown policy 'fifo'; there are: fcfs, priority, layer, tile"):
        Engine(model, policy="fifo")
    with pytest.raises(ValueError, match="no MoE"):
        Engine(tiny_model("llama"))
    for no_model, kind in (("a/folder", "str"), (torch.nn.Linear(2, 2), "Linear"), (type(model), "type")):
        with pytest.raises(TypeError, match=f"model must be a model of transformers, got {kind}; .*load"):
            Engine(no_model)
    for headless in (model.model, AutoModelForTokenClassification.from_config(model.config)):
        said = f"{type(headless).__name__} has no language-model head, .*; AutoModelForCausalLM loads"
        with pytest.raises(ValueError, match=said):
            Engine(headless.eval())
    with pytest.raises(
        ValueError, match=r"SwitchTransformers\w* has an encoder, which the engine does not run"
    ):
        Engine(
            AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("switch_transformers", **SWITCH)).eval()
        )
    with pytest.raises(ValueError, match="max_batch must be a positive integer, got 0"):
        Engine(model, limits=Limits(max_batch=0))
    with pytest.raises(ValueError, match=r"DeepseekV4ForCausalLM: its attention or cache asks for what"):
        Engine(tiny_model("deepseek_v4"))
    monkeypatch.setattr(attention, "_attend", lambda attend, q, *args: q[0].transpose(0, 1) * 0 + 1)
    with pytest.raises(ValueError, match="attention is not supported"):
        Engine(model, limits=LIMITS)
    assert choices(model) == before


def test_a_model_in_training_mode_is_refused_and_one_that_is_put_there_fails_its_requests():
    model = make_preset("tiny")
    model.model.layers[1].train()
    with pytest.raises(ValueError, match=r"model\.layers\.1 is in training mode; call model\.eval\(\) first"):
        Engine(model)
    with pytest.raises(ValueError, match="model is in training mode"):
        Engine(model.train())
    with Engine(model.eval(), limits=LIMITS) as engine:
        model.train()
        with pytest.raises(RequestError, match="was put into training mode while it is served"):
            engine.submit(prompt(5)).result(WAIT_S)
        model.eval()
        assert engine.submit(prompt(5), max_new_tokens=3).result(WAIT_S) == generated(model, prompt(5), 3)


def test_a_model_in_no_memory_or_in_several_is_refused(monkeypatch):
    model = make_preset("tiny")
    with torch.device("meta"), pytest.raises(ValueError, match=r"no weights in memory \(model\.embed_tokens"):
        Engine(type(model)(model.config).eval())
    places = [("embed.weight", "cuda:0"), ("layer.weight", "cuda:0"), ("head.weight", "cuda:1")]
    parameters = [(name, SimpleNamespace(device=torch.device(place))) for name, place in places]
    monkeypatch.setattr(model, "named_parameters", lambda: iter(parameters))
    with pytest.raises(ValueError, match=r"one device, got embed.weight on cuda:0, head.weight on cuda:1"):
        Engine(model)


def test_autocast_does_not_reach_the_lanes(model):
    """So an engine is not made in it, and a request that is submitted in it gets the model's own tokens."""
    said = r"inside of torch\.autocast.* model\.to\(torch\.bfloat16\)"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=said):
        Engine(model, limits=LIMITS)
    with Engine(model, limits=LIMITS) as engine, torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = engine.submit(prompt(50), max_new_tokens=6).result(WAIT_S)
    assert tokens == generated(model, prompt(50), 6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.set_attn_implementation("sdpa"), "attn_implementation .* changed to 'sdpa'"),
        (
            lambda model: model.set_experts_implementation("eager"),
            "experts_implementation .* changed to 'eager'",
        ),
    ],
)
def test_a_model_that_is_changed_while_it_is_served_fails_its_requests(change, said):
    """Tokens came out wrong, or nothing was preempted any more, without a word."""
    model = make_preset("tiny")
    before = choices(model)
    with Engine(model, limits=LIMITS) as engine:
        change(model)
        with pytest.raises(RequestError, match=said):
            engine.submit(prompt(5)).result(WAIT_S)
    assert choices(model) == before


def test_the_experts_of_a_model_that_is_served_are_left_alone(model):
    with Engine(model, limits=LIMITS) as engine:
        for change, said in (
            (uninstall, "uninstalled"),
            (install, "installed again"),
            (lambda model: quantize_experts(model, "int4"), "quantised"),
        ):
            with pytest.raises(RuntimeError, match=f"cannot be {said} while an engine serves it; close"):
                change(model)
        assert engine.submit(prompt(5), max_new_tokens=3).result(WAIT_S) == generated(model, prompt(5), 3)
    assert not uninstall(model)  # nothing is left of the engine
    assert len(install(model)) == 2
    assert uninstall(model)


def test_an_engine_that_is_made_while_a_flag_of_the_thread_is_paused(model):
    """It stood at that flag until the deadline, in the passes that it tries the model with."""
    expected, waited = generated(model, prompt(5), 3), []
    flag = PriorityFlag(on_event=lambda kind, *_: kind == "park" and waited.append(kind))
    flag.pause(BE, timeout_s=0.1)
    with preemptible(flag), Engine(model, limits=LIMITS) as engine:
        assert engine.submit(prompt(5), max_new_tokens=3).result(WAIT_S) == expected
    assert waited == []


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_the_users_default_device_is_not_the_engines(model, device):
    with torch.device(device), Engine(model, limits=LIMITS) as engine:
        handles = [engine.submit(prompt(n), max_new_tokens=3) for n in (5, 9)]
        assert all(len(handle.result(WAIT_S)) == 3 for handle in handles)


@pytest.mark.parametrize("started", [0, 1])
def test_an_engine_that_gets_no_thread_gives_the_model_back(started):
    model = make_preset("tiny")
    before, start = choices(model), threading.Thread.start

    def refuse(thread):
        if thread.name == f"qllm-{(FOREGROUND, BACKGROUND)[started]}":
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            Engine(model, limits=LIMITS)
    assert choices(model) == before
    with Engine(model, limits=LIMITS) as engine:
        assert len(engine.submit(prompt(5), max_new_tokens=3).result(WAIT_S)) == 3


# -- between threads -----------------------------------------------------------------------------------


def test_a_pause_that_ends_while_the_lane_looks_for_work_keeps_nobody_waiting(model):
    """The lane was told that its class is paused, found it running, and slept until some other request."""
    with Engine(model, limits=LIMITS) as engine:
        ask, looked = engine.scheduler.next, threading.Event()

        def ask_then_resume(lane):
            batch = ask(lane)
            if lane == BACKGROUND and engine.flag.resume(BE, "absent") is False:
                engine.flag.resume(BE, "test")
                looked.set()
            return batch

        engine.scheduler.next = ask_then_resume
        engine.flag.pause(BE, "test")
        handle = engine.submit(prompt(5), max_new_tokens=3)
        assert looked.wait(WAIT_S)
        assert len(handle.result(5)) == 3


def test_a_request_that_ages_while_its_class_is_paused_is_served(model):
    """The foreground lane, which takes it then, slept until some other request came."""
    with Engine(model, limits=Limits(kv_tokens=4096, aging_s=0.05)) as engine:
        engine.flag.pause(BE, timeout_s=None)
        assert len(engine.submit(prompt(5), max_new_tokens=3).result(5)) == 3
        assert {span.lane for span in engine.log.spans} == {FOREGROUND}


@pytest.mark.parametrize("lane", [FOREGROUND, BACKGROUND])
def test_a_finalizer_that_cancels_inside_of_the_scheduler_harms_nobody(model, lane):
    """Garbage is collected in any thread: that of a lane, while it makes a batch of the very request."""
    with Engine(model, limits=LIMITS) as engine:
        engine.flag.pause(BE, "test")
        left, other = (
            engine.submit(prompt(n), priority=LS if lane == FOREGROUND else BE, max_new_tokens=200)
            for n in (40, 50)
        )
        admit = engine.scheduler._admit

        def collect(ready, now):
            if left.request in ready and threading.current_thread().name == f"qllm-{lane}":
                left.cancel()
            admit(ready, now)

        engine.scheduler._admit = collect
        engine.flag.resume(BE, "test")
        with pytest.raises(RequestCancelled):
            left.result(WAIT_S)
        assert len(other.result(WAIT_S)) == 200
        assert engine.drain(WAIT_S)
        assert engine.scheduler.kv.free_tokens == LIMITS.kv_tokens


def test_cancelling_waits_for_no_lock(model):
    """A lane that has the engine's may wait for the flag's, which the thread has that collects garbage."""
    with Engine(model, limits=LIMITS) as engine:
        engine.flag.pause(BE, "test")
        handle = engine.submit(prompt(5))
        cancel = threading.Thread(target=handle.cancel)
        with engine._changed:
            cancel.start()
            cancel.join(WAIT_S)
            assert not cancel.is_alive()
        with pytest.raises(RequestCancelled):
            handle.result(WAIT_S)


def test_an_urgent_pass_that_may_take_for_ever_does_not_end_the_other_lane(model):
    limits = Limits(kv_tokens=4096, kv_reserve=512, pause_timeout_s=float("inf"))
    with Engine(model, limits=limits) as engine:
        run, behind = engine.runner.run, threading.Event()

        def wait_in_front(batch, granularity):
            if batch.lane == FOREGROUND:
                engine.flag.release(BE)  # so that the other lane asks, and is told when to ask again
                assert behind.wait(WAIT_S)
            return run(batch, granularity)

        def ask(lane, ask=engine.scheduler.next):
            batch = ask(lane)
            if lane == BACKGROUND and lane in engine.scheduler.wake_s:
                behind.set()
            return batch

        engine.runner.run, engine.scheduler.next = wait_in_front, ask
        handles = [engine.submit(prompt(5), priority=priority, max_new_tokens=2) for priority in (LS, BE)]
        assert [len(handle.result(WAIT_S)) for handle in handles] == [2, 2]


# -- memory --------------------------------------------------------------------------------------------


def test_a_failed_request_does_not_keep_the_tensors_of_its_pass():
    made = []

    def broken(module, args, kwargs):
        hidden_states = torch.zeros(1000)
        made.append(weakref.ref(hidden_states))
        try:
            raise MemoryError("no room")
        except MemoryError as error:
            raise RuntimeError("out of memory") from error

    model = make_preset("tiny")
    with Engine(model, limits=LIMITS) as engine:
        model.register_forward_pre_hook(broken, with_kwargs=True)
        handle = engine.submit(prompt(5))
        with pytest.raises(RequestError, match="out of memory"):
            handle.result(WAIT_S)
        assert engine.drain(WAIT_S)
        assert [of() for of in made] == [None]
        assert "broken" in "".join(traceback.format_exception(handle.request.error))


def test_a_closed_engine_holds_no_memory(model):
    engine = Engine(model, limits=LIMITS)
    keys, _ = engine.runner.pool.layers[0]
    keys = weakref.ref(keys)
    assert engine.runner.pool.nbytes > 0
    engine.submit(prompt(5), max_new_tokens=2).result(WAIT_S)
    engine.close()
    assert keys() is None


# -- the end of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_a_pause_of_the_users_keeps_no_engine_from_closing(model, again):
    """A pause without a deadline, of which one pass stands still; and one that comes again and again."""
    engine = Engine(model, limits=LIMITS)
    handle = engine.submit(prompt(3000), max_new_tokens=2)
    parked, closed = threading.Event(), threading.Event()
    where = engine.log._parked
    engine.log._parked = lambda now, place: (parked.set(), where(now, place))

    def pause_again():
        while not closed.is_set():
            engine.flag.pause(BE, "test", timeout_s=None)
            time.sleep(0.001)

    while BACKGROUND not in engine.scheduler.running:
        time.sleep(0.001)
    engine.flag.pause(BE, "test", timeout_s=None)
    assert parked.wait(WAIT_S)
    pausing = threading.Thread(target=pause_again, daemon=True)
    if again:
        pausing.start()
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(WAIT_S)
    closed.set()
    assert not closing.is_alive()
    with pytest.raises(RequestError, match="closed"):
        handle.result(WAIT_S)


def test_a_close_that_was_interrupted_can_be_finished(model, monkeypatch):
    """By Ctrl-C, while it waits for an iteration: the model must not stay with an engine that is no more."""
    before = choices(model)
    engine = Engine(model, limits=LIMITS)

    def interrupted(timeout_s=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._threads[0], "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    engine.close()
    assert choices(model) == before
    Engine(model, limits=LIMITS).close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # which is what this is about
def test_a_fork_has_no_lanes_and_says_so(model):
    """It waited for a lock that a lane had when the process was forked, or for a lane."""
    with Engine(model, limits=LIMITS) as engine:
        with engine._changed:
            child = os.fork()
            if not child:
                signal.alarm(10)
                code = 1
                try:
                    engine.submit(prompt(3))
                except RuntimeError as error:
                    engine.close()
                    code = 0 if "of which this one is a fork" in str(error) else 2
                finally:
                    os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(engine.submit(prompt(3), max_new_tokens=2).result(WAIT_S)) == 2


LEFT_OPEN = """
from qllm_ops.models import make_preset
from qllm_ops.scheduler import LS, Engine
engine = Engine(make_preset("tiny"))
handles = [engine.submit([1] * 1000, max_new_tokens=500, priority=priority) for priority in (0, 0, LS)]
next(handles[-1].stream())
"""


def test_an_engine_that_nobody_closed_does_not_abort_the_process():
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")

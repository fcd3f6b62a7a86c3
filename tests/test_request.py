"""A request and the caller's end of it."""

import asyncio
import queue
import re
import reprlib
import threading
import time

import numpy as np
import pytest
import torch

from qllm_ops.scheduler.core import Limits, Scheduler
from qllm_ops.scheduler.policies import FOREGROUND
from qllm_ops.scheduler.request import (
    BE,
    LS,
    Handle,
    Request,
    RequestCancelled,
    RequestError,
    Sampling,
    State,
    token_ids,
)

SOON_S = 10.0  # for what another thread does at once, on a machine that may be busy


class Served:
    """A scheduler of one lane, and a handle on its only request."""

    def __init__(self, new=3):
        self.scheduler = Scheduler("fcfs", Limits(kv_tokens=64, kv_reserve=0))
        self.handle = Handle(Request("a", [1, 2], BE, new), self.scheduler.cancel)
        self.scheduler.submit(self.handle.request)

    def step(self, *outcomes):
        for outcome in outcomes:
            self.scheduler.complete(self.scheduler.next(FOREGROUND), [outcome])

    @staticmethod
    def in_thread(call):
        """What ``call`` returned or raised in a thread of its own, once the thread has ended."""
        out = []

        def body():
            try:
                out.append(call())
            except BaseException as error:
                out.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()

        def outcome():
            thread.join(SOON_S)
            assert not thread.is_alive(), "the caller was left waiting"
            return out[0]

        return outcome


def test_a_stream_yields_each_token_when_it_is_made():
    served = Served()
    stream = served.handle.stream()
    for token in (7, 8, 9):
        served.step((token, 1.0))
        assert next(stream) == token
    assert list(stream) == []
    assert served.handle.done
    assert served.handle.result() == [7, 8, 9]
    assert served.handle.id == "a"


def test_whoever_reads_a_stream_again_finds_its_end():
    served = Served()
    served.step((7, 1.0), (8, 1.0), (9, 1.0))
    assert list(served.handle.stream()) == [7, 8, 9]
    assert served.in_thread(lambda: list(served.handle.stream()))() == []


def test_a_waiting_reader_is_woken_by_the_tokens_and_by_the_end():
    served = Served()
    tokens = served.in_thread(lambda: list(served.handle.stream()))
    result = served.in_thread(lambda: served.handle.result(SOON_S))
    served.step((7, 1.0), (8, 1.0), (9, 1.0))
    assert tokens() == result() == [7, 8, 9]


def test_result_gives_up_after_its_timeout_and_can_be_asked_again():
    served = Served()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"request 'a' has not ended after 0\.05 s"):
        served.handle.result(timeout_s=0.05)
    assert time.monotonic() - start >= 0.05
    served.step((7, 1.0), (8, 1.0), (9, 1.0))
    assert served.handle.result(timeout_s=0) == [7, 8, 9]


def test_infinity_is_a_timeout_too():
    served = Served()
    result = served.in_thread(lambda: served.handle.result(float("inf")))
    served.step((7, 1.0), (8, 1.0), (9, 1.0))
    assert result() == [7, 8, 9]


def test_the_result_is_the_callers_own():
    served = Served()
    served.step((7, 1.0), (8, 1.0), (9, 1.0))
    served.handle.result().clear()
    assert served.handle.result() == [7, 8, 9]


def test_a_failure_reaches_the_reader_after_the_tokens_that_were_made():
    served = Served()
    cause = ValueError("the logits are not numbers")
    stream = served.handle.stream()
    served.step((7, 1.0), cause)
    assert next(stream) == 7
    for read in (lambda: next(stream), served.handle.result, lambda: list(served.handle.stream())):
        with pytest.raises(RequestError, match="request 'a' failed: the logits are not numbers") as raised:
            read()
        assert raised.value.__cause__ is cause
    assert served.handle.done


def test_a_lane_that_dies_fails_the_request_with_its_reason():
    served = Served()
    served.scheduler.abort("the foreground lane died", FOREGROUND)
    with pytest.raises(RequestError, match="request 'a' failed: the foreground lane died"):
        served.handle.result()


@pytest.mark.parametrize("tokens_before", [0, 1])
def test_cancel(tokens_before):
    served = Served()
    waiting = served.in_thread(lambda: served.handle.result(SOON_S))
    served.step(*[(7, 1.0)] * tokens_before)
    served.handle.cancel()
    assert served.handle.done
    assert isinstance(waiting(), RequestCancelled)
    stream = served.handle.stream()
    assert [next(stream) for _ in range(tokens_before)] == [7] * tokens_before
    with pytest.raises(RequestCancelled, match="request 'a' was cancelled"):
        next(stream)
    assert served.scheduler.idle


def test_cancel_of_what_is_in_an_iteration_waits_for_it():
    served = Served()
    batch = served.scheduler.next(FOREGROUND)
    served.handle.cancel()
    served.handle.cancel()
    assert not served.handle.done
    served.scheduler.complete(batch, [(7, 1.0)])
    assert served.handle.request.state is State.CANCELLED
    assert served.handle.request.tokens == [7]
    with pytest.raises(RequestCancelled):
        served.handle.result()


def test_what_completes_in_spite_of_a_cancel_is_done():
    served = Served(new=1)
    batch = served.scheduler.next(FOREGROUND)
    served.handle.cancel()
    served.scheduler.complete(batch, [(7, 1.0)])
    assert served.handle.result() == [7]


def test_cancel_after_the_end_changes_nothing():
    served = Served(new=1)
    served.step((7, 1.0))
    served.handle.cancel()
    assert served.handle.result() == [7]
    assert not served.handle.request.cancelled


def test_the_end_token_ends_a_request_and_is_its_last():
    served = Served(new=10)
    served.handle.request.eos_token_id = 9
    served.step((7, 0.5), (9, 0.25))
    assert served.handle.result() == [7, 9]
    assert served.handle.request.margins == [0.5, 0.25]


# -- asyncio --------------------------------------------------------------------------------------------


def run(main):
    """In a loop that refuses to be touched by other threads, except by ``call_soon_threadsafe``; and in
    a thread of its own, as a task that nobody wakes may not be cancelled either."""
    outcome = Served.in_thread(lambda: asyncio.run(main, debug=True))()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def collect(handle):
    return [token async for token in handle.astream()]


async def waiting(*reads):
    """Tasks that have come as far as they get by themselves."""
    tasks = [asyncio.ensure_future(read) for read in reads]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


TOKENS = ((7, 1.0), (8, 1.0), (9, 1.0))


@pytest.mark.parametrize("before", range(4))
def test_a_task_gets_the_tokens_from_before_it_reads_and_is_woken_by_the_others(before):
    async def main():
        served = Served()
        served.step(*TOKENS[:before])
        stream = served.handle.astream()
        tokens = [await anext(stream) for _ in range(before)]
        for token in TOKENS[before:]:
            (task,) = await waiting(anext(stream))
            stepped = served.in_thread(lambda token=token: served.step(token))
            tokens.append(await task)
            stepped()
        assert [token async for token in stream] == []
        assert tokens == await served.handle.aresult() == [7, 8, 9]
        assert await collect(served.handle) == []  # whoever reads again finds the end

    run(main())


def fail(served):
    served.step(ValueError("the logits are not numbers"))


def ends_of_a_lane(served):
    served.scheduler.abort("the foreground lane died", FOREGROUND)


@pytest.mark.parametrize("end", [fail, ends_of_a_lane, lambda served: served.handle.cancel()])
@pytest.mark.parametrize("late", [False, True])
def test_a_task_is_told_of_a_bad_end_as_a_thread_is(end, late):
    async def main():
        served = Served()
        served.step((7, 1.0))
        tokens = []

        async def read():
            async for token in served.handle.astream():
                tokens.append(token)

        reads = [read(), served.handle.aresult()]
        if not late:
            reads = await waiting(*reads)
        served.in_thread(lambda: end(served))()
        errors = await asyncio.gather(*reads, return_exceptions=True)
        with pytest.raises((RequestError, RequestCancelled)) as raised:
            served.handle.result()
        for error in errors:
            assert type(error) is raised.type
            assert (str(error), error.__cause__) == (str(raised.value), raised.value.__cause__)
        assert tokens == [7]

    run(main())


def test_many_tasks_wait_in_one_loop_and_take_no_thread():
    async def main():
        many = [Served() for _ in range(100)]
        threads = threading.active_count()
        reads = [collect(served.handle) for served in many] + [served.handle.aresult() for served in many]
        tasks = await waiting(*reads)
        assert threading.active_count() == threads
        made = [[(i, 1.0), (i + 1, 1.0), (i + 2, 1.0)] for i in range(len(many))]

        def last_first():
            for served, tokens in reversed(list(zip(many, made, strict=True))):
                served.step(*tokens)

        stepped = many[0].in_thread(last_first)
        assert await asyncio.gather(*tasks) == [[token for token, _ in tokens] for tokens in made] * 2
        stepped()

    run(main())


def test_a_task_that_waits_for_the_end_is_not_woken_by_tokens():
    woken = []

    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args, **kwargs):
            woken.append(args)
            return super().call_soon_threadsafe(*args, **kwargs)

    async def main():
        served = Served()
        for _ in range(3):  # who has given up is woken by nothing
            with pytest.raises(TimeoutError, match="request 'a' has not ended after 0 s"):
                await served.handle.aresult(0)
        (reader,) = await waiting(collect(served.handle))
        reader.cancel()
        (task,) = await waiting(served.handle.aresult())
        counts = []
        for token in TOKENS:
            served.step(token)
            counts.append(len(woken))
        assert await task == [7, 8, 9]
        assert counts == [0, 0, 1]

    loop = Loop()
    loop.run_until_complete(asyncio.wait_for(main(), SOON_S))
    loop.close()


def test_a_loop_that_is_closed_before_the_end_harms_neither_the_request_nor_its_lane():
    served, loop = Served(), asyncio.new_event_loop()
    left = [anext(served.handle.astream()), served.handle.aresult()]

    async def begin():
        for read in left:
            read.send(None)  # by hand: a task that is left in a closed loop complains

    loop.run_until_complete(begin())
    loop.close()
    other = served.in_thread(lambda: run(served.handle.aresult()))
    served.step(*TOKENS)
    assert served.handle.request.state is State.DONE
    assert other() == served.handle.result() == [7, 8, 9]
    assert run(collect(served.handle)) == [7, 8, 9]
    for read in left:
        read.close()


def test_a_task_that_is_cancelled_or_leaves_takes_no_token_along_and_does_not_end_the_request():
    async def main():
        served = Served()
        cancelled = await waiting(collect(served.handle), served.handle.aresult())
        served.step((7, 1.0))
        for task in cancelled:
            task.cancel()  # the token has come, and the task has not seen it
        await asyncio.wait(cancelled)
        assert all(task.cancelled() for task in cancelled)
        async for token in served.handle.astream():
            assert token == 7
            break
        served.step((8, 1.0), (9, 1.0))
        assert await collect(served.handle) == [8, 9]
        assert await served.handle.aresult() == [7, 8, 9]

    run(main())


def test_a_task_may_cancel_the_request_that_it_waits_for():
    async def main():
        served = Served()
        tasks = await waiting(collect(served.handle), served.handle.aresult())
        served.handle.cancel()
        for task in tasks:
            with pytest.raises(RequestCancelled):
                await task

    run(main())


def test_a_task_gives_up_after_its_timeout_and_can_ask_again():
    async def main():
        served = Served()
        for timeout_s in (0.01, 0, -1.0):
            with pytest.raises(TimeoutError, match=f"request 'a' has not ended after {timeout_s} s"):
                await served.handle.aresult(timeout_s)
        (task,) = await waiting(served.handle.aresult(float("inf")))
        served.step(*TOKENS)
        assert await served.handle.aresult(0) == await task == [7, 8, 9]

    run(main())


@pytest.mark.parametrize("read", [collect, Handle.aresult])
def test_what_comes_between_looking_and_waiting_is_not_missed(read):
    served = Served(new=1)

    class Queue(queue.SimpleQueue):
        def empty(self):
            return then(super().empty())

    def then(seen):
        """The token comes, and with it the end, after the task has seen that there is none."""
        if served.handle.request.open:
            served.step((7, 1.0))
        return seen

    served.handle._tokens = Queue()
    served.handle._ended.is_set = lambda is_set=served.handle._ended.is_set: then(is_set())
    assert run(read(served.handle)) == [7]


@pytest.mark.parametrize("read", [lambda h: list(h.stream()), lambda h: run(collect(h))])
def test_who_looks_while_another_reader_has_the_end_in_its_hand_finds_it_too(read):
    served, looked, others = Served(), threading.Event(), []

    class Queue(queue.SimpleQueue):
        def get(self):
            return then(super().get())

        def get_nowait(self):
            return then(super().get_nowait())

        def empty(self):
            seen = super().empty()
            looked.set()
            return seen

    def then(token):
        if token is None and not others:
            others.append(served.in_thread(lambda: run(collect(served.handle))))
            assert looked.wait(SOON_S)
        return token

    served.handle._tokens = Queue()
    served.step(*TOKENS)
    assert read(served.handle) == [7, 8, 9]
    assert others[0]() == []


def test_loops_of_several_threads_wait_for_one_request():
    """Each token goes to one reader only; the end, and the result, to all."""
    served, tokens = Served(new=50), []
    ready = threading.Barrier(5)

    async def main():
        tasks = await waiting(collect(served.handle), served.handle.aresult())
        ready.wait(SOON_S)
        return await asyncio.gather(*tasks)

    threads = [served.in_thread(lambda: run(main())) for _ in range(3)]
    threads.append(served.in_thread(lambda: (ready.wait(SOON_S), list(served.handle.stream()))))
    ready.wait(SOON_S)
    made = list(range(50))
    served.step(*[(token, 1.0) for token in made])
    *tasks, (_, rest) = (outcome() for outcome in threads)
    for read, result in tasks:
        assert result == made
        tokens += read
    assert sorted(tokens + rest) == made


def test_times_are_the_clocks():
    now = iter(range(100))
    request = Request("a", [1, 2, 3], LS, 2)
    scheduler = Scheduler("fcfs", Limits(prefill_tokens=2), clock=lambda: 10.0 * next(now))
    scheduler.submit(request)
    for outcome in (None, (7, 1.0), (8, 1.0)):
        before = request.first_token_s
        scheduler.complete(scheduler.next(FOREGROUND), [outcome])
        assert (request.first_token_s is None) == (outcome is None)
        assert before is None or before == request.first_token_s
    assert request.first_token_s < request.finish_s
    assert request.state is State.DONE


def test_an_id_is_a_string():
    with pytest.raises(ValueError, match=r"id of a request must be a string, got \[1\]"):
        Request([1], [1]).check()


def test_pending_tokens():
    request = Request("a", [4, 5, 6], max_new_tokens=3)
    assert (request.pending(2), request.pending(9), request.kv_tokens) == ([4, 5], [4, 5, 6], 6)
    request.computed = 2
    assert (request.prefilling, request.pending(9)) == (True, [6])
    request.computed, request.tokens = 3, [7, 8]
    assert (request.prefilling, request.pending(9)) == (False, [8])


def test_a_state_is_its_name_and_two_requests_alike_are_two():
    assert State("waiting") == "waiting"
    assert [state for state in State if Request("a", [1], state=state).open] == [State.WAITING, State.RUNNING]
    assert Request("a", [1]) != Request("a", [1])
    assert len({Request("a", [1]), Request("a", [1])}) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, float("nan"), float("inf"), None, "0.5", True)],
        *[("top_p", v) for v in (0, -1, 1.01, float("nan"), None, "1", True)],
        *[("seed", v) for v in (1.5, None, "1", True)],
    ],
)
def test_bad_sampling_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("values", [{}, {"temperature": 2.5, "top_p": 0.001, "seed": -3}, {"top_p": 1}])
def test_good_sampling(values):
    sampling = Sampling(**values)
    assert {name: getattr(sampling, name) for name in values} == values


@pytest.mark.parametrize("prompt", [[3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2]), np.array([3, 1, 2])])
def test_a_prompt_is_any_sequence_of_integers(prompt):
    ids = token_ids(prompt)
    assert ids == [3, 1, 2]
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize(
    "prompt",
    [
        "12",
        b"12",
        {1, 2},
        {1: 2},
        None,
        3,
        [1.0],
        [[1, 2]],
        torch.tensor([[1, 2]]),
        torch.tensor([1.0]),
        {"input_ids": [1]},
    ],
)
def test_what_is_no_prompt_is_shown(prompt):
    with pytest.raises(ValueError, match=re.escape(f"one sequence of token ids, got {reprlib.repr(prompt)}")):
        token_ids(prompt)

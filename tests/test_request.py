"""A request and the caller's end of it."""

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

    def in_thread(self, call):
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

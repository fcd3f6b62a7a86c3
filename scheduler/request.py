"""A request: what was asked, how far it has come, and the caller's handle on it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import operator
import queue
import reprlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import SupportsIndex

from qllm_ops.arguments import is_integer, is_number

LS = 1
"""Latency-sensitive: the lowest class that is urgent. Higher numbers are more urgent still."""

BE = 0
"""Best-effort."""


class State(str, Enum):
    """WAITING and RUNNING are open; a request ends in exactly one of the other three."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestError(RuntimeError):
    """The request failed; the message says why. Other requests are not affected."""


class RequestCancelled(RuntimeError):
    """The request was cancelled before it was complete."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the token with the largest logit; above 0 divides the logits first.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this, in (0, 1].
        seed: of the request's own random stream, so its draws do not depend on its neighbours.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("temperature", "top_p"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        object.__setattr__(self, "seed", as_int(self.seed))  # the fields are frozen
        if not is_integer(self.seed):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")


def token_ids(prompt: Iterable[SupportsIndex]) -> list[int]:
    """A prompt as a list: of a list, an array or a tensor of integers. Raises ValueError for anything else,
    such as text, or the two dimensions that a tokenizer returns."""
    try:
        if isinstance(prompt, (bytes, bytearray, Set, Mapping)):  # integers too, but text, or in no order
            raise TypeError
        # All numbers of a tensor at once: one by one, each would be waited for on a GPU.
        return [operator.index(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
    except TypeError:
        raise ValueError(f"prompt must be one sequence of token ids, got {reprlib.repr(prompt)}") from None


def as_int(value: object) -> object:
    """An integer of numpy as Python's own, which has no largest one; anything else as it is."""
    return int(value) if is_integer(value) else value


def bounded(timeout_s: float | None) -> float | None:
    """A time that threads can wait for, infinity as the longest of them; ValueError for no time."""
    if timeout_s is not None and (not is_number(timeout_s) or timeout_s != timeout_s):
        raise ValueError(f"timeout_s must be a number of seconds or None, got {timeout_s!r}")
    return None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)


@dataclass(eq=False)
class Request:
    """One request on its way through the scheduler. Only the scheduler changes it.

    ``on_token`` is called with each token, and fails the request if it raises; ``on_end`` once, at the end,
    and must not raise. Both must be quick: the driver calls them, which in an engine is a lane with its lock.

    ``computed`` counts the tokens whose keys and values lie in the KV pool. A request prefills until
    that reaches the length of its prompt, which yields its first token, and decodes from then on.
    """

    id: str
    prompt: list[int]
    priority: int = BE
    max_new_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | Sequence[int] | None = None
    arrival_s: float = 0.0
    on_token: Callable[[int], None] | None = None
    on_end: Callable[[], None] | None = None

    state: State = State.WAITING
    error: BaseException | None = None
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # best logit minus second best, per token
    region: int | None = None  # where its KV begins in the pool; None: not admitted yet
    in_flight: bool = False  # part of an iteration that has not ended
    alone: bool = False  # was in an iteration that failed: runs by itself until it has succeeded
    cancelled: bool = False
    first_token_s: float | None = None
    finish_s: float | None = None

    def __post_init__(self):
        self.priority, self.max_new_tokens = as_int(self.priority), as_int(self.max_new_tokens)
        several = isinstance(self.eos_token_id, (list, tuple))
        self.eos_token_id = [as_int(t) for t in self.eos_token_id] if several else as_int(self.eos_token_id)

    def check(self) -> None:
        """Raise ValueError for values that no scheduler can count, compare or sort by."""
        if not isinstance(self.id, str):
            raise ValueError(f"id of a request must be a string, got {self.id!r}")
        for name in ("max_new_tokens", "priority"):
            if not is_integer(value := getattr(self, name)):
                raise ValueError(f"request {self.id!r}: {name} must be an integer, got {value!r}")
        if not all(is_integer(token) for token in self.ends):
            raise ValueError(
                f"request {self.id!r}: eos_token_id must be an integer, several or None, "
                f"got {self.eos_token_id!r}"
            )
        if not is_number(self.arrival_s) or not math.isfinite(self.arrival_s):
            raise ValueError(
                f"request {self.id!r}: arrival_s must be a finite number, got {self.arrival_s!r}"
            )

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that end it."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, list) else (self.eos_token_id,)

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV memory it may need; reserved when it is admitted, so it never runs short."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def open(self) -> bool:
        return self.state in (State.WAITING, State.RUNNING)

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt)

    def pending(self, limit: int) -> list[int]:
        """The next tokens to compute, at most ``limit`` of them."""
        if self.prefilling:
            return self.prompt[self.computed : self.computed + limit]
        return self.tokens[-1:]


async def _asleep(
    wakers: list[Callable[[], object]], until: Callable[[], bool], timeout_s: float | None = None
) -> None:
    """Wait in the running event loop, without a thread, until ``until()``, of which a call of all ``wakers``
    tells, or for ``timeout_s`` seconds."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    waker = partial(loop.call_soon_threadsafe, woken.set)
    timer = None if timeout_s is None else loop.call_later(timeout_s, woken.set)
    wakers.append(waker)  # before looking: what comes in between wakes, too
    try:
        if not until():
            await woken.wait()
    finally:
        wakers.remove(waker)
        if timer is not None:
            timer.cancel()


def _wake(wakers: list[Callable[[], object]]) -> None:
    """Does not raise and waits for nothing: a lane calls it, or a finalizer that cancels, in any thread."""
    for waker in tuple(wakers):
        with contextlib.suppress(Exception):  # a loop that is closed, whose tasks nobody can wake
            waker()


class Handle:
    """The caller's end of a request: read its tokens as they come, wait for it, cancel it.

    :meth:`stream` and :meth:`result` wait in their thread; :meth:`astream` and :meth:`aresult` are the same
    for asyncio, in any event loop of any thread. A caller that gives up (leaves its loop over the tokens, is
    cancelled, closes its event loop) does not end the request: :meth:`cancel` does.
    """

    def __init__(self, request: Request, cancel: Callable[[Request], None]):
        self.request = request
        self._cancel = cancel
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        # What wakes event loops: those that wait for a token, and those that wait for the end.
        self._readers: list[Callable[[], object]] = []
        self._waiters: list[Callable[[], object]] = []
        request.on_token = self._put
        request.on_end = self._end

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def stream(self) -> Iterator[int]:
        """Yield each token when it is made; raises as :meth:`result` does when the request ends badly.

        Meant for one consumer, once: each token goes to one reader only, of this and of :meth:`astream`.
        """
        while (token := self._tokens.get()) is not None:
            yield token
        self._put(None)  # whoever reads again finds the end, not silence
        self._raise()

    async def astream(self) -> AsyncIterator[int]:
        """:meth:`stream` for asyncio: ``async for token in handle.astream()``."""
        while True:
            try:
                token = self._tokens.get_nowait()
            except queue.Empty:
                await _asleep(self._readers, lambda: not self._tokens.empty())
                continue
            if token is None:
                break
            yield token
        self._put(None)
        self._raise()

    def result(self, timeout_s: float | None = None) -> list[int]:
        """Wait for the end and return all generated tokens.

        Raises:
            TimeoutError: it has not ended after ``timeout_s`` seconds; it goes on.
            RequestError: it failed.
            RequestCancelled: it was cancelled.
        """
        self._ended.wait(bounded(timeout_s))
        return self._outcome(timeout_s)

    async def aresult(self, timeout_s: float | None = None) -> list[int]:
        """:meth:`result` for asyncio: ``tokens = await handle.aresult()``."""
        await _asleep(self._waiters, self._ended.is_set, bounded(timeout_s))
        return self._outcome(timeout_s)

    def cancel(self) -> None:
        """Ask for the request to end; an iteration that it is part of is not cut short. Returns at once."""
        self._cancel(self.request)

    def _put(self, token: int | None) -> None:
        self._tokens.put(token)
        _wake(self._readers)

    def _end(self) -> None:
        self._ended.set()
        self._put(None)
        _wake(self._waiters)

    def _outcome(self, timeout_s: float | None) -> list[int]:
        if not self.done:
            raise TimeoutError(f"request {self.id!r} has not ended after {timeout_s} s")
        self._raise()
        return list(self.request.tokens)

    def _raise(self) -> None:
        if self.request.state is State.FAILED:
            raise RequestError(f"request {self.id!r} failed: {self.request.error}") from self.request.error
        if self.request.state is State.CANCELLED:
            raise RequestCancelled(f"request {self.id!r} was cancelled")

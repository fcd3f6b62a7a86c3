"""The engine: two lanes (host threads with their own device stream) drive the scheduler and a model.

    engine = Engine(model, policy="tile")
    handle = engine.submit(prompt_ids, priority=LS, max_new_tokens=32)
    for token in handle.stream(): ...

One lock guards the scheduler; a lane holds it only to fetch a batch or to hand in its outcome. While a
lane computes, the only word that the lanes share is the priority flag.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from transformers import PreTrainedModel

from qllm_ops import PriorityFlag
from qllm_ops.models import preemptible
from qllm_ops.models.install import installed
from qllm_ops.openmp import release_workers
from qllm_ops.scheduler.core import Batch, Limits, Scheduler
from qllm_ops.scheduler.log import Log
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, Policy
from qllm_ops.scheduler.request import BE, Handle, Request, Sampling, bounded, token_ids
from qllm_ops.scheduler.runner import Runner, chunk_multiple

SWITCH_INTERVAL_S = 0.0005
"""How long one lane's Python code may hold the interpreter when the other wants it. Python's default of
5 ms is as long as a tile."""

FLAG_WAIT_S = 0.2

EXIT_WAIT_S = 10.0
"""How long Python's exit waits for the iteration that a lane runs, where nobody has closed the engine."""

_served: list[torch.nn.Module] = []
_served_lock = threading.Lock()
_switch_interval_s = 0.0  # Python's own, while there is an engine


@contextlib.contextmanager
def _only_engine(model: torch.nn.Module) -> Iterator[None]:
    """What engines of one process must agree on: one at a time per model, and the switch interval."""
    global _switch_interval_s
    with _served_lock:
        if any(model is other for other in _served):
            raise ValueError(f"another engine serves this {type(model).__name__}; close that one first")
        if not _served:
            _switch_interval_s = sys.getswitchinterval()
            sys.setswitchinterval(min(_switch_interval_s, SWITCH_INTERVAL_S))
        _served.append(model)
    try:
        yield
    finally:
        with _served_lock:
            _served[:] = [other for other in _served if other is not model]
            if not _served:
                sys.setswitchinterval(_switch_interval_s)


def _forget_locals(error: BaseException | None) -> None:
    """Who keeps a failed request keeps its error, and with the error's frames all tensors of that pass."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where the model is; refuses one that no lane could run, or would run as something else."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers, got {type(model).__name__}; "
            "qllm_ops.models.load makes one from a folder"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder, which the engine does not run")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, so its output is no logits of tokens; "
            "AutoModelForCausalLM loads the model with one"
        )
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f"{training or 'model'} is in training mode; call model.eval() first")
    first: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(parameter.device, name)
    if len(first) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in first.items())
        raise ValueError(f"the parameters of model must be on one device, got {found}")
    (device,) = first
    if device.type == "meta":
        raise ValueError(f"model has no weights in memory ({first[device]} is on the meta device); load them")
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            "an engine cannot be made inside of torch.autocast, which its lanes, being threads, do not "
            f"inherit; leave it, and convert the model with model.to({torch.get_autocast_dtype(device.type)})"
        )
    return device


class Engine:
    """Serves latency-sensitive and best-effort requests on one Hugging Face MoE model.

    Args:
        model: a causal language model with MoE layers, in eval mode, on a CPU or one CUDA device. While
            the engine is open, the model's experts and attention are ours; ``close`` puts back what
            was there. Lanes are threads, so ``torch.autocast`` does not reach them: a request is computed
            in the dtype of the model, wherever it is submitted.
        policy: "fcfs", "priority", "layer", "tile", or an object of your own like those. It holds no
            state, so several engines may share it.
        limits: memory, batch sizes and floors; see :class:`Limits`.
        backend: of the experts: "auto", "torch" or "triton".
        gate: where paused work stands still on a GPU, in its thread or in its stream; see
            :class:`qllm_ops.PriorityFlag`.
        batch_invariant: True: the tokens of a request and the logits behind them are, bit by bit, those
            that it gets when it is alone in the engine, whatever else is served, under every policy. All
            passes run inside of :class:`qllm_ops.batch_invariant`; rows are attended as if each were
            alone; chunks of a prompt end at multiples of a block of queries (512 tokens, on a GPU 1024).
        clock: monotonic time in seconds.

    Raises:
        TypeError: the model is none of transformers, the limits are no Limits, the policy is no policy, or
            batch_invariant is neither True nor False.
        ValueError: another engine serves the model; or it is in training mode, on several devices or on the
            meta device; or it has no language-model head, no MoE layers, a layout that is not
            supported, attention that the engine's does not reproduce, or modules that change themselves
            in a forward pass, so that two lanes would corrupt each other's; or it is to be batch invariant
            and its logits are not (all checked on a few tokens).
        RuntimeError: the engine is made inside of ``torch.autocast``.
        NotInvariantError: the device's products are not batch invariant in any way that was tried.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        policy: str | Policy = "tile",
        limits: Limits | None = None,
        backend: str = "auto",
        gate: str = "host",
        batch_invariant: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        device = _device_of(model)
        if not isinstance(batch_invariant, bool):
            raise TypeError(f"batch_invariant must be True or False, got {batch_invariant!r}")
        self.model, self.clock, self.log = model, clock, Log(clock)
        self.flag = PriorityFlag(device=device, clock=clock, on_event=self.log.flag_event, gate=gate)
        multiple = chunk_multiple(device, batch_invariant)
        self.scheduler = Scheduler(policy, limits, flag=self.flag, clock=clock, chunk_multiple=multiple)
        # Whatever body of `preemptible` this is in: nobody pauses the passes that try the model.
        with contextlib.ExitStack() as stack, preemptible(None):
            stack.enter_context(_only_engine(model))
            self.report = stack.enter_context(installed(model, backend=backend))
            self.runner = stack.enter_context(
                contextlib.closing(
                    Runner(model, self.scheduler.limits.kv_tokens, self.flag, self.log, batch_invariant)
                )
            )
            self._give_back = stack.pop_all().close
        self._changed = threading.Condition(threading.Lock())  # no thread may have it twice; see _cancel
        self._closing = False
        self._died = ""  # which lane, and of what
        release_workers()  # this thread waits from now on; its workers would slow the lanes
        self._names, self._process = count(), os.getpid()
        lanes = self.scheduler.policy.lanes
        self._cold = len(lanes)
        self._threads: list[threading.Thread] = []
        # Python ends with what its daemon threads are doing, and torch ends the process with an abort then.
        atexit.register(self._end_lanes, EXIT_WAIT_S)
        try:
            for lane in lanes:
                thread = threading.Thread(target=self._lane, args=(lane,), name=f"qllm-{lane}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # no thread to be had, or Ctrl-C: nobody else could give the model back
            self.close()
            raise

    # -- for callers -----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        *,
        priority: int = BE,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        id: str | None = None,
        arrival_s: float | None = None,
    ) -> Handle:
        """Queue a request; returns at once.

        Args:
            prompt: token ids: a list, or an array or tensor of one dimension.
            priority: 0 best-effort, 1 latency-sensitive.
            eos_token_id: the token that ends the request, or several of which each does, itself included in
                what it returns; None: only ``max_new_tokens`` does. Not taken from the model's configuration.
            arrival_s: when it arrived, by the engine's clock; now by default.

        Raises:
            ValueError: a prompt that is no sequence of token ids, is empty, or does not fit the KV memory or
                the model's positions; a token id outside the vocabulary, there or in eos_token_id; a request
                id in use; a bad sampling parameter; any other value of the wrong type.
            RuntimeError: the engine is closed, or one of its lanes has died; says of what. Or this process is
                a fork of the one that made it.
        """
        request = Request(
            id=id if id is not None else f"request-{next(self._names)}-{secrets.token_hex(4)}",
            prompt=token_ids(prompt),
            priority=priority,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, seed),
            eos_token_id=eos_token_id,
            arrival_s=self.clock() if arrival_s is None else arrival_s,
        )
        request.check()
        self.runner.check(request)
        if self._forked:
            raise RuntimeError(
                f"the engine was made in process {self._process}, of which this one is a fork: it has none "
                "of the engine's threads; make an engine after forking"
            )
        handle = Handle(request, self._cancel)
        with self._changed:
            if self._closing:
                raise RuntimeError(f"the engine is closed{self._died and f', because {self._died}'}")
            self.scheduler.submit(request)
            self._changed.notify_all()
        return handle

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until every request has ended; False if that took longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self.scheduler.idle, bounded(timeout_s))

    def close(self) -> None:
        """Finish the iterations that run, fail the requests that are left, and give the model back.

        An iteration that stands still goes on: pauses of best-effort work end here, whoever holds them.
        Does nothing in a fork of the process that made the engine.
        """
        if self._forked:
            return
        self._end_lanes()
        with self._changed:
            self._give_back()  # does nothing the second time
        atexit.unregister(self._end_lanes)

    @property
    def _forked(self) -> bool:
        """Whether this process has no lanes, and their lock as it was, perhaps taken by one of them."""
        return os.getpid() != self._process

    def _end_lanes(self, timeout_s: float = math.inf) -> None:
        if self._forked:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        give_up_s = time.monotonic() + timeout_s
        for thread in self._threads:
            while True:
                self.flag.release(BE)  # again and again, as a user may pause again
                thread.join(FLAG_WAIT_S)
                if not thread.is_alive() or time.monotonic() >= give_up_s:
                    break

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # -- lanes -----------------------------------------------------------------------------------

    def _lane(self, lane: str) -> None:
        died = ""
        try:
            with self.runner.lane(lane):
                self.runner.warm_up_lane()
                with self._changed:  # Both, before one can pause the other and writes what requests own.
                    self._cold -= 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._cold == 0 or self._closing)
                while (batch := self._next(lane)) is not None:
                    self._run(batch)
        except BaseException as bug:
            died = f"the {lane} lane died: {bug!r}"
            raise
        finally:
            # Whatever ended this lane, no caller may be left waiting and no pause may be left behind.
            with self._changed:
                self._closing = True
                self._died = self._died or died
                self.scheduler.abort(self._died or "the engine was closed", lane)
                if lane == FOREGROUND:
                    self.scheduler.release()
                self._changed.notify_all()

    def _next(self, lane: str) -> Batch | None:
        while True:
            if lane == BACKGROUND:
                # Stand here, without the lock, while paused: whoever waits at the flag also ends the
                # pauses that are past their deadline. Now and then, see whether the engine closes.
                self.flag.wait(BE, FLAG_WAIT_S)
            with self._changed:
                if self._closing:
                    return None
                batch = self.scheduler.next(lane)
                if lane == FOREGROUND:
                    self._changed.notify_all()  # the background lane may start now, or must wait at the flag
                if batch is not None:
                    self.log.begin(batch, self._granularity(batch))
                    return batch
                # Not the flag as it is now: a pause that has ended since then wakes nobody here.
                if self.scheduler.held:
                    continue
                release_workers()  # an idle lane must not slow the other one
                wake = self.scheduler.wake_s.get(lane)
                self._changed.wait(None if wake is None else bounded(max(wake - self.clock(), 0.0)))

    def _run(self, batch: Batch) -> None:
        try:
            outcomes = self.runner.run(batch, self._granularity(batch))
        except Exception as error:
            outcomes = error
            _forget_locals(error)
        with self._changed:
            self.log.end(batch)
            if isinstance(outcomes, Exception):
                self.scheduler.fail(batch, outcomes)
            else:
                self.scheduler.complete(batch, outcomes)
            self._changed.notify_all()

    def _granularity(self, batch: Batch) -> str | None:
        return self.scheduler.policy.granularity if batch.lane == BACKGROUND else None

    def _cancel(self, request: Request) -> None:
        """Does not wait for the lock. Finalizers cancel, too (of a generator that a client left), and run in
        any thread, whatever it holds: in a lane's as well, in the midst of the scheduler."""
        if not self._changed.acquire(blocking=False):
            threading.Thread(target=self._cancel_waiting, args=(request,), daemon=True).start()
            return
        try:
            self.scheduler.cancel(request)
            self._changed.notify_all()
        finally:
            self._changed.release()

    def _cancel_waiting(self, request: Request) -> None:
        with self._changed:
            self.scheduler.cancel(request)
            self._changed.notify_all()

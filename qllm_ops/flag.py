"""The priority flag: one 32-bit word per class that says how many programs the class may run.

    0            paused: programs leave at the next tile
    n > 0        the first n programs of a launch may take tiles, the others leave
    FULL         every program may run

The word lies where the computation can see it: in device memory for the Triton kernels, in
ordinary memory for the CPU. Only the host writes it, and every write of one flag goes through
one lock and, on a GPU, one stream, so that an earlier resume can never overtake a later pause.

A pause belongs to an owner and has a deadline. A class runs again when its last owner has let
go or run out of time: being resumed early costs latency, being paused for ever loses work.
Whoever waits at the flag or steps a run looks at the deadlines too, so no watchdog thread is
needed for a host that waits. For device streams that wait (gate="stream") there is one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from qllm_ops.arguments import is_integer, is_number
from qllm_ops.openmp import release_workers

FULL = 2**31 - 1
"""Value of a class that may run on every program."""

PAUSE_TIMEOUT_S = 60.0
"""Deadline of a pause whose owner names none, in seconds."""

WATCH_S = 1.0
"""How often the watchdog of a flag with a stream gate looks at least, in seconds."""

NUMBERED: weakref.WeakValueDictionary[int, PriorityFlag] = weakref.WeakValueDictionary()
"""Every flag by its number: how a compiled graph refers to one."""

_numbers = itertools.count()

NON_BLOCKING = 1
"""Of a CUDA stream: it does not wait for the default stream, nor that for it."""

SPARE_STREAMS: dict[int, list[torch.cuda.Stream]] = {}
"""Streams that flags have had on each device, for the next ones: none is ever destroyed."""

Event = Callable[[str, int, float], None]


class PriorityFlag:
    """How many programs each priority class may run, readable from inside a kernel.

    A copy of it, as of a model that holds it, is the flag itself. It cannot be pickled.

    Args:
        device: where the words live: "cpu" or a CUDA device.
        classes: number of priority classes. A higher number is more urgent. Every class starts FULL.
        clock: monotonic time in seconds. Replaceable so that deadlines can be tested.
        on_event: called as ``on_event(kind, priority, time)`` under the flag's lock, so it must be
            quick and must not call back. Kinds: "pause" and "resume" (the class stopped or started
            being paused), "expire" (a pause ended by its deadline), "park" and "unpark" (a thread
            stands still in :meth:`wait`). Words are written before it is called; what it raises reaches
            whoever called the flag.
        writer: how a word in CUDA memory is written: "stream" (``cuStreamWriteValue32`` through
            cuda-bindings), "copy" (a copy from pinned memory), or None for the first that works.
            Neither needs a free multiprocessor, which a kernel such as ``fill_`` would.
        gate: where paused work of :func:`qllm_ops.moe` stands still. "host": the calling thread waits, and
            looks after every launch whether it was left: one round trip per layer. "stream": the stream
            waits (``cuStreamWaitValue32``, through cuda-bindings), and the thread may run ahead, up to the
            next layer that begins while the class is paused. A stream that waits keeps whatever shares a
            hardware queue with it waiting as well, and the first use of any kernel, torch's own included: set
            CUDA_DEVICE_MAX_CONNECTIONS=32 and CUDA_MODULE_LOADING=EAGER before CUDA starts. When the flag is
            gone, streams that it held go on; a CUDA graph that holds must not outlive it.

    Attributes:
        words: int32 tensor of shape (classes,) on ``device``; what kernels poll. Read only.
        expired: number of pauses that were ended by their deadline.
        number: unique in this process.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        classes: int = 2,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_event: Event | None = None,
        writer: str | None = None,
        gate: str = "host",
    ):
        if gate not in ("host", "stream"):
            raise ValueError(f'gate must be "host" or "stream", got {gate!r}')
        if not is_integer(classes) or classes < 1:
            raise ValueError(f"classes must be a positive integer, got {classes!r}")
        for name, function in (("clock", clock), ("on_event", on_event)):
            if not callable(function) and (name == "clock" or function is not None):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
        self.device = _device(device)
        with torch.inference_mode(False):  # or only threads in that mode could write them
            self.words = torch.full((classes,), FULL, dtype=torch.int32, device=self.device)
        self.device = self.words.device  # with its number, whatever device is current later
        self.expired = 0
        self.gate = gate
        self.number = next(_numbers)
        NUMBERED[self.number] = self
        self._clock = clock
        self._on_event = on_event or (lambda kind, priority, now: None)
        self._quota = [FULL] * classes
        self._owners: list[dict[Hashable, float | None]] = [{} for _ in range(classes)]
        self._changed = threading.Condition()
        if self.device.type == "cuda":
            self._write_word = _CudaWords(self.words, writer, gate)
            weakref.finalize(self, self._write_word.close).atexit = False
        elif writer is not None:
            raise ValueError(f"writer={writer!r} is for CUDA flags; this one is on {self.device}")
        else:
            self._write_word = self.words.__setitem__
        if gate == "stream":
            watch = threading.Thread(target=_watch, args=(weakref.ref(self),), name="qllm-flag", daemon=True)
            watch.start()

    @property
    def classes(self) -> int:
        return len(self._quota)

    # -- copies --------------------------------------------------------------------------------------

    def __copy__(self) -> PriorityFlag:
        return self  # A copy of a model that holds it listens to whoever writes it, as the model does.

    def __deepcopy__(self, memo: dict[int, object]) -> PriorityFlag:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "a PriorityFlag cannot be pickled: its words and whoever pauses by it are in this process; make "
            "one where it is needed"
        )

    # -- writing ---------------------------------------------------------------------------------

    def pause(
        self, priority: int, owner: Hashable = None, *, timeout_s: float | None = PAUSE_TIMEOUT_S
    ) -> None:
        """Pause class ``priority`` on behalf of ``owner``.

        Pausing again with the same owner only moves the deadline. ``timeout_s`` is the time after
        which the pause ends by itself, in seconds; None means never.
        """
        c = self._check(priority)
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
            raise ValueError(f"timeout_s must be a positive number of seconds or None, got {timeout_s!r}")
        with self._changed:
            now = self._clock()
            self._expire(now)
            running = not self._owners[c]
            self._owners[c][owner] = None if timeout_s is None else now + timeout_s
            if running:
                self._publish(c)
                self._on_event("pause", c, now)
            else:
                # A waiter may be asleep until the old deadline; let it look at the new one.
                self._changed.notify_all()

    def resume(self, priority: int, owner: Hashable = None) -> bool:
        """Let go of ``owner``'s pause of class ``priority``; True if the class may run now.

        Letting go of a pause that is not held (it may have expired) changes nothing.
        """
        c = self._check(priority)
        with self._changed:
            now = self._clock()
            self._expire(now)
            if owner in self._owners[c]:
                del self._owners[c][owner]
                if not self._owners[c]:
                    self._publish(c)
                    self._on_event("resume", c, now)
            return not self._owners[c]

    def release(self, priority: int) -> None:
        """End every pause of class ``priority``, whoever holds it. Those that come later pause it again."""
        c = self._check(priority)
        with self._changed:
            for owner in [*self._owners[c]]:
                self.resume(c, owner)

    def share(self, priority: int, programs: int) -> None:
        """Let class ``priority`` run on ``programs`` programs per launch (FULL for all).

        A pause goes before a share: while the class is paused this only sets what it gets later.
        """
        c = self._check(priority)
        if not is_integer(programs) or not 1 <= programs <= FULL:
            raise ValueError(
                f"programs must be an integer from 1 to FULL, got {programs!r}; use pause() for 0"
            )
        with self._changed:
            self._quota[c] = int(programs)
            self._publish(c)

    @contextlib.contextmanager
    def urgent(self, priority: int, *, timeout_s: float | None = PAUSE_TIMEOUT_S) -> Iterator[None]:
        """Pause every class below ``priority`` for the body, whatever way the body ends.

        What this thread computes in the body has to be of class ``priority`` or above: else it waits for
        itself, which :meth:`wait` refuses.
        """
        c = self._check(priority)
        owner = _Urgent(threading.get_ident())
        with contextlib.ExitStack() as resumes:  # It goes on with the others when one raises.
            for lower in range(c):
                resumes.callback(self.resume, lower, owner)
                self.pause(lower, owner, timeout_s=timeout_s)
            yield

    # -- reading ---------------------------------------------------------------------------------

    def read(self) -> tuple[int, ...]:
        """The value last written for each class, without asking the device."""
        with self._changed:
            self._expire(self._clock())
            return tuple(self._value(c) for c in range(self.classes))

    def paused(self, priority: int) -> bool:
        """Whether class ``priority`` is paused."""
        return self.read()[self._check(priority)] == 0

    def wait(self, priority: int, timeout_s: float | None = None) -> bool:
        """Stand still while class ``priority`` is paused: the host gate.

        Returns True once the class may run, False if ``timeout_s`` seconds went by first. A thread
        that waits here also enforces the deadlines, so it cannot be kept for ever by an owner that
        died.

        Raises:
            RuntimeError: this thread is inside of :meth:`urgent`, which pauses the class: it would wait for
                itself until the deadline. Not with ``timeout_s``.
        """
        c = self._check(priority)
        if timeout_s is not None and (not is_number(timeout_s) or timeout_s != timeout_s):
            raise ValueError(f"timeout_s must be a number of seconds or None, got {timeout_s!r}")
        with self._changed:
            now = self._clock()
            self._expire(now)
            if not self._owners[c]:
                return True
            if timeout_s is None:
                self._check_not_own(c)
            give_up = None if timeout_s is None else now + timeout_s
            self._on_event("park", c, now)
            if self.device.type == "cpu":
                release_workers()  # the class that goes first needs the cores
            try:
                while self._owners[c]:
                    wake = min(
                        (t for t in (give_up, *self._owners[c].values()) if t is not None), default=None
                    )
                    if give_up is not None and now >= give_up:
                        return False
                    # The clock may be a test's: never sleep long on a deadline it alone decides.
                    self._changed.wait(None if wake is None else min(max(wake - now, 0.0005), 1.0))
                    now = self._clock()
                    self._expire(now)
                return True
            finally:
                self._on_event("unpark", c, self._clock())

    def hold(self, priority: int) -> None:
        """Let the current CUDA stream stand still while class ``priority`` is paused: the stream gate.

        Returns at once; may be captured in a CUDA graph if the driver allows it. On a CPU, where work is done
        when it is enqueued, the calling thread stands still.

        Raises:
            RuntimeError: the flag was not made with gate="stream", or the driver refuses.
        """
        c = self._check(priority)
        if self.gate != "stream":
            raise RuntimeError('a stream can be held only by a flag that was made with gate="stream"')
        if isinstance(self._write_word, _CudaWords):
            self._write_word.hold(c)
        else:
            self.wait(c)

    def fence(self) -> None:
        """Let what the current CUDA stream launches next see every word written so far.

        Words are written on a stream of the flag's own, so that a pause overtakes work that is queued.
        A launch that has to see them as well waits for that stream, which is never busy for long.
        """
        if isinstance(self._write_word, _CudaWords):
            torch.cuda.current_stream(self.device).wait_stream(self._write_word.stream)

    def expire(self) -> int:
        """End every pause that is past its deadline; how many there were."""
        with self._changed:
            return self._expire(self._clock())

    # -- inside the lock -------------------------------------------------------------------------

    def _value(self, c: int) -> int:
        return 0 if self._owners[c] else self._quota[c]

    def _publish(self, c: int) -> None:
        self._write_word(c, self._value(c))
        self._changed.notify_all()

    def _expire(self, now: float) -> int:
        count, events = 0, []
        for c, owners in enumerate(self._owners):
            late = [owner for owner, deadline in owners.items() if deadline is not None and now >= deadline]
            for owner in late:
                del owners[owner]
                events.append(("expire", c))
            if late and not owners:
                self._publish(c)
                events.append(("resume", c))
            count += len(late)
        self.expired += count
        # Last: one that raises would leave a word at 0 that nobody pauses.
        for kind, c in events:
            self._on_event(kind, c, now)
        return count

    def _check_not_own(self, c: int) -> None:
        here = threading.get_ident()
        if any(isinstance(owner, _Urgent) and owner.thread == here for owner in self._owners[c]):
            raise RuntimeError(
                f"class {c} is paused by flag.urgent() in this very thread, which would wait for itself; "
                "give what is urgent its own class (moe(..., priority=1) inside of flag.urgent(1))"
            )

    def _check(self, priority: int) -> int:
        if not is_integer(priority) or not 0 <= priority < self.classes:
            raise ValueError(f"priority must be an integer from 0 to {self.classes - 1}, got {priority!r}")
        return int(priority)


class _Urgent:
    """The owner of one body of :meth:`PriorityFlag.urgent`."""

    def __init__(self, thread: int):
        self.thread = thread


def _device(device: str | torch.device) -> torch.device:
    """The device of a flag, if torch has it here."""
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError):  # Torch lists all its overloads, or devices that nobody has.
        made = None
    if made is None or made.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {device!s}")
    if made.type == "cuda" and (made.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device must be a CPU or one of the {count} CUDA devices that torch finds here, got {made}"
        )
    return made


def _watch(reference: weakref.ref[PriorityFlag]) -> None:
    """End the pauses of a flag that are past their deadline, as long as there is the flag."""
    while (flag := reference()) is not None:
        changed = flag._changed
        with changed:
            now = flag._clock()
            try:
                flag._expire(now)
            except Exception:  # of the user's on_event: streams that wait would have nobody any more
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            deadlines = (t for owners in flag._owners for t in owners.values() if t is not None)
            # Looks now and then, too: the clock may be a test's, and the flag may be gone.
            wait_s = min(max(min(deadlines, default=now + WATCH_S) - now, 0.0005), WATCH_S)
            del flag
            changed.wait(wait_s)


class _CudaWords:
    """Writes words of a CUDA tensor from the host, all on one stream and without a kernel; holds streams."""

    def __init__(self, words: torch.Tensor, writer: str | None, gate: str):
        if writer not in (None, "stream", "copy"):
            raise ValueError(f'writer must be "stream", "copy" or None, got {writer!r}')
        self.words = words
        self.pinned: dict[int, torch.Tensor] = {}
        self.kind = "copy"
        self.held: set[int] = set()  # streams
        self.own = False
        # Its own stream: a pause must not queue behind work that the caller has enqueued.
        _, most_urgent = torch.cuda.Stream.priority_range()
        self._use(torch.cuda.Stream(device=words.device, priority=most_urgent))
        try:
            self._open_driver(gate, most_urgent)
            self.kind = "copy" if writer == "copy" else "stream"
        except Exception as error:
            for name, asked in (("writer", writer), ("gate", gate)):
                if asked == "stream":
                    raise ValueError(f'{name}="stream" does not work here: {error}') from error
        if self.kind == "copy":
            # Pinning memory may wait for the device: the common values are ready before the first pause.
            self._pinned(0), self._pinned(FULL)

    def _open_driver(self, gate: str, priority: int) -> None:
        """Find the driver, and try it on a word that holds nobody."""
        from cuda.bindings import driver

        self.driver: Any = driver
        # A thread that has used no CUDA yet has no context, and then the driver knows no stream.
        self.context = self._checked(driver.cuDevicePrimaryCtxRetain(self.words.device.index))
        # A stream that is nobody else's. torch hands out the same 32 again and again: a resume on one of them
        # might queue behind the very wait that it has to end.
        try:  # Looking first whether there is one would be a race with flags of other threads.
            stream = SPARE_STREAMS.setdefault(self.words.device.index, []).pop()
        except IndexError:
            handle = self._call("cuStreamCreateWithPriority", NON_BLOCKING, priority)
            stream = torch.cuda.ExternalStream(int(handle), device=self.words.device)
        self._use(stream)
        self.own = True
        self._enqueue("cuStreamWriteValue32", self.stream, 0, FULL)
        if gate == "stream":
            self._enqueue("cuStreamWaitValue32", self.stream, 0, 1)
        self.stream.synchronize()

    def _use(self, stream: torch.cuda.Stream) -> None:
        """Write on this stream from now on, after the words were made."""
        self.stream = stream
        stream.wait_stream(torch.cuda.current_stream(self.words.device))
        # Whoever gets the words' memory next must not get a write that is still under way, too.
        self.words.record_stream(stream)

    def close(self) -> None:
        """The flag is gone: let go whatever it still holds, as nobody else could."""
        for c in range(len(self.words) if self.held else 0):
            self(c, FULL)
        if self.own:
            SPARE_STREAMS[self.words.device.index].append(self.stream)

    def __call__(self, c: int, value: int) -> None:
        if self.kind == "stream":
            self._enqueue("cuStreamWriteValue32", self.stream, c, value)
            return
        with torch.cuda.stream(self.stream):
            self.words[c : c + 1].copy_(self._pinned(value), non_blocking=True)

    def hold(self, c: int) -> None:
        stream = torch.cuda.current_stream(self.words.device)
        if stream.cuda_stream not in self.held:
            self.words.record_stream(stream)  # It may still read the word when the flag is gone.
            self.held.add(stream.cuda_stream)
        # Flags of 0 wait until the word is at least 1, as signed numbers: FULL is the largest of those.
        self._enqueue("cuStreamWaitValue32", stream, c, 1)

    def _enqueue(self, operation: str, stream: torch.cuda.Stream, c: int, value: int) -> None:
        address = self.words.data_ptr() + 4 * c
        self._call(operation, self.driver.CUstream(stream.cuda_stream), address, value, 0)

    def _call(self, operation: str, *arguments: Any) -> Any:
        driver = self.driver
        self._checked(driver.cuCtxPushCurrent(self.context))
        try:
            return self._checked(getattr(driver, operation)(*arguments))
        finally:
            driver.cuCtxPopCurrent()

    @staticmethod
    def _checked(returned: tuple[Any, ...]) -> Any:
        status, *values = returned
        if int(status) != 0:
            raise RuntimeError(f"the CUDA driver refuses: {status}")
        return values[0] if values else None

    def _pinned(self, value: int) -> torch.Tensor:
        """One pinned word per value, never overwritten: a copy in flight always reads what was meant."""
        if value not in self.pinned:
            self.pinned[value] = torch.tensor([value], dtype=torch.int32, device="cpu").pin_memory()
        return self.pinned[value]

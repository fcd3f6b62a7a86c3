"""Every way in which programs can take turns at the memory operations of the ticket protocol.

The functions of kernels/tickets.py that take, give back and count tickets are run as they stand, on a
memory of a few words. A program is stopped before each of its operations, and at every stop any program, or
whoever writes the flag, may be the next one: all states that can be reached are visited once. What a program
reads of the slots without an atomic operation may be old: any value since the launch began, but none from
before one that it has seen or written itself.

    state of a program    where in its loop it is (`Place`), and what its operations since then have returned
    state of all          those, the memory, the values that slots had, what is left to be written to the flag

Programs are deterministic, so the next operation of one follows from its state by running it again.
"""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from qllm_ops.kernels import tickets as kernels

BUDGET, GIVEN_BACK, TICKETS, DONE, TOTAL, FLAG, SLOTS = 0, 1, 2, 4, 6, 8, 9
PHASES = 2
FULL = 99
THREADS = 2  # of a program

FUNCTIONS = ("begin_poll", "answer", "next_ticket", "take_returned", "give_back", "leave", "last_ticket")


class Pending(Exception):
    """An operation whose result is not known yet."""


@dataclass(frozen=True)
class Pointer:
    address: Any

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.address + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.address - offset)


class Memory:
    """What stands for `triton.language`: its operations have the results that they are given."""

    constexpr = int

    def __init__(self, program: int, results: tuple):
        self.program, self.results = program, iter(results)

    def operation(self, *what: Any) -> Any:
        for result in self.results:
            return result
        raise Pending(what)

    def atomic_add(self, pointer: Pointer, value: int, sem: str, scope: str = "gpu") -> int:
        return self.operation("add", int(pointer.address), int(value))

    def atomic_xchg(self, pointer: Pointer, value: int, sem: str) -> int:
        return self.operation("exchange", int(pointer.address), int(value))

    def load(self, pointer: Pointer, mask: Any = None, other: int = 0, volatile: bool = False) -> Any:
        addresses = np.atleast_1d(pointer.address)
        if volatile:  # of one thread: it sees what is there
            values = [
                self.operation("add", int(a), 0) if m else other for a, m in zip(addresses, mask, strict=True)
            ]
            return np.array(values)
        values = np.array(self.operation("load", *map(int, addresses)))
        return values if np.ndim(pointer.address) else int(values[0])

    def program_id(self, axis: int) -> int:
        return self.program

    arange, where = staticmethod(np.arange), staticmethod(np.where)
    min, sum = staticmethod(np.min), staticmethod(np.sum)


def protocol(changes: dict[str, str] | None = None) -> str:
    """The source of the functions, with ``changes`` made: a text that stands there once, for another."""
    source = ""
    for name in FUNCTIONS:
        text = textwrap.dedent(inspect.getsource(getattr(kernels, name).fn))
        source += text[text.index("def ") :] + "\n"
    for text, other in (changes or {}).items():
        assert source.count(text) == 1, (text, source.count(text))
        source = source.replace(text, other)
    return source


@dataclass(frozen=True)
class Place:
    """Between two turns of a program's loop, as gate_up and down have it."""

    end: int
    done: int
    ticket: int


@dataclass(frozen=True)
class Launch:
    phase: int
    share: int = FULL
    quantum: int = 0
    polls: bool = True


@dataclass(frozen=True)
class State:
    memory: tuple[int, ...]
    computed: tuple[int, ...]
    writes: tuple[int, ...]  # still to come, to the flag
    budgets: tuple[int, ...]  # of the steps still to come; the ones after them have none
    most: int = FULL  # tiles that may be computed when this step ends
    undisturbed: bool = False  # whether nothing keeps this step from doing all that is left
    coming: tuple[Launch, ...] = ()  # of this step
    launch: Launch | None = None
    programs: tuple[tuple[Place | None, tuple] | None, ...] = ()  # None: it has ended
    versions: tuple[tuple[int, ...], ...] = ()  # of each slot, since the launch began
    seen: tuple[
        tuple[int, ...], ...
    ] = ()  # of each program: the oldest version of each slot that it may read


@dataclass
class Explorer:
    """Explores a run of ``tickets`` (of each of two phases) by ``programs``.

    Args:
        writes: what is written to the flag, one after the other; at last it is FULL again.
        looks: how often a program looks at the flag inside of a tile.
        budgets: of the first steps, in tiles; the others have none.
        rounds: under a stream gate, how often a phase is launched with a look at the flag, before it is
            launched without one; None: in steps.
        changes: to the protocol's source; see :func:`protocol`.
        coherent: whether a program sees its own writes to slots.
    """

    tickets: tuple[int, int]
    programs: int
    writes: tuple[int, ...]
    looks: int = 1
    budgets: tuple[int, ...] = ()
    rounds: int | None = None
    changes: dict[str, str] = field(default_factory=dict)
    coherent: bool = True

    def __post_init__(self):
        self.slots = 1 << (self.programs - 1).bit_length()
        self.code = compile(protocol(self.changes), "protocol", "exec")
        self.turn = cache(self._turn)

    # -- a program -------------------------------------------------------------------------------

    def _functions(self, memory: Memory) -> SimpleNamespace:
        names = {"BUDGET": BUDGET, "GIVEN_BACK": GIVEN_BACK, "TICKETS": TICKETS, "DONE": DONE, "TOTAL": TOTAL}
        names["tl"] = memory
        exec(self.code, names)
        return SimpleNamespace(**{name: names[name] for name in FUNCTIONS})

    def _turn(self, program: int, launch: Launch, place: Place | None, results: tuple) -> tuple[str, Any]:
        """("operation", what) that comes next, ("place", the next turn of the loop) or ("end", None)."""
        memory = Memory(program, results)
        run, state, flag = self._functions(memory), Pointer(0), Pointer(FLAG)

        def poll() -> Any:
            return run.begin_poll(flag, launch.polls, THREADS)

        def next_ticket(asked: Any, end: int) -> int:
            return run.next_ticket(
                state, Pointer(SLOTS), asked, end, launch.share, launch.quantum, launch.phase, launch.polls,
                self.looks, self.slots,
            )  # fmt: skip

        try:
            if place is None:
                asked = poll()
                end = run.last_ticket(state, launch.phase)
                return "place", Place(int(end), 0, int(next_ticket(asked, end)))
            if not place.ticket < place.end:
                run.leave(state, place.done, launch.quantum, launch.phase)
                return "end", None
            looks = self.looks if launch.polls else 0
            whole = all(program < run.answer(poll()) for _ in range(looks))
            if not whole:
                run.give_back(place.ticket, state, Pointer(SLOTS))
            asked = poll()
            if whole:  # Its tile is stored while the poll is under way.
                memory.operation("compute", place.ticket)
            return "place", Place(place.end, place.done + whole, int(next_ticket(asked, place.end)))
        except Pending as pending:
            return "operation", pending.args[0]

    # -- all of them -----------------------------------------------------------------------------

    def start(self) -> State:
        memory = [0] * SLOTS + [-1] * self.slots
        memory[TOTAL : TOTAL + PHASES] = self.tickets
        memory[FLAG] = FULL
        state = State(tuple(memory), (0,) * sum(self.tickets), self.writes, self.budgets)
        if self.rounds is not None:  # `TritonMoe.launch_all`
            polls = (*[True] * self.rounds, False)
            coming = tuple(Launch(phase, polls=poll) for phase in range(PHASES) for poll in polls)
            state = replace(state, coming=coming)
        return state

    def explore(self, most: int = 10**6) -> int:
        """Visit every state; how many there are. Raises AssertionError where a law is broken."""
        first = self.start()
        known, waiting = {first}, [first]
        while waiting:
            state = waiting.pop()
            followers = list(self.followers(state))
            if not followers:
                self.check_end(state)
            for follower in followers:
                if follower not in known:
                    assert len(known) < most, f"more than {most} states"
                    known.add(follower)
                    waiting.append(follower)
        return len(known)

    def followers(self, state: State) -> Iterator[State]:
        running = [program for program, local in enumerate(state.programs) if local is not None]
        for program in running:
            if self.alone(*self.turn(program, state.launch, *state.programs[program])):
                yield from self.advance(state, program)
                return
        if state.writes:
            memory = list(state.memory)
            memory[FLAG], *left = state.writes
            yield replace(state, memory=tuple(memory), writes=tuple(left))
        for program in running:
            yield from self.advance(state, program)
        if not running:
            yield from self.host(state)

    def alone(self, kind: str, what: Any) -> bool:
        """Whether nobody else can tell when this happens, so that it need not be tried in every order: what
        is no operation, counts that nobody reads before the launch is over, and what nobody writes in one."""
        if kind != "operation":
            return True
        name, *arguments = what
        counts = name == "add" and (arguments[0] == GIVEN_BACK or DONE <= arguments[0] < TOTAL)
        return name == "compute" or counts or (name == "load" and arguments[0] < SLOTS)

    def host(self, state: State) -> Iterator[State]:
        """What happens when no launch is running."""
        # A step waits for the flag before it begins, a stream before every launch.
        waits = not state.coming or self.rounds is not None
        if waits and state.memory[FLAG] == 0:
            return
        left = self.unfinished(state)
        assert state.coming or not (state.undisturbed and left), f"phases {left} are not done by a whole step"
        if state.coming:
            yield self.begin(state)
        elif self.rounds is None and left:
            yield self.begin(self.step(state, left))

    def unfinished(self, state: State) -> list[int]:
        return [p for p in range(PHASES) if state.memory[DONE + p] < state.memory[TOTAL + p]]

    def step(self, state: State, phases: list[int]) -> State:
        """`TritonMoe.step`: a launch of each phase that was not done before."""
        memory, quantum = list(state.memory), len(state.budgets) > 0
        most = FULL
        if quantum:
            memory[BUDGET] = state.budgets[0]
            most = sum(state.computed) + state.budgets[0]
        coming = tuple(Launch(phase, quantum=int(quantum)) for phase in phases)
        undisturbed = not quantum and not state.writes
        memory, budgets = tuple(memory), state.budgets[1:]
        return replace(
            state, memory=memory, coming=coming, budgets=budgets, most=most, undisturbed=undisturbed
        )

    def begin(self, state: State) -> State:
        launch, *coming = state.coming
        flag = state.memory[FLAG]
        if self.rounds is None and 0 < flag < self.programs:  # `TritonMoe._share`
            launch = replace(launch, share=flag)
        return replace(
            state,
            coming=tuple(coming),
            launch=launch,
            programs=((None, ()),) * self.programs,
            versions=tuple((value,) for value in state.memory[SLOTS:]),
            seen=((0,) * self.slots,) * self.programs,
        )

    def advance(self, state: State, program: int) -> Iterator[State]:
        place, results = state.programs[program]
        kind, what = self.turn(program, state.launch, place, results)
        if kind != "operation":
            yield self.moved(state, program, None if kind == "end" else (what, ()))
            return
        name, *arguments = what
        if name == "load":
            for values, seen in self.readings(state, program, arguments):
                after = replace(state, seen=_with(state.seen, program, seen))
                yield self.moved(after, program, (place, (*results, values)))
            return
        memory, computed = list(state.memory), list(state.computed)
        result = None
        if name == "compute":
            first = self.tickets[0]  # of the second phase
            number = arguments[0] + (first if state.launch.phase else 0)
            computed[number] += 1
            assert computed[number] == 1, f"tile {number} was computed twice"
            assert number < first or 0 not in computed[:first], (
                "the second phase began before the first ended"
            )
            assert sum(computed) <= state.most, "more tiles were computed than the budget had"
        else:
            address, value = arguments
            result = memory[address]
            memory[address] = value + (result if name == "add" else 0)
            if address >= SLOTS:
                assert value < 0 or result < 0, f"ticket {result} was overwritten by {value}"
                state = self.written(state, program, address - SLOTS, memory[address])
        after = replace(state, memory=tuple(memory), computed=tuple(computed))
        yield self.moved(after, program, (place, (*results, result)))

    def written(self, state: State, program: int, slot: int, value: int) -> State:
        versions = _with(state.versions, slot, (*state.versions[slot], value))
        if not self.coherent:
            return replace(state, versions=versions)
        seen = _with(state.seen[program], slot, len(versions[slot]) - 1)
        return replace(state, versions=versions, seen=_with(state.seen, program, seen))

    def readings(
        self, state: State, program: int, addresses: list[int]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What a load may return, and which versions of slots it has seen then."""
        if addresses[0] < SLOTS:  # nobody writes these in this launch
            yield tuple(state.memory[address] for address in addresses), state.seen[program]
            return
        oldest = state.seen[program]
        for at in itertools.product(*(range(o, len(v)) for o, v in zip(oldest, state.versions, strict=True))):
            values = tuple(v[i] for v, i in zip(state.versions, at, strict=True))
            yield values, at if self.coherent else oldest

    def moved(self, state: State, program: int, local: tuple | None) -> State:
        """With what no program will look at any more left out, so that states are the same that are alike."""
        programs = _with(state.programs, program, local)
        seen = tuple(at if local else () for at, local in zip(state.seen, programs, strict=True))
        oldest = [min((at[slot] for at in seen if at), default=0) for slot in range(self.slots)]
        versions = tuple(v[o:] for v, o in zip(state.versions, oldest, strict=True))
        seen = tuple(tuple(i - o for i, o in zip(at, oldest, strict=True)) if at else () for at in seen)
        if not any(programs):
            versions = ()
        return replace(state, programs=programs, versions=versions, seen=seen)

    def check_end(self, state: State) -> None:
        assert state.computed == (1,) * sum(self.tickets), f"computed {state.computed}"
        assert state.memory[DONE : DONE + PHASES] == self.tickets
        assert set(state.memory[SLOTS:]) == {-1}, "a ticket was left in a slot"


def _with(items: tuple, index: int, item: Any) -> tuple:
    return (*items[:index], item, *items[index + 1 :])

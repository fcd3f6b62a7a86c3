"""How programs share out the tiles of a launch, and leave.

What a run needs to be taken up again is one tensor, `state` (int32). `moe.route` writes all of it; later
the plan stays as it is:

    budget      tiles that a step with a quantum may still take
    given back  how often a tile was given back
    tickets     given out in each of the phases, at most MAX_PHASES. They go on counting past the last tile
    done        tiles finished in each phase; a program adds its own when it leaves
    total       tiles in all
    plan        offsets (E + 1), then the first row block of each expert and the number of all row blocks
                (E + 1), for gate_up and again for down
    returned    (SLOTS,) the ticket of a tile that was given back by the program of this number, or -1

A program polls the flag, takes a ticket, computes that tile whole, and polls again before it stores it, which
hides how long the answer takes. So a tile that was taken is a tile that is done, and no tile's arithmetic
depends on who ran it or when.

Where one tile takes longer than leaving may (EXIT_K > 0), a program polls inside of its sums as well, drops
them if it has to leave, and gives the ticket back: whoever looks for work next takes it first. A ticket is
always in one place, the counter, a slot or a program, and moves by single atomic operations.
tests/tickets.py tries every order of these operations.
"""

import triton
import triton.language as tl

from qllm_ops.tiles import MAX_PHASES as _MAX_PHASES

MAX_PHASES = tl.constexpr(_MAX_PHASES)

BUDGET = tl.constexpr(0)
GIVEN_BACK = tl.constexpr(1)
TICKETS = tl.constexpr(2)
DONE = tl.constexpr(TICKETS + MAX_PHASES)
TOTAL = tl.constexpr(DONE + MAX_PHASES)
OFFSETS = tl.constexpr(TOTAL + MAX_PHASES)


@triton.jit
def begin_poll(flag_ptr, HAS_FLAG: tl.constexpr, THREADS: tl.constexpr):
    """Ask how many programs of this launch may run. Nobody waits for that before `answer`.

    One thread reads, the first of as many elements as there are threads: if all did, the warps of one program
    could see different values. For PTX a volatile load is a relaxed one of the scope of the system.
    """
    asked = None
    if HAS_FLAG:
        threads = tl.arange(0, THREADS)
        asked = tl.load(flag_ptr + threads, mask=threads == 0, other=0, volatile=True)
    return asked


@triton.jit
def answer(asked):
    """How many programs may run, the same for the whole program."""
    return tl.sum(asked, axis=0)


@triton.jit
def next_ticket(
    state_ptr,
    returned_ptr,
    asked,  # by begin_poll, since this program's last tile was computed
    end,
    share,  # most programs that the flag may allow before this launch leaves to begin anew with more
    quantum,  # whether tiles are taken out of the budget
    phase,
    HAS_FLAG: tl.constexpr,
    EXIT_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Take a ticket, if the poll allows it: `end` or more if this program has to leave.

    Programs that a share has kept out do not come back by themselves: when it grows, those that run leave
    too, and the next launch begins with more.
    """
    # A phase that may not begin gives out no ticket: nobody would compute its tile.
    may_run = end > 0
    if quantum != 0:
        may_run &= tl.atomic_add(state_ptr + BUDGET, -1, sem="relaxed") > 0
    if HAS_FLAG:
        programs = answer(asked)
        may_run &= (tl.program_id(0) < programs) & (programs <= share)
    ticket = end
    if may_run:
        ticket = -1
        if EXIT_K > 0:
            ticket = take_returned(returned_ptr, SLOTS)
        if ticket < 0:
            ticket = tl.atomic_add(state_ptr + TICKETS + phase, 1, sem="relaxed")
    return ticket


@triton.jit
def leave(state_ptr, done, quantum, phase):
    """Count the tiles that this program has finished."""
    tl.atomic_add(state_ptr + DONE + phase, done, sem="relaxed")
    if quantum != 0:  # It has paid for a last look for work, which found none.
        tl.atomic_add(state_ptr + BUDGET, 1, sem="relaxed")


@triton.jit
def take_returned(returned_ptr, SLOTS: tl.constexpr):
    """A ticket that was given back, or -1.

    What this program sees of the slots may be old; the exchange decides who gets a ticket. It tries all that
    it sees: where nobody leaves any more, none is left behind.
    """
    slots = tl.arange(0, SLOTS)
    # Everybody begins at a slot of their own, so that few reach for the same one.
    distance = (slots - tl.program_id(0)) & (SLOTS - 1)
    distance = tl.where(tl.load(returned_ptr + slots) >= 0, distance, SLOTS)
    nearest = tl.min(distance, axis=0)
    ticket = -1
    while (ticket < 0) & (nearest < SLOTS):
        slot = (nearest + tl.program_id(0)) & (SLOTS - 1)
        ticket = tl.atomic_xchg(returned_ptr + slot, -1, sem="relaxed")
        distance = tl.where(distance == nearest, SLOTS, distance)
        nearest = tl.min(distance, axis=0)
    return ticket


@triton.jit
def give_back(ticket, state_ptr, returned_ptr):
    """Leave a ticket for others. This program's slot is empty: it looked there before it took any other."""
    tl.atomic_xchg(returned_ptr + tl.program_id(0), ticket, sem="relaxed")
    tl.atomic_add(state_ptr + GIVEN_BACK, 1, sem="relaxed")


@triton.jit
def last_ticket(state_ptr, phase):
    """One past the last ticket of a phase; 0 while the previous phase is not done.

    The end of a launch makes its tiles visible to the next.
    """
    end = tl.load(state_ptr + TOTAL + phase)
    if phase > 0:
        ready = tl.load(state_ptr + DONE + phase - 1) >= tl.load(state_ptr + TOTAL + phase - 1)
        end = tl.where(ready, end, 0)
    return end

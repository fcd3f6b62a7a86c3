"""Policies: which batch each lane runs next, and what is paused meanwhile.

A policy sees the queues and what runs now, and answers with a plan. It holds no state, takes no
lock and touches no device; the scheduler turns plans into batches. All policies run on the same
engine and the same kernels, so a comparison of two of them compares nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qllm_ops.scheduler.request import Request

FOREGROUND = "foreground"
BACKGROUND = "background"


@dataclass(frozen=True)
class View:
    """What a policy may look at. Lists hold open requests that are not part of an iteration now.

    ``ls_*`` are urgent: latency-sensitive, or best-effort and aged. Each list is in the order of
    (class, arrival), the most urgent first.
    """

    ls_prefill: Sequence[Request]
    ls_decode: Sequence[Request]
    be_prefill: Sequence[Request]
    be_decode: Sequence[Request]
    foreground_busy: bool  # False too for an iteration that has outlived the pause it was given
    best_effort_due: bool  # best-effort work is owed its floor, and some of it can run
    prefills: int  # prefill iterations of this lane since its last decode
    max_batch: int  # rows of a decode batch
    top_up_tokens: int  # best-effort prompt tokens that may ride in an urgent prefill


@dataclass(frozen=True)
class Plan:
    """One iteration: the requests, in order of preference, and how many tokens riders may add."""

    kind: str  # "prefill" or "decode"
    requests: Sequence[Request]
    riders: Sequence[Request] = ()
    rider_tokens: int = 0

    def __post_init__(self):
        if self.kind not in ("prefill", "decode"):
            raise ValueError(f'kind of a plan must be "prefill" or "decode", got {self.kind!r}')
        if not self.requests:
            raise ValueError(
                "requests of a plan must hold at least one; a policy with none to run gives None"
            )


class Policy(Protocol):
    """What a policy is.

    ``granularity`` is where paused work stops: None (never within an iteration), "layer", "tile".
    ``by_class`` says whether an urgent request gets memory before one that came earlier, and
    whether best-effort work, being passed over, is owed its floor.
    """

    name: str
    lanes: tuple[str, ...]
    granularity: str | None
    by_class: bool

    def next_batch(self, lane: str, view: View) -> Plan | None: ...


class Fcfs:
    """Iteration-level, first come first served, continuous batching: the paper's baseline.

    A waiting prompt goes before the next decode step, so that the decode batch fills up.
    """

    name = "fcfs"
    lanes = (FOREGROUND,)
    granularity = None
    by_class = False

    def next_batch(self, lane: str, view: View) -> Plan | None:
        prefill = sorted([*view.ls_prefill, *view.be_prefill], key=lambda r: r.arrival_s)
        decode = sorted([*view.ls_decode, *view.be_decode], key=lambda r: r.arrival_s)
        if prefill and not decode_is_due(decode, view):
            return Plan("prefill", prefill)
        return Plan("decode", decode) if decode else None


class Priority:
    """Iteration-level priority: an urgent request goes next, but waits for the iteration that runs."""

    name = "priority"
    lanes = (FOREGROUND,)
    granularity = None
    by_class = True

    def next_batch(self, lane: str, view: View) -> Plan | None:
        if view.best_effort_due:
            return best_effort_batch(view)
        return urgent_batch(view) or best_effort_batch(view)


class Preempting:
    """Urgent iterations start at once and pause best-effort ones inside their forward pass."""

    lanes = (FOREGROUND, BACKGROUND)
    by_class = True

    def __init__(self, name: str, granularity: str):
        self.name, self.granularity = name, granularity

    def next_batch(self, lane: str, view: View) -> Plan | None:
        if lane == FOREGROUND:
            return None if view.best_effort_due else urgent_batch(view)
        return None if view.foreground_busy else best_effort_batch(view)


def urgent_batch(view: View) -> Plan | None:
    """The urgent part of the paper's Algorithm 1."""
    if decode_is_due(view.ls_decode, view):
        return Plan("decode", view.ls_decode)
    if view.ls_prefill:
        return Plan("prefill", view.ls_prefill, riders=view.be_prefill, rider_tokens=view.top_up_tokens)
    if view.ls_decode:
        return Plan("decode", [*view.ls_decode, *view.be_decode])
    return None


def best_effort_batch(view: View) -> Plan | None:
    """The rest of it, with one change: decode waits for a full batch while there are prompts left.

    Algorithm 1 decodes first, which runs most best-effort decode steps nearly empty.
    """
    if view.be_prefill and not decode_is_due(view.be_decode, view):
        return Plan("prefill", view.be_prefill)
    return Plan("decode", view.be_decode) if view.be_decode else None


def decode_is_due(decode: Sequence[Request], view: View) -> bool:
    """Whether these decode before any waiting prompt: they fill a batch, or have waited long enough.

    Prompts that end with their first token never fill the batch; an endless row of them would
    otherwise keep the others from their second one for ever.
    """
    return bool(decode) and (len(decode) >= view.max_batch or view.prefills >= view.max_batch)


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (Fcfs(), Priority(), Preempting("layer", "layer"), Preempting("tile", "tile"))
}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name; an object of the user's own is taken if it is one.

    Raises:
        ValueError: no policy has that name, or the object has lanes or a granularity that there is none of.
        TypeError: it is neither a name nor like `Policy`.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; there are: {', '.join(POLICIES)}")
        return POLICIES[policy]
    wanted = f"policy must be one of {', '.join(POLICIES)} or an object like Policy"
    if isinstance(policy, type):
        raise TypeError(f"{wanted}, got the class {policy.__name__} and not an object of it")
    missing = [name for name in ("name", "lanes", "granularity", "by_class") if not hasattr(policy, name)]
    if missing or not callable(getattr(policy, "next_batch", None)):
        raise TypeError(f"{wanted}, got {policy!r}, which has no {(missing or ['next_batch()'])[0]}")
    if FOREGROUND not in policy.lanes or not {*policy.lanes} <= {FOREGROUND, BACKGROUND}:
        raise ValueError(
            f"lanes of policy {policy.name!r} must be {FOREGROUND!r} with or without {BACKGROUND!r}, "
            f"got {policy.lanes!r}"
        )
    if policy.granularity not in (None, "layer", "tile"):
        raise ValueError(
            f"granularity of policy {policy.name!r} must be one of None, 'layer' and 'tile', "
            f"got {policy.granularity!r}"
        )
    return policy

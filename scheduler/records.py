"""What a run leaves behind: a record per request, pause and iteration.

All times are in seconds on the clock of one run, which starts at 0 with the workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LS_ALONE = "ls_alone"
"""Name of the run of the LS requests with no BE at all: the limit every policy is held against."""

STATUSES = ("done", "failed", "cancelled", "refused")


@dataclass
class Finished:
    """One request after its end.

    Attributes:
        priority: 1 (LS) or 0 (BE).
        first_token_s: when the first token was there; None if none ever was.
        output_tokens: how many tokens were generated.
        status: "done", "failed", "cancelled" or "refused" (never admitted).
        error: what went wrong, if anything did.
        tokens: the generated token ids.
        margins: best logit minus second-best logit at each generated token.
    """

    id: str
    priority: int
    arrival_s: float
    first_token_s: float | None
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    status: str = "done"
    error: str | None = None
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status of {self.id} must be one of {', '.join(STATUSES)}, got {self.status!r}")

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def turnaround_s(self) -> float:
        """Arrival to last token."""
        return self.finish_s - self.arrival_s


@dataclass
class Pause:
    """One time that a lane was asked to stand still.

    Attributes:
        lane: whose work was paused: "background".
        asked_s: when the flag was written.
        parked_s: when the lane stood still; None if it was idle, or the pause ended before it did.
        resumed_s: when the lane was let go.
        where: between what it stood still: "tile", "layer" or "attention"; "end" if its iteration ended
            before it reached a gate; None if it did not stand still.
    """

    lane: str
    asked_s: float
    parked_s: float | None
    resumed_s: float
    where: str | None


@dataclass
class Span:
    """One iteration of one lane, pauses included.

    Attributes:
        lane: "foreground" or "background".
        kind: "prefill" or "decode".
        ls_rows, be_rows: sequences of each class in the batch.
        tokens: tokens that went through the model.
    """

    lane: str
    start_s: float
    end_s: float
    kind: str
    ls_rows: int
    be_rows: int
    tokens: int
    request_ids: Sequence[str] = ()


@dataclass
class RunRecord:
    """Everything that one policy did with one workload. ``wall_s`` is start to last token."""

    policy: str
    wall_s: float
    finished: list[Finished] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    wasted_tiles: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

"""KV memory: one pool with an explicit budget, shared by all requests and both lanes.

A request gets one contiguous region of token slots when it is admitted, long enough for its prompt
and everything it may generate. So it can never run out half-way, nothing is ever evicted or
recomputed, and its keys and values are a slice of the pool that attention reads without a copy.
"""

from __future__ import annotations

from bisect import insort


class KVBudget:
    """Hands out contiguous regions of ``tokens`` slots; knows nothing of tensors.

    Best-effort requests fill the pool from the bottom and leave ``reserve`` slots alone;
    latency-sensitive ones fill it from the top. So a queue of long best-effort prompts cannot keep
    an urgent one out, and the two kinds do not break up each other's room.
    """

    def __init__(self, tokens: int, reserve: int = 0):
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"kv tokens must be a positive integer, got {tokens!r}")
        if not isinstance(reserve, int) or not 0 <= reserve < tokens:
            raise ValueError(f"kv reserve must be an integer from 0 to {tokens - 1}, got {reserve!r}")
        self.tokens = tokens
        self.reserve = reserve
        self._free: list[tuple[int, int]] = [(0, tokens)]  # (start, length), sorted, never adjacent

    @property
    def free_tokens(self) -> int:
        return sum(length for _, length in self._free)

    def limit(self, urgent: bool) -> int:
        """The largest request of its kind that can ever be admitted."""
        return self.tokens if urgent else self.tokens - self.reserve

    def take(self, length: int, urgent: bool) -> int | None:
        """The start of a free region of ``length`` slots, or None if there is none now."""
        if not urgent and self.free_tokens - length < self.reserve:
            return None
        order = reversed(range(len(self._free))) if urgent else range(len(self._free))
        for i in order:
            start, room = self._free[i]
            if room >= length:
                rest = (start, room - length) if urgent else (start + length, room - length)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return start + room - length if urgent else start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free a region that :meth:`take` handed out."""
        insort(self._free, (start, length))
        merged: list[tuple[int, int]] = []
        for region in self._free:
            if merged and sum(merged[-1]) > region[0]:
                raise RuntimeError(f"KV region at {start} of {length} slots was given back twice")
            if merged and sum(merged[-1]) == region[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + region[1])
            else:
                merged.append(region)
        self._free = merged

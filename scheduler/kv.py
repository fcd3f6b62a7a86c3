"""KV memory: one pool with an explicit budget, shared by all requests and both lanes.

A request gets one contiguous region of token slots when it is admitted, long enough for its prompt
and everything it may generate. So it can never run out half-way, nothing is ever evicted or
recomputed, and its keys and values are a slice of the pool that attention reads without a copy.
"""

from __future__ import annotations

from qllm_ops.arguments import is_integer


class KVBudget:
    """Hands out contiguous regions of ``tokens`` slots; knows nothing of tensors.

    Best-effort requests fill the pool from the bottom and never get the top ``reserve`` slots;
    latency-sensitive ones fill it from the top. So a queue of long best-effort prompts cannot keep
    an urgent one out, and the two kinds do not break up each other's room.

        0 |  best-effort ->        <- latency-sensitive  | tokens
          |       for either kind      | reserve: not BE |
    """

    def __init__(self, tokens: int, reserve: int = 0):
        if not is_integer(tokens) or tokens < 1:
            raise ValueError(f"kv_tokens must be a positive integer, got {tokens!r}")
        if not is_integer(reserve) or not 0 <= reserve < tokens:
            raise ValueError(f"kv_reserve must be an integer from 0 to {tokens - 1}, got {reserve!r}")
        self.tokens = tokens
        self.reserve = reserve
        self._free: list[tuple[int, int]] = [(0, tokens)]  # (start, length), sorted, never adjacent

    @property
    def free_tokens(self) -> int:
        return sum(length for _, length in self._free)

    def limit(self, urgent: bool) -> int:
        """The largest request of its kind that can ever be admitted."""
        return self.tokens if urgent else self.tokens - self.reserve

    def take(self, length: int, urgent: bool, *, reserve_only: bool = False) -> int | None:
        """The start of a free region of ``length`` slots, or None if there is none now.

        ``reserve_only`` keeps an urgent request out of the room that best-effort ones may use.
        """
        low = self.tokens - self.reserve if reserve_only else 0
        high = self.limit(urgent)
        order = range(len(self._free))
        for i in reversed(order) if urgent else order:
            start, room = self._free[i]
            first, last = max(start, low), min(start + room, high) - length
            if first <= last:
                begin = last if urgent else first
                rest = [(start, begin - start), (begin + length, start + room - begin - length)]
                self._free[i : i + 1] = [hole for hole in rest if hole[1]]
                return begin
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free a region that :meth:`take` handed out. RuntimeError, and no change, if part of it is free."""
        merged: list[tuple[int, int]] = []
        for region in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) > region[0]:
                raise RuntimeError(f"KV region at {start} of {length} slots was given back twice")
            if merged and sum(merged[-1]) == region[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + region[1])
            else:
                merged.append(region)
        self._free = merged

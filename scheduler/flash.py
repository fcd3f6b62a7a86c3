"""Attention of all rows of an iteration in one launch: torch's FlashAttention for sequences of different
lengths (Dao, arXiv 2307.08691), where the device and the numbers are such that it can be had.

Queries lie one row after the other, and so do keys, but for slots between them that belong to nobody:

    queries   | row 0 | row 1     | row 2 |
    keys      ... | row 0   | free | row 1 | free | row 2    | ...
              cu_k[0]               cu_k[1]         cu_k[2]   cu_k[3] = N
              `used` says how many of the keys from cu_k[i] on are the row's

A row's queries are its last tokens. So nothing is copied, padded or masked in memory, and a decode batch, a
prompt and a chunk of one are the same call.

The operator is the one behind `torch.nn.attention.varlen.varlen_attn`, which takes `seqused_k` from torch
2.12 on; the operator has had it for longer. That it means what is meant here is seen on a few random rows
before it is first used on a device.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

kernel = torch.ops.aten._flash_attention_forward.default

ARGUMENTS = frozenset(argument.name for argument in kernel._schema.arguments)
"""Of this torch's kernel."""

LEAST_CAPABILITY = (8, 0)
LARGEST_HEAD = 256

AGREEMENT = {"outputs": 3e-2, "sums": 1e-3}
"""Largest difference of two right ways to attend on random rows: some roundings of bfloat16 in the outputs,
which are below 4; float32 in the logarithms of sums, which one key too many changes by 0.003 and more."""


@dataclass(frozen=True)
class Rows:
    """Where B rows lie, as the kernel reads it.

    Attributes:
        cu_q, cu_k: (B + 1,) int32 on the device: where their queries and their keys begin; then the end.
        used: (B,) int32 on the device: how many keys they have.
        max_q, max_k: most queries and keys of a row.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    used: torch.Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, lengths: list[int], starts: list[int], totals: list[int], keys: torch.Tensor) -> Rows:
        """Rows of so many queries, whose ``totals`` keys begin at ``starts`` of (kv heads, N, d) ``keys``."""
        ends = [start + total for start, total in zip(starts, totals, strict=True)]
        if any(end > start for end, start in zip(ends, [*starts[1:], keys.shape[1]], strict=True)):
            raise RuntimeError(f"rows must lie one behind the other, got starts {starts} of {totals} keys")
        cu_q = [0]
        for length in lengths:
            cu_q.append(cu_q[-1] + length)
        parts = (cu_q, [*starts, keys.shape[1]], totals)
        flat = torch.tensor([n for part in parts for n in part], dtype=torch.int32, device=keys.device)
        return cls(*flat.split([len(part) for part in parts]), max(lengths), max(totals))


def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel is made for such numbers and sizes of heads."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == keys.dtype == values.dtype
        and values.shape[-1] <= size == keys.shape[-1]
        and size % 8 == 0
        and size <= LARGEST_HEAD
    )


def attend_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows,
    window: int = 0, scale: float | None = None, batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Causal attention of every row over its own keys.

    Args:
        query: (heads, T, d), float16 or bfloat16.
        keys, values: (kv heads, N, d); values may be shorter than d (multi-head latent attention), which the
            kernel does not know: they are padded.
        window: how many keys a query sees, itself included; 0 for all before it.
        scale: of the scores; d ** -0.5 by default.
        batch_invariant: a row's output does not depend on which others there are. So keys are never split
            among programs, and which of the library's kernels runs is not left to the longest row:
            it has another for batches of single queries, and another where a window exceeds all keys.

    Returns:
        (T, heads, size of the values), and the logarithms of the softmaxes' sums, (heads, T) float32.
    """
    size = values.shape[-1]
    if size < keys.shape[-1]:
        values = torch.nn.functional.pad(values, (0, keys.shape[-1] - size))
    max_q, max_k, options = rows.max_q, rows.max_k, {}
    if batch_invariant:
        max_q, max_k = max(max_q, 2), max(keys.shape[1], window + 1)
        if "num_splits" in ARGUMENTS:
            options["num_splits"] = 1
    if window:
        options |= {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, *_ = kernel(
        query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), rows.cu_q, rows.cu_k,
        max_q, max_k, 0.0, True, False, scale=scale, seqused_k=rows.used, **options,
    )  # fmt: skip
    return out[..., :size], lse


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why the kernel cannot be had on ``device``; None if it can. Launches it there the first time."""
    if device.type != "cuda":
        return f"{device.type} has no such kernel"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention for NVIDIA devices"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or newer"
    if "seqused_k" not in ARGUMENTS:
        return f"torch {torch.__version__} has it without seqused_k"
    try:
        return disagreement(device)
    except RuntimeError as error:  # what torch raises for a launch that it refuses
        return f"it failed on a few rows: {error}"


@torch.inference_mode()
def disagreement(device: torch.device) -> str | None:
    """What the kernel computes otherwise than a row after the other, on random rows; None if nothing."""
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 70, 64), (2, 300, 64), (2, 300, 64))
    q, k, v = (torch.randn(s, generator=random, device="cpu").to(device, torch.bfloat16) for s in shapes)
    for lengths, starts, totals in (
        ([1, 1, 1], [0, 40, 200], [33, 150, 1]),  # rows that decode
        ([1, 60, 9], [3, 50, 180], [20, 60, 100]),  # one of them, a prompt, and a chunk of one
    ):
        rows = Rows.of(lengths, starts, totals, k)
        for window, batch_invariant in itertools.product((0, 5), (False, True)):
            out, lse = attend_rows(q[:, : sum(lengths)], k, v, rows, window, 0.2, batch_invariant)
            end = 0
            for length, start, total in zip(lengths, starts, totals, strict=True):
                row, end = slice(end, end + length), end + length
                of_row = (of[:, start : start + total] for of in (k, v))
                expected = _attend_row(q[:, row], *of_row, window, 0.2)
                for name, got in (("outputs", out[row].transpose(0, 1)), ("sums", lse[:, row])):
                    error = (got.float() - expected[name]).abs().max().item()
                    if not error <= AGREEMENT[name]:
                        return f"its {name} are off by {error:.2g}: rows of {lengths}, window {window}"
    return None


def _attend_row(q, k, v, window: int, scale: float) -> dict[str, torch.Tensor]:
    """The same for one row, written out: (heads, n, d) queries, its last; (kv heads, total, d) keys."""
    q, k, v = (of.float().repeat_interleave(q.shape[0] // of.shape[0], 0) for of in (q, k, v))
    position = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    column = torch.arange(k.shape[1], device=q.device)
    seen = (column <= position) & (column > position - (window or k.shape[1]))
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return {"outputs": scores.softmax(-1) @ v, "sums": scores.logsumexp(-1)}

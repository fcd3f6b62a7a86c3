"""Stored tensors into tensors in memory, by a few threads, in the order in which they lie on the disk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .shards import StoredTensor

PIECE_BYTES = 16 * 2**20
"""What a thread takes at a time."""

BUFFER_BYTES = 2**20
"""What it reads at a time for a conversion or a copy to a GPU: it stays in a core's cache."""

READERS = 4
"""Threads that read: enough for a disk's queue, and no more than transformers uses."""


class Reader:
    """Reads stored tensors into tensors with a few threads, in the order of the files, and shows how far."""

    def __init__(self, total_bytes: int, device: torch.device, progress: bool):
        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
        columns += (TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
        self.task = self.bar.add_task("loading", total=total_bytes)
        self.pinned = device.type == "cuda"
        self.own = threading.local()
        self.pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> Reader:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.bar.stop()

    def read(self, slots: Iterable[tuple[StoredTensor, torch.Tensor]]) -> None:
        in_order = sorted(slots, key=lambda slot: (slot[0].file, slot[0].begin))
        pieces = (piece for tensor, slot in in_order for piece in _pieces(tensor, slot))
        for nbytes in self.pool.map(self._read_piece, pieces):
            self.bar.advance(self.task, nbytes)

    def _read_piece(self, piece: tuple[StoredTensor, int, torch.Tensor]) -> int:
        tensor, start, target = piece
        straight = target.dtype == tensor.dtype and target.device.type == "cpu"
        tensor.read(start, target, None if straight else self._buffer())
        return len(target) * tensor.dtype.itemsize

    def _buffer(self) -> torch.Tensor:
        """This thread's own; of those made anew for every piece the allocator would keep several."""
        if not hasattr(self.own, "buffer"):
            self.own.buffer = torch.empty(
                BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self.pinned
            )
        return self.own.buffer


def _pieces(tensor: StoredTensor, slot: torch.Tensor) -> Iterator[tuple[StoredTensor, int, torch.Tensor]]:
    """A tensor in pieces of PIECE_BYTES: the element that each starts at, and where it goes."""
    flat, step = slot.view(-1), PIECE_BYTES // tensor.dtype.itemsize
    for start in range(0, len(flat), step):
        yield tensor, start, flat[start : start + step]

"""The safetensors files of a checkpoint: whether they are whole, and where in them each tensor lies.

A safetensors file is eight bytes that give the length of a header, the header (JSON: the name,
dtype, shape and byte range of every tensor), and the bytes. So a file that was cut off or damaged
in its header is found without reading the weights.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit that the format itself sets

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Size of one element of each safetensors dtype, in bits."""

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What torch calls those dtypes that a model in memory has."""


SERIAL = 2**15
"""torch converts so few elements in the calling thread. Several readers that each woke a team of OpenMP
threads took five times as long on two cores that others used too."""


class CheckpointError(ValueError):
    """A model folder or file that cannot be loaded; names the file, the tensor and what was wanted."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as the file's header has it.

    Attributes:
        code: its dtype as safetensors calls it.
        begin: first byte in the file.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"

    @property
    def dtype(self) -> torch.dtype:
        if self.code not in TORCH:
            raise CheckpointError(f"{self} has dtype {self.code}, wanted one of {', '.join(TORCH)}")
        return TORCH[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, target: torch.Tensor, buffer: torch.Tensor | None = None) -> None:
        """Fill ``target`` with the elements from ``start`` on, converted to its dtype, on its device.

        Args:
            target: one-dimensional and contiguous.
            buffer: bytes (uint8) on the CPU, for a target of another dtype or on another device: as many
                elements as it takes are read and converted at a time. None: they go straight into the target.
        """
        at_once = len(target) if buffer is None else len(buffer) // self.dtype.itemsize
        # Not a mapping: its pages would count as this process's memory beside the weights.
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin + start * self.dtype.itemsize)
            for part in target.split(max(1, at_once)):
                stored = (
                    part if buffer is None else buffer[: len(part) * self.dtype.itemsize].view(self.dtype)
                )
                self._read_bytes(stream, stored)
                if part.device.type != "cpu":
                    part.copy_(stored)
                elif buffer is not None:
                    for few, values in zip(part.split(SERIAL), stored.split(SERIAL), strict=True):
                        few.copy_(values)

    def _read_bytes(self, stream: BinaryIO, stored: torch.Tensor) -> None:
        left = memoryview(stored.view(torch.uint8).numpy())
        while left:
            count = stream.readinto(left)
            if not count:
                raise CheckpointError(f"{self} ends {len(left)} bytes too early: the file has changed")
            left = left[count:]


def check_safetensors(path: str | Path) -> tuple[Path, ...]:
    """See that the *.safetensors files at ``path`` are whole, without reading the weights.

    Args:
        path: a file, or a folder: then all of its files, and the shards that its index names.

    Returns:
        The files that were looked at.

    Raises:
        CheckpointError: a file is missing, cut off or damaged, or a tensor is not where it should be.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        _read_header(path)
        return (path,)
    return tuple(_read_folder(path))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors by name that transformers reads from ``folder``, whose files are checked to be whole.

    That is those of model.safetensors, or else of the shards that the index names. Other files may lie beside
    them (the same weights under the names of another library, for instance), and are not looked at.

    Raises:
        CheckpointError: as `check_safetensors`, or two shards have a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for header in _read_folder(folder, only_read=True).values():
        for tensor in header.values():
            twin = found.setdefault(tensor.name, tensor)
            if twin is not tensor:
                raise CheckpointError(f"{tensor} is also in {twin.file.name}, wanted it once")
    return found


def _read_folder(folder: Path, only_read: bool = False) -> dict[Path, dict[str, StoredTensor]]:
    """The headers of all safetensors files in a folder, or of those alone that transformers reads."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such file or folder")
    files = sorted(folder.glob("*.safetensors"))
    whole = only_read and folder / WHOLE in files
    shards = {} if whole else _read_index(folder / INDEX)
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        tensors = shards[missing[0]]
        raise CheckpointError(
            f"{folder / missing[0]}: no such file, but {INDEX} names it for {len(tensors)} tensors, "
            f"{tensors[0]} among them ({len(missing)} of {len(shards)} files are missing)"
        )
    named = [folder / name for name in sorted(shards)]
    if not files and not named:
        raise CheckpointError(f"{folder}: no *.safetensors file in this folder; other formats are not read")
    if only_read:
        if not whole and not named:
            raise CheckpointError(
                f"{folder}: neither {WHOLE} nor {INDEX} in this folder, but {files[0].name}, which "
                "transformers would not read"
            )
        files = [folder / WHOLE] if whole else named
    else:
        files = sorted({*files, *named})
    headers = {file: _read_header(file) for file in files}
    for name, tensors in shards.items():
        for tensor in tensors:
            if tensor not in headers[folder / name]:
                raise CheckpointError(
                    f"{folder / name}: no tensor {tensor}, but {INDEX} says that it is here"
                )
    _check_every_expert(folder, {tensor for header in headers.values() for tensor in header})
    return headers


def _read_index(file: Path) -> dict[str, list[str]]:
    """File name -> tensors that the index says are in it; empty if there is no index."""
    if not file.is_file():
        return {}
    shards: dict[str, list[str]] = {}
    try:
        for tensor, name in json.loads(file.read_bytes())["weight_map"].items():
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is no file for {tensor}")
            shards.setdefault(name, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{file}: not an index with a "weight_map" of tensor to file: {error!r}'
        ) from error
    return shards


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, after checking its header and its length."""
    if not file.is_file():
        raise CheckpointError(f"{file}: a folder, or a link to nothing; wanted a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":  # of https://git-lfs.github.com/spec/v1
            raise CheckpointError(
                f"{file}: a pointer of Git LFS and not the file itself; git lfs pull fetches it"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: cut off or not safetensors: {size} bytes, too short for the header "
                f"of {length} bytes that it announces"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not a JSON object: {error}") from error

    end = 0
    for tensor, begin, stop in sorted(
        (_byte_range(file, name, entry) for name, entry in header.items()), key=lambda r: r[1:]
    ):
        if begin != end:
            raise CheckpointError(f"{file}: tensor {tensor} starts at byte {begin}, wanted {end}")
        if 8 + length + stop > size:
            raise CheckpointError(
                f"{file}: cut off in tensor {tensor}: {size} bytes, wanted at least {8 + length + stop}"
            )
        end = stop
    if size != 8 + length + end:
        raise CheckpointError(f"{file}: {size} bytes, wanted {8 + length + end} by its header")
    return {
        name: StoredTensor(
            name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _byte_range(file: Path, tensor: str, entry: dict) -> tuple[str, int, int]:
    try:
        (begin, stop), shape, bits = entry["data_offsets"], entry["shape"], BITS[entry["dtype"]]
        for number in (begin, stop, *shape):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is not a size or an offset")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: tensor {tensor} has no valid entry in the header: {error!r}"
        ) from error
    wanted = -(-bits * math.prod(shape) // 8)
    if stop - begin != wanted:
        raise CheckpointError(
            f"{file}: tensor {tensor} has bytes {begin} to {stop}, wanted {wanted} bytes "
            f"for {entry['dtype']} {shape}"
        )
    return tensor, begin, stop


def split_at_expert(tensor: str) -> tuple[str, int, str] | None:
    """``(before, 7, after)`` of the name of a tensor of expert 7; None of any other tensor."""
    match = re.fullmatch(r"(.*\bexperts\.)(\d+)(\..*)", tensor)
    return (match[1], int(match[2]), match[3]) if match else None


def _check_every_expert(path: Path, tensors: set[str]) -> None:
    """Where experts are stored one by one, each must have what the others of its layer have."""
    layers: dict[str, tuple[set[int], set[str]]] = {}
    for before, expert, after in filter(None, map(split_at_expert, tensors)):
        experts, parts = layers.setdefault(before, (set(), set()))
        experts.add(expert)
        parts.add(after)
    for layer, (experts, parts) in sorted(layers.items()):
        for name in (f"{layer}{n}{part}" for n in range(max(experts) + 1) for part in sorted(parts)):
            if name not in tensors:
                raise CheckpointError(f"{path}: no tensor {name} in any file, though its like are there")

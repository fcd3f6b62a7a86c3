"""Load a local Hugging Face MoE model, after seeing that its safetensors files are whole.

A safetensors file is eight bytes that give the length of a header, the header (JSON: the name,
dtype, shape and byte range of every tensor), and the bytes. So a file that was cut off or damaged
in its header is found without reading the weights.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qllm_ops import PriorityFlag

from .install import find_experts
from .install import install as install_experts

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


class CheckpointError(ValueError):
    """A model folder or file that cannot be loaded; names the file, the tensor and what was wanted."""


def check_safetensors(path: str | Path) -> tuple[Path, ...]:
    """See that the *.safetensors files at ``path`` are whole, without reading the weights.

    Args:
        path: a file, or a folder: then all of its files, and the shards that its index names.

    Returns:
        The files that were looked at.

    Raises:
        CheckpointError: a file is missing, cut off or damaged, or a tensor is not where it should be.
    """
    path = Path(path)
    if path.is_file():
        _read_header(path)
        return (path,)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    shards = _read_index(path / INDEX)
    missing = sorted(name for name in shards if not (path / name).is_file())
    if missing:
        tensors = shards[missing[0]]
        raise CheckpointError(
            f"{path / missing[0]}: no such file, but {INDEX} names it for {len(tensors)} tensors, "
            f"{tensors[0]} among them ({len(missing)} of {len(shards)} files are missing)"
        )
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file in this folder; other formats are not read")
    tensors: set[str] = set()
    for file in files:
        header = _read_header(file)
        for tensor in shards.get(file.name, ()):
            if tensor not in header:
                raise CheckpointError(f"{file}: no tensor {tensor}, but {INDEX} says that it is here")
        tensors |= header.keys()
    _check_every_expert(path, tensors)
    return files


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    flag: PriorityFlag | None = None,
    priority: int = 0,
    backend: str = "auto",
    install: bool = True,
) -> PreTrainedModel:
    """Load a causal language model from a local folder, in eval mode. Nothing is ever downloaded.

    Args:
        path: folder with config.json and *.safetensors, the experts one by one or fused.
        dtype: of the weights; None for that of the checkpoint.
        device: where the model goes.
        flag, priority, backend: for :func:`qllm_ops.models.install`.
        install: False leaves the experts to transformers, for comparison; dense models load too then.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, damaged or of another shape.
        ValueError: there are no MoE experts in the model.
        UnsupportedExpertsError: experts that qllm-ops does not support.
    """
    path = Path(path)
    config = _read_config(path)
    check_safetensors(path)
    if install:
        # Refuse a model that cannot be installed before its weights are read.
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        find_experts(skeleton)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are listed below
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its tensors do not fit config.json: {error}") from error
    _check_loaded(path, info)
    model = model.to(device).eval()
    if install:
        install_experts(model, flag, priority, backend=backend)
    return model


def _read_config(path: Path):
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; models are loaded from local folders, never downloaded"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json in this folder, so it is not a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / 'config.json'}: not a model configuration: {error}") from error


def _read_index(file: Path) -> dict[str, list[str]]:
    """File name -> tensors that the index says are in it; empty if there is no index."""
    if not file.is_file():
        return {}
    shards: dict[str, list[str]] = {}
    try:
        for tensor, name in json.loads(file.read_bytes())["weight_map"].items():
            shards.setdefault(name, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{file}: not an index with a "weight_map" of tensor to file: {error!r}'
        ) from error
    return shards


def _read_header(file: Path) -> dict[str, dict]:
    """The tensors of a safetensors file, after checking its header and its length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
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
    return header


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


def _check_every_expert(path: Path, tensors: set[str]) -> None:
    """Where experts are stored one by one, each must have what the others of its layer have."""
    layers: dict[str, tuple[set[int], set[str]]] = {}
    for tensor in tensors:
        match = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", tensor)
        if match:
            experts, parts = layers.setdefault(match[1], (set(), set()))
            experts.add(int(match[2]))
            parts.add(match[3])
    for layer, (experts, parts) in sorted(layers.items()):
        for name in (f"{layer}{n}{part}" for n in range(max(experts) + 1) for part in sorted(parts)):
            if name not in tensors:
                raise CheckpointError(f"{path}: no tensor {name} in any file, though its like are there")


def _check_loaded(path: Path, info: dict) -> None:
    """transformers fills what it does not find with random numbers, and only warns."""
    for key, said in (
        ("missing_keys", "not in the checkpoint"),
        ("mismatched_keys", "of another shape than config.json says"),
        ("conversion_errors", "not to be put together from the checkpoint's tensors"),
        ("error_msgs", "not loaded"),
    ):
        wrong = info.get(key)
        if wrong:
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in wrong)
            raise CheckpointError(f"{path}: {len(names)} tensors are {said}: {', '.join(names[:3])}")

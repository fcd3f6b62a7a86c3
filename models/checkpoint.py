"""Load a local Hugging Face MoE model: every tensor from its file straight to its place in the model.

transformers says what the model is, and we read the bytes:

1. its tables of conversions say which stored tensors make up which tensor of the model (`_plan`);
2. its own `from_pretrained` runs on the headers alone, on tensors without memory (`_without_weights`):
   so dtypes, buffers, tied weights and what may be missing are its rules, not a copy of them;
3. then each tensor of the model is allocated on its device and filled (`_fill`). An expert goes into
   its slice of the fused tensor, so nothing is stacked or concatenated, and nothing is kept beside.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import logging as transformers_logging

from qllm_ops import PriorityFlag

from .install import find_experts
from .install import install as install_experts
from .shards import CheckpointError, StoredTensor, check_safetensors, split_at_expert, stored_tensors

__all__ = ["CheckpointError", "check_safetensors", "load"]

PIECE_BYTES = 16 * 2**20
"""What a thread takes at a time."""

BUFFER_BYTES = 2**20
"""What it reads at a time for a conversion or a copy to a GPU: it stays in a core's cache."""

READERS = 4
"""Threads that read: enough for a disk's queue, and no more than transformers uses."""


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    flag: PriorityFlag | None = None,
    priority: int = 0,
    backend: str = "auto",
    install: bool = True,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a local folder, in eval mode. Nothing is ever downloaded.

    The model is the one that transformers' `from_pretrained` gives, bit by bit. Beside it, memory holds
    1 MiB per thread that reads, or, where transformers' tables ask for more than stacking
    experts, the stored tensors of one tensor of the model. Quantised weights are left to transformers.

    Args:
        path: folder with config.json and *.safetensors, the experts one by one or fused.
        dtype: of the weights; None for that of the checkpoint.
        device: where the model goes, tensor by tensor.
        flag, priority, backend: for :func:`qllm_ops.models.install`.
        install: False leaves the experts to transformers, for comparison; dense models load too then.
        progress: a bar on stderr; None: where stderr is a terminal.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, surplus, twice there, damaged or of
            another shape.
        ValueError: there are no MoE experts in the model.
        UnsupportedExpertsError: experts that qllm-ops does not support.
    """
    path, device = Path(path), torch.device(device)
    config = _read_config(path)
    if _only_by_transformers(path, config):
        check_safetensors(path)
        stored = None
    else:
        stored = stored_tensors(path)
    # Refuse what cannot be installed or does not fit before the weights are read.
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if install:
        find_experts(skeleton)
    if stored is None:
        model = _from_pretrained(path, dtype)
    else:
        targets, unused = _plan(path, skeleton, stored)
        model, dtypes = _without_weights(path, type(skeleton), config, dtype, stored, unused)
        _fill(model, targets, dtypes, device, sys.stderr.isatty() if progress is None else progress)
        _finish(model, path)
    model = model.to(device).eval()
    if install:
        install_experts(model, flag, priority, backend=backend)
    return model


def _read_config(path: Path) -> PreTrainedConfig:
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


# -- which stored tensors go where -----------------------------------------------------------------------


@dataclass
class _Target:
    """A tensor of the model and what there is for it in the checkpoint.

    Attributes:
        name: the tensor's; the first one's where the converter makes several.
        converter: of transformers' tables; None where one stored tensor is the whole.
        sources: per pattern of the converter the stored tensors that it matched, by number.
    """

    name: str
    converter: WeightConverter | None
    sources: dict[str, list[StoredTensor]] = field(default_factory=dict)

    @property
    def stored(self) -> list[StoredTensor]:
        return [tensor for tensors in self.sources.values() for tensor in tensors]

    def is_stack(self, whole: torch.Tensor) -> bool:
        """Whether ``whole`` is one stored tensor per expert, or several of each below one another."""
        if self.converter is None or len(self.converter.target_patterns) > 1 or whole.dim() < 2:
            return False
        parts, (stack, *then) = len(self.converter.source_patterns), self.converter.operations
        if type(stack) is not MergeModulelist or stack.dim != 0 or whole.shape[1] % parts:
            return False
        if not then:
            return parts == 1
        return len(then) == 1 and type(then[0]) is Concatenate and then[0].dim == 1

    def slots(self, whole: torch.Tensor) -> list[tuple[StoredTensor, torch.Tensor]] | None:
        """Which slice of ``whole`` each stored tensor is; None where its values must be worked on."""
        if self.converter is None:
            return [(self.stored[0], whole)]
        if not self.is_stack(whole):
            return None
        # (E, 2I, H) as (E, 2, I, H): expert, then gate and up
        patterns = self.converter.source_patterns
        experts = whole.unflatten(1, (len(patterns), -1))
        return [
            (tensor, experts[expert, part])
            for part, pattern in enumerate(patterns)
            for expert, tensor in enumerate(self.sources[pattern])
        ]

    def convert(self, model: PreTrainedModel, values: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The converter's operations on the values of ``stored``: tensors of the model by name."""
        converter, values = copy.deepcopy(self.converter), iter(values)
        for pattern, tensors in self.sources.items():
            for tensor in tensors:
                converter.add_tensor(self.name, tensor.name, pattern, next(values))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _plan(
    path: Path, model: PreTrainedModel, stored: dict[str, StoredTensor]
) -> tuple[list[_Target], dict[str, list[StoredTensor]]]:
    """What makes up each tensor of ``model``, and what is stored for none, by the name it would have.

    Raises:
        CheckpointError: an expert is missing or beyond the config, a shape is not the config's, or
            there are two tensors for one place.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    targets: dict[str, _Target] = {}
    unused: dict[str, list[StoredTensor]] = {}
    for name in sorted(stored, key=dot_natural_key):  # transformers' order, which some renamings rely on
        place, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if place not in wanted and name in wanted:
            place, pattern = rename_source_key(name, [], [], prefix, wanted)
        if place not in wanted:
            unused.setdefault(place, []).append(stored[name])
            continue
        converter = by_pattern.get(pattern)
        target = targets.setdefault(place, _Target(place, converter))
        if target.converter is not converter or (converter is None and target.sources):
            raise CheckpointError(
                f"{stored[name]} would be {place}, which {target.stored[0]} is already, wanted one of them"
            )
        target.sources.setdefault(pattern or name, []).append(stored[name])
    for target in targets.values():
        _check_target(path, model, wanted, target)
    return list(targets.values()), unused


def _check_target(
    path: Path, model: PreTrainedModel, wanted: dict[str, torch.Tensor], target: _Target
) -> None:
    whole = wanted[target.name]
    if target.is_stack(whole):
        for pattern in target.converter.source_patterns:
            _check_experts(path, target, pattern, len(whole))
    slots = target.slots(whole)
    for tensor, slot in slots or ():
        if tensor.shape != tuple(slot.shape):
            raise CheckpointError(
                f"{tensor} has shape {list(tensor.shape)}, wanted {list(slot.shape)} by config.json "
                f"({target.name} is {list(whole.shape)})"
            )
    if slots is None:
        _check_conversion(path, model, wanted, target)


def _check_experts(path: Path, target: _Target, pattern: str, num_experts: int) -> None:
    """The tensors that are stacked must be those of experts 0 to num_experts - 1, each once."""
    tensors = target.sources.setdefault(pattern, [])
    names = [split_at_expert(tensor.name) for tensor in tensors]
    for tensor, name in zip(tensors, names, strict=True):
        if name and name[1] >= num_experts:
            raise CheckpointError(
                f"{tensor} is one of expert {name[1]}, but {target.name} has {num_experts} experts by "
                f"config.json, wanted 0 to {num_experts - 1}"
            )
    if names and all(names):
        before, _, after = names[0]
        for expert in sorted(set(range(num_experts)) - {number for _, number, _ in names}):
            raise CheckpointError(f"{path}: no tensor {before}{expert}{after} in any file for {target.name}")
    if len(tensors) != num_experts:
        raise CheckpointError(
            f"{path}: {len(tensors)} tensors *{pattern} for {target.name}, wanted {num_experts}"
        )


def _check_conversion(
    path: Path, model: PreTrainedModel, wanted: dict[str, torch.Tensor], target: _Target
) -> None:
    """Run the conversion on tensors without memory, to see that it gives what config.json says."""
    of = f"{', '.join(map(str, target.stored[:3]))}{' and others' if len(target.stored) > 3 else ''}"
    try:
        made = target.convert(model, (_meta(tensor) for tensor in target.stored))
    except Exception as error:
        raise CheckpointError(f"{of}: cannot be put together to {target.name}: {error}") from error
    for name, value in made.items():
        if name in wanted and value.shape != wanted[name].shape:
            raise CheckpointError(
                f"{of}: put together to {name} of shape {list(value.shape)}, "
                f"wanted {list(wanted[name].shape)} by config.json"
            )


def _meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


# -- the model without its weights -----------------------------------------------------------------------


class _Header:
    """A stored tensor to `from_pretrained`, which indexes it and moves it to where and what it should be.

    It gets a tensor without memory; ``asked`` is the dtype that it wanted.
    """

    def __init__(self, stored: StoredTensor):
        self.shape, self.dtype, self.asked = stored.shape, stored.dtype, stored.dtype

    def __getitem__(self, everything: object) -> _Header:
        return self

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.asked = dtype or self.dtype
        return torch.empty(self.shape, dtype=self.asked, device="meta")


def _without_weights(
    path: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    stored: dict[str, StoredTensor],
    unused: dict[str, list[StoredTensor]],
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """What `from_pretrained` makes of the headers: all loaded tensors on the meta device, the rest real.

    Returns the model and the dtype that each stored tensor is to be converted to.
    """
    if config.sub_configs.get("text_config") is model_class.config_class:  # as the Auto classes do
        config = config.get_text_config()
    # By file and name: where config.json names no dtype, that of the first tensor in this order counts.
    in_order = sorted(stored.values(), key=lambda tensor: (str(tensor.file), tensor.name))
    headers = {tensor.name: _Header(tensor) for tensor in in_order}
    try:
        with _no_progress_of_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=headers,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its tensors do not fit config.json: {error}") from error
    # What is missing transformers fills with random numbers, and what is surplus it leaves out.
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path}: {len(names)} tensors of the model are not in the checkpoint: {', '.join(names[:3])}"
        )
    surplus = sorted(info["unexpected_keys"])
    if surplus:
        first = unused.get(surplus[0], [f"{path}: tensor {surplus[0]}"])[0]
        raise CheckpointError(
            f"{first} is surplus: {model_class.__name__} has no place for it by config.json "
            f"(nor for {len(surplus) - 1} others)"
        )
    return model, {name: header.asked for name, header in headers.items()}


@contextlib.contextmanager
def _no_progress_of_transformers() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# -- the weights -----------------------------------------------------------------------------------------


def _fill(
    model: PreTrainedModel,
    targets: list[_Target],
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    progress: bool,
) -> None:
    """Give every tensor on the meta device its memory on ``device`` and its values."""
    empty = dict(model.named_parameters(remove_duplicate=False))
    empty |= dict(model.named_buffers(remove_duplicate=False))
    full: dict[int, torch.Tensor] = {}  # by the id of what it replaces, so that tied weights stay tied
    straight, worked_on = [], []
    for target in targets:
        if target.slots(empty[target.name]) is None:
            worked_on.append(target)
        else:
            like = empty[target.name]
            full[id(like)] = torch.empty(like.shape, dtype=like.dtype, device=device)
            straight += target.slots(full[id(like)])
    stored = [tensor for tensor, _ in straight] + [tensor for target in worked_on for tensor in target.stored]
    with _Reader(sum(tensor.nbytes for tensor in stored), device, progress) as reader:
        reader.read(straight)
        for target in worked_on:
            values = [
                torch.empty(tensor.shape, dtype=dtypes[tensor.name], device="cpu") for tensor in target.stored
            ]
            reader.read(zip(target.stored, values, strict=True))
            made = target.convert(model, values)
            del values
            for name in list(made):
                full[id(empty[name])] = made.pop(name).to(device)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if isinstance(tensor, nn.Parameter) and not isinstance(full[id(tensor)], nn.Parameter):
                    full[id(tensor)] = nn.Parameter(full[id(tensor)], requires_grad=tensor.requires_grad)
                tensors[name] = full[id(tensor)]
                tensors[name]._is_hf_initialized = True  # as from_pretrained marks what was loaded


class _Reader:
    """Reads stored tensors into tensors with a few threads, in the order of the files, and shows how far."""

    def __init__(self, total_bytes: int, device: torch.device, progress: bool):
        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
        columns += (TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
        self.task = self.bar.add_task("loading", total=total_bytes)
        self.pinned = device.type == "cuda"
        self.own = threading.local()
        self.pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> _Reader:
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


def _finish(model: PreTrainedModel, path: Path) -> None:
    """What `from_pretrained` does with the weights or the folder, which it did not have."""
    # Tied weights that are both stored are tied if they are equal.
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    for module in model.modules():
        for named in (module, getattr(module, "config", None)):
            if getattr(named, "name_or_path", None) == str(None):
                named.name_or_path = str(path)
    if model.can_generate():
        model.adjust_generation_fn(
            generation_config=None,
            from_auto_class=True,
            from_pipeline=None,
            pretrained_model_name_or_path=str(path),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=None,
        )


# -- what transformers alone can load ----------------------------------------------------------------------


def _only_by_transformers(path: Path, config: PreTrainedConfig) -> bool:
    """Quantised weights, adapters, and configs that name files of their own: rules that are not ours."""
    own_files = [getattr(config, "transformers_weights", None), *getattr(type(config), "extra_files", ())]
    return (
        getattr(config, "quantization_config", None) is not None
        or (path / "adapter_config.json").is_file()
        or any(own_files)
    )


def _from_pretrained(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
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
    # transformers fills what it does not find with random numbers, and only warns.
    for key, said in (
        ("missing_keys", "not in the checkpoint"),
        ("mismatched_keys", "of another shape than config.json says"),
        ("error_msgs", "not loaded"),
    ):
        wrong = info.get(key)
        if wrong:
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in wrong)
            raise CheckpointError(f"{path}: {len(names)} tensors are {said}: {', '.join(names[:3])}")
    return model

"""Load a local Hugging Face MoE model: every tensor from its file straight to its place in the model.

transformers says what the model is, and we read the bytes:

1. its tables of conversions say which stored tensors make up which tensor of the model (`_plan`);
2. its own `from_pretrained` runs on the headers alone, on tensors without memory (`_without_weights`):
   so dtypes, buffers, tied weights and what may be missing are its rules, not a copy of them;
3. then each tensor of the model is allocated on its device and filled (`_Filling`). An expert goes into
   its slice of the fused tensor, so nothing is stacked or concatenated, and nothing is kept beside.

Quantised weights take part as the dense tensors that they stand for (`quantized_shards`); those of experts
stay quantised, others are dequantised.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from transformers.utils import is_peft_available
from transformers.utils import logging as transformers_logging

from qllm_ops import PriorityFlag, QuantizedWeight

from .arguments import as_device, as_dtype, as_folder, check_run
from .experts import ExpertsLayout
from .install import find_experts
from .install import install as install_experts
from .quantize import check_format, check_quantizable, hold, quantize_experts, quantize_stored
from .quantized_shards import METHODS, Assembly, QuantizedTensor, gather
from .reader import Reader
from .shards import CheckpointError, StoredTensor, check_safetensors, split_at_expert, stored_tensors

__all__ = ["CheckpointError", "check_safetensors", "load"]

Stored = StoredTensor | QuantizedTensor


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device = "cpu",
    flag: PriorityFlag | None = None,
    priority: int = 0,
    backend: str = "auto",
    install: bool = True,
    quantize: str | None = None,
    fp8_activations: bool = False,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a local folder, in eval mode. Nothing is ever downloaded.

    The model is the one that transformers' `from_pretrained` gives, bit by bit. Beside it, memory holds
    1 MiB per thread that reads, or, where transformers' tables ask for more than stacking
    experts, the stored tensors of one tensor of the model.

    Of a quantised checkpoint (FP8 in blocks; MXFP4; 4-bit groups of compressed-tensors, GPTQ and AWQ), the
    experts stay as they are stored, on any device, and all other weights are dequantised one by one; so are
    experts that transformers' tables do more to than stacking, and those of classes that `install` fuses.
    Activations keep their dtype, unless ``fp8_activations``. Other ways to quantise are left to
    transformers. A model with quantised experts cannot be saved.

    Args:
        path: folder with config.json and *.safetensors, the experts one by one or fused. Where transformers
            has a text model for a checkpoint that has parts for images too, those parts are left out.
        dtype: of the weights, or its name; None or "auto" for that of the checkpoint.
        device: where the model goes, tensor by tensor. All of it goes to one.
        flag, priority, backend, fp8_activations: for :func:`qllm_ops.models.install`.
        install: False leaves the experts to transformers, dequantised, for comparison; dense models load
            too then.
        quantize: the experts of a checkpoint that is not quantised become "fp8", "mxfp4" or "int4" as they
            are read, one projection of a layer after the other (:func:`qllm_ops.models.quantize_experts`).
        progress: a bar on stderr; None: where stderr is a terminal.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, surplus, twice there, damaged or of
            another shape.
        TypeError, ValueError: there are no MoE experts in the model; an argument is none of the above; or
            ``quantize`` is given for experts that are quantised or not installed.
        UnsupportedExpertsError: experts that qllm-ops does not support.
    """
    path, dtype, device = as_folder(path), as_dtype(dtype), as_device(device)
    if install:
        check_run(device, flag, priority, backend)
    with torch.device("cpu"):  # not the user's default device, which transformers would obey
        model = _read(path, dtype, device, install, quantize, progress)
    if install:
        install_experts(model, flag, priority, backend=backend, fp8_activations=fp8_activations)
    return model


def _read(
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    install: bool,
    quantize: str | None,
    progress: bool | None,
) -> PreTrainedModel:
    config = _read_config(path)
    quantization = _quantization(config)
    _check_quantize(quantize, path, quantization, install)
    if _only_by_transformers(path, config):
        if _adapter(path).is_file() and not is_peft_available():
            raise CheckpointError(
                f"{_adapter(path)}: without the package peft, this adapter would be left out"
            )
        check_safetensors(path)
        stored = None
    else:
        stored = stored_tensors(path)
        if quantization:
            config = copy.deepcopy(config)
            del config.quantization_config
            stored = gather(stored, quantization, getattr(config, "dtype", None) or torch.bfloat16)
    # Refuse what cannot be installed or does not fit before the weights are read.
    skeleton = _skeleton(path, config, dtype)
    projections = _projections(skeleton, quantize) if install else {}
    if stored is None:
        model = _from_pretrained(path, dtype)
        if quantize:
            quantize_experts(model, quantize)
    else:
        targets, unused = _plan(path, skeleton, stored)
        _check_formats(targets, projections)
        model, dtypes = _without_weights(path, type(skeleton), config, dtype, stored, unused)
        shown = sys.stderr.isatty() if progress is None else progress
        _Filling(model, dtypes, device, projections, quantize).fill(targets, shown)
        _finish(model, path)
    return model.to(device).eval()


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        inside = next(path.glob("snapshots/*/config.json"), None)  # the cache of huggingface_hub
        raise CheckpointError(
            f"{path}: no config.json in this folder, so it is not a Hugging Face model"
            + (f"; {inside.parent} is" if inside else "")
        )
    with _as_config_error(path, "not a model configuration"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _skeleton(path: Path, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model without memory."""
    with torch.device("meta"), _as_config_error(path, "no causal language model can be made of it"):
        return AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {}))


@contextlib.contextmanager
def _as_config_error(path: Path, said: str) -> Iterator[None]:
    """Whatever transformers raises over the values of a config.json names the file."""
    try:
        yield
    except Exception as error:
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400)  # it may list all architectures
        if "trust_remote_code" in str(error):
            why = (
                "it names code of its own, which load does not run; from_pretrained(..., "
                "trust_remote_code=True) does, and install takes what it gives"
            )
        raise CheckpointError(f"{path / 'config.json'}: {said}: {why}") from error


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) or found is None else found.to_dict()


def _check_quantize(
    quantize: str | None, path: Path, quantization: dict[str, Any] | None, install: bool
) -> None:
    if quantize is None:
        return
    check_format("quantize", quantize)
    if quantization:
        raise ValueError(
            f"quantize must be None for {path}, which is quantised already "
            f"({quantization.get('quant_method')}), got {quantize!r}"
        )
    if not install:
        raise ValueError(f"quantize needs install=True: qllm-ops alone computes {quantize} experts")


def _projections(skeleton: PreTrainedModel, quantize: str | None) -> dict[str, ExpertsLayout]:
    """The weights of experts that may be quantised, by name. Refuses experts that cannot be installed."""
    experts = find_experts(skeleton)
    for _, module, layout in experts if quantize else ():
        check_quantizable(type(module).__name__, layout)
    return {
        f"{name}.{leaf}": layout
        for name, _, layout in experts
        if not layout.stored
        for leaf in (layout.first, "down_proj")
    }


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
    sources: dict[str, list[Stored]] = field(default_factory=dict)

    @property
    def stored(self) -> list[Stored]:
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

    @property
    def quantized(self) -> bool:
        return any(isinstance(tensor, QuantizedTensor) for tensor in self.stored)

    def slots(self, whole: torch.Tensor) -> list[tuple[Stored, torch.Tensor]] | None:
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
    path: Path, model: PreTrainedModel, stored: dict[str, Stored]
) -> tuple[list[_Target], dict[str, list[Stored]]]:
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
    unused: dict[str, list[Stored]] = {}
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
    for tensor in target.stored:
        if whole.is_floating_point() and not _meta(tensor).is_floating_point():
            # from_pretrained converts: packed numbers to nonsense, complex ones to a half of them.
            raise CheckpointError(
                f"{tensor} is {tensor.code}, wanted a floating-point dtype for {target.name}"
            )
    kinds = {type(tensor): tensor for tensor in target.stored}
    if len(kinds) > 1 and target.is_stack(whole):
        dense, quantized = kinds[StoredTensor], kinds[QuantizedTensor]
        raise CheckpointError(
            f"{dense} is dense, but {quantized} beside it is {quantized.format}; wanted them alike"
        )
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


def _check_formats(targets: list[_Target], projections: dict[str, ExpertsLayout]) -> None:
    """The two weights of an experts module must be stored alike."""
    formats: dict[str, dict[str, str]] = {}
    for target in targets:
        if target.name in projections:
            first = target.stored[0]
            format = first.format if isinstance(first, QuantizedTensor) else "dense"
            formats.setdefault(target.name.rpartition(".")[0], {})[target.name] = format
    for module in formats.values():
        if len(set(module.values())) > 1:
            (one, its), (other, others) = module.items()
            raise CheckpointError(f"{one} is {its}, but {other} {others}; wanted them alike")


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


def _meta(tensor: Stored) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


# -- the model without its weights -----------------------------------------------------------------------


class _Header:
    """A stored tensor to `from_pretrained`, which indexes it and moves it to where and what it should be.

    It gets a tensor without memory; ``asked`` is the dtype that it wanted.
    """

    def __init__(self, stored: Stored):
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
    stored: dict[str, Stored],
    unused: dict[str, list[Stored]],
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """What `from_pretrained` makes of the headers: all loaded tensors on the meta device, the rest real.

    Returns the model and the dtype that each stored tensor is to be converted to.
    """
    only_text = config.sub_configs.get("text_config") is model_class.config_class
    if only_text:  # as the Auto classes do
        config = config.get_text_config()
    # By file and name: where config.json names no dtype, that of the first tensor in this order counts.
    in_order = sorted(stored.values(), key=lambda tensor: (str(tensor.file), tensor.name))
    headers = {tensor.name: _Header(tensor) for tensor in in_order}
    with _no_progress_of_transformers():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=headers,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
        )
    # What is missing transformers fills with random numbers, and what is surplus it leaves out.
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path}: {len(names)} tensors of the model are not in the checkpoint: {', '.join(names[:3])}"
        )
    surplus = sorted(info["unexpected_keys"])
    if only_text:  # the parts for images lie beside it (Llama 4): those of which nothing at all is used
        left = {tensor.name for tensors in unused.values() for tensor in tensors}
        parts = {name.partition(".")[0] for name in stored.keys() - left}
        surplus = [name for name in surplus if name.partition(".")[0] in parts]
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


class _Filling:
    """Gives every tensor of a model on the meta device its memory on ``device`` and its values.

    Args:
        dtypes: of stored tensors whose values are worked on, by name.
        projections: the weights of experts that stay quantised, or become so, by name.
        quantize: the format that dense ones of them become; None: they stay dense.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtypes: dict[str, torch.dtype],
        device: torch.device,
        projections: dict[str, ExpertsLayout],
        quantize: str | None,
    ):
        self.model, self.dtypes, self.device = model, dtypes, device
        self.projections, self.quantize = projections, quantize
        self.empty = dict(model.named_parameters(remove_duplicate=False))
        self.empty |= dict(model.named_buffers(remove_duplicate=False))
        self.full: dict[int, torch.Tensor] = {}  # by the id of what it replaces: tied weights stay tied

    def fill(self, targets: list[_Target], progress: bool) -> None:
        straight: list[tuple[StoredTensor, torch.Tensor]] = []
        assemblies: dict[str, Assembly] = {}
        one_by_one = []
        for target in targets:
            like = self.empty[target.name]
            slots = target.slots(like)
            if target.quantized and slots is not None and target.name in self.projections:
                assemblies[target.name] = Assembly(list(target.sources.values()), self.device)
                straight += assemblies[target.name].slots
            elif target.quantized or slots is None or (self.quantize and target.name in self.projections):
                one_by_one.append(target)
            else:
                straight += target.slots(self._memory(target.name))
        nbytes = sum(tensor.nbytes for target in targets for tensor in target.stored)
        with Reader(nbytes, self.device, progress) as reader:
            reader.read(straight)
            straight.clear()  # what is rearranged is then kept by its assembly alone
            for name in list(assemblies):
                self._hold(name, assemblies.pop(name).weight())
            for target in one_by_one:
                self._work(target, reader)
        self._put_in_place()

    def _work(self, target: _Target, reader: Reader) -> None:
        """What takes more than reading: the stored tensors of one target are in memory beside it."""
        slots = target.slots(self.empty[target.name])
        if slots is None:
            values = [self._value(tensor, reader) for tensor in target.stored]
            made = target.convert(self.model, values)
            del values
        else:
            made = {target.name: self._memory(target.name)}
            slots = target.slots(made[target.name])
            reader.read((tensor, slot) for tensor, slot in slots if isinstance(tensor, StoredTensor))
            for tensor, slot in slots:
                if isinstance(tensor, QuantizedTensor):
                    slot.copy_(self._dequantized(tensor, reader))
        for name in list(made):
            self._take(name, made.pop(name).to(self.device))

    def _take(self, name: str, value: torch.Tensor) -> None:
        if self.quantize and name in self.projections:
            self._hold(name, quantize_stored(name, value, self.projections[name], self.quantize))
        else:
            self.full[id(self.empty[name])] = value

    def _value(self, tensor: Stored, reader: Reader) -> torch.Tensor:
        if isinstance(tensor, QuantizedTensor):
            return self._dequantized(tensor, reader).to(self.dtypes[tensor.name])
        value = torch.empty(tensor.shape, dtype=self.dtypes[tensor.name], device="cpu")
        reader.read([(tensor, value)])
        return value

    def _dequantized(self, tensor: QuantizedTensor, reader: Reader) -> torch.Tensor:
        assembly = Assembly([[tensor]], torch.device("cpu"))
        reader.read(assembly.slots)
        return assembly.dequantized()

    def _memory(self, name: str) -> torch.Tensor:
        like = self.empty[name]
        value = self.full[id(like)] = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return value

    def _hold(self, name: str, weight: QuantizedWeight) -> None:
        self.full.pop(id(self.empty[name]), None)  # what it was made of
        hold(self.model, name, weight)

    def _put_in_place(self) -> None:
        full = self.full
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if isinstance(tensor, nn.Parameter) and not isinstance(full[id(tensor)], nn.Parameter):
                        full[id(tensor)] = nn.Parameter(full[id(tensor)], requires_grad=tensor.requires_grad)
                    tensors[name] = full[id(tensor)]
                    tensors[name]._is_hf_initialized = True  # as from_pretrained marks what was loaded


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
    """Adapters, configs that name files of their own, other quantised weights: rules that are not ours."""
    own_files = [getattr(config, "transformers_weights", None), *getattr(type(config), "extra_files", ())]
    quantization = _quantization(config)
    return (
        (quantization is not None and quantization.get("quant_method") not in METHODS)
        or _adapter(path).is_file()
        or any(own_files)
    )


def _adapter(path: Path) -> Path:
    return path / "adapter_config.json"


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
        ("unexpected_keys", "surplus: the model has no place for them"),
        ("error_msgs", "not loaded"),
    ):
        wrong = info.get(key)
        if wrong:
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in wrong)
            raise CheckpointError(f"{path}: {len(names)} tensors are {said}: {', '.join(names[:3])}")
    return model

"""Every experts class of the installed transformers, held against its own forward; writes docs/models.md.

The table is read from transformers' sources, so that a class which a new release brings is a new row. Each
row is tried as a whole tiny model first; where none can be built, as the experts class alone; where that
fails too, the row says so. `python tests/conformity.py` runs all of it, prints what it measured and writes
the page; tests/test_conformity.py runs a part.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from qllm_ops import PriorityFlag
from qllm_ops.models import UnsupportedExpertsError, install, preemptible, uninstall
from qllm_ops.models.experts import ADAPTED, NAME, UNSUITED, experts_forward, experts_layout
from qllm_ops.models.install import find_experts
from qllm_ops.testing import flipping

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SOURCES = Path(transformers.__file__).parent / "models"

FP32_LIMIT = 1e-5
BF16_LIMIT = 2e-2
NEW_TOKENS = 8
PARKS = 3
"""How often a preempted pass must have stood still before it counts."""

IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))


# -- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One experts class, by the module that defines it."""

    module: str
    class_name: str
    dispatched: bool

    @property
    def folder(self) -> str:
        return self.module.split(".")[-2]

    def load(self) -> tuple[ModuleType, type[nn.Module]]:
        module = importlib.import_module(self.module)
        return module, getattr(module, self.class_name)


_DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\s*\n(?:@.*\n)*class (\w+)", re.MULTILINE)
_DECORATOR = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
_BY_NAME = re.compile(r"^class (\w*Experts)\b", re.MULTILINE)
_BLOCK = re.compile(r"^class (\w*M[oO][eE]\w*)\(nn\.Module\)", re.MULTILINE)


def table() -> list[Row]:
    """A row for each experts class that transformers dispatches, and for each that it does not.

    Where a module has no such class, each MoE block is one.
    """
    rows = []
    for path in sorted(SOURCES.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        decorated = _DECORATED.findall(source)
        if len(decorated) != len(_DECORATOR.findall(source)):
            raise RuntimeError(f"{module}: a decorated class that this scan does not understand")
        rows += [Row(module, name, True) for name in decorated]
        # Shared experts are an ordinary MLP beside the routed ones.
        others = [name for name in _BY_NAME.findall(source) if name not in decorated and "Shared" not in name]
        rows += [Row(module, name, False) for name in others or ([] if decorated else _BLOCK.findall(source))]
    return rows


# -- tiny models ----------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 128, "unpadded_vocab_size": 128, "max_position_embeddings": 256, "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    # experts and routers
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_k": 2, "top_k_experts": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "intermediate_size": 96, "dense_intermediate_size": 96, "prefix_dense_intermediate_size": 96,
    "moe_intermediate_size": 48, "shared_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    # which layers have experts: all
    "first_k_dense_replace": 0, "num_dense_layers": 0, "decoder_sparse_step": 1, "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # latent, indexed and linear attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4,
    # vision towers
    "depth": 1, "num_heads": 4, "out_hidden_size": 64, "projection_intermediate_size": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
"""What a config is made small with, where it has the field."""

LATENT = {"num_key_value_heads": 4, "head_dim": 8}
"""Multi-head latent attention has as many KV heads as heads, and rotates qk_rope_head_dim of them."""

ONE_OF_EACH = ["linear_attention", "full_attention"]

FIXES: dict[str, dict] = {
    "bailing_hybrid": {"layer_types": ONE_OF_EACH},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [48, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "partial_rotary_factor": 1.0,
    },
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "longcat_flash": {
        "num_layers": 1,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 4,
        "moe_topk": 4,
    },
    "step3p5": {
        "pad_token_id": 1,
        "share_expert_dim": 48,
        "num_sliding_attention_heads": 4,
        "sliding_window": 16,
        "mlp_layer_types": ["dense", "sparse"],
        "swiglu_limits": [0.0, 7.0],
    },
    "switch_transformers": {
        "d_kv": 16,
        "d_ff": 48,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 4,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "mistral_large4": {
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
    },
    "muse_spark_audio": {"num_hidden_layers": 4},
    "granitemoehybrid": {
        "layer_types": ONE_OF_EACH,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ONE_OF_EACH},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 16,
    },
    "qwen3_5_moe_text": {"layer_types": ONE_OF_EACH},
    "qwen3_next": {"layer_types": ONE_OF_EACH},
    "qwen4_exp_text": {
        "layer_types": ONE_OF_EACH,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 1, "vision_end_token_id": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    "zaya": {"num_experts_per_tok": 1},
}
"""Per model type, what the common sizes leave wrong."""

FAR_OUT = 4.0
"""Standard deviation of gate and up for inputs of size 1: clamps lie at 7 and 10."""

LARGEST = 25_000_000
"""More parameters than this is a config whose sizes were missed, and takes too long."""


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of this class with small sizes, and its inner configs likewise."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    aliases = getattr(config_class, "attribute_map", {})
    known = fields | {alias for alias, real in aliases.items() if real not in SIZES}
    small = {**SIZES, **(LATENT if "kv_lora_rank" in known else {})}
    sizes = {name: value for name, value in small.items() if name in known}
    inner = {
        name: tiny_config(inner_class).to_dict()
        for name, inner_class in config_class.sub_configs.items()
        if dataclasses.is_dataclass(inner_class)
    }
    return config_class(**{**sizes, **inner, **FIXES.get(config_class.model_type, {})})


def config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig] | None:
    """The config that a model class takes; the first one where it takes several."""
    declared = getattr(model_class, "config_class", None)
    return next(iter(typing.get_args(declared)), declared)


def model_classes(module: ModuleType) -> list[type[PreTrainedModel]]:
    """The models that a module defines: with a language-model head first, and those of text alone first."""
    found = []
    for value in vars(module).values():
        if not (isinstance(value, type) and issubclass(value, PreTrainedModel)):
            continue
        if value.__module__ != module.__name__ or "PreTrainedModel" in value.__name__:
            continue
        config_class = config_class_of(value)
        if config_class is not None and (value.can_generate() or value.__name__.endswith("Model")):
            found.append((not value.can_generate(), bool(config_class.sub_configs), len(found), value))
    return [value for *_, value in sorted(found, key=lambda entry: entry[:3])]


def redraw(experts: nn.Module) -> None:
    """Large weights: with initial ones, leaving the experts out hardly shows, and a clamp not at all."""
    if type(experts).__name__ in ADAPTED:
        for name, parameter in experts.named_parameters():
            size = FAR_OUT if name.endswith(("gate_up_proj", "input_linear.weight", "w1", "v1")) else 1.0
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=size * 8**-1)
        return
    for name, parameter in experts.named_parameters():
        fan_in = parameter.shape[-2 if experts.is_transposed else -1] if name.endswith("_proj") else 1
        size = FAR_OUT if name.startswith(("gate_up", "up")) and name.endswith("_proj") else 1.0
        nn.init.normal_(parameter, std=size * fan_in**-0.5)


class MissingExperts(ValueError):
    """The model class does not use this experts class: a vision tower, say."""


def tiny_model(model_class: type[PreTrainedModel], experts_class: type[nn.Module]) -> PreTrainedModel:
    """A seeded tiny model with experts of this class, whose own forward works.

    Raises:
        Exception: whatever kept it from being built.
    """
    config = tiny_config(config_class_of(model_class))
    with torch.device("meta"):
        sketch = model_class(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in sketch.parameters())
    if not any(isinstance(module, experts_class) for module in sketch.modules()):
        raise MissingExperts(experts_class.__name__)
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with the tiny sizes")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for module in experts_in(model):
            redraw(module)
    model.set_experts_implementation("eager")
    if not output_of(model).isfinite().all():
        raise ValueError("its own output is not finite")
    return model


def experts_in(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in model.modules()
        if type(m).__name__ in ADAPTED or (hasattr(m, "is_transposed") and hasattr(m, "down_proj"))
    ]


def tiny_experts(module: ModuleType, experts_class: type[nn.Module]) -> nn.Module:
    """The experts class alone, from a config of its module, else from anything that has the usual fields."""
    classes = dict.fromkeys(config_class_of(model_class) for model_class in model_classes(module))
    usual = SimpleNamespace(**SIZES, hidden_act="silu", swiglu_limit=10.0, _experts_implementation="eager")
    errors = []
    for make in [*(partial(tiny_config, config_class) for config_class in classes), lambda: usual]:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                experts = experts_class(make()).eval()
                redraw(experts)
            return experts
        except Exception as error:
            errors.append(said(error))
    raise ValueError(errors[-1])


def said(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# -- what is compared -----------------------------------------------------------------------------------


@torch.no_grad()
def output_of(model: PreTrainedModel) -> Tensor:
    """The logits; the last hidden states of a model without a head."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    output = model(input_ids=IDS, use_cache=False, **more)
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def tokens_of(model: PreTrainedModel) -> Tensor | None:
    """Greedy tokens; None for a model without a language-model head."""
    if not model.can_generate():
        return None
    model.generation_config.eos_token_id = None
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted; NaN where anything is NaN."""
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def hooked(model: nn.Module, register: str, hook: Callable, run: Callable[[], Tensor]) -> Tensor:
    """``run()`` with a hook on every experts module."""
    hooks = [getattr(module, register)(hook) for module in experts_in(model)]
    try:
        return run()
    finally:
        for handle in hooks:
            handle.remove()


def share_of_experts(model: PreTrainedModel, wanted: Tensor) -> float:
    """How much the output changes, relatively, when the experts return zeros."""

    def nothing(module: nn.Module, call: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    without = hooked(model, "register_forward_hook", nothing, lambda: output_of(model))
    return relative(without, wanted)


def with_routing(model: PreTrainedModel, routing: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The output, with the experts calls routed as given, in their order.

    In 16 bits a rounding error somewhere below can make a router choose another expert, which is no
    error of the experts and as large as any.
    """
    routes = iter(routing)
    pin = lambda module, call: (call[0], *next(routes))  # noqa: E731
    return hooked(model, "register_forward_pre_hook", pin, lambda: output_of(model))


@contextlib.contextmanager
def counting_flag() -> Iterator[tuple[PriorityFlag, list]]:
    """A flag, and the times at which somebody stood still at it."""
    parks: list = []
    yield PriorityFlag(on_event=lambda kind, priority, now: kind == "park" and parks.append(now)), parks


def same_while_preempted(flag: PriorityFlag, parks: list, run: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether every pass is bitwise ``wanted`` under random pauses; repeated until some of them were met."""
    parks.clear()
    with flipping(flag):
        for _ in range(100):
            if not torch.equal(run(), wanted):
                return False
            if len(parks) >= PARKS:
                return True
    raise RuntimeError(f"100 passes met {len(parks)} pauses")


# -- a row's result -------------------------------------------------------------------------------------

WHOLE, CLASS_ONLY, REFUSED, NOT_BUILT = "whole model", "class only", "refused", "not built"


@dataclass
class Result:
    """What became of a row. None: not applicable, or not reached."""

    row: Row
    coverage: str = NOT_BUILT
    tried: str = ""
    layout: str = ""
    fp32: float | None = None
    bf16: float | None = None
    bf16_output: float | None = None
    bf16_eager: float | None = None
    tokens: bool | None = None
    preempted: bool | None = None
    reason: str = ""
    failure: str = ""
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What is not as it should be; NaN is not, either."""
        output_limit = max(BF16_LIMIT, 2 * (self.bf16_eager or 0))
        checks = {
            f"fp32: {self.fp32}": self.fp32 is None or self.fp32 <= FP32_LIMIT,
            f"bf16 experts: {self.bf16}": self.bf16 is None or self.bf16 <= BF16_LIMIT,
            f"bf16 output: {self.bf16_output}, eager's: {self.bf16_eager}": self.bf16_output is None
            or self.bf16_output <= output_limit,
            "greedy tokens differ": self.tokens is not False,
            "preemption changed the output": self.preempted is not False,
            self.failure: not self.failure,
        }
        return [problem for problem, passed in checks.items() if not passed]


def examine(row: Row) -> Result:
    """Try a row as a whole model, else as the class alone, and compare what can be compared."""
    result, began = Result(row), time.perf_counter()
    try:
        _examine(row, result)
    except UnsupportedExpertsError as error:
        result.coverage = REFUSED
        result.reason = "; ".join(error.reasons) or str(error)
    except Exception as error:
        result.failure = said(error)
    result.seconds = time.perf_counter() - began
    return result


def _examine(row: Row, result: Result) -> None:
    try:
        module, experts_class = row.load()
    except ImportError as error:
        result.reason = said(error)
        return
    if hasattr(experts_class.forward, "__wrapped__") != row.dispatched:
        raise RuntimeError("the source and the class disagree on whether transformers dispatches it")
    if row.class_name in UNSUITED:
        refuse(experts_class)
    model, result.tried, result.reason = first_model(module, experts_class)
    if model is not None:
        result.coverage = WHOLE
        compare_models(model, result)
        return
    if not row.dispatched:
        return
    try:
        experts = tiny_experts(module, experts_class)
    except Exception as error:
        result.reason += f"; alone: {said(error)}"
        return
    result.coverage = CLASS_ONLY
    compare_experts(experts, result)


def refuse(experts_class: type[nn.Module]) -> None:
    """Raise what install says of a class that it refuses by name; a shell is enough for that."""
    shell = experts_class.__new__(experts_class)
    nn.Module.__init__(shell)
    experts_layout(shell)
    raise RuntimeError("an experts class that is refused by name was taken")


def first_model(
    module: ModuleType, experts_class: type[nn.Module]
) -> tuple[PreTrainedModel | None, str, str]:
    """The first model of a module that can be built tiny, and its name; or why the likeliest could not."""
    reasons = {"": "no model in its module has it"}
    for model_class in model_classes(module):
        try:
            return tiny_model(model_class, experts_class), model_class.__name__, ""
        except MissingExperts:
            continue
        except Exception as error:
            reasons[model_class.__name__] = f"{model_class.__name__}: {said(error)}"
    # A module may hold several models: the one named most like the experts, and of those the plainest.
    likeliest = max(reversed(reasons), key=lambda name: shared_start(name, experts_class.__name__))
    return None, "", reasons[likeliest]


def shared_start(one: str, other: str) -> int:
    """How many characters two names begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def compare_models(model: PreTrainedModel, result: Result) -> None:
    """A whole model with its own experts, and with ours."""
    find_experts(model)  # raises for what install refuses
    wanted, wanted_tokens = output_of(model), tokens_of(model)
    if share_of_experts(model, wanted) < 1e-3:
        raise RuntimeError("the output hardly depends on the experts, so the comparison would say nothing")
    with counting_flag() as (flag, parks):
        result.layout = install(model, flag).modules[0].layout
        got, tokens = output_of(model), tokens_of(model)
        result.fp32 = relative(got, wanted)
        result.preempted = same_while_preempted(flag, parks, lambda: output_of(model), got)
        if tokens is not None:
            result.tokens = torch.equal(tokens, wanted_tokens)
            result.preempted &= same_while_preempted(flag, parks, lambda: tokens_of(model), tokens)
    if any(type(module).__name__ in ADAPTED for module in experts_in(model)):
        result.bf16 = compare_adapted(model)
        return
    in_bfloat16(model)
    result.bf16, result.bf16_output, result.bf16_eager = compare_bfloat16(model)


def in_bfloat16(model: PreTrainedModel) -> None:
    """Cast as `from_pretrained(dtype=torch.bfloat16)` does: what a model wants in fp32 stays so."""
    kept = [name.strip(".") for name in model._keep_in_fp32_modules_strict or ()]
    named = re.compile(r"(^|\.)(" + "|".join(map(re.escape, kept)) + r")($|\.)") if kept else None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not (named and named.search(name)):
            tensor.data = tensor.data.to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    try:
        output_of(model)
    except RuntimeError:  # some releases do not run with what they keep in fp32
        model.to(torch.bfloat16)


def compare_bfloat16(model: PreTrainedModel) -> tuple[float, float, float]:
    """Ours against grouped_mm: each experts call on the same inputs, and the output; that of eager, too.

    Some models amplify a rounding error on the way up, so that two implementations of transformers' own
    lie further apart than ours may: what eager makes of it is the measure then.
    """
    calls: list = []

    def note(module: nn.Module, call: tuple, output: Tensor) -> None:
        calls.append((module, call, output))

    model.set_experts_implementation("grouped_mm")
    wanted = hooked(model, "register_forward_hook", note, lambda: output_of(model))
    routing = [call[1:] for _, call, _ in calls]
    outputs = {}
    for name in (NAME, "eager"):
        model.set_experts_implementation(name)
        outputs[name] = relative(with_routing(model, routing), wanted)
    model.set_experts_implementation(NAME)
    with torch.no_grad():
        each = [relative(module(*call), output) for module, call, output in calls]
    return max(each), outputs[NAME], outputs["eager"]


def compare_adapted(model: PreTrainedModel) -> float:
    """Adapted modules in bfloat16: every call of them on the same inputs, against the class's own forward."""
    calls: list = []

    def note(module: nn.Module, call: tuple, output: Tensor | tuple) -> None:
        calls.append((module, call, first_of(output)))

    uninstall(model)
    model.to(torch.bfloat16)
    hooked(model, "register_forward_hook", note, lambda: output_of(model))
    install(model)
    with torch.no_grad():
        return max(relative(first_of(module(*call)), output) for module, call, output in calls)


def first_of(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def compare_experts(experts: nn.Module, result: Result) -> None:
    """An experts module alone, its own forward and ours."""
    layout = experts_layout(experts)
    result.layout = str(layout)
    num_experts, hidden_size, _ = layout.sizes(experts)
    draw = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(IDS.numel(), hidden_size, generator=draw)
    index = torch.rand(len(hidden_states), num_experts, generator=draw).argsort(1)[:, :2]
    weights = torch.rand(index.shape, generator=draw)

    got = experts_forward(experts, hidden_states, index, weights)
    own = type(experts).forward.__wrapped__
    result.fp32 = relative(got, own(experts, hidden_states, index, weights))
    with counting_flag() as (flag, parks), preemptible(flag):
        run = lambda: experts_forward(experts, hidden_states, index, weights)  # noqa: E731
        result.preempted = same_while_preempted(flag, parks, run, got)
    experts, hidden_states = experts.to(torch.bfloat16), hidden_states.bfloat16()
    wanted = ExpertsInterface()["grouped_mm"](experts, hidden_states, index, weights)
    result.bf16 = relative(experts_forward(experts, hidden_states, index, weights), wanted)


# -- the page -------------------------------------------------------------------------------------------

TITLE = "# Models\n\ntransformers {version}"

ABOUT = """
What `qllm_ops.models.install` does with every experts class of this release. There is a row for each class
that transformers decorates with `use_experts_implementation`, for each other class that is named like one,
and for each MoE block of a module that has neither; the list is read from its sources. Classes outside
that interface are taken by `models/adapters.py` or refused by name. `make conformity` makes this page;
`make test` checks a part of it, every day another one.

- **whole model**: a tiny model of random weights (hidden size 64, mostly two layers) whose output depends on
  the experts. **class only**: the experts module alone, because no tiny model of it could be built.
- **fp32**: the logits (the last hidden states of a model without a head) against the class's own forward,
  "eager": largest difference <= {fp32:g} of the largest value.
- **bf16**: against `grouped_mm`. Every experts call on the same inputs: <= {bf16:g} of the largest value. The
  logits, with the routing held fixed: <= {bf16:g}, or twice what separates transformers' own eager from its
  `grouped_mm`, in models that amplify a rounding error more than that.
  Classes that transformers does not dispatch: every call against the class's own forward, in bfloat16.
- **tokens**: {tokens} greedy tokens with a cache, equal to eager's.
- **preempted**: logits and tokens under random pauses, at least {parks} of which were met: bitwise equal.

"""

TAKEN = (
    "| experts class | architecture | layout | tried as | fp32 | bf16 | tokens | preempted |\n"
    + "|---" * 8
    + "|"
)
LEFT = "| experts class | architecture | | why |\n" + "|---" * 4 + "|"


def line(result: Result) -> str:
    """A row of the page; without measured numbers, which differ between machines."""
    name = f"| `{result.row.class_name}` | {result.row.folder} |"
    if result.coverage in (REFUSED, NOT_BUILT):
        return f"{name} {result.coverage} | {cell(result.reason)} |"
    tried = f"`{result.tried}`" if result.coverage == WHOLE else f"class only ({cell(result.reason)})"
    bf16 = None if result.bf16 is None else not any(p.startswith("bf16") for p in result.problems)
    fp32 = None if result.fp32 is None else result.fp32 <= FP32_LIMIT
    marks = [
        {True: "yes", False: "**no**", None: "-"}[m] for m in (fp32, bf16, result.tokens, result.preempted)
    ]
    return f"{name} {result.layout} | {tried} | {' | '.join(marks)} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace(str(SOURCES.parent), "transformers")


def page(results: list[Result]) -> str:
    """docs/models.md."""
    whole, alone, refused, missing = (
        sum(result.coverage == kind for result in results) for kind in (WHOLE, CLASS_ONLY, REFUSED, NOT_BUILT)
    )
    counts = (
        f"{whole} tried as a whole model, {alone} as the class only, {refused} refused, {missing} not built"
    )
    failed = [f"- `{r.row.class_name}`: {cell('; '.join(r.problems))}" for r in results if r.problems]
    about = ABOUT.format(fp32=FP32_LIMIT, bf16=BF16_LIMIT, tokens=NEW_TOKENS, parks=PARKS)
    parts = [
        TITLE.format(version=transformers.__version__) + f": {len(results)} experts classes. {counts}.\n",
        about.strip("\n") + "\n",
        *(["## Failed\n", *failed, ""] if failed else []),
        "## Taken\n",
        TAKEN,
        *(line(r) for r in results if r.coverage in (WHOLE, CLASS_ONLY)),
        "",
        "## Not taken\n",
        LEFT,
        *(line(r) for r in results if r.coverage in (REFUSED, NOT_BUILT)),
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Examine every row, print what was measured, write the page; 1 if a row has a problem."""
    transformers.logging.set_verbosity_error()
    results = []
    for row in table():
        result = examine(row)
        results.append(result)
        numbers = " ".join(
            f"{name} {value:.1e}"
            for name, value in (("fp32", result.fp32), ("bf16", result.bf16), ("output", result.bf16_output))
            if value is not None
        )
        verdict = "FAILED: " + "; ".join(result.problems) if result.problems else "ok"
        print(
            f"{row.class_name:32} {result.coverage:12} {result.seconds:5.1f} s  {numbers}  {verdict}",
            flush=True,
        )
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"\n{page(results)}")
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""Small MoE models of random weights, for demos, tests and benchmarks without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Preset:
    """An architecture of transformers and its sizes.

    Attributes:
        model_type: transformers' name of the architecture.
        sizes: arguments of its configuration.
        about: one line for people.
    """

    model_type: str
    about: str
    sizes: dict[str, Any]


_MIXTRAL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 16384,
    "initializer_range": 0.05,
}

_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
}

# initializer_range is about 1 / sqrt(hidden_size) and not the usual 0.02: with that, so narrow a
# model passes its embeddings on almost unchanged, and what it says next hardly depends on the prompt.
PRESETS = {
    "tiny": Preset(
        "mixtral",
        "Mixtral, 2 layers, 8 experts, top-2; for tests",
        {**_TINY, "intermediate_size": 96, "num_local_experts": 8},
    ),
    "tiny-qwen3-moe": Preset(
        "qwen3_moe",
        "Qwen3-MoE, 2 layers, 12 experts, top-2; for tests",
        {**_TINY, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 12, "head_dim": 16},
    ),
    "tiny-olmoe": Preset(
        "olmoe",
        "OLMoE, 2 layers, 8 experts, top-2; for tests",
        {**_TINY, "intermediate_size": 48, "num_experts": 8},
    ),
    "tiny-deepseek-v3": Preset(
        "deepseek_v3",
        "DeepSeek-V3, 1 dense and 2 MoE layers, 8 experts in 4 groups, top-2, 1 shared; for tests",
        {
            **_TINY,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "demo": Preset("mixtral", "Mixtral, 4 layers, 54 M parameters", {**_MIXTRAL, "num_hidden_layers": 4}),
    "mixtral-84m": Preset(
        "mixtral",
        "Mixtral, 6 layers, 84 M parameters",
        {**_MIXTRAL, "num_hidden_layers": 6, "vocab_size": 4096},
    ),
}


def make_preset(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The preset ``name`` with weights drawn from ``seed``, on the CPU in eval mode.

    It has no tokenizer (prompts are token ids) and no end-of-sequence token, so the request alone
    decides how many tokens are generated. The caller's random state is left as it is.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    no_special_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(preset.model_type, **preset.sizes, **no_special_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_preset(name: str, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Make a preset and save it as config.json, generation_config.json and safetensors in ``folder``."""
    folder = Path(folder)
    make_preset(name, seed, dtype).save_pretrained(folder)
    return folder

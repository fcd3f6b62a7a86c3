"""Tiny models of random weights, beside the presets: other layouts, and what `install` must refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_kernels_available

needs_pickle = pytest.mark.skipif(
    is_kernels_available(), reason="with the kernels library, no model of transformers can be pickled"
)

SUPPORTED = ("tiny", "tiny-qwen3-moe", "tiny-olmoe", "tiny-deepseek-v3")
"""Presets with experts that are installed."""

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "head_dim": 16,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

OTHER_LAYOUTS = {
    "gpt_oss": {**_SIZES, "intermediate_size": 48, "num_local_experts": 8},
    "openai_privacy_filter": {**_SIZES, "intermediate_size": 48, "num_local_experts": 8},
    "nemotron_h": {
        **_SIZES,
        "layers_block_type": ["moe", "attention"],
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "moe_shared_expert_intermediate_size": 48,
    },
    "deepseek_v4": {
        **_SIZES,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "muse_spark_text": {
        **_SIZES,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "moe_hidden_size": 32,
        "num_local_experts": 8,
    },
}
"""Architectures whose experts lie in another way than [gate; up] without biases."""

REFUSED = {
    "doge": {**_SIZES, "intermediate_size": 48, "is_moe": True, "num_experts": 16},
    "llama": {**_SIZES, "intermediate_size": 96},
}


@contextlib.contextmanager
def defaults_of(default: torch.dtype | torch.device) -> Iterator[None]:
    """A user's default dtype, or default device, which torch itself obeys."""
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with default if isinstance(default, torch.device) else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def tiny_model(model_type: str) -> PreTrainedModel:
    """A tiny model of an architecture in OTHER_LAYOUTS or REFUSED, seeded."""
    config = AutoConfig.for_model(model_type, **{**OTHER_LAYOUTS, **REFUSED}[model_type], pad_token_id=None)
    headless = ("openai_privacy_filter", "muse_spark_text")
    auto = AutoModel if model_type in headless else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config).eval()


STRETCHED = {
    "longrope": {
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "factor": 8.0,
    },
    "dynamic": {"factor": 8.0},
    "phimoe": {
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    },
}
"""Rotary scalings that depend on the longest position of a call: from position 32 on."""


def gpt_oss_with_sinks() -> PreTrainedModel:
    """A tiny one, with sinks that take much of some heads' attention, and a window of 16 in every other
    layer."""
    model = tiny_model("gpt_oss")
    model.config.sliding_window = 16
    for layer in model.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and 16
        layer.self_attn.sinks.data = torch.tensor([-2.0, 0.0, 2.0, 4.0])
        layer.self_attn.q_proj.weight.data *= 20  # so that which keys are seen counts
    return model


def stretched_model(kind: str) -> PreTrainedModel:
    """A tiny model with rotary scaling of this kind, seeded: Mixtral, or Phi-MoE, whose own is longrope."""
    rope = {"rope_theta": 100.0, "rope_type": "longrope" if kind == "phimoe" else kind, **STRETCHED[kind]}
    config = AutoConfig.for_model(
        "phimoe" if kind == "phimoe" else "mixtral",
        **_SIZES,
        intermediate_size=48,
        num_local_experts=8,
        max_position_embeddings=32 if kind == "dynamic" else 256,
        rope_parameters=rope,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for module in model.modules():  # so that attention, and with it the positions, count
            if type(module).__name__.endswith("Attention"):
                module.q_proj.weight.data *= 20
    return model.eval()

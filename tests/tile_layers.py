"""Layers whose tiles the tests look at."""

import torch
from hypothesis import strategies as st

from qllm_ops.tiles import MODELS, token_counts

ARCHS = ("sm_100", "sm_90", "sm_90_h100", "sm_80", "sm_86", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
archs, dtypes = st.sampled_from(ARCHS), st.sampled_from(DTYPES)

LAYER = {"num_tokens": 1000, "top_k": 2, "num_experts": 8, "dtype": torch.bfloat16, "arch": "sm_90"}
MIXTRAL = {**LAYER, "hidden_size": 4096, "intermediate_size": 14336}


def model_layers():
    for hidden, intermediate, experts, top_k in MODELS.values():
        for num_tokens in token_counts(top_k, experts):
            yield {
                "num_tokens": num_tokens, "top_k": top_k, "num_experts": experts, "hidden_size": hidden,
                "intermediate_size": intermediate,
            }  # fmt: skip

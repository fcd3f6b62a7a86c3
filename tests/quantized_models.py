"""Models that the tests of quantised experts make and look at."""

import torch
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from qllm_ops.models import make_preset
from qllm_ops.models.projections import QuantizedProjection

IDS = torch.arange(20).reshape(2, 10)
SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16, "pad_token_id": None}


def small(model_type, **sizes):
    """Seeded; of sizes that blocks of 128 x 128 divide, attention excepted."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(model_type, **SIZES, **heads, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def qwen3():
    return small("qwen3_moe", num_experts=4, moe_intermediate_size=128)


def gpt_oss():
    return small("gpt_oss", num_local_experts=4, intermediate_size=96)


def mixtral():
    return small("mixtral", num_local_experts=4, intermediate_size=96)


def dense_model(name):
    return make_preset(name) if name.startswith("tiny") else tiny_model(name)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same_logits(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max())


def experts_of(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def projections_of(model):
    """The held weights by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedProjection)}
    return {name: module.weight for name, module in found.items()}

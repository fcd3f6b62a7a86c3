"""Experts that transformers has quantised: `FP8Experts` are taken as they are, others are refused by name."""

import copy
from types import SimpleNamespace

import pytest
import torch
from quantized_models import IDS, assert_same_logits, experts_of, gpt_oss, logits, qwen3
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Quantize, replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

from qllm_ops import QuantizedWeight, moe, quantize_mxfp4
from qllm_ops.models import UnsupportedExpertsError, install, make_preset, uninstall
from qllm_ops.models.experts import experts_layout
from qllm_ops.models.install import installed

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate"]
"""Left in 16 bits, because transformers multiplies float8 only on GPUs."""


def with_fp8_experts(model, **options):
    """A copy whose experts are transformers' `FP8Experts`, and the model itself with what they stand for."""
    config = FineGrainedFP8Config(**options)
    quantised = copy.deepcopy(model)
    replace_with_fp8_linear(quantised, LINEAR, config)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    for name, module in experts_of(quantised).items():
        for leaf in ("gate_up_proj", "down_proj"):
            dense = model.get_parameter(f"{name}.{leaf}")
            values, scales = quantizer._quantize_one(leaf, dense.data).values()
            if config.weight_block_size is None:  # where theirs is a scale for gate and for up
                scales = scales.view(-1, 1, 1).expand(getattr(module, leaf + "_scale_inv").shape).clone()
            setattr(module, leaf, nn.Parameter(values, requires_grad=False))
            setattr(module, leaf + "_scale_inv", nn.Parameter(scales, requires_grad=False))
            rows = -(-values.shape[1] // scales.shape[1])
            block = config.weight_block_size or (rows, 256)
            dense.data.copy_(QuantizedWeight.from_fp8(values, scales, tuple(block)).dequantize())
    return quantised, model


@pytest.mark.parametrize(
    "options", [{}, {"scale_fmt": "ue8m0"}, {"weight_block_size": (64, 64)}, {"weight_block_size": None}],
    ids=str,
)  # fmt: skip
def test_fp8_experts_of_transformers(options):
    quantised, dense = with_fp8_experts(qwen3(), **options)
    report = install(quantised)
    assert {(m.class_name, m.format) for m in report.modules} == {("FP8Experts", "fp8")}
    assert_same_logits(logits(quantised), logits(dense))
    assert uninstall(quantised)
    assert quantised.config._experts_implementation != "qllm"


def test_fp8_experts_of_four_bits():
    """As DeepSeek-V4 has them: two numbers a byte, a power of two for every 32 of a row."""
    dense = qwen3()
    quantised = copy.deepcopy(dense)
    config = FineGrainedFP8Config(scale_fmt="ue8m0", expert_dtype="fp4")
    replace_with_fp8_linear(quantised, LINEAR, config)
    for name, module in experts_of(quantised).items():
        for leaf in ("gate_up_proj", "down_proj"):
            weight = quantize_mxfp4(dense.get_parameter(f"{name}.{leaf}").data)
            scales = weight.scales.contiguous().view(torch.float8_e8m0fnu)
            setattr(module, leaf, nn.Parameter(weight.values.view(torch.int8), requires_grad=False))
            setattr(module, leaf + "_scale_inv", nn.Parameter(scales, requires_grad=False))
            dense.get_parameter(f"{name}.{leaf}").data.copy_(weight.dequantize())
    report = install(quantised)
    assert {(m.class_name, m.format) for m in report.modules} == {("FP8Experts", "mxfp4")}
    assert_same_logits(logits(quantised), logits(dense))
    module.down_proj_scale_inv = nn.Parameter(scales.float(), requires_grad=False)
    module.down_proj.data = module.down_proj.data.clone()
    with pytest.raises(TypeError, match=r"scales must be float8_e8m0fnu .*, got torch.float32"):
        logits(quantised)


def test_fp8_experts_of_transformers_are_no_part_of_an_exported_program():
    quantised, _ = with_fp8_experts(qwen3())
    install(quantised)
    with pytest.raises(
        ValueError, match=r"gate_up_proj must be in memory, got a fake tensor.*models.load can"
    ):
        torch.export.export(quantised, (IDS,), {"use_cache": False}, strict=False)


def test_moved_fp8_experts_are_described_anew():
    quantised, _ = with_fp8_experts(qwen3())
    install(quantised)
    wanted = logits(quantised)
    for module in experts_of(quantised).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
            if parameter.dtype == torch.float8_e4m3fn:
                stale = parameter
    assert torch.equal(logits(quantised), wanted)
    stale.data = torch.zeros_like(stale.data)
    assert not torch.equal(logits(quantised), wanted)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", "float"])
def test_fp8_experts_that_were_loaded_into_are_described_anew(scale_fmt):
    """Scales of 8 bits are widened to a copy, and of any the largest is known."""
    first, dense = qwen3(), qwen3()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter *= 16 if "experts" in name else 1
    (quantised, _), (other, _) = (with_fp8_experts(model, scale_fmt=scale_fmt) for model in (first, dense))
    install(quantised)
    install(other)
    before, wanted = logits(quantised), logits(other)
    quantised.load_state_dict(other.state_dict())
    assert torch.equal(logits(quantised), wanted)
    assert not torch.equal(before, wanted)
    of = {name: experts_layout(module).weights(module) for name, module in experts_of(quantised).items()}
    for name, module in experts_of(other).items():
        for got, expected in zip(of[name], experts_layout(module).weights(module), strict=True):
            assert got.largest == expected.largest


def test_fp8_experts_with_a_clamp():
    """The class builds its own gating from the config, whatever the model's was."""
    model = qwen3()
    model.config.swiglu_limit = 7.0
    quantised, _ = with_fp8_experts(model)
    assert "silu(limit=7)" in str(install(quantised))


def test_float8_activations_are_those_of_moe():
    quantised, _ = with_fp8_experts(qwen3().bfloat16())
    install(quantised)
    plain = logits(quantised)
    report = install(quantised, fp8_activations=True)
    assert "fp8, float8 activations" in str(report)
    name, module = next(iter(experts_of(quantised).items()))
    draw = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(6, 256, generator=draw).bfloat16()
    index = torch.arange(12).view(6, 2) % 4
    weights = torch.full((6, 2), 0.5).bfloat16()
    pair = [
        QuantizedWeight.from_fp8(
            getattr(module, leaf).detach(), getattr(module, leaf + "_scale_inv").detach()
        )
        for leaf in ("gate_up_proj", "down_proj")
    ]
    expected = moe(hidden_states, *pair, index, weights, fp8_activations=True)
    with torch.no_grad():
        assert torch.equal(module(hidden_states, index, weights), expected), name
    difference = (logits(quantised) - plain).norm() / plain.norm()
    assert 0.005 < difference < 0.2
    chosen = logits(quantised)
    with installed(quantised):  # as the engine does
        assert torch.equal(logits(quantised), chosen)
    assert torch.equal(logits(quantised), chosen)


def test_float8_activations_are_refused_by_module():
    with pytest.raises(TypeError, match=r"layers.0.mlp.experts: gate_up_proj must be quantised to fp8"):
        install(make_preset("tiny"), fp8_activations=True)
    model, _ = with_fp8_experts(qwen3())
    with pytest.raises(TypeError, match=r"experts: hidden_states must be bfloat16 or float16"):
        install(model, fp8_activations=True)


def test_mxfp4_experts_of_transformers_are_sent_to_load():
    model = gpt_oss()

    class Mxfp4GptOssExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(UnsupportedExpertsError, match=r"Mxfp4GptOssExperts: .*qllm_ops.models.load"):
        install(model)


def test_what_bitsandbytes_leaves_is_said():
    model = make_preset("tiny", dtype=torch.bfloat16)
    model.quantization_method = "bitsandbytes"
    assert "note: bitsandbytes left these experts in 16 bits" in str(install(model))
    assert "note:" not in str(install(make_preset("tiny")))

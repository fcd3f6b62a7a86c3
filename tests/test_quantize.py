"""Quantising the experts of a model in memory: they and nothing else, and only `moe` computes them then."""

import copy

import pytest
import torch
from quantized_models import assert_same_logits, dense_model, logits, projections_of
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qllm_ops.models import UnsupportedExpertsError, install, load, make_preset, quantize_experts, warming_up
from qllm_ops.models.projections import QuantizedProjection
from qllm_ops.quantized import FORMATS, QUANTIZERS

DENSE = ("tiny", "tiny-qwen3-moe", "tiny-deepseek-v3", "gpt_oss", "nemotron_h")


def put_dense(model, weights):
    """Give a dense model, under the same names, what quantised weights stand for."""
    for name, weight in weights.items():
        dense = weight.dequantize()
        parameter = model.get_parameter(name)
        parameter.data.copy_(dense if parameter.shape == dense.shape else dense.mT)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", DENSE)
def test_experts_are_quantised_and_nothing_else(name, format):
    dense, model = dense_model(name), dense_model(name)
    quantize_experts(model, format)
    held = projections_of(model)
    assert {weight.format for weight in held.values()} == {format}
    others = dict(model.named_parameters())
    assert not held.keys() & others.keys()
    assert held.keys() | others.keys() == dict(dense.named_parameters()).keys()
    for key, parameter in others.items():
        assert torch.equal(parameter, dense.get_parameter(key)), key
    for key, weight in held.items():
        wanted = dense.get_parameter(key)
        wanted = wanted if wanted.shape == weight.shape else wanted.mT
        assert torch.equal(weight.dequantize(), QUANTIZERS[format](wanted).dequantize()), key

    report = install(model)
    assert {m.format for m in report.modules} == {format}
    assert f"{format}, float32 activations" in str(report)
    put_dense(dense, held)
    assert_same_logits(logits(model), logits(dense))


def test_installed_before_or_after():
    first, then = make_preset("tiny"), make_preset("tiny")
    install(first)
    quantize_experts(first, "int4")
    quantize_experts(then, "int4")
    install(then)
    assert torch.equal(logits(first), logits(then))


@pytest.mark.parametrize("format", FORMATS)
def test_another_dtype_leaves_the_quantised_weights_as_they_are(format):
    model = make_preset("tiny-qwen3-moe")
    quantize_experts(model, format)
    install(model)
    before = {name: (w.values.clone(), w.scales.clone()) for name, w in projections_of(model).items()}
    model.bfloat16()
    assert model.dtype == torch.bfloat16
    for name, weight in projections_of(model).items():
        values, scales = before[name]
        assert weight.values.dtype == values.dtype
        assert torch.equal(weight.values.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(weight.scales, scales)
    assert logits(model).dtype == torch.bfloat16


def test_moved_buffers_are_described_anew():
    model = make_preset("tiny")
    quantize_experts(model, "int4")
    install(model)
    wanted = logits(model)
    for module in model.modules():
        if isinstance(module, QuantizedProjection):
            module._apply(torch.clone)
            assert module.weight.values is module.values
    assert torch.equal(logits(model), wanted)


def test_a_copy_computes_the_same():
    model = make_preset("tiny")
    quantize_experts(model, "mxfp4")
    install(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_state_dict_restores_the_weights():
    model, other = make_preset("tiny"), make_preset("tiny", seed=1)
    for each in (model, other):
        quantize_experts(each, "int4")
        install(each)
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_only_ours_computes_them_and_nobody_saves_them(tmp_path):
    model = make_preset("tiny")
    quantize_experts(model, "int4")
    for implementation, error in (("eager", TypeError), ("grouped_mm", AttributeError)):
        model.set_experts_implementation(implementation)
        with pytest.raises(error, match=r"qllm_ops.models.install\(model\)"):
            logits(model)
    with pytest.raises(NotImplementedError, match="quantised cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [lambda model: model.model, copy.copy], ids=["inner", "shallow copy"])
def test_whoever_has_quantised_experts_is_not_saved(part, tmp_path):
    model, other = make_preset("tiny"), make_preset("tiny")
    quantize_experts(part(model), "int4")
    install(model)
    with pytest.raises(NotImplementedError, match="quantised cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    other.save_pretrained(tmp_path)


def test_warming_up_knows_quantised_weights():
    model = make_preset("tiny")
    quantize_experts(model, "int4")
    install(model)
    wanted = logits(model)
    with warming_up(None):
        assert torch.equal(logits(model), wanted)


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"format must be one of fp8, mxfp4, int4, got 'int3'"):
        quantize_experts(make_preset("tiny"), "int3")
    with pytest.raises(ValueError, match="no MoE experts"):
        quantize_experts(tiny_model("llama"), "int4")
    model = make_preset("tiny")
    quantize_experts(model, "int4")
    with pytest.raises(ValueError, match=r"experts is quantised already: int4"):
        quantize_experts(model, "fp8")


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = make_preset("tiny")
    name = "model.layers.1.mlp.experts.down_proj"
    model.get_parameter(name).data[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    for call in (lambda: load(tmp_path, quantize="int4"), lambda: quantize_experts(model, "int4")):
        with pytest.raises(ValueError, match=f"{name}: weight must be finite.* in expert 2"):
            call()


def test_what_a_wrapper_adds_to_weights_is_not_lost():
    """As peft wraps the experts that it adapts."""
    model = make_preset("tiny")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleDict({"base_layer": layer.mlp.experts})
    with pytest.raises(
        UnsupportedExpertsError, match=r"experts.base_layer is wrapped by a ModuleDict.*merge"
    ):
        quantize_experts(model, "int4")
    assert not projections_of(model)


def test_experts_that_were_fused_are_refused_and_stay():
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    heads = {"kv_n_heads": 2, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "dbrx", d_model=64, n_heads=4, n_layers=1, vocab_size=64, ffn_config=experts, attn_config=heads
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedExpertsError, match="DbrxExperts cannot be quantised"):
        quantize_experts(model, "int4")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())

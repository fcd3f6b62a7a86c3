"""Quantised checkpoints: the experts stay as they are stored, and damage is named."""

import functools
import json
import random
import weakref

import pytest
import torch
from conformity import tiny_config
from quantized_models import (
    IDS,
    assert_same_logits,
    dense_model,
    experts_of,
    gpt_oss,
    logits,
    mixtral,
    projections_of,
    qwen3,
)
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4

from qllm_ops import quantize_fp8, quantize_int4, quantize_mxfp4
from qllm_ops.models import CheckpointError, install, load, make_preset, quantize_experts
from qllm_ops.models.quantized_shards import Assembly
from qllm_ops.quantized import FORMATS


def in_fp8(tensors, block=(128, 128), scale_dtype=torch.float32):
    """Every projection of a layer, attention's too, as FP8 checkpoints have them."""
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = quantize_fp8(tensors[name][None], block)
        tensors[name] = weight.values[0]
        tensors[name + "_scale_inv"] = weight.scales[0].to(scale_dtype)
    return {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}


def in_fp8_of_one_scale(tensors):
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        weight = quantize_fp8(tensors[name][None], (rows, 256))
        assert columns <= 256
        tensors[name], tensors[name + "_scale_inv"] = weight.values[0], weight.scales[0, 0, 0].clone()
    return {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"}


def in_mxfp4(tensors):
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        weight = quantize_mxfp4(tensors.pop(name).mT)
        tensors[name + "_blocks"] = weight.values.unflatten(2, (-1, 16)).contiguous()
        tensors[name + "_scales"] = weight.scales.contiguous()
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}


def in_int4(tensors, group=64, symmetric=True):
    for name in [n for n in tensors if ".experts." in n]:
        weight = quantize_int4(tensors[name][None], group, symmetric)
        shape = torch.tensor(tensors.pop(name).shape)
        tensors[name + "_packed"] = weight.values[0].view(torch.int32)
        tensors[name + "_scale"] = weight.scales[0].contiguous()
        tensors[name + "_shape"] = shape
        if not symmetric:
            eights = weight.zeros[0].int().unflatten(0, (-1, 8)) << 4 * torch.arange(8)[:, None]
            tensors[name + "_zero_point"] = eights.sum(1, dtype=torch.int32)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }


def words(codes, places=range(8)):
    """(rows, C) of 0 to 15 -> (rows, C / 8) int32, number n of eight at ``places[n]``, 0 the lowest bits."""
    words = (codes.long().unflatten(-1, (-1, 8)) << 4 * torch.tensor(places)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def by_inputs(tensors, group, symmetric, store):
    """Every projection as ``store`` makes it of its codes and zero points, both with inputs as rows."""
    for name in [n for n in tensors if n.endswith("proj.weight") or ".experts." in n]:
        weight = quantize_int4(tensors.pop(name)[None], group, symmetric)
        halves = weight.values[0]
        codes = torch.stack((halves & 15, halves >> 4), -1).flatten(1)
        zeros = torch.full_like(weight.scales[0], 8) if symmetric else weight.zeros[0]
        base = name.removesuffix("weight")
        tensors[base + "scales"] = weight.scales[0].mT.to(torch.float16).contiguous()
        tensors[base + "qweight"], tensors[base + "qzeros"] = store(codes.mT, zeros.mT)


def in_gptq(tensors, group=64, symmetric=True, v2=False):
    def store(codes, zeros):
        return words(codes.mT).mT.contiguous(), words(zeros if v2 else zeros.clamp(min=1) - 1)

    by_inputs(tensors, group, symmetric, store)
    for name in [n for n in tensors if n.endswith("qweight")]:
        columns = 8 * len(tensors[name])
        tensors[name.replace("qweight", "g_idx")] = torch.arange(columns, dtype=torch.int32) // group
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": symmetric}
    return config | ({"checkpoint_format": "gptq_v2"} if v2 else {})


def in_awq(tensors, group=64, symmetric=False):
    places = (0, 4, 1, 5, 2, 6, 3, 7)
    by_inputs(tensors, group, symmetric, lambda codes, zeros: (words(codes, places), words(zeros, places)))
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return config | {"modules_to_not_convert": ["mlp.gate"]}


STORED = {
    "fp8": (qwen3, in_fp8),
    "fp8, scales of 16 bits": (qwen3, functools.partial(in_fp8, scale_dtype=torch.bfloat16)),
    "fp8, exponents as scales": (qwen3, functools.partial(in_fp8, scale_dtype=torch.float8_e8m0fnu)),
    "fp8, one scale": (qwen3, in_fp8_of_one_scale),
    "fp8, small blocks": (qwen3, functools.partial(in_fp8, block=(64, 32))),
    "mxfp4": (gpt_oss, in_mxfp4),
    "int4": (qwen3, in_int4),
    "int4, zero points": (qwen3, functools.partial(in_int4, symmetric=False)),
    "int4, groups of 32": (mixtral, functools.partial(in_int4, group=32)),
    "int4, gptq": (qwen3, in_gptq),
    "int4, gptq, zero points": (mixtral, functools.partial(in_gptq, group=32, symmetric=False)),
    "int4, gptq_v2, zero points": (qwen3, functools.partial(in_gptq, symmetric=False, v2=True)),
    "int4, awq, zero points": (qwen3, functools.partial(in_awq, group=128)),
    "int4, awq": (mixtral, functools.partial(in_awq, group=32, symmetric=True)),
}


def save_quantized(folder, model, quantise):
    model.save_pretrained(folder, save_original_format=True)
    change(folder, quantise)
    return folder


def change(folder, how):
    """Change the tensors, and with a result the quantization_config, of a saved model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    quantization = how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if quantization:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=STORED)
def stored(request, tmp_path):
    """A folder with a quantised checkpoint, the dense model it was made of, and its name in STORED."""
    make, quantise = STORED[request.param]
    model = make()
    return save_quantized(tmp_path, model, quantise), model, request.param


def test_experts_stay_as_they_are_stored(stored):
    folder, dense, name = stored
    model = load(folder)
    held = projections_of(model)
    assert len(held) == 2 * len(experts_of(dense))
    assert {weight.format for weight in held.values()} == {name.partition(",")[0]}
    assert {weight.zeros is not None for weight in held.values()} == {"zero points" in name}
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    # Everything else, dequantised, and the experts, as somebody else's sum of them says.
    compared = load(folder, install=False)
    assert {name for name, _ in compared.named_parameters()} == {n for n, _ in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, compared.get_parameter(name)), name
    for name, weight in held.items():
        wanted = compared.get_parameter(name)
        assert torch.equal(weight.dequantize(), wanted if wanted.shape == weight.shape else wanted.mT), name
    compared.set_experts_implementation("eager")
    assert_same_logits(logits(model), logits(compared))
    # Not another model: the dense one's logits but for the quantisation.
    difference = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert difference < 0.5
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["fp8", "fp8, scales of 16 bits", "mxfp4", "int4"])
def test_dequantised_they_are_what_transformers_makes_of_them(name, tmp_path, monkeypatch):
    """It dequantises all of them on a CPU, and asks for a package that it does not need for that."""
    if name == "int4":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for quantizer in (quantizer_finegrained_fp8, quantizer_mxfp4):
        monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    make, quantise = STORED[name]
    save_quantized(tmp_path, make(), quantise)
    ours = load(tmp_path, install=False, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, wanted[key]), key


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "int4"])
def test_stored_numbers_arrive_unchanged(name, tmp_path):
    """Against the tensors of the file, by hand."""
    make, quantise = STORED[name]
    tensors = load_file(save_quantized(tmp_path, make(), quantise) / "model.safetensors")
    held = projections_of(load(tmp_path))
    if name == "mxfp4":
        for key, weight in held.items():
            assert torch.equal(weight.values, tensors[key + "_blocks"].flatten(2))
            assert torch.equal(weight.scales, tensors[key + "_scales"])
        return
    for key, weight in held.items():
        parts = ("gate_proj", "up_proj") if "gate_up" in key else ("down_proj",)
        stem = key.rpartition(".")[0]
        ends = (".weight", ".weight_scale_inv") if name == "fp8" else (".weight_packed", ".weight_scale")
        for expert in range(4):
            for end, got in zip(ends, (weight.values, weight.scales), strict=True):
                wanted = torch.cat([tensors[f"{stem}.{expert}.{part}{end}"] for part in parts])
                wanted = wanted.view(torch.uint8) if wanted.dtype == torch.int32 else wanted
                assert torch.equal(got[expert].float(), wanted.float()), (key, expert, end)


@pytest.mark.parametrize("packing", ["gptq", "awq"])
def test_what_lies_by_inputs_arrives_rearranged(packing, tmp_path):
    """Against the tensors of the file, unpacked number by number."""
    quantise = functools.partial(in_gptq if packing == "gptq" else in_awq, symmetric=False)
    tensors = load_file(save_quantized(tmp_path, qwen3(), quantise) / "model.safetensors")
    draw = random.Random(0)

    def number(part, base, k, n):
        if packing == "gptq" and part == "qweight":
            word, place = tensors[base + part][k // 8, n], k % 8
        else:
            word, place = tensors[base + part][k, n // 8], n % 8
            place = (0, 4, 1, 5, 2, 6, 3, 7)[place] if packing == "awq" else place
        return word.item() >> 4 * place & 15

    for key, weight in projections_of(load(tmp_path)).items():
        dense, stem = weight.dequantize(), key.rpartition(".")[0]
        for _ in range(200):
            expert, n, k = (draw.randrange(size) for size in weight.shape)
            part, row = ("down_proj", n) if "down" in key else (("gate_proj", "up_proj")[n // 128], n % 128)
            base = f"{stem}.{expert}.{part}."
            zero = number("qzeros", base, k // 64, row) + (packing == "gptq")
            wanted = (number("qweight", base, k, row) - zero) * tensors[base + "scales"][k // 64, row].float()
            assert dense[expert, n, k] == wanted, (key, expert, n, k)


@pytest.mark.parametrize("name", ["int4, gptq", "int4, awq, zero points"])
def test_memory_beside_what_is_rearranged(name, tmp_path, monkeypatch):
    """While one weight is put together, what the others were read into is there once and not twice."""
    make, quantise = STORED[name]
    save_quantized(tmp_path, make(), quantise)
    read, left = [], []
    init, weight = Assembly.__init__, Assembly.weight

    def note_init(self, *args):
        init(self, *args)
        read.append(weakref.ref(self._values))

    def note_weight(self):
        left.append(sum(of() is not None for of in read))
        return weight(self)

    monkeypatch.setattr(Assembly, "__init__", note_init)
    monkeypatch.setattr(Assembly, "weight", note_weight)
    load(tmp_path)
    assert left[:4] == [4, 3, 2, 1]  # two layers


def test_stored_zero_points_arrive_unchanged(tmp_path):
    dense = qwen3()
    save_quantized(tmp_path, dense, functools.partial(in_int4, symmetric=False))
    for key, weight in projections_of(load(tmp_path)).items():
        wanted = quantize_int4(dense.get_parameter(key), 64, symmetric=False)
        for part in ("values", "scales", "zeros"):
            assert torch.equal(getattr(weight, part).float(), getattr(wanted, part).float()), (key, part)


def test_a_conversion_works_on_what_was_dequantised(tmp_path):
    """Of HRM, projections are stored as one that is cut in two."""
    model = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING["hrm_text"]))
    blocks = functools.partial(in_fp8, block=(64, 32))
    tensors = load_file(save_quantized(tmp_path / "fp8", model, blocks) / "model.safetensors")

    def dequantise(dense):
        for name in [name for name in dense if name + "_scale_inv" in tensors]:
            values, scales = tensors[name], tensors[name + "_scale_inv"]
            dense[name] = (
                values.float().unflatten(1, (-1, 32)) * scales.repeat_interleave(64, 0)[..., None]
            ).flatten(1)

    change(save_quantized(tmp_path / "dense", model, lambda tensors: None), dequantise)
    ours, wanted = load(tmp_path / "fp8", install=False), load(tmp_path / "dense", install=False)
    cut = "model.L_module.layers.1.mlp.gate_proj.weight"
    assert not torch.equal(wanted.state_dict()[cut], model.state_dict()[cut])
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


def test_dtype_is_of_what_is_not_quantised(tmp_path):
    save_quantized(tmp_path, qwen3(), in_fp8)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {weight.values.dtype for weight in projections_of(model).values()} == {torch.float8_e4m3fn}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek-v3", "gpt_oss", "nemotron_h"])
def test_quantised_while_they_are_read(name, format, tmp_path):
    model = dense_model(name)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantize=format)
    quantize_experts(model, format)
    install(model)
    wanted = projections_of(model)
    assert projections_of(loaded).keys() == wanted.keys()
    for key, weight in projections_of(loaded).items():
        assert torch.equal(weight.dequantize(), wanted[key].dequantize()), key
    assert torch.equal(logits(loaded), logits(model))


def test_generates_what_the_dequantised_model_does(tmp_path):
    save_quantized(tmp_path, gpt_oss(), in_mxfp4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours, theirs = load(tmp_path), load(tmp_path, install=False)
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_straight_to_a_gpu(stored):
    folder, _, _ = stored
    model, beside = load(folder, device="cuda"), load(folder)
    wanted = projections_of(beside)
    for name, weight in projections_of(model).items():
        assert weight.device.type == "cuda"
        assert torch.equal(weight.values.cpu().view(torch.uint8), wanted[name].values.view(torch.uint8))
        assert torch.equal(weight.scales.cpu(), wanted[name].scales)
    with torch.no_grad():
        got = model(IDS.cuda()).logits.cpu()
    assert_same_logits(got, logits(beside), 1e-3)


# -- what is refused -------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.experts."
GATE = LAYER + "2.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = []


def damage(kind, *words):
    """Of a checkpoint of STORED; the message of the refusal has these words."""

    def add(function):
        DAMAGE.append(pytest.param(kind, function, words, id=function.__name__))
        return function

    return add


@damage("fp8", QUERY, "is float8", "scales")
def no_scales(tensors):
    del tensors[QUERY + "_scale_inv"]


@damage("fp8", QUERY + "_scale_inv belongs to", QUERY)
def no_values(tensors):
    del tensors[QUERY]


@damage("fp8", GATE + "_scale_inv")
def no_scales_of_one_expert(tensors):
    del tensors[GATE + "_scale_inv"]


@damage("fp8", GATE, "is I8, wanted F8_E4M3")
def two_numbers_in_a_byte(tensors):
    tensors[GATE] = tensors[GATE].view(torch.int8)[:, ::2].contiguous()


@damage("fp8", "_scale_inv", "[1, 1]", "[1, 2]")
def one_column_of_scales(tensors):
    tensors[GATE + "_scale_inv"] = tensors[GATE + "_scale_inv"][:, :1].clone()


@damage("fp8", "scales must be (4, 2, 2)", "gate_proj", "(4, 2, 1)")
def every_column_of_scales_but_one(tensors):
    for name in [n for n in tensors if n.startswith(LAYER) and n.endswith("scale_inv") and "down" not in n]:
        tensors[name] = tensors[name][:, :1].clone()


@damage("fp8", "gate_proj", "positive and finite", "0.0")
def a_scale_of_zero(tensors):
    tensors[GATE + "_scale_inv"].zero_()


@damage("fp8", "gate_proj", "positive and finite", "nan")
def a_scale_that_is_no_number(tensors):
    tensors[GATE + "_scale_inv"][0, 1] = float("nan")


@damage("fp8", "gate_proj.weight is dense", "up_proj.weight beside it is fp8", "alike")
def every_gate_dense(tensors):
    for expert in range(4):
        name = f"{LAYER}{expert}.gate_proj.weight"
        tensors[name] = tensors[name].float()
        del tensors[name + "_scale_inv"]


@damage("int4", LAYER + "down_proj is dense", LAYER + "gate_up_proj int4", "alike")
def one_projection_dense(tensors):
    for expert in range(4):
        name = f"{LAYER}{expert}.down_proj.weight"
        for part in ("_packed", "_scale", "_shape"):
            del tensors[name + part]
        tensors[name] = torch.zeros(256, 128)


@damage("fp8", "blocks of 48 rows", "128 rows", "share blocks")
def blocks_that_gate_and_up_would_share(tensors):
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = quantize_fp8(torch.ones(1, *tensors[name].shape), (48, 128))
        tensors[name], tensors[name + "_scale_inv"] = weight.values[0], weight.scales[0]
    return {"quant_method": "fp8", "weight_block_size": [48, 128]}


@damage("int4, zero points", GATE + "_zero_point", "[16, 3]", "wanted I32 [16, 4]")
def too_few_zero_points(tensors):
    tensors[GATE + "_zero_point"] = tensors[GATE + "_zero_point"][:, :3].clone()


@damage(
    "int4, zero points", "up_proj.weight_packed has zero points", "gate_proj.weight_packed beside it none"
)
def gates_without_zero_points(tensors):
    for expert in range(4):
        del tensors[f"{LAYER}{expert}.gate_proj.weight_zero_point"]


@damage("int4", QUERY + "_g_idx", "in order")
def columns_in_another_order(tensors):
    weight = quantize_int4(tensors.pop(QUERY)[None], 64)
    tensors[QUERY + "_packed"] = weight.values[0].view(torch.int32)
    tensors[QUERY + "_scale"] = weight.scales[0].contiguous()
    tensors[QUERY + "_g_idx"] = torch.zeros(256, dtype=torch.int32)


@damage("int4", "{8} bits", "wanted 4")
def eight_bits(tensors):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@damage("int4", "has no bits by config.json", "wanted 4")
def a_config_that_does_not_say(tensors):
    return {"quant_method": "compressed-tensors"}


@damage("int4", GATE, "block", "wanted them alike")
def a_group_that_does_not_divide(tensors):
    tensors[GATE + "_scale"] = tensors[GATE + "_scale"][:, :3].clone()


@damage("int4", LAYER, ".gate_proj.weight", "twice")
def dense_and_quantised(tensors):
    for expert in range(4):
        tensors[f"{LAYER}{expert}.gate_proj.weight"] = torch.zeros(128, 256)


@damage("int4", GATE + "_packed", "[128, 256]", "[128, 224]")
def a_packed_tensor_that_is_too_short(tensors):
    tensors[GATE + "_packed"] = tensors[GATE + "_packed"][:, :-4].clone()


@damage("int4", GATE + "_packed", "wanted I32 [N, K / 8]")
def packed_in_bytes(tensors):
    tensors[GATE + "_packed"] = tensors[GATE + "_packed"].view(torch.uint8)


@damage("int4, gptq", "0.self_attn.q_proj.qweight belongs to", "q_proj.qzeros")
def no_words_of_zero_points(tensors):
    del tensors[QUERY.replace("weight", "qzeros")]


@damage("int4, gptq", "gate_proj", "g_idx must be groups in order", "k // 64")
def inputs_in_another_order(tensors):
    tensors[LAYER + "2.gate_proj.g_idx"] = tensors[LAYER + "2.gate_proj.g_idx"].flip(0).contiguous()


@damage("int4, gptq", "up_proj.qweight has a g_idx", "gate_proj.qweight beside it none")
def gates_without_an_order(tensors):
    for expert in range(4):
        del tensors[f"{LAYER}{expert}.gate_proj.g_idx"]


@damage("int4, gptq", LAYER + "2.gate_proj.g_idx", "[255]", "wanted [256]")
def an_order_that_is_too_short(tensors):
    tensors[LAYER + "2.gate_proj.g_idx"] = tensors[LAYER + "2.gate_proj.g_idx"][:-1].clone()


@damage("int4, gptq", "gate_proj", "qzeros must be at most 14", "got 15")
def a_zero_point_of_16(tensors):
    tensors[LAYER + "2.gate_proj.qzeros"].fill_(-1)


@damage("int4, gptq", LAYER + "2.gate_proj.qzeros", "[4, 15]", "wanted [4, 16]")
def too_few_words_of_zero_points(tensors):
    name = LAYER + "2.gate_proj.qzeros"
    tensors[name] = tensors[name][:, :-1].clone()


@damage("int4, awq", "qweight", "I64", "wanted I32")
def words_of_64_bits(tensors):
    for name in [n for n in tensors if n.endswith("qweight")]:
        tensors[name] = tensors[name].long()


@damage("int4, awq", "qweight", "8 bits", "wanted 4 bits in gemm")
def eight_bits_of_awq(tensors):
    return {"quant_method": "awq", "bits": 8, "version": "gemm"}


@damage("int4, awq", "qweight", "packed as 'gemv'", "wanted 4 bits in gemm")
def another_way_to_pack(tensors):
    return {"quant_method": "awq", "bits": 4, "version": "GEMV"}


@damage("int4, gptq", "qweight", "packed as 'marlin'", "wanted 4 bits in gptq or gptq_v2")
def packed_for_a_kernel(tensors):
    return {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}


@damage("mxfp4", LAYER + "down_proj_blocks belongs to", LAYER + "down_proj_scales")
def no_exponents(tensors):
    del tensors[LAYER + "down_proj_scales"]


@damage("mxfp4", "down_proj", "0 to 254")
def exponents_that_are_no_number(tensors):
    tensors[LAYER + "down_proj_scales"].fill_(255)


@damage("mxfp4", "down_proj", "[3, 96, 256]", "[4, 96, 256]")
def another_number_of_experts(tensors):
    for part in ("_blocks", "_scales"):
        tensors[LAYER + "down_proj" + part] = tensors[LAYER + "down_proj" + part][:-1].clone()


@damage("mxfp4", "down_proj_blocks", "[4, 256, 48]", "wanted [E, N, K / 32, 16]")
def blocks_that_are_none(tensors):
    tensors[LAYER + "down_proj_blocks"] = tensors[LAYER + "down_proj_blocks"].flatten(2)


@pytest.mark.parametrize(("kind", "how", "words"), DAMAGE)
def test_damage_is_named(kind, how, words, tmp_path):
    make, quantise = STORED[kind]
    save_quantized(tmp_path, make(), quantise)
    change(tmp_path, how)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_quantize_is_refused_where_it_cannot_be(tmp_path):
    save_quantized(tmp_path, qwen3(), in_fp8)
    with pytest.raises(ValueError, match=r"quantize must be None .* \(fp8\), got 'int4'"):
        load(tmp_path, quantize="int4")
    make_preset("tiny").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"quantize must be one of .*, got 'int2'"):
        load(tmp_path / "dense", quantize="int2")
    with pytest.raises(ValueError, match=r"quantize needs install=True"):
        load(tmp_path / "dense", quantize="int4", install=False)

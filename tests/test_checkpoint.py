"""Loading: bit by bit the model that `from_pretrained` gives; everything else is refused by name."""

import collections
import json
import re
import shutil

import pytest
import torch
from conformity import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import SUPPORTED, defaults_of, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_peft_available

from qllm_ops import PriorityFlag
from qllm_ops.models import (
    CheckpointError,
    UnsupportedExpertsError,
    check_safetensors,
    install,
    load,
    make_preset,
    quantize_experts,
    uninstall,
)
from qllm_ops.models import checkpoint as checkpoint_module
from qllm_ops.models import reader as reader_module

IDS = torch.arange(20).reshape(2, 10)
EXPERT = "model.layers.1.block_sparse_moe.experts.3."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_preset("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    make_preset("tiny").save_pretrained(tmp_path, max_shard_size="300KB")
    return tmp_path


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def edit(folder, change):
    """Change the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("fused", [False, True])
def test_both_forms_on_disk(name, fused, tmp_path):
    model = make_preset(name)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.endswith("experts.gate_up_proj") for key in names) == fused
    assert any(".experts.7." in key for key in names) != fused
    wanted = dict(model.named_parameters())

    loaded = load(tmp_path)
    assert not loaded.training
    assert loaded.config._experts_implementation == "qllm"
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, wanted.pop(key)), key
    assert not wanted
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5 * logits(model).abs().max())


def test_load_arguments(tiny):
    model = load(tiny, dtype=torch.bfloat16, flag=PriorityFlag())
    assert model.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert uninstall(model)
    assert model.config._experts_implementation != "qllm"
    assert load(tiny).dtype == torch.float32
    assert load(tiny, install=False).config._experts_implementation != "qllm"
    for name, dtype in (
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("auto", torch.float32),
    ):
        assert load(tiny, dtype=name, device=torch.device("cpu")).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dtype": torch.int8},
            ValueError,
            'dtype must be a floating-point dtype of torch or "auto", got torch.int8',
        ),
        ({"dtype": "half-ish"}, ValueError, "dtype must be .*, got 'half-ish'"),
        ({"dtype": 16}, ValueError, "dtype must be .*, got 16"),
        (
            {"dtype": torch.float64},
            UnsupportedExpertsError,
            r"gate_up_proj has dtype torch\.float64, wanted [^(]*;",
        ),
        ({"device": "auto"}, ValueError, "device must be one that torch has here, got 'auto'"),
        ({"device": None}, ValueError, "device must be one that torch has here, got None"),
        ({"device": {"": "cpu"}}, ValueError, "device must be one that torch has here, got {'': 'cpu'}"),
        ({"device": "meta"}, ValueError, "device must have memory, got 'meta'"),
        ({"backend": "cublas"}, ValueError, "^backend must be one of auto, torch, triton, got 'cublas'"),
        ({"flag": PriorityFlag(), "priority": 2}, ValueError, "^priority must be .* 0 to 1, got 2"),
        ({"flag": "x"}, TypeError, "^flag must be a PriorityFlag or None, got str"),
        ({"quantize": "int5"}, ValueError, "quantize must be one of fp8, mxfp4, int4, got 'int5'"),
    ],
)
def test_bad_arguments_are_named_before_a_weight_is_read(arguments, error, message, tiny, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_Filling", lambda *a: pytest.fail("read"))
    with pytest.raises(error, match=message):
        load(tiny, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [0, "cuda"])
def test_a_device_that_is_not_there(device, tiny):
    with pytest.raises(ValueError, match=f"device must be one that torch has here, got {device!r}"):
        load(tiny, device=device)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
def test_the_users_defaults_are_not_obeyed(default, tiny):
    wanted = logits(load(tiny)), logits(load(tiny, quantize="int4"))
    with defaults_of(default):
        models = load(tiny), load(tiny, quantize="int4")
    for model, its in zip(models, wanted, strict=True):
        assert (model.dtype, model.device.type) == (torch.float32, "cpu")
        assert torch.equal(logits(model), its)


def test_a_folder_is_found_as_a_shell_finds_it(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load("~/copy").name_or_path == str(copy)
    assert check_safetensors("~/copy") == (copy / "model.safetensors",)
    monkeypatch.chdir(copy.parent)
    assert load("copy").name_or_path == "copy"


def test_sharded(sharded):
    files = check_safetensors(sharded)
    assert len(files) > 2
    assert torch.equal(logits(load(sharded)), logits(load(save_whole(sharded))))


def save_whole(folder):
    make_preset("tiny").save_pretrained(folder / "whole")
    return folder / "whole"


# -- the same model as from_pretrained ---------------------------------------------------------------


def tensors_of(model):
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def tied(tensors):
    names = collections.defaultdict(set)
    for name, tensor in tensors.items():
        names[id(tensor)].add(name)
    return sorted(map(sorted, names.values()))


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(got, wanted):
    """Every tensor bit by bit, where and what it is, what is tied, and all that is no tensor."""
    ours, theirs = tensors_of(got), tensors_of(wanted)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(ours[name], what) == getattr(tensor, what), (name, what)
        assert type(ours[name]) is type(tensor), name
        assert ours[name].stride() == tensor.stride(), name
        assert torch.equal(bits(ours[name]), bits(tensor)), name
    assert tied(ours) == tied(theirs)
    assert got.config.to_dict() == wanted.config.to_dict()
    assert got.config._experts_implementation == wanted.config._experts_implementation
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()
    for module, other in zip(got.modules(), wanted.modules(), strict=True):
        assert not module.training
        assert getattr(module, "name_or_path", None) == getattr(other, "name_or_path", None)
    assert got.config.name_or_path == wanted.config.name_or_path


def theirs(folder, dtype=None):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)


ARCHITECTURES = {
    "mixtral": "stacked",
    "qwen3_moe": "stacked",
    "deepseek_v3": "stacked",  # a buffer that is loaded
    "deepseek_v4": "stacked",  # many renamings, modules kept in float32
    "phimoe": "stacked",
    "jamba": "stacked",
    "lfm2_moe": "stacked",
    "nemotron_h": "stacked",  # no gate
    "granitemoe": "renamed",
    "gpt_oss": "renamed",
    "kimi_linear": "converted",  # Concatenate
    "inkling2_text": "converted",  # Interleave, a number in a name that is shifted
    "hrm_text": "converted",  # Chunk: several targets of one tensor
    "qwen3_5_moe_text": "renamed",  # a prefix
}
"""Architecture -> what its own format on disk asks of the loader at the most."""


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name in CONFIG_MAPPING])
def test_architectures(model_type, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # also those that start as ones and zeros
            parameter.normal_()
    model.save_pretrained(tmp_path / "own", max_shard_size="150KB")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    seen = {"renamed"}
    slots, convert = checkpoint_module._Target.slots, checkpoint_module._Target.convert

    def spied_slots(target, whole):
        found = slots(target, whole)
        seen.add("stacked" if found is not None and len(found) > 1 else "renamed")
        return found

    def spied_convert(target, model, values):
        seen.add("converted")
        return convert(target, model, values)

    monkeypatch.setattr(checkpoint_module._Target, "slots", spied_slots)
    monkeypatch.setattr(checkpoint_module._Target, "convert", spied_convert)
    for dtype in (None, torch.bfloat16, torch.float16):
        assert_same(load(tmp_path / "own", dtype=dtype, install=False), theirs(tmp_path / "own", dtype))
    assert ARCHITECTURES[model_type] in seen
    assert_same(load(tmp_path / "fused", install=False), theirs(tmp_path / "fused"))


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5_moe", "qwen4_exp"])
def test_the_text_model_of_one_for_images(model_type, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type])
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("vis" in name for name in stored)
    for dtype in (None, torch.bfloat16):
        assert_same(load(tmp_path, dtype=dtype, install=False), theirs(tmp_path, dtype))
    text = next(name for name in stored if "vis" not in name and "layers.1." in name)
    edit(tmp_path, lambda tensors: tensors.update({text.replace("layers.1", "layers.9"): torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"layers\.9\..* is surplus"):
        load(tmp_path, install=False)


EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


@st.composite
def checkpoints(draw):
    """A config, whether its experts are fused on disk, the dtype there, and which shard each tensor is in."""
    model_type = draw(st.sampled_from(list(EXPERTS)))
    config = tiny_config(CONFIG_MAPPING[model_type])
    setattr(config, EXPERTS[model_type], draw(st.integers(12, 24)))
    config.hidden_size = draw(st.sampled_from([8, 24, 40]))
    config.intermediate_size = config.moe_intermediate_size = draw(st.integers(2, 30))
    config.tie_word_embeddings = draw(st.booleans())
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    model = AutoModelForCausalLM.from_config(config, dtype=draw(dtypes))
    return model, draw(st.booleans()), draw(st.randoms(use_true_random=False)), draw(st.none() | dtypes)


@given(checkpoint=checkpoints(), piece=st.sampled_from([64, 1000, 2**20]), buffers=st.integers(1, 9))
def test_any_cut_into_shards(checkpoint, piece, buffers, tmp_path_factory):
    model, fused, random, dtype = checkpoint
    folder = tmp_path_factory.mktemp("shards")
    model.save_pretrained(folder, save_original_format=not fused)
    tensors = load_file(folder / "model.safetensors")
    assert any(".experts.11." in name for name in tensors) != fused
    (folder / "model.safetensors").unlink()
    shuffle_into_shards(tensors, folder, random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "PIECE_BYTES", piece)
        patch.setattr(reader_module, "BUFFER_BYTES", max(8, piece // buffers))
        got = load(folder, dtype=dtype, install=False)
    assert_same(got, theirs(folder, dtype))
    for name, tensor in model.state_dict().items():  # and that is the model which was saved
        assert torch.equal(got.state_dict()[name], tensor.to(got.state_dict()[name].dtype)), name


def shuffle_into_shards(tensors, folder, random):
    names = list(tensors)
    random.shuffle(names)
    cuts = sorted(random.sample(range(1, len(names)), random.randint(1, 5)))
    weight_map = {}
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(names)], strict=True)):
        shard = f"part-{random.randint(0, 99):02}-{number}.safetensors"
        save_file({name: tensors[name] for name in names[start:stop]}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[start:stop], shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("head", ["missing", "equal", "another", "only"])
def test_tied_weights(head, tmp_path):
    """lm_head is tied where it is not stored or stored equal, and not where it is another."""
    config = tiny_config(CONFIG_MAPPING["qwen3_moe"])
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    def change(tensors):
        embeddings = tensors["model.embed_tokens.weight"]
        if head != "missing":
            tensors["lm_head.weight"] = embeddings + (head == "another")
        if head == "only":
            del tensors["model.embed_tokens.weight"]

    edit(tmp_path, change)
    model = load(tmp_path, install=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head != "another")
    assert_same(model, theirs(tmp_path))


def test_the_first_tensor_says_the_dtype_where_the_config_does_not(tmp_path):
    make_preset("tiny", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    # The first by name, not by place in the file: there the widest come first.
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    model = load(tmp_path, install=False)
    assert model.dtype == torch.bfloat16
    assert_same(model, theirs(tmp_path))


def test_what_transformers_ignores_is_no_error(tmp_path):
    make_preset("tiny-deepseek-v3").save_pretrained(tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.layers.61.mlp.gate.weight"] = torch.zeros(4, 4)  # the layer that predicts ahead

    edit(tmp_path, change)
    assert_same(load(tmp_path, install=False), theirs(tmp_path))


def test_what_is_loaded_is_saved_as_it_was_stored(tiny, tmp_path):
    load(tiny).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()


def test_a_model_may_outlive_its_files(copy):
    model = load(copy, install=False)
    before = {name: bits(tensor).clone() for name, tensor in tensors_of(model).items()}
    (copy / "model.safetensors").write_bytes(b"")  # a mapping of the file would end the process here
    assert all(torch.equal(bits(tensor), before[name]) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_is_shown_on_stderr_if_asked_for_or_on_a_terminal(progress, shown, tiny, capsys):
    load(tiny, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("loading" in err) == shown
    assert "Loading weights" not in err  # transformers' own bar


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_onto_a_gpu(dtype, sharded):
    assert_same(load(sharded, device="cuda", dtype=dtype, install=False), theirs(sharded, dtype).to("cuda"))


def test_other_quantised_checkpoints_are_left_to_transformers(copy, monkeypatch):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        checkpoint_module, "_from_pretrained", lambda *args: asked.append(args) or tiny_model("llama")
    )
    load(copy, install=False)
    assert asked == [(copy, None)]


def test_a_config_that_names_a_file_of_its_own_is_left_to_transformers(copy):
    config = json.loads((copy / "config.json").read_text()) | {"transformers_weights": "own.safetensors"}
    (copy / "config.json").write_text(json.dumps(config))
    whole = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(whole, copy / "own.safetensors", metadata={"format": "pt"})
    assert_same(load(copy, install=False), theirs(copy))
    ours, wanted = load(copy, quantize="int4"), theirs(copy)
    quantize_experts(wanted, "int4")
    install(wanted)
    assert torch.equal(logits(ours), logits(wanted))
    for damage, message in (
        ({"lm_head.weight": None}, "1 tensors are not in the checkpoint: lm_head.weight"),
        ({"lm_head.weight": torch.zeros(3, 64)}, "of another shape than config.json says: lm_head.weight"),
        ({"a.weight": torch.zeros(3)}, "surplus: .*: a.weight"),
        ({EXPERT + "w1.weight": torch.zeros(3, 64)}, "tensors do not fit config.json"),
    ):
        left = {name: tensor for name, tensor in (whole | damage).items() if tensor is not None}
        save_file(left, copy / "own.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(copy)


@pytest.mark.skipif(is_peft_available(), reason="peft is installed")
def test_an_adapter_is_not_left_out(copy):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: without the package peft, .* left out"):
        load(copy)


# -- damage ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    make_preset("tiny-qwen3-moe").save_pretrained(folder, max_shard_size="200KB")
    return folder


def of_shard(folder, tensor):
    """The shard that a tensor is in, and all that is in that one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][tensor]
    return file, load_file(file)


def truncate(folder, name, other, draw):
    file, _ = of_shard(folder, name)
    file.write_bytes(file.read_bytes()[: -draw(st.integers(1, 1000), label="bytes")])
    return rf"{file.name}: .*cut off"


def drop(folder, name, other, draw):
    file, tensors = of_shard(folder, name)
    del tensors[name]
    save_file(tensors, file)
    if draw(st.booleans(), label="also from the index"):
        rewrite_index(folder, lambda weight_map: weight_map.pop(name))
        return rf"{re.escape(name)}\b"
    return rf"{file.name}: no tensor {re.escape(name)}, but"


def rename(folder, name, other, draw):
    file, tensors = of_shard(folder, name)
    tensors["x" + name] = tensors.pop(name)
    save_file(tensors, file)
    rewrite_index(folder, lambda weight_map: weight_map.update({"x" + name: weight_map.pop(name)}))
    return rf"\bx?{re.escape(name)}\b"


def reshape(folder, name, other, draw):
    file, tensors = of_shard(folder, name)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, file)
    return rf"{file.name}: tensor {re.escape(name)} has shape"


def swap(folder, name, other, draw):
    """Two tensors of different shapes under each other's name."""
    kept = {key: of_shard(folder, key)[1][key] for key in (name, other)}
    for one, two in ((name, other), (other, name)):
        file, tensors = of_shard(folder, one)
        save_file({**tensors, one: kept[two]}, file)
    return rf"tensor ({re.escape(name)}|{re.escape(other)}) has shape"


def twice(folder, name, other, draw):
    file, tensors = of_shard(folder, other)
    own, own_tensors = of_shard(folder, name)
    if own == file:
        own = folder / "extra.safetensors"
        rewrite_index(folder, lambda weight_map: weight_map.update({"extra": own.name}))
        save_file({"extra": torch.zeros(1), name: own_tensors[name]}, own)
    else:
        save_file({**tensors, name: own_tensors[name]}, file)
    return rf"tensor {re.escape(name)} is also in"


def rewrite_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@given(data=st.data(), damage=st.sampled_from([truncate, drop, rename, reshape, swap, twice]))
def test_damage_is_refused_by_name(cut, tmp_path_factory, data, damage):
    folder = shutil.copytree(cut, tmp_path_factory.mktemp("damaged") / "model")
    shapes = {
        name: tuple(t.shape) for file in check_safetensors(folder) for name, t in load_file(file).items()
    }
    name = data.draw(st.sampled_from(sorted(shapes)), label="tensor")
    others = sorted(other for other, shape in shapes.items() if shape != shapes[name])
    message = damage(folder, name, data.draw(st.sampled_from(others), label="other"), data.draw)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_conversion_that_does_not_fit_is_refused_by_name(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING["kimi_linear"])).save_pretrained(tmp_path)
    name = next(
        name for name in load_file(tmp_path / "model.safetensors") if name.endswith("q_conv1d.weight")
    )
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-2].contiguous()}))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)}.*: put together to .*conv1d.weight of shape"
    ):
        load(tmp_path, install=False)
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*: cannot be put together to .*conv1d"):
        load(tmp_path, install=False)


def cut_lm_head(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].contiguous()


def cut_expert(tensors):
    tensors[EXPERT + "w1.weight"] = tensors[EXPERT + "w1.weight"][:50].contiguous()


def drop_last_experts(tensors):
    for name in [name for name in tensors if ".experts.7." in name]:
        del tensors[name]


def one_expert_more(tensors):
    for name in [name for name in tensors if "1.block_sparse_moe.experts.7." in name]:
        tensors[name.replace("experts.7", "experts.8")] = tensors[name].clone()


def no_gates(tensors):
    for name in [name for name in tensors if re.search(r"layers\.1\..*\.w1\.", name)]:
        del tensors[name]


def fused_beside(tensors):
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 64, 96)


def as_dtype(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def one_layer_more(tensors):
    for name in [name for name in tensors if "layers.1." in name]:
        tensors[name.replace("layers.1", "layers.2")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "not in the checkpoint: lm_head.weight"),
        (lambda tensors: tensors.pop(EXPERT + "w1.weight"), f"no tensor {EXPERT}w1.weight"),
        (
            cut_lm_head,
            r"model\.safetensors: tensor lm_head\.weight has shape \[100, 64\], wanted \[128, 64\]",
        ),
        (cut_expert, rf"{EXPERT}w1\.weight has shape \[50, 64\], wanted \[96, 64\] by config"),
        (drop_last_experts, r"no tensor model\.layers\.\d\.block_sparse_moe\.experts\.7\.w\d\.weight in any"),
        (one_expert_more, r"experts\.8\.w1\.weight is one of expert 8, but .*, wanted 0 to 7"),
        (
            no_gates,
            r"0 tensors \*\.experts\.\*\.w1\.weight for model\.layers\.1\..*\.gate_up_proj, wanted 8",
        ),
        (
            as_dtype("model.norm.weight", torch.int64),
            r"model\.norm\.weight is I64, wanted a floating-point dtype for model\.norm\.weight",
        ),
        (as_dtype(EXPERT + "w1.weight", torch.int8), rf"{EXPERT}w1\.weight is I8, .* for .*\.gate_up_proj"),
        (as_dtype("lm_head.weight", torch.complex64), r"tensor lm_head\.weight is C64, wanted a floating"),
        (fused_beside, r"would be model\.layers\.1\.mlp\.experts\.down_proj, which .*wanted one of them"),
        (
            one_layer_more,
            r"tensor model\.layers\.2\..* is surplus: MixtralForCausalLM .* \(nor for \d+ others\)",
        ),
    ],
)
def test_missing_or_misshapen_tensors(change, message, copy):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value)


def test_no_such_model(tiny, copy, tmp_path):
    for path, message in (
        ("some/model", r"^some/model: no such folder.*huggingface_hub\.snapshot_download\('some/model'\)"),
        ("some/nested/model", r"no such folder; models are loaded from local folders, never downloaded$"),
        (tmp_path / "model", r"/model: no such folder; .* never downloaded$"),
        (tiny / "model.safetensors", r"model\.safetensors: no such folder, but a file; wanted the folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(path)
    for path in (None, make_preset("tiny")):
        with pytest.raises(TypeError, match=f"path must be a folder, .*, got {type(path).__name__}"):
            load(path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        check_safetensors(tmp_path / "nowhere")
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json .* Hugging Face model$"):
        load(copy)
    shutil.copy(tiny / "config.json", copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not a model configuration: OSError"),
        ({"model_type": "no-such-architecture"}, "not a model configuration: .*no-such-architecture"),
        ({"hidden_size": "64"}, "not a model configuration: .*'hidden_size' expected int, got str"),
        ({"hidden_act": "nope"}, "no causal language model can be made of it: KeyError: 'nope'"),
        (
            {"model_type": "t5"},
            r"no causal language model can be made of it: ValueError: .*T5Config.*\[\.\.\.\]$",
        ),
        (
            {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"},
            },
            "names code of its own, which load does not run",
        ),
    ],
)
def test_configurations_that_are_none(change, message, copy):
    config = copy / "config.json"
    config.write_text(
        change if isinstance(change, str) else json.dumps(json.loads(config.read_text()) | change)
    )
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        load(copy)


def test_the_cache_of_the_hub(tiny, tmp_path):
    """Links to blobs, in a folder of a folder; and what an interrupted download leaves: a link to nothing."""
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for file in tiny.iterdir():
        shutil.copy(file, tmp_path / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blob-{file.name}")
    assert torch.equal(logits(load(snapshot)), logits(load(tiny)))
    with pytest.raises(CheckpointError, match=rf"no config\.json .*; {re.escape(str(snapshot))} is$"):
        load(tmp_path)
    (tmp_path / "blob-model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a folder, or a link to nothing"):
        load(snapshot)


def test_not_an_moe_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE experts"):
        load(tmp_path)
    assert logits(load(tmp_path, install=False)).shape == (2, 10, 128)


def test_unsupported_experts_are_refused_before_their_weights_are_read(tmp_path, monkeypatch):
    tiny_model("doge").save_pretrained(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("read")
    )
    with pytest.raises(UnsupportedExpertsError, match="DogeCDMoE: its experts are rows"):
        load(tmp_path)

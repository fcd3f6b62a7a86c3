"""Loading: whole files are read right in both forms, everything else is refused by name."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import SUPPORTED, tiny_model

from qllm_ops import PriorityFlag
from qllm_ops.models import (
    CheckpointError,
    UnsupportedExpertsError,
    check_safetensors,
    load,
    make_preset,
    uninstall,
)

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


def test_sharded(sharded):
    files = check_safetensors(sharded)
    assert len(files) > 2
    assert torch.equal(logits(load(sharded)), logits(load(save_whole(sharded))))


def save_whole(folder):
    make_preset("tiny").save_pretrained(folder / "whole")
    return folder / "whole"


def test_a_file_or_a_folder(tiny):
    file = tiny / "model.safetensors"
    assert check_safetensors(file) == check_safetensors(str(tiny)) == (file,)


# -- damage ------------------------------------------------------------------------------------------


@given(data=st.data())
def test_every_cut_is_found(tiny, tmp_path_factory, data):
    whole = (tiny / "model.safetensors").read_bytes()
    length = data.draw(st.one_of(st.integers(0, 9000), st.integers(0, len(whole) - 1)), label="length")
    cut = tmp_path_factory.mktemp("cut") / "model.safetensors"
    cut.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*cut off"):
        check_safetensors(cut)


@given(data=st.data())
def test_damaged_headers_never_escape(tiny, tmp_path_factory, data):
    """Whatever stands in the header, the answer is yes or CheckpointError; a yes fits the file's length."""
    whole = bytearray((tiny / "model.safetensors").read_bytes()[:3000])
    length = int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, 2990), label="at")
    junk = data.draw(
        st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"-", b"[", b"{}", b"1e9"]))
    )
    whole[at : at + len(junk)] = junk
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    file.write_bytes(bytes(whole) + (tiny / "model.safetensors").read_bytes()[len(whole) :])
    error = None
    try:
        check_safetensors(file)
    except CheckpointError as caught:
        error = caught
    if error is None:
        assert length == int.from_bytes(whole[:8], "little")
    else:
        assert str(file) in str(error)


HEADERS = {
    "no JSON": b"{nonsense",
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no dtype": {"w": {"shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {"w": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 4]}},
    "wrong size": {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "a hole": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "an overlap": {
        "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "backwards": {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
    "endless": b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
    "fractions": {"w": {"dtype": "F32", "shape": [0.5, 2], "data_offsets": [0, 4]}},
    "text": {"w": {"dtype": "F32", "shape": "ab", "data_offsets": "cd"}},
    "nothing": {"w": None},
    "trailing bytes": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers(case, tmp_path):
    header = HEADERS[case]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor w|header") as caught:
        check_safetensors(file)
    assert str(file) in str(caught.value)


def test_smallest_good_file(tmp_path):
    save_file({"scalar": torch.tensor(1.0), "empty": torch.empty(0, 3)}, tmp_path / "a.safetensors")
    assert len(check_safetensors(tmp_path)) == 1


def test_missing_shard(sharded):
    shard = check_safetensors(sharded)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file") as caught:
        load(sharded)
    assert "model.layers" in str(caught.value) or "model.embed" in str(caught.value)


def test_tensor_not_in_its_shard(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.not.there"] = first
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{first}: no tensor model\.not\.there"):
        load(sharded)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"w": []}}'])
def test_bad_index(text, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not an index"):
        check_safetensors(sharded)


def cut_lm_head(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].contiguous()


def cut_expert(tensors):
    tensors[EXPERT + "w1.weight"] = tensors[EXPERT + "w1.weight"][:50].contiguous()


def drop_last_experts(tensors):
    for name in [name for name in tensors if ".experts.7." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "not in the checkpoint: lm_head.weight"),
        (lambda tensors: tensors.pop(EXPERT + "w1.weight"), f"no tensor {EXPERT}w1.weight"),
        (cut_lm_head, "another shape.*lm_head.weight"),
        (cut_expert, "do not fit config.json"),
        (drop_last_experts, "another shape.*experts"),
    ],
)
def test_missing_or_misshapen_tensors(change, message, copy):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value)


def test_no_such_model(tiny, copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"some/model: no such folder; .* never downloaded"):
        load("some/model")
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tiny / "model.safetensors")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        check_safetensors(tmp_path / "nowhere")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not a model configuration"):
        load(copy)
    (copy / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(
        CheckpointError, match=r"config\.json: not a model configuration.*no-such-architecture"
    ):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(copy)
    shutil.copy(tiny / "config.json", copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load(copy)


def test_not_an_moe_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE experts"):
        load(tmp_path)
    assert logits(load(tmp_path, install=False)).shape == (2, 10, 128)


def test_unsupported_experts_are_refused_before_their_weights_are_read(tmp_path, monkeypatch):
    tiny_model("dbrx").save_pretrained(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("read")
    )
    with pytest.raises(UnsupportedExpertsError, match="DbrxExperts: transformers never asks"):
        load(tmp_path)

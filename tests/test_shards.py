"""The files of a checkpoint: cut off, damaged, missing or twice there is found without reading weights."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qllm_ops.models import CheckpointError, check_safetensors, make_preset
from qllm_ops.models.shards import BITS, TORCH, stored_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_preset("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tmp_path):
    make_preset("tiny").save_pretrained(tmp_path, max_shard_size="300KB")
    return tmp_path


def test_a_file_or_a_folder(tiny):
    file = tiny / "model.safetensors"
    assert check_safetensors(file) == check_safetensors(str(tiny)) == (file,)


@given(data=st.data())
def test_every_cut_is_found(tiny, tmp_path_factory, data):
    whole = (tiny / "model.safetensors").read_bytes()
    length = data.draw(st.one_of(st.integers(0, 9000), st.integers(0, len(whole) - 1)), label="length")
    cut = tmp_path_factory.mktemp("cut") / "model.safetensors"
    cut.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*cut off"):
        check_safetensors(cut)


def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path):
    """What a clone without Git LFS leaves in place of the weights."""
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a pointer of Git LFS .*git lfs pull"):
        check_safetensors(file)


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


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"w": []}}', '{"weight_map": {"w": 5}}']
)
def test_bad_index(text, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not an index"):
        check_safetensors(sharded)


def test_missing_shard(sharded):
    shard = check_safetensors(sharded)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file") as caught:
        stored_tensors(sharded)
    assert "model.layers" in str(caught.value) or "model.embed" in str(caught.value)


def test_tensor_not_in_its_shard(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.not.there"] = first
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{first}: no tensor model\.not\.there"):
        stored_tensors(sharded)


def save(folder, files, index=True):
    """Files of small tensors, by name, and an index of them."""
    for file, tensors in files.items():
        save_file({tensor: torch.zeros(2) for tensor in tensors}, folder / file)
    if index:
        weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_what_is_read_is_what_the_index_names(tmp_path):
    save(tmp_path, {"b.safetensors": ["v"], "a.safetensors": ["w"]})
    save(tmp_path, {"consolidated.safetensors": ["v", "tok"]}, index=False)
    assert len(check_safetensors(tmp_path)) == 3
    found = stored_tensors(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.items()} == {
        "w": "a.safetensors",
        "v": "b.safetensors",
    }


def test_one_file_comes_before_an_index(tmp_path):
    save(tmp_path, {"a.safetensors": ["w"]})
    save(tmp_path, {"model.safetensors": ["w"]}, index=False)
    assert stored_tensors(tmp_path)["w"].file.name == "model.safetensors"
    (tmp_path / "a.safetensors").unlink()
    assert stored_tensors(tmp_path)["w"].file.name == "model.safetensors"


def test_what_is_not_read_need_not_be_whole(tmp_path):
    """A clone of which only some files were fetched; `check_safetensors` looks at all of them."""
    save(tmp_path, {"a.safetensors": ["w"]})
    (tmp_path / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert list(stored_tensors(tmp_path)) == ["w"]
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors: a pointer of Git LFS"):
        check_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save(tmp_path, {"a.safetensors": ["v", "w"], "b.safetensors": ["w", "x"]})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor w is also in a\.safetensors"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "missing"),
    [
        (["a.experts.0.up", "a.experts.0.down", "a.experts.1.up"], "a.experts.1.down"),
        (["a.experts.0.up", "a.experts.2.up"], "a.experts.1.up"),
        (["a.experts.0.up", "b.experts.1.up"], "b.experts.0.up"),
        (["a.experts.0.up", "a.experts.1.up", "b.experts.0.down"], None),
        (["a.experts.up", "a.shared_experts.3.up.scale", "a.1.up"], None),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_what_one_expert_of_a_layer_has_they_all_have(tensors, missing, cut, tmp_path):
    """In whichever shard."""
    save(tmp_path, {"a.safetensors": tensors[:cut], "b.safetensors": tensors[cut:]})
    if missing is None:
        assert stored_tensors(tmp_path).keys() == set(tensors)
        return
    for look in (check_safetensors, stored_tensors):
        with pytest.raises(CheckpointError, match=rf"no tensor {re.escape(missing)} in any file"):
            look(tmp_path)


def test_neither_one_file_nor_an_index(tmp_path):
    save(tmp_path, {"a.safetensors": ["w"]}, index=False)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*, but a\.safetensors"):
        stored_tensors(tmp_path)


def test_shards_in_folders_of_their_own(tmp_path):
    (tmp_path / "inner").mkdir()
    save(tmp_path, {"inner/a.safetensors": ["w"]})
    assert stored_tensors(tmp_path)["w"].file == tmp_path / "inner" / "a.safetensors"


@given(data=st.data())
def test_reading_any_part_into_any_dtype(tmp_path_factory, data):
    stored, wanted = (
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])) for _ in "ab"
    )
    values = torch.arange(-20_000, 20_000).to(stored)
    file = tmp_path_factory.mktemp("part") / "model.safetensors"
    save_file({"other": torch.ones(3, dtype=torch.uint8), "w": values.view(200, 200)}, file)
    tensor = stored_tensors(file.parent)["w"]
    assert (tensor.shape, tensor.dtype) == ((200, 200), stored)
    start = data.draw(st.integers(0, len(values)), label="start")
    stop = data.draw(st.integers(start, len(values)), label="stop")
    target = torch.full((stop - start,), 7).to(wanted)
    buffer = (
        None
        if stored == wanted
        else torch.empty(data.draw(st.sampled_from([8, 999, 10**6])), dtype=torch.uint8)
    )
    tensor.read(start, target, buffer)
    assert torch.equal(target, values[start:stop].to(wanted))


def test_a_file_that_is_cut_off_after_it_was_checked(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, file)
    tensor = stored_tensors(tmp_path)["w"]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor w ends 40 bytes too early"):
        tensor.read(0, torch.empty(100))


def test_a_dtype_that_no_model_in_memory_has(tmp_path):
    raw = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(2))
    with pytest.raises(CheckpointError, match=r"tensor w has dtype F4, wanted one of F64"):
        _ = stored_tensors(tmp_path)["w"].dtype


@pytest.mark.parametrize("code", BITS)
def test_a_dtype_has_the_bits_that_its_name_says(code, tmp_path):
    bits = 8 if code == "BOOL" else int(re.search(r"\d+", code)[0])
    assert code not in TORCH or TORCH[code].itemsize == bits // 8
    for more in (0, -1, 1):
        header = {"w": {"dtype": code, "shape": [2, 4], "data_offsets": [0, bits + more]}}
        raw = json.dumps(header).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(bits + more))
        if not more:
            assert stored_tensors(tmp_path)["w"].shape == (2, 4)
            continue
        with pytest.raises(CheckpointError, match=rf"tensor w has bytes 0 to {bits + more}, wanted {bits} "):
            check_safetensors(file)

"""Where scales and zero points lie: kernels find them, whatever came and wherever it goes."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

import qllm_ops
from qllm_ops import QuantizedWeight, quantize_int4, quantize_mxfp4
from qllm_ops.models.projections import QuantizedProjection
from qllm_ops.testing import QUANTIZED, quantize

PLACES = {
    "in a buffer": lambda t, at: in_buffer(t, at),
    "a slice": lambda t, at: pad(t, (at, 1) * 3)[tuple(slice(at, at + size) for size in t.shape)],
    "by columns": lambda t, at: t.mT.contiguous().mT,
    "rows of all experts": lambda t, at: t.transpose(0, 1).contiguous().transpose(0, 1),
    "of its own": lambda t, at: t.clone(),
}
"""Where a tensor of a user's may lie: equal to the one given."""


def in_buffer(tensor, byte):
    """At an address that need not be a multiple of the tensor's item size, as in a mapped file."""
    numbers = bytes(byte) + tensor.flatten().clone().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(numbers), dtype=tensor.dtype, offset=byte).view(tensor.shape)


def assert_where_kernels_look(weight):
    """Rows in whole words of 4 bytes, one after the other, and numbers in between."""
    for tensor in (weight.scales, weight.zero_words):
        if tensor is not None:
            experts, rows, columns = tensor.shape
            stride, step = tensor.stride()[1:]
            assert tensor.data_ptr() % 4 == 0
            assert stride * tensor.itemsize % 4 == 0
            assert step == (2 if weight.zero_words is weight.scales else 1)
            read = tensor.as_strided((experts * rows, stride), (stride, 1))
            assert torch.equal(read[:, : step * columns : step], tensor.flatten(0, 1))
            assert step == 2 or not read[:, columns:].any()
    if weight.zero_words is weight.scales:
        assert torch.equal(weight.scales.view(torch.int16).as_strided((1,), (1,), 1), weight.zeros[0, 0, :1])


def saved_and_loaded(value):
    torch.save({"value": value}, saved := io.BytesIO())
    saved.seek(0)
    return torch.load(saved)["value"]


def moved(weight, how):
    """The weight, by one of the ways on which it comes elsewhere."""
    other = QuantizedProjection(copy.deepcopy(weight))
    if how == "torch.save":
        return saved_and_loaded(weight)
    if how == "safetensors":
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(other.state_dict())), assign=True)
    if how == "state_dict":
        state = saved_and_loaded(other.state_dict())
        other.scales.fill_(1)
        other.load_state_dict(state)
    if how == "a model's copy":
        other = copy.deepcopy(other.bfloat16())
    if how == "its buffers":
        other._apply(torch.clone)
    if how == "checked":
        zeros = None if weight.zeros is None else weight.zeros.clone()
        return QuantizedWeight.checked(
            weight.values, weight.scales.clone(), weight.format, weight.block, weight.columns, zeros,
            weight.largest,
        )  # fmt: skip
    return weight.to("cpu") if how == "to" else other.weight


@given(
    format=st.sampled_from(sorted(QUANTIZED)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([16, 48, 128, 250, 400])),
    places=st.tuples(*[st.sampled_from(sorted(PLACES))] * 2),
    at=st.tuples(*[st.integers(0, 3)] * 3),
    how=st.sampled_from(
        ["to", "torch.save", "safetensors", "state_dict", "a model's copy", "its buffers", "checked"]
    ),
)
def test_wherever_a_users_tensors_lie_kernels_find_them(format, shape, places, at, how):
    made = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), format)
    values, scales = in_buffer(made.values, at[0]), PLACES[places[0]](made.scales, at[1])
    zeros = None if made.zeros is None else PLACES[places[1]](made.zeros, at[2])
    weight = QuantizedWeight(values, scales, made.format, made.block, made.columns, zeros)
    for each in (weight, moved(weight, how)):
        assert torch.equal(each.scales, made.scales)
        assert torch.equal(each.dequantize(), made.dequantize())
        assert each.largest == made.largest
        assert_where_kernels_look(each)


def test_some_rows_of_a_weight_are_a_weight():
    """Their scales and zero points lie beside one another already, but not row after row."""
    dense = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    first = quantize_int4(dense, symmetric=False)
    parts = (first.scales[:, :16], "int4", first.block, 256, first.zeros[:, :16])
    tensors = {
        "hidden_states": dense[0, :4],
        "gate_up_proj": QuantizedWeight(first.values[:, :16].contiguous(), *parts),
        "down_proj": quantize_int4(dense.mT[..., :8], symmetric=False),
        "top_k_index": torch.tensor([[0], [1], [1], [0]]),
        "top_k_weights": torch.ones(4, 1),
    }
    assert tensors["gate_up_proj"].zero_words is tensors["gate_up_proj"].scales
    assert_where_kernels_look(tensors["gate_up_proj"])
    output = qllm_ops.moe(**tensors, backend="triton")
    torch.testing.assert_close(output, qllm_ops.moe_reference(**tensors), rtol=1e-4, atol=1e-4)


class Forged:
    """In a file it is whatever its maker says."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("format", QUANTIZED)
def test_torch_load_takes_a_weight_by_default(format):
    """And checks it: a file is no more trusted than any other caller."""
    weight = quantize(torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0)), format)
    loaded = saved_and_loaded(weight)
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    assert loaded.largest == weight.largest

    rebuild, parts = weight.__reduce__()
    fewer = (parts[0], parts[1][:1].clone(), *parts[2:])
    with pytest.raises(ValueError, match="scales must be"):
        saved_and_loaded(Forged((rebuild, fewer)))
    # The class itself is none that a file may name: its attributes could then be set to anything.
    with pytest.raises(pickle.UnpicklingError, match=r"qllm_ops.quantized.QuantizedWeight"):
        saved_and_loaded(Forged((QuantizedWeight, parts)))


def test_what_was_moved_or_loaded_is_described_anew():
    """The largest number decides whether 16 bits hold a product; and old memory is let go."""
    small, large = (quantize_int4(size * torch.randn(2, 8, 256), symmetric=False) for size in (1, 100))
    projection = QuantizedProjection(small)
    projection.load_state_dict(QuantizedProjection(large).state_dict())
    assert projection.weight.largest == large.largest
    said = str(projection)
    projection.to("meta")
    assert str(projection) == said
    assert projection._weight is None
    state = QuantizedProjection(large).state_dict()
    state["scales"][0, 0] = float("nan")
    projection = QuantizedProjection(large)
    with pytest.raises(ValueError, match="scales must be positive and finite, got nan"):
        projection.load_state_dict(state)


def test_weights_of_another_format_are_not_loaded():
    """Of the same shapes, in groups of 32."""
    dense = torch.randn(2, 8, 64)
    int4, mxfp4 = QuantizedProjection(quantize_int4(dense, 32)), QuantizedProjection(quantize_mxfp4(dense))
    before = mxfp4.weight.dequantize()
    with pytest.raises(
        TypeError, match=r"scales must be torch.uint8 in mxfp4 \(2, 8, 64\).*got torch.bfloat16"
    ):
        mxfp4.load_state_dict(int4.state_dict())
    assert torch.equal(mxfp4.weight.dequantize(), before)

"""What the operator refuses, and that the message says which argument, what came and what was wanted."""

import os

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import qllm_ops
from qllm_ops import ACTIVATIONS, Activation, testing
from qllm_ops.inputs import INDEX_DTYPES, check_inputs
from qllm_ops.testing import MoeCase

T, H, I, E, K = 5, 8, 6, 4, 2  # noqa: E741
BACKENDS = ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")


def tensors(**changes):
    return {**MoeCase(T, H, I, E, K).tensors(), **changes}


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = [
    # changed argument, its value, error, words of the message besides the argument's name
    ("hidden_states", None, TypeError, ["(T, H)", "NoneType"]),
    ("hidden_states", [[1.0]], TypeError, ["list"]),
    ("hidden_states", zeros(1, T, H), ValueError, ["2 dimensions", "(1, 5, 8)"]),
    ("hidden_states", zeros(T, H).to_sparse(), TypeError, ["sparse"]),
    (
        "hidden_states",
        zeros(T, H, dtype=torch.float64),
        TypeError,
        ["float32, bfloat16 or float16", "float64"],
    ),
    ("hidden_states", zeros(T, H, dtype=torch.int64), TypeError, ["int64"]),
    ("hidden_states", zeros(T, H, dtype=torch.complex64), TypeError, ["complex64"]),
    ("hidden_states", zeros(T, 0), ValueError, ["at least 1", "(5, 0)"]),
    ("gate_up_proj", zeros(2 * I, H), ValueError, ["3 dimensions", "(12, 8)"]),
    ("gate_up_proj", zeros(E, 2 * I, H, dtype=torch.bfloat16), TypeError, ["float32", "bfloat16"]),
    ("gate_up_proj", zeros(E, 2 * I + 1, H), ValueError, ["(4, 12, 8)", "(4, 13, 8)"]),
    ("gate_up_proj", zeros(E, I, H), ValueError, ["(4, 12, 8)", "(4, 6, 8)"]),
    ("gate_up_proj", zeros(E, 2 * I, H + 1), ValueError, ["(4, 12, 8)", "(4, 12, 9)"]),
    ("gate_up_proj", zeros(E - 1, 2 * I, H), ValueError, ["(4, 12, 8)", "(3, 12, 8)"]),
    ("gate_up_proj", zeros(E, H, 2 * I).mT, ValueError, ["contiguous", "strides"]),
    ("down_proj", zeros(E, H), ValueError, ["3 dimensions", "(4, 8)"]),
    ("down_proj", zeros(E, H, I, dtype=torch.float16), TypeError, ["float32", "float16"]),
    ("down_proj", zeros(E, H + 1, I), ValueError, ["H = 8", "(4, 9, 6)"]),
    ("down_proj", zeros(E, I, H), ValueError, ["H = 8", "(4, 6, 8)"]),
    ("down_proj", zeros(E, H, 0), ValueError, ["at least 1", "(4, 8, 0)"]),
    ("down_proj", zeros(0, H, I), ValueError, ["at least 1", "(0, 8, 6)"]),
    ("down_proj", zeros(E, I, H).mT, ValueError, ["contiguous", "strides"]),
    ("top_k_index", zeros(T * K, dtype=torch.int64), ValueError, ["2 dimensions", "(10,)"]),
    ("top_k_index", zeros(T, K), TypeError, ["integer", "float32"]),
    ("top_k_index", zeros(T, K, dtype=torch.bool), TypeError, ["integer", "bool"]),
    ("top_k_index", zeros(T + 1, K, dtype=torch.int64), ValueError, ["T = 5", "(6, 2)"]),
    ("top_k_index", zeros(T, 0, dtype=torch.int64), ValueError, ["K >= 1", "(5, 0)"]),
    ("top_k_weights", zeros(T), ValueError, ["2 dimensions", "(5,)"]),
    ("top_k_weights", zeros(T, K, dtype=torch.int64), TypeError, ["floating-point", "int64"]),
    ("top_k_weights", zeros(T, K, dtype=torch.bool), TypeError, ["bool"]),
    ("top_k_weights", zeros(T, K + 1), ValueError, ["(5, 2)", "(5, 3)"]),
    ("top_k_weights", zeros(K, T), ValueError, ["(5, 2)", "(2, 5)"]),
    ("activation", "swish", ValueError, ["silu, gelu, gelu_tanh", "'swish'"]),
    ("activation", None, TypeError, ["silu", "NoneType"]),
    ("activation", torch.nn.SiLU, TypeError, ["a function", "the class SiLU"]),
    ("top_k_weights", zeros(T, K, dtype=torch.float8_e4m3fn), TypeError, ["16 bits", "float8_e4m3fn"]),
    ("down_bias", zeros(E, H, dtype=torch.float8_e4m3fn), TypeError, ["16 bits", "float8_e4m3fn"]),
    ("gate_up_bias", zeros(E, I), ValueError, ["(E, 2I)", "(4, 12)", "(4, 6)"]),
    ("gate_up_bias", zeros(2 * I), ValueError, ["2 dimensions", "(12,)"]),
    ("gate_up_bias", zeros(E, 2 * I, dtype=torch.int64), TypeError, ["floating-point", "int64"]),
    ("gate_up_bias", 1.0, TypeError, ["(E, 2I)", "float"]),
    ("down_bias", zeros(E, I), ValueError, ["(E, H)", "(4, 8)", "(4, 6)"]),
    ("down_bias", torch.zeros(E, H, device="meta"), ValueError, ["meta", "cpu"]),
    ("transposed", 1, TypeError, ["True or False", "1"]),
    ("interleaved", None, TypeError, ["True or False", "None"]),
    ("gated", "no", TypeError, ["True or False", "'no'"]),
    ("max_exit_us", -1.0, ValueError, ["positive", "-1.0"]),
    ("max_exit_us", None, ValueError, ["positive", "None"]),
    ("batch_invariant", 1, TypeError, ["True or False", "1"]),
    ("weights_on_input", 0, TypeError, ["True or False", "0"]),
    ("expert_norm", 1, TypeError, ["function", "int"]),
    *(
        (name, torch.zeros(shape, dtype=dtype, device="meta"), ValueError, ["meta", "cpu"])
        for name, shape, dtype in (
            ("gate_up_proj", (E, 2 * I, H), torch.float32),
            ("down_proj", (E, H, I), torch.float32),
            ("top_k_index", (T, K), torch.int64),
            ("top_k_weights", (T, K), torch.float32),
        )
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(name, value, error, words):
    for call in (check_inputs, qllm_ops.moe, qllm_ops.MoeRun):
        with pytest.raises(error) as caught:
            call(**tensors(**{name: value}))
        for word in [name, *words]:
            assert word in str(caught.value)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_any_integer_index_is_the_same(dtype):
    given = tensors()
    expected = qllm_ops.moe(**given)
    given["top_k_index"] = given["top_k_index"].to(dtype)
    assert torch.equal(qllm_ops.moe(**given), expected)


def test_experts_beyond_the_range_of_the_index_dtype():
    """Offsets of 300 experts do not fit the eight bits of an index that points at the first of them."""
    given = MoeCase(9, 4, 4, 300, 3).tensors()
    given["top_k_index"] = given["top_k_index"] % 250
    expected = qllm_ops.moe(**given)
    given["top_k_index"] = given["top_k_index"].to(torch.uint8)
    assert torch.equal(qllm_ops.moe(**given), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_weights(dtype):
    given = tensors()
    given["top_k_weights"] = given["top_k_weights"].to(dtype)
    output = qllm_ops.moe(**given)
    assert output.dtype == torch.float32
    assert torch.allclose(output, qllm_ops.moe_reference(**given), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tensors_need_not_be_contiguous(backend):
    given = {**MoeCase(T, H, I, E, K, biases=True).tensors(), "backend": backend}
    expected = qllm_ops.moe(**given)
    for name in ("hidden_states", "top_k_index", "top_k_weights", "gate_up_bias", "down_bias"):
        strided = given[name].t().contiguous().t()
        assert not strided.is_contiguous()
        output = qllm_ops.moe(**{**given, name: strided})
        assert torch.equal(output, expected)
        assert output.is_contiguous()
        every_other = given[name].repeat_interleave(2, dim=0)[::2]
        assert torch.equal(qllm_ops.moe(**{**given, name: every_other}), expected)


def test_a_slice_of_experts_is_contiguous_and_taken_as_it_is():
    given = tensors()
    few = {**given, "gate_up_proj": given["gate_up_proj"][1:3], "down_proj": given["down_proj"][1:3]}
    inputs = check_inputs(**few)
    assert inputs.gate_up_proj.data_ptr() == few["gate_up_proj"].data_ptr()
    assert inputs.num_experts == 2
    shifted = {**few, "top_k_index": given["top_k_index"] - 1}
    assert torch.allclose(qllm_ops.moe(**shifted), qllm_ops.moe_reference(**shifted), atol=1e-5)


def test_parameters_are_taken_as_they_are():
    given = tensors()
    given["gate_up_proj"] = torch.nn.Parameter(given["gate_up_proj"])
    assert check_inputs(**given).gate_up_proj.data_ptr() == given["gate_up_proj"].data_ptr()


@pytest.mark.parametrize(
    ("transform", "argument"),
    [(torch.vmap, zeros(3, T, H)), (torch.func.grad, zeros(T, H)), (torch.func.jacrev, zeros(T, H))],
)
def test_transforms_of_functions_are_refused(transform, argument):
    given = tensors()
    for call in (qllm_ops.moe, qllm_ops.moe_reference):
        with pytest.raises(RuntimeError, match=r"qllm_ops\.moe cannot be called inside of torch\.func"):
            transform(lambda x: call(**{**given, "hidden_states": x}).sum())(argument)  # noqa: B023


@pytest.mark.parametrize("name", ["hidden_states", "gate_up_proj", "top_k_weights"])
def test_what_has_its_numbers_elsewhere_is_refused(name):
    given = tensors()
    wrapped = TwoTensor(given[name], given[name].clone())
    with pytest.raises(TypeError, match=f"{name} must have its numbers in memory, got a TwoTensor"):
        qllm_ops.moe(**{**given, name: wrapped})


def test_tensors_of_the_meta_device_give_one():
    given = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in MoeCase(T, H, I, E, K, dtype=torch.bfloat16, biases=True).tensors().items()
    }
    for options in ({}, {"activation": testing.own_gate}, {"flag": qllm_ops.PriorityFlag()}):
        output = qllm_ops.moe(**{**given, **options})
        assert (output.device.type, output.shape, output.dtype) == ("meta", (T, H), torch.bfloat16)
    assert qllm_ops.moe_reference(**given).is_meta
    assert qllm_ops.warm_up(**given) is None
    with pytest.raises(
        ValueError, match=r"hidden_states must be in memory for a MoeRun, .* on the meta device"
    ):
        qllm_ops.MoeRun(**given)
    with pytest.raises(ValueError, match="down_proj must be"):
        qllm_ops.moe(**{**given, "down_proj": zeros(E, H + 1, I, dtype=torch.bfloat16, device="meta")})


def test_inputs_know_their_sizes():
    inputs = check_inputs(**tensors(activation=ACTIVATIONS[1]))
    sizes = (
        inputs.num_tokens, inputs.hidden_size, inputs.intermediate_size, inputs.num_experts, inputs.top_k,
    )  # fmt: skip
    assert sizes == (T, H, I, E, K)
    assert inputs.activation == Activation("gelu")
    assert inputs.gate_up_size == 2 * I
    turned = {name: tensors()[name].mT.contiguous() for name in ("gate_up_proj", "down_proj")}
    inputs = check_inputs(**{**tensors(), **turned}, transposed=True)
    assert (inputs.intermediate_size, inputs.gate_up_size) == (I, 2 * I)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transposed": True}, ["down_proj", "(E, I, H)", "H = 8"]),
        ({"gated": False}, ["gate_up_proj", "(E, I, H)", "(4, 6, 8)", "(4, 12, 8)"]),
        ({"gated": False, "interleaved": True}, ["interleaved", "gated=False"]),
        (
            {"gate_up_proj": zeros(E, I, H), "gated": False, "gate_up_bias": zeros(E, 2 * I)},
            ["(E, I)", "(4, 12)"],
        ),
    ],
)
def test_layouts_that_the_weights_do_not_have(changes, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        check_inputs(**{**tensors(), **changes})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tanh"}, "silu, gelu, gelu_tanh, relu, relu2, got 'tanh'"),
        ({"kind": "gelu", "alpha": 2.0}, "alpha belongs to .silu., got 2.0"),
        ({"kind": "silu", "alpha": float("nan")}, "finite, got nan"),
        ({"kind": "silu", "limit": 0.0}, "limit must be positive or None, got 0.0"),
        ({"kind": "silu", "limit": float("nan")}, "limit must be positive"),
    ],
)
def test_bad_activations(options, words):
    with pytest.raises(ValueError, match=words):
        Activation(**options)

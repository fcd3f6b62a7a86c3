"""Autocast and grad mode of the caller change no bit, and a gradient that there is none of is refused."""

import os
import threading

import pytest
import torch
from torch.autograd import forward_ad

import qllm_ops
from qllm_ops import MoeRun, QuantizedWeight, moe, moe_reference
from qllm_ops.testing import QUANTIZED, MoeCase, assert_same_bits, own_gate, own_norm, quantize

BACKENDS = ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")
CASE = MoeCase(40, 16, 12, 4, 2, biases=True)
NO_BACKWARD = r"qllm_ops\.moe is for inference and has no backward pass"


def of_a_run(*, backend, **tensors):
    """Made by a thread and stepped by another one, each in a mode of its own."""
    with torch.autocast("cpu", enabled=False):
        run = MoeRun(**tensors, backend=backend)

    def steps():
        with torch.autocast("cpu"):
            while not run.step(3):
                pass

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    return run.output


def of_the_reference(*, backend, **tensors):
    return moe_reference(**tensors)


def projects(rows):
    """A function of a user whose product autocast would turn into one of 16 bits."""
    return rows @ torch.linspace(-1, 1, rows.shape[1] * 12).view(-1, 12)


@pytest.mark.parametrize("call", [moe, of_a_run, of_the_reference])
@pytest.mark.parametrize(
    "changes", [{}, {"batch_invariant": True}, {"activation": projects}, {"quantized": "int4"}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, changes, call):
    given = MoeCase(**{**vars(CASE), "biases": False, **changes}).tensors() | {"backend": backend}
    expected = of_the_reference(**given) if call is of_the_reference else moe(**given)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert_same_bits(call(**given), expected)
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("format", QUANTIZED)
def test_weights_are_quantised_alike_under_autocast(format):
    weight = CASE.tensors()["gate_up_proj"]
    expected = quantize(weight, format)
    with torch.autocast("cpu"):
        got = quantize(weight, format)
        assert_same_bits(got.dequantize(), expected.dequantize())


@pytest.mark.parametrize("call", [moe, of_a_run, of_the_reference])
@pytest.mark.parametrize(
    "name", ["hidden_states", "gate_up_proj", "down_proj", "top_k_weights", "gate_up_bias", "down_bias"]
)
def test_a_gradient_is_refused_and_not_taken_for_zero(name, call):
    given = CASE.tensors() | {"backend": "torch"}
    expected = call(**given)
    given[name] = torch.nn.Parameter(given[name])
    output = call(**given)
    assert_same_bits(output.detach(), expected)
    residual = torch.ones(16, requires_grad=True)
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        (output + residual).sum().backward()
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        torch.autograd.grad(call(**given).sum(), given[name])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not call(**given).requires_grad


@pytest.mark.parametrize("call", [moe, MoeRun, moe_reference])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["hidden_states", "down_proj", "top_k_weights", "gate_up_bias"])
def test_a_tangent_is_refused_and_not_dropped(name, mode, call):
    given = CASE.tensors()
    with mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"no forward-mode derivative.*got {name} with"):
            call(**given | {name: dual})
        assert moe(**given).shape == (40, 16)


def test_scales_that_require_a_gradient_count_as_well():
    given = MoeCase(5, 16, 12, 4, 2, quantized="int4").tensors()
    expected = moe(**given)
    first = given["gate_up_proj"]
    scales = first.scales.clone().requires_grad_()
    given["gate_up_proj"] = QuantizedWeight(first.values, scales, "int4", first.block, first.columns)
    output = moe(**given)
    assert_same_bits(output.detach(), expected)
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        output.sum().backward()


def test_an_output_in_grad_mode_may_be_changed_in_place():
    """As models add a residual, in inference without no_grad."""
    given = CASE.tensors()
    expected = moe(**given) + 1
    given["down_proj"] = torch.nn.Parameter(given["down_proj"])
    run = MoeRun(**given)
    run.step()
    for output in (moe(**given), run.output):
        output += 1
        assert_same_bits(output.detach(), expected)


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize("name", ["activation", "expert_norm"])
def test_parameters_of_a_function_count_as_well(name, as_method):
    module = torch.nn.Linear(24, 12) if name == "activation" else torch.nn.LayerNorm(16)
    given = CASE.tensors() | {name: module.forward if as_method else module}
    output = moe(**given)
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        output.sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not moe(**given).requires_grad
    assert_same_bits(moe(**given), output.detach())


def test_who_requires_no_gradient_gets_a_plain_output():
    for changes in ({}, {"activation": own_gate, "expert_norm": own_norm}):
        output = moe(**CASE.tensors() | changes)
        assert not output.requires_grad
        assert output.grad_fn is None


def test_modes_are_left_as_they_were_by_a_call_that_raises():
    def fails(rows):
        raise ZeroDivisionError

    with torch.autocast("cpu"), pytest.raises(ZeroDivisionError):
        moe(**CASE.tensors() | {"activation": fails})
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert qllm_ops.moe(**CASE.tensors()).dtype == torch.float32

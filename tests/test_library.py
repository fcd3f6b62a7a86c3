"""The operator under torch.compile and torch.export."""

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import qllm_ops
from qllm_ops import Activation, PriorityFlag, QuantizedWeight, quantize_int4
from qllm_ops.flag import NUMBERED
from qllm_ops.library import numbered_flag
from qllm_ops.testing import (
    LAYOUTS,
    QUANTIZED,
    MoeCase,
    assert_same_bits,
    flipping,
    own_gate,
    own_norm,
    quantize,
)

CASE = MoeCase(33, 16, 12, 4, 2)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()


class Block(torch.nn.Module):
    """An MoE block as a user writes it: a router, the experts, and a residual."""

    def __init__(self, case, flag=None, **changes):
        super().__init__()
        self.options = {**case.tensors(), **changes}
        for name in ("hidden_states", "top_k_index", "top_k_weights"):
            del self.options[name]
        for name in ("gate_up_proj", "down_proj"):
            weight = self.options.pop(name)
            setattr(self, name, weight if case.quantized else torch.nn.Parameter(weight))
        self.router = torch.nn.Linear(case.hidden_size, case.num_experts).to(case.dtype)
        self.top_k, self.flag = case.top_k, flag

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(self.top_k)
        y = qllm_ops.moe(
            x * 2, self.gate_up_proj, self.down_proj, index, weights, flag=self.flag, **self.options
        )
        return x + y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["gelu", Activation("silu", 1.702, 7.0, 1.0)], ids=str)
@torch.no_grad()
def test_a_block_is_one_graph(layout, activation):
    case = MoeCase(33, 16, 12, 4, 2, layout=layout, biases=True, activation=activation)
    block, x = Block(case), case.tensors()["hidden_states"]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), block(x))


@torch.no_grad()
def test_any_number_of_tokens_is_one_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    block = Block(CASE)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 7, 64):
        x = torch.randn(tokens, 16)
        assert_same_bits(compiled(x), block(x))
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("qllm_ops.moe") == 1


@torch.no_grad()
def test_a_compiled_block_is_paused_like_any_other():
    flag = PriorityFlag()
    block, x = Block(CASE, flag), CASE.tensors()["hidden_states"]
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), expected)
    flag.pause(0)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(compiled(x)))
    thread.start()
    thread.join(0.3)
    assert not outputs
    flag.resume(0)
    thread.join(20)
    assert_same_bits(outputs[0], expected)
    with flipping(flag):
        for _ in range(20):
            assert_same_bits(compiled(x), expected)


@torch.no_grad()
def test_a_function_that_is_not_fused_breaks_the_graph_and_nothing_else():
    block, x = Block(CASE, activation=own_gate), CASE.tensors()["hidden_states"]
    assert_same_bits(torch.compile(block, backend="aot_eager")(x), block(x))


@torch.no_grad()
def test_export():
    block, x = Block(CASE), CASE.tensors()["hidden_states"]
    tokens = torch.export.Dim("tokens", max=1000)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},), strict=True)
    assert "torch.ops.qllm_ops.moe.default" in str(program)
    for example in (x, torch.randn(9, 16)):
        assert_same_bits(program.module()(example), block(example))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flag": PriorityFlag()}, "flag must be None in torch.export .*, got PriorityFlag"),
        ({"activation": own_gate}, "activation must be a name or .* in torch.export .*, got own_gate"),
        ({"expert_norm": own_norm}, "expert_norm must be None in torch.export .*, got own_norm"),
    ],
)
def test_what_an_exported_program_cannot_hold_is_named(strict, changes, words):
    block = Block(CASE, **changes)
    with pytest.raises((ValueError, Unsupported), match=words) as caught:
        torch.export.export(block, (CASE.tensors()["hidden_states"],), strict=strict)
    assert strict or type(caught.value) is ValueError


def test_a_run_is_no_part_of_an_exported_program():
    class Runs(torch.nn.Module):
        def forward(self, x):
            run = qllm_ops.MoeRun(**{**CASE.tensors(), "hidden_states": x})
            run.step()
            return run.output

    with pytest.raises(RuntimeError, match="a MoeRun cannot be part of an exported or traced program"):
        torch.export.export(Runs(), (CASE.tensors()["hidden_states"],), strict=False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, x: make_fx(f)(*x)], ids=["jit", "make_fx"])
def test_a_trace_does_not_keep_the_routing_that_it_saw(trace):
    block, x = Block(CASE), CASE.tensors()["hidden_states"]
    traced = trace(block, (x,))
    assert_same_bits(traced(x.flip(0)), block(x.flip(0)))
    with pytest.raises(ValueError, match="activation must be a name"):
        trace(Block(CASE, activation=own_gate), (x,))


def test_fake_tensors_give_a_fake_output():
    with FakeTensorMode() as mode:
        given = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in CASE.tensors().items()
        }
        for call in (qllm_ops.moe, qllm_ops.moe_reference):
            output = call(**given)
            assert isinstance(output, FakeTensor)
            assert (output.shape, output.dtype, output.device.type) == ((33, 16), torch.float32, "cpu")
        assert qllm_ops.moe(**given | {"activation": own_gate}).shape == (33, 16)
        with pytest.raises(ValueError, match=r"hidden_states must be in memory for a MoeRun, .* is fake"):
            qllm_ops.MoeRun(**given)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["hidden_states", "gate_up_proj", "down_proj", "top_k_weights", "down_bias"])
def test_a_compiled_backward_pass_is_refused_when_it_runs(name, dynamic):
    given = MoeCase(5, 16, 12, 4, 2, biases=True).tensors()
    expected = 2 * qllm_ops.moe(**given)
    given[name].requires_grad_()
    compiled = torch.compile(
        lambda tensors: 2 * qllm_ops.moe(**tensors), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    output = compiled(given)
    assert_same_bits(output.detach(), expected)
    with pytest.raises(NotImplementedError, match=r"qllm_ops\.moe .* has no backward pass"):
        output.sum().backward()
    with torch.no_grad():
        assert not compiled(given).requires_grad


def arguments(case, flag=-1, priority=0, backend="torch"):
    given = case.tensors()
    five = ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
    scales, lists = (None,) * 4, ([], [], [], [])
    both = [given[name] for name in five[1:3]]
    if case.quantized:
        scales = tuple(tensor for weight in both for tensor in (weight.scales, weight.zeros))
        lists = (*(list(w.block) for w in both), [w.columns for w in both], [w.largest for w in both])
        given |= {"gate_up_proj": both[0].values, "down_proj": both[1].values}
    format = case.quantized and case.quantized.partition("_")[0]
    return (
        *(given[name] for name in five), *scales, given.get("gate_up_bias"), given.get("down_bias"),
        format, *lists,
        case.activation, 1.0, None, 0.0,
        given.get("gated", True), given.get("interleaved", False), given.get("transposed", False),
        case.weights_on_input, False, False, 30.0, flag, priority, backend,
    )  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)), st.booleans(), st.booleans(), st.integers(0, 40),
    st.sampled_from((None, *QUANTIZED)),
)  # fmt: skip
def test_opcheck(layout, biases, on_input, tokens, quantized):
    flag = PriorityFlag()
    quantized = None if "transposed" in layout else quantized
    case = MoeCase(
        tokens, 16, 12, 4, 2, layout=layout, biases=biases, weights_on_input=on_input, quantized=quantized
    )
    # Whether an argument was changed is looked for by arithmetic that torch has not for float8.
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] if quantized != "fp8" else []
    given = arguments(case, flag.number)
    torch.library.opcheck(torch.ops.qllm_ops.moe.default, given, test_utils=checks)
    given = (given[0].requires_grad_(), *given[1:])
    torch.library.opcheck(torch.ops.qllm_ops.moe.default, given, test_utils=checks[:2])


@pytest.mark.parametrize("format", QUANTIZED)
@torch.no_grad()
def test_a_block_of_quantised_experts_is_one_graph(format):
    case = MoeCase(33, 16, 12, 4, 2, quantized=format, biases=True, dtype=torch.bfloat16)
    block, x = Block(case, PriorityFlag()), case.tensors()["hidden_states"]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), block(x))
    block.flag = None
    program = torch.export.export(block, (x,), strict=True)
    assert "torch.ops.qllm_ops.moe.default" in str(program)
    assert_same_bits(program.module()(x), block(x))


@torch.no_grad()
def test_quantised_weights_may_be_arguments_and_others_the_next_time():
    """Of other scales, sizes and groups: nothing of the first is left in the graph."""
    call = lambda tensors: 2 * qllm_ops.moe(**tensors)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for hidden, format, seed in (
        (16, "int4", 0),
        (16, "int4", 1),
        (40, "int4", 0),
        (16, "int4_asymmetric", 0),
    ):
        tensors = MoeCase(5, hidden, 12, 4, 2, quantized=format, seed=seed).tensors()
        assert_same_bits(compiled(tensors), call(tensors))
    tensors["gate_up_proj"] = quantize_int4(tensors["gate_up_proj"].dequantize(), 32)
    assert_same_bits(compiled(tensors), call(tensors))


@torch.no_grad()
def test_float8_activations_are_one_graph():
    case = MoeCase(5, 32, 16, 2, 1, dtype=torch.bfloat16)
    tensors = case.tensors() | {"fp8_activations": True}
    for name in ("gate_up_proj", "down_proj"):
        tensors[name] = quantize(tensors[name], "fp8", fp8_activations=True)
    call = lambda tensors: 2 * qllm_ops.moe(**tensors)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors)
    assert_same_bits(compiled, call(tensors))
    assert not torch.equal(compiled, call(tensors | {"fp8_activations": False}))


def test_a_graph_does_not_look_at_the_values_again(monkeypatch):
    case = MoeCase(5, 16, 12, 4, 2, quantized="int4_asymmetric")
    given = arguments(case)
    expected = qllm_ops.moe(**case.tensors(), backend="torch")
    monkeypatch.setattr(QuantizedWeight, "__post_init__", None)
    assert_same_bits(torch.ops.qllm_ops.moe(*given), expected)


@torch.no_grad()
def test_weights_that_are_not_alike_are_refused_by_a_compiled_call_too():
    dense = MoeCase(5, 16, 12, 4, 2).tensors()
    dense["down_proj"] = quantize_int4(dense["down_proj"], 16)
    with pytest.raises(TypeError, match="quantised alike"):
        torch.compile(lambda tensors: qllm_ops.moe(**tensors), backend="aot_eager")(dense)


def test_bad_input_is_refused_when_the_graph_runs():
    block = Block(CASE)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    block.down_proj = torch.nn.Parameter(torch.zeros(4, 16, 5))
    with pytest.raises(ValueError, match="gate_up_proj must be"):
        compiled(CASE.tensors()["hidden_states"])


def test_a_flag_that_is_gone_is_an_error():
    flag = PriorityFlag()
    number = flag.number
    assert numbered_flag(number) is flag
    del flag
    gc.collect()
    assert number not in NUMBERED
    with pytest.raises(RuntimeError, match=f"priority flag {number}, which does not exist"):
        torch.ops.qllm_ops.moe(*arguments(CASE, number))

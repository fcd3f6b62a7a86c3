"""The operator under torch.compile and torch.export."""

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm_ops
from qllm_ops import Activation, PriorityFlag
from qllm_ops.flag import NUMBERED
from qllm_ops.library import numbered_flag
from qllm_ops.testing import LAYOUTS, MoeCase, assert_same_bits, flipping, own_gate

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
            setattr(self, name, torch.nn.Parameter(self.options.pop(name)))
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


def arguments(case, flag=-1, priority=0, backend="torch"):
    given = case.tensors()
    five = ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
    return (
        *(given[name] for name in five), given.get("gate_up_bias"), given.get("down_bias"),
        case.activation, 1.0, None, 0.0,
        given.get("gated", True), given.get("interleaved", False), given.get("transposed", False),
        case.weights_on_input, False, 30.0, flag, priority, backend,
    )  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.booleans(), st.booleans(), st.integers(0, 40))
def test_opcheck(layout, biases, on_input, tokens):
    flag = PriorityFlag()
    case = MoeCase(tokens, 16, 12, 4, 2, layout=layout, biases=biases, weights_on_input=on_input)
    torch.library.opcheck(torch.ops.qllm_ops.moe.default, arguments(case, flag.number))


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

"""The operator as a user calls it: the reference, the two forms, the choice of a backend, what goes wrong."""

import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

import qllm_ops
from qllm_ops import ACTIVATIONS, FULL, Activation, MoeRun, PriorityFlag, moe, moe_reference
from qllm_ops.quantized import FORMATS
from qllm_ops.testing import (
    CLAMPED,
    LAYOUTS,
    MoeCase,
    assert_close,
    assert_same_bits,
    moe_cases,
    own_gate,
    own_norm,
    poisoned_empty,
)

CASE = MoeCase(40, 16, 12, 4, 2)
BACKENDS = ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")


def test_reference_by_hand():
    """Two tokens, two experts, H = 1 and I = 1: few enough numbers to check on paper."""
    output = moe_reference(
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[[3.0], [5.0]], [[-1.0], [4.0]]]),
        torch.tensor([[[10.0]], [[100.0]]]),
        torch.tensor([[0, 1], [1, 7]]),
        torch.tensor([[0.5, 0.25], [2.0, 9.0]]),
    )
    silu = lambda x: x * torch.sigmoid(torch.tensor(x))  # noqa: E731
    first = 0.5 * 10 * silu(3.0) * 5 + 0.25 * 100 * silu(-1.0) * 4
    second = 2.0 * 100 * silu(-2.0) * 8
    assert torch.allclose(output, torch.stack([first, second])[:, None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_against_dense_algebra(activation):
    """Every expert on every token at once, weighted by a (T, E) matrix."""
    given = MoeCase(11, 7, 5, 3, 2, activation=activation, routing="any").tensors()
    x, w1, w2, index, weights, _ = given.values()
    act = {
        "silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(), "relu2": lambda x: torch.nn.functional.relu(x) ** 2,
    }[activation]  # fmt: skip
    gate, up = torch.einsum("th,eih->tei", x, w1).chunk(2, dim=2)
    each = torch.einsum("tei,ehi->teh", act(gate) * up, w2)
    share = torch.zeros(11, 3).scatter_add_(1, index, weights)
    assert torch.allclose(moe_reference(**given), torch.einsum("te,teh->th", share, each), atol=1e-5)


def test_reference_of_gpt_oss_by_hand():
    """Its experts as transformers writes them: interleaved, transposed, with biases, clamped."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    config = GptOssConfig(hidden_size=12, intermediate_size=7, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, index, weights = torch.randn(9, 12) * 3, torch.randint(3, (9, 2)), torch.rand(9, 2)
    index[:, 1] = (index[:, 0] + 1) % 3  # eager takes an expert once per token
    tensors = (x, experts.gate_up_proj, experts.down_proj, index, weights)
    options = {
        "gate_up_bias": experts.gate_up_proj_bias, "down_bias": experts.down_proj_bias,
        "interleaved": True, "transposed": True,
        "activation": Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0),
    }  # fmt: skip
    with torch.no_grad():
        expected = type(experts).forward.__wrapped__(experts, x, index, weights)
    assert torch.allclose(moe_reference(*tensors, **options), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(moe(*tensors, **options), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expert_norm", [None, own_norm])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *CLAMPED, "function"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layout(backend, layout, activation, expert_norm):
    if activation == "function":
        activation = torch.tanh if "ungated" in layout else own_gate
    for dtype, biases in ((torch.float32, True), (torch.bfloat16, False)):
        case = MoeCase(
            7, 18, 14, 3, 2, dtype=dtype, activation=activation, layout=layout, biases=biases,
            expert_norm=expert_norm, routing="out_of_range", weights_on_input=biases,
        )  # fmt: skip
        with poisoned_empty():
            expected = moe(**case.tensors(), backend=backend)
            assert_close(expected, case)
            run = MoeRun(**case.tensors(), backend=backend)
            while not run.step(3):
                assert run.tiles_taken == run.tiles_done
        assert_same_bits(run.output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"activation": lambda x: x},
            ValueError,
            r"activation must return .* \(.*, 12\), got \(.*, 24\); .* 2I\)",
        ),
        ({"activation": lambda x: None}, ValueError, "activation must return .* got NoneType"),
        ({"expert_norm": lambda x: x[:, :1]}, ValueError, r"expert_norm must return .* 16\), got \(.*, 1\)"),
        ({"activation": lambda x: x[:, :12] > 0}, ValueError, "activation must return .* got torch.bool"),
        ({"activation": lambda x: x[:, :12].to("meta")}, ValueError, "activation must return .* on meta"),
        ({"expert_norm": lambda x: x.to_sparse()}, ValueError, "expert_norm must return .* torch.sparse_coo"),
        ({"expert_norm": lambda x: x.long()}, ValueError, "expert_norm must return .* got torch.int64"),
    ],
)
def test_functions_that_return_something_else(backend, changes, error, words):
    given = {**CASE.tensors(), **changes}
    with pytest.raises(error, match=words):
        moe(**given, backend=backend)
    with pytest.raises(error, match=words):
        moe_reference(**given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_may_return_another_dtype_or_strides(backend):
    """A row's number decides, whether one group of rows holds them all or not."""
    for tokens in (5, 700):
        case = MoeCase(tokens, 16, 12, 4, 2, activation=own_gate, expert_norm=own_norm)
        given = case.tensors()
        expected = moe(**given, backend=backend)
        given["activation"] = lambda x: own_gate(x).double()
        given["expert_norm"] = lambda x: own_norm(x).double().t().contiguous().t()
        assert_same_bits(moe(**given, backend=backend), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_close_to_the_reference(backend, dtype, activation):
    case = MoeCase(23, 17, 13, 5, 3, dtype=dtype, activation=activation)
    with poisoned_empty():
        output = moe(**case.tensors(), backend=backend)
        assert_close(output, case)
        run = MoeRun(**case.tensors(), backend=backend)
        while not run.step(2):
            pass
    assert run.backend == backend
    assert_same_bits(run.output, output)


@given(case=moe_cases(formats=(None, *FORMATS)))
def test_inputs_are_not_changed(case):
    given = case.tensors()
    moe(**given)
    for name, value in case.tensors().items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(given[name], value) if value.is_floating_point() else None
            assert torch.equal(given[name], value)


# Rows that no pair has are read as they lie in memory, and multiplied, and not stored.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("fp8_activations", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_matter(backend, fp8_activations):
    """Models are made and sometimes run under another one."""
    formats = {"dtype": torch.bfloat16, "quantized": "fp8", "fp8_activations": True}
    given = MoeCase(9, 16, 12, 4, 2, routing="out_of_range", **(formats if fp8_activations else {})).tensors()
    expected = moe(**given, backend=backend), moe_reference(**given)
    torch.set_default_dtype(torch.float16)
    try:
        got = moe(**given, backend=backend), moe_reference(**given)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def test_memory_of_an_output_waits_for_the_stream_that_asked_for_it(monkeypatch):
    """A run may have been made on another one, whose the memory is."""
    run, streams = MoeRun(**MoeCase(2, 8, 8, 2, 2).tensors(), backend="torch"), []
    output = SimpleNamespace(is_cuda=True, device="cuda:3", record_stream=streams.append)
    monkeypatch.setattr(run, "_layer", SimpleNamespace(output=output, tiles_done=1, tiles_total=1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    assert run.output is output
    assert streams == ["current of cuda:3"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    given = MoeCase(0, 16, 12, 4, 2, dtype=torch.bfloat16).tensors()
    flag = PriorityFlag()
    flag.pause(0)  # nothing to do is done, paused or not
    output = moe(**given, flag=flag, backend=backend)
    assert output.shape == (0, 16)
    assert output.dtype == torch.bfloat16
    run = MoeRun(**given, flag=flag, backend=backend)
    assert run.done
    assert run.step()
    assert run.output.shape == (0, 16)
    assert run.tiles_done == run.tiles_total == run.tiles_taken == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_here(backend):
    """All indices out of range: the output is zero, and written."""
    given = CASE.tensors()
    given["top_k_index"] = torch.full((40, 2), 4)
    with poisoned_empty():
        output = moe(**given, backend=backend)
    assert_same_bits(output, torch.zeros(40, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pause_share_and_deadline(backend):
    clock = [0.0]
    flag = PriorityFlag(clock=lambda: clock[0])
    given = CASE.tensors()
    expected = moe(**given, backend=backend)
    run = MoeRun(**given, flag=flag, priority=0, backend=backend)
    flag.pause(0, "owner", timeout_s=5)
    assert not run.step()
    assert run.tiles_done == 0
    with pytest.raises(RuntimeError, match="not done: 0 of"):
        _ = run.output
    clock[0] = 4.9
    assert not run.step()
    clock[0] = 5.0
    flag.share(0, 1)
    assert not run.step(1)  # the step itself saw the deadline
    assert run.tiles_done == 1
    assert flag.expired == 1
    assert run.step()
    assert_same_bits(run.output, expected)


def test_moe_waits_while_paused_and_no_longer():
    events = []
    flag = PriorityFlag(on_event=lambda kind, *_: events.append(kind))
    flag.pause(0, "me")
    done = threading.Event()
    outputs = []

    def background():
        outputs.append(moe(**CASE.tensors(), flag=flag, priority=0))
        done.set()

    thread = threading.Thread(target=background, daemon=True)
    thread.start()
    assert not done.wait(0.1)
    assert torch.equal(moe(**CASE.tensors(), flag=flag, priority=1), moe(**CASE.tensors()))
    flag.resume(0, "me")
    assert done.wait(10)
    assert events == ["pause", "park", "resume", "unpark"]  # it stood still, and did not ask in a circle
    assert_same_bits(outputs[0], moe(**CASE.tensors()))


@pytest.mark.parametrize("gate", ["host", "stream"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_forgets_the_class_inside_of_urgent_does_not_wait_for_himself(backend, gate):
    """It would be a minute, until the pause's deadline."""
    flag, given = PriorityFlag(gate=gate), {**CASE.tensors(), "backend": backend}
    with flag.urgent(1):
        with pytest.raises(RuntimeError, match=r"class 0 is paused by flag.urgent\(\) in this very thread"):
            moe(**given, flag=flag)
        assert_same_bits(moe(**given, flag=flag, priority=1), moe(**given))
        assert not flag.wait(0, 0.01)
        outputs = []
        thread = threading.Thread(target=lambda: outputs.append(moe(**given, flag=flag)))
        thread.start()  # which is another one, and may wait
        thread.join(0.1)
        assert not outputs
    thread.join(20)
    assert_same_bits(outputs[0], moe(**given))


def test_moe_outlives_an_owner_that_died():
    flag = PriorityFlag()
    flag.pause(0, "dead", timeout_s=0.05)
    start = time.monotonic()
    moe(**CASE.tensors(), flag=flag)
    assert 0.04 < time.monotonic() - start < 5


# -- backends ------------------------------------------------------------------------------------


def test_auto_is_torch_on_a_cpu():
    assert MoeRun(**CASE.tensors()).backend == "torch"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (moe, MoeRun):
        with pytest.raises(
            ValueError, match=r'backend="triton" needs CUDA tensors, got cpu.*TRITON_INTERPRET=1'
        ):
            call(**CASE.tensors(), backend="triton")


def test_an_interpreter_that_does_not_run_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys.modules["qllm_ops.moe"], "_interpreter_problem", lambda: "it is old")
    for call in (moe, MoeRun):
        with pytest.raises(ValueError, match=r'backend="triton" cannot run on a CPU here: it is old'):
            call(**CASE.tensors(), backend="triton")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(sys.modules["qllm_ops.moe"], "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match="package triton, which is not installed"):
        moe(**CASE.tensors(), backend="triton")
    assert MoeRun(**CASE.tensors(), backend="auto").backend == "torch"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, torch, triton, got 'cuda'"),
        ({"flag": 1}, TypeError, "flag must be a PriorityFlag or None, got int"),
        ({"priority": -1}, ValueError, "priority must be an integer of at least 0, got -1"),
        ({"priority": 1.0}, ValueError, "priority must be an integer of at least 0, got 1.0"),
        ({"priority": True}, ValueError, "priority must be an integer of at least 0, got True"),
        ({"flag": PriorityFlag(classes=3), "priority": 3}, ValueError, "priority .* from 0 to 2, got 3"),
    ],
)
def test_bad_options(changes, error, message):
    for call in (moe, MoeRun):
        with pytest.raises(error, match=message):
            call(**CASE.tensors(), **changes)


def test_flag_on_another_device():
    flag = PriorityFlag()
    flag.words = flag.words.to("meta")
    for call in (moe, MoeRun):
        with pytest.raises(ValueError, match="flag is on meta, but hidden_states is on cpu"):
            call(**CASE.tensors(), flag=flag)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_tiles", [2**31 - 1, 2**31, 2**63])
def test_a_quantum_of_more_tiles_than_there_can_be(backend, max_tiles):
    run = MoeRun(**CASE.tensors(), backend=backend)
    assert run.step(max_tiles)
    assert_same_bits(run.output, moe(**CASE.tensors(), backend=backend))


@pytest.mark.parametrize("max_tiles", [0, -1, 1.5, True, "all"])
def test_bad_quantum(max_tiles):
    run = MoeRun(**CASE.tensors())
    with pytest.raises(ValueError, match="max_tiles must be a positive integer or None, got"):
        run.step(max_tiles)
    assert run.step()  # asking wrongly does no harm


# -- failures ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def test_a_step_that_raises_kills_the_run_and_says_so(monkeypatch):
    run = MoeRun(**CASE.tensors())
    run.step(1)

    def fail(self, tile):
        raise Broken

    with monkeypatch.context() as patched:
        patched.setattr("qllm_ops.torch_moe.TorchMoe._compute", fail)
        with pytest.raises(Broken):
            run.step()
    assert not run.done
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an earlier step of this run failed") as caught:
            run.step()
        assert isinstance(caught.value.__cause__, Broken)
    with pytest.raises(RuntimeError, match="it has no output"):
        _ = run.output
    assert MoeRun(**CASE.tensors()).step()  # only that run


def test_two_threads_cannot_step_one_run(monkeypatch):
    inside, leave = threading.Event(), threading.Event()
    original = qllm_ops.torch_moe.TorchMoe._compute

    def slow(self, tile):
        inside.set()
        assert leave.wait(10)
        original(self, tile)

    monkeypatch.setattr("qllm_ops.torch_moe.TorchMoe._compute", slow)
    run = MoeRun(**CASE.tensors())
    thread = threading.Thread(target=run.step)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError, match="another thread is inside step"):
        run.step()
    leave.set()
    thread.join()
    assert run.step()
    assert_same_bits(run.output, moe(**CASE.tensors()))


def test_the_flag_is_left_as_it_was():
    flag = PriorityFlag()
    flag.share(0, 3)
    moe(**CASE.tensors(), flag=flag)
    assert flag.read() == (3, FULL)


def test_warm_up_wants_what_moe_wants():
    tensors = MoeCase(3, 8, 8, 2, 2).tensors()
    assert qllm_ops.warm_up(**tensors, backend="torch") is None
    with pytest.raises(ValueError, match="at least one token"):
        qllm_ops.warm_up(**MoeCase(0, 8, 8, 2, 2).tensors())
    with pytest.raises(ValueError, match="activation"):
        qllm_ops.warm_up(**{**tensors, "activation": "swish"})
    with pytest.raises(TypeError, match="flag"):
        qllm_ops.warm_up(**tensors, flag=1)

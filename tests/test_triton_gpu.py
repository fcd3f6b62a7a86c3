"""The Triton backend on a GPU: right numbers, the same bits however it is preempted, and no waiting."""

import contextlib
import gc
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from served import served

from qllm_ops import PriorityFlag, batch_invariant, moe
from qllm_ops.activation import ACTIVATIONS
from qllm_ops.inputs import MoeInputs, check_inputs
from qllm_ops.models.presets import make_preset
from qllm_ops.scheduler.core import Limits
from qllm_ops.testing import CLAMPED, LAYOUTS, MoeCase, own_gate, own_norm
from qllm_ops.tiles import TileConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_moe(*args, **kwargs):
    from qllm_ops.triton_moe import TritonMoe  # not under the interpreter

    return TritonMoe(*args, **kwargs)


def plan_of(*args, **kwargs):
    from qllm_ops import plan

    return plan.plan_of(*args, **kwargs)


def load_kernels(*args):
    from qllm_ops.triton_moe import TritonMoe

    TritonMoe.warm_up(*args)


def layer(
    tokens, hidden, intermediate, experts, top_k, *, dtype=torch.bfloat16, activation="silu", seed=0,
    low=0, high=None,
) -> MoeInputs:  # fmt: skip
    """A layer of random numbers, of indices from ``low`` up to ``high`` (excluded; default: E)."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, scale):
        return torch.randn(shape, generator=g, device="cuda", dtype=dtype).mul_(scale)

    high = experts if high is None else high
    return check_inputs(
        normal(tokens, hidden, scale=1.0),
        normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        torch.randint(low, high, (tokens, top_k), generator=g, device="cuda"),
        torch.rand(tokens, top_k, generator=g, device="cuda"),
        activation,
    )


def arguments(inputs: MoeInputs) -> tuple[torch.Tensor, ...]:
    return (
        inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj,
        inputs.top_k_index, inputs.top_k_weights,
    )  # fmt: skip


def uninterrupted(inputs: MoeInputs) -> torch.Tensor:
    return moe(**vars(inputs), backend="triton")


def assert_close(inputs: MoeInputs, output: torch.Tensor) -> None:
    """Design tolerances, against the torch backend, which multiplies in float32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    wide = {name: vars(inputs)[name].float() for name in ("hidden_states", "gate_up_proj", "down_proj")}
    reference = moe(**{**vars(inputs), **wide}, backend="torch")
    error = output.float() - reference
    rms = (error.square().mean().sqrt() / reference.square().mean().sqrt()).item()
    peak = (error.abs().max() / reference.abs().max()).item()
    if inputs.hidden_states.dtype == torch.float32:
        assert rms <= 1e-5
    else:
        assert rms <= 4e-3
        assert peak <= 2e-2


EXITS = {
    "gate_up": TileConfig(64, 32, 64, 4, 4, 2, exit_k=128),
    "down": TileConfig(64, 64, 64, 4, 4, 2, split_k=2, exit_k=128),
    "combine": TileConfig(1, 1024, 1, 4, 1, 8),
}
"""Tiles of which every program leaves several times halfway."""


@contextlib.contextmanager
def flipped(flag, seed, longest_s=3e-4):
    """Another thread pauses, resumes and shares at random."""
    rng, finished = random.Random(seed), threading.Event()

    def flip():
        while not finished.is_set():
            rng.choice((flag.pause, flag.resume))(0, "thread")
            flag.share(0, rng.choice((1, 20, 2**31 - 1)))
            time.sleep(rng.random() * longest_s)
        flag.resume(0, "thread")

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 200, 700, 3000])  # a class of rows each
def test_every_class_of_rows(tokens, dtype):
    inputs = layer(tokens, 512, 384, 8, 2, dtype=dtype)
    assert_close(inputs, uninterrupted(inputs))


@pytest.mark.parametrize("expert_norm", [None, own_norm])
@pytest.mark.parametrize("activation", ["relu2", CLAMPED[0], "function"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(512, 384), (250, 190)], ids=str)
def test_every_layout(size, layout, activation, expert_norm):
    if activation == "function":
        activation = torch.tanh if "ungated" in layout else own_gate
    for tokens in (3, 300):
        case = MoeCase(
            tokens, *size, 8, 2, dtype=torch.bfloat16, activation=activation, layout=layout, biases=True,
            expert_norm=expert_norm, routing="out_of_range",
        )  # fmt: skip
        inputs = check_inputs(**case.tensors("cuda"))
        expected = uninterrupted(inputs)
        assert_close(inputs, expected)
        run = triton_moe(inputs, PriorityFlag("cuda"), 0)
        while not run.step(7):
            assert run.tiles_taken == run.tiles_done
        assert torch.equal(run.output, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (5, 37, 29, 3, 2), (130, 131, 67, 5, 5), (64, 96, 2000, 3, 1)]
)
def test_odd_shapes(shape, activation):
    inputs = layer(*shape, dtype=torch.float32, activation=activation)
    assert_close(inputs, uninterrupted(inputs))


@pytest.mark.parametrize(
    ("low", "high"), [(3, 4), (-2, 9), (-1, 0)], ids=["one_expert", "some_skipped", "all_skipped"]
)
def test_skewed_routing(low, high):
    inputs = layer(300, 256, 128, 8, 2, dtype=torch.float32, low=low, high=high)
    output = uninterrupted(inputs)
    if high == 0:
        assert not output.any()
    else:
        assert_close(inputs, output)


@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts", "top_k"),
    [(1, 4096, 14336, 8, 2), (300, 4096, 14336, 8, 2), (2048, 2048, 768, 128, 8), (64, 7168, 2048, 16, 8)],
    ids=["mixtral_decode", "mixtral_prefill", "qwen3_prefill", "deepseek_decode"],
)
def test_shapes_of_models(tokens, hidden, intermediate, experts, top_k):
    inputs = layer(tokens, hidden, intermediate, experts, top_k)
    output = uninterrupted(inputs)
    assert_close(inputs, output)
    for _ in range(3):
        assert torch.equal(uninterrupted(inputs), output)


def test_memory_is_written_whole():
    """Every output element is written: torch.empty is poisoned with NaN."""
    inputs = layer(300, 513, 257, 8, 2, low=-1)
    torch.use_deterministic_algorithms(True)
    try:
        assert not uninterrupted(inputs).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("quantum", [1, 7, 100])
def test_quanta_change_no_bit(tokens, quantum):
    inputs = layer(tokens, 512, 768, 8, 2)
    expected = uninterrupted(inputs)
    run = triton_moe(inputs, PriorityFlag("cuda"), 0)
    steps = 0
    while not run.step(quantum):
        steps += 1
        assert run.tiles_taken == run.tiles_done == steps * quantum
    assert torch.equal(run.output, expected)


@pytest.mark.parametrize("seed", range(4))
def test_flips_at_random_change_no_bit(seed):
    inputs = layer(2000, 1024, 1024, 16, 2, seed=seed)
    expected = uninterrupted(inputs)
    flag, left_early = PriorityFlag("cuda"), 0
    with flipped(flag, seed):
        for _ in range(100):
            run, done = triton_moe(inputs, flag, 0), 0
            while not run.step(None):
                left_early += 1
                assert done <= run.tiles_done == run.tiles_taken
                done = run.tiles_done
                flag.wait(0)
            assert torch.equal(run.output, expected)
    assert left_early > 0


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="from 9.0 on"
)
@pytest.mark.parametrize("tokens", [1, 40, 600, 3000])
def test_dependent_launches_change_no_bit(tokens, monkeypatch):
    """Layers one after another, each reading what the one before has just written, and while it is paused."""

    def chain(flag=None):
        x = layers[0].hidden_states
        for inputs in layers * 5:
            x = moe(**{**vars(inputs), "hidden_states": x}, backend="triton", flag=flag)
            x = F.layer_norm(x, x.shape[-1:])
        return x

    layers = [layer(tokens, 512, 768, 8, 2, seed=seed) for seed in range(3)]
    monkeypatch.setattr("qllm_ops.plan.DEPENDENT_LAUNCHES", False)
    expected = chain()
    monkeypatch.setattr("qllm_ops.plan.DEPENDENT_LAUNCHES", True)
    assert plan_of(layers[0]).signature.dependent_launches
    assert torch.equal(chain(), expected)
    flag = PriorityFlag("cuda")
    with flipped(flag, tokens):
        assert torch.equal(chain(flag), expected)


@pytest.mark.parametrize("seed", range(3))
def test_tiles_that_are_given_back_are_computed_once(seed):
    """Tickets pass through slots while programs come, leave and take: none is lost, none is done twice."""
    inputs = layer(2000, 2048, 2048, 16, 2, seed=seed)
    plain = triton_moe(inputs, None, 0, plan=plan_of(inputs, EXITS))
    plain.launch_all()
    flag, given_back = PriorityFlag("cuda"), 0
    with flipped(flag, seed):
        for _ in range(60):
            run = triton_moe(inputs, flag, 0, plan=plan_of(inputs, EXITS))
            torch.use_deterministic_algorithms(True)
            run._output.fill_(float("nan"))
            torch.use_deterministic_algorithms(False)
            while not run.step(random.choice((None, 500))):
                flag.wait(0)
            assert torch.equal(run.output, plain.output)
            assert not (run._state[-run.plan.slots :] >= 0).any()
            given_back += run.tiles_taken - run.tiles_total
    assert given_back > 0


def test_the_output_in_chunks_of_columns_has_the_same_bits():
    inputs = layer(900, 2048, 512, 8, 2)
    whole, chunks = (triton_moe(inputs, None, 0, plan=plan_of(inputs, width=width)) for width in (2048, 512))
    for run in (whole, chunks):
        run.launch_all()
    assert torch.equal(whole.output, chunks.output)


def test_a_confined_class_is_slower_and_grows_back():
    inputs = layer(8192, 2048, 2048, 8, 2)
    flag = PriorityFlag("cuda")
    triton_moe(inputs, flag, 0).step(None)

    def seconds():
        run = triton_moe(inputs, flag, 0)
        run.tiles_total  # noqa: B018  (waits for the routing)
        start = time.perf_counter()
        while not run.step(None):
            pass
        return time.perf_counter() - start

    full = min(seconds() for _ in range(3))
    flag.share(0, 8)
    confined = seconds()
    assert confined > 4 * full  # 8 of over 100 programs
    timer = threading.Timer(confined / 10, flag.share, (0, 2**31 - 1))
    timer.start()
    assert seconds() < confined / 2
    timer.join()


# -- the stream gate -----------------------------------------------------------------------------------


@pytest.fixture
def gated():
    pytest.importorskip("cuda.bindings")
    return PriorityFlag("cuda", gate="stream")


@pytest.mark.parametrize("tiles", [None, EXITS], ids=["default", "exits"])
def test_a_gated_layer_waits_on_the_device_and_not_on_the_host(gated, tiles):
    inputs = layer(3000, 1024, 1024, 8, 2)
    plain = triton_moe(inputs, None, 0, plan=plan_of(inputs, tiles))
    plain.launch_all()
    triton_moe(inputs, gated, 0, plan=plan_of(inputs, tiles)).step(
        None
    )  # loaded, as nothing can be while a stream is held
    gated.pause(0, "test")
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [triton_moe(inputs, gated, 0, plan=plan_of(inputs, tiles)) for _ in range(4)]
        for run in runs:
            run.launch_all(gated=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    behind = torch.cuda.current_stream().record_event()
    time.sleep(0.05)
    assert not behind.query()
    gated.resume(0, "test")
    behind.synchronize()
    for run in runs:
        assert torch.equal(run.output, plain.output)


@pytest.mark.parametrize("seed", range(3))
def test_gated_layers_under_random_flips_keep_their_bits(gated, seed):
    inputs = layer(2000, 1024, 1024, 16, 2, seed=seed)
    expected = uninterrupted(inputs)
    load_kernels(inputs, gated)
    with flipped(gated, seed):
        for _ in range(50):
            outputs = [moe(*arguments(inputs), flag=gated, backend="triton") for _ in range(4)]
            assert all(torch.equal(output, expected) for output in outputs)


def test_a_device_wide_wait_behind_a_dead_owner_ends_with_its_deadline(gated):
    """The watchdog opens the gate while this thread is inside of a synchronisation."""
    inputs = layer(300, 512, 512, 8, 2)
    load_kernels(inputs, gated)
    run = triton_moe(inputs, gated, 0)
    gated.pause(0, "dead", timeout_s=0.3)
    run.launch_all(gated=True)
    start = time.perf_counter()
    torch.cuda.synchronize()
    assert 0.2 < time.perf_counter() - start < 3
    assert gated.expired == 1
    assert torch.equal(run.output, uninterrupted(inputs))


def ends(event, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not event.query() and time.monotonic() < deadline:
        time.sleep(0.001)
    return event.query()


def held(flag, priority):
    """An event behind a wait at the flag, on a stream of torch's with that priority."""
    stream = torch.cuda.Stream(priority=priority)
    with torch.cuda.stream(stream):
        flag.hold(0)
        return stream.record_event()


def test_no_stream_that_is_held_keeps_the_flag_from_being_written(gated):
    """torch has 32 streams of each priority, so some of these are the same ones again."""
    least, most = torch.cuda.Stream.priority_range()
    gated.pause(0)
    try:
        behind = [held(gated, priority) for priority in (least, most) for _ in range(40)]
        time.sleep(0.05)
        assert not any(event.query() for event in behind)
        gated.resume(0)
        assert all(ends(event) for event in behind)
    finally:
        gated.words.fill_(2**31 - 1)


def test_streams_go_on_when_the_flag_that_holds_them_is_gone():
    pytest.importorskip("cuda.bindings")
    flag = PriorityFlag("cuda", gate="stream")
    words = flag.words
    flag.pause(0, timeout_s=None)
    try:
        behind = held(flag, 0)
        time.sleep(0.05)
        assert not behind.query()
        del flag
        gc.collect()
        assert ends(behind)
    finally:
        words.fill_(2**31 - 1)


def test_the_gate_in_a_cuda_graph(gated):
    inputs = layer(300, 512, 512, 8, 2)
    expected = uninterrupted(inputs)
    load_kernels(inputs, gated)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = moe(*arguments(inputs), flag=gated, backend="triton")
    except RuntimeError as error:
        pytest.skip(f"this driver does not capture it: {error}")
    for _ in range(3):
        output.fill_(float("nan"))
        gated.pause(0, "test")
        graph.replay()
        time.sleep(0.02)
        assert not torch.cuda.current_stream().query()
        gated.resume(0, "test")
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


def test_a_pause_is_obeyed_in_the_middle_of_a_launch():
    inputs = layer(16384, 2048, 2048, 8, 2)
    flag = PriorityFlag("cuda")
    triton_moe(inputs, flag, 0).step(None)  # compiled
    for delay in (1e-4, 3e-4, 1e-3, 2e-3):
        run = triton_moe(inputs, flag, 0)
        timer = threading.Timer(delay, flag.pause, (0,))
        timer.start()
        finished = run.step(None)
        timer.join()
        left_inside = not finished and 0 < run.tiles_done < run.tiles_total
        flag.resume(0)
        assert run.step(None)
        assert torch.equal(run.output, uninterrupted(inputs))
        if left_inside:
            return
    pytest.fail("no pause was seen inside of a launch")


def test_nothing_waits_for_the_device():
    inputs = layer(64, 512, 512, 8, 2)
    expected = uninterrupted(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = moe(*arguments(inputs), backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected)


def test_a_run_may_be_stepped_on_other_streams_than_it_was_made_on():
    inputs = layer(500, 1024, 512, 8, 2)
    expected = uninterrupted(inputs)
    run = triton_moe(inputs, PriorityFlag("cuda"), 0)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for i in range(10**6):
        with torch.cuda.stream(streams[i % 3]):
            if run.step(13):
                break
    assert torch.equal(run.output, expected)


def test_addresses_beyond_32_bits():
    """Weights of over 2^31 elements, all tokens on the last expert."""
    hidden, intermediate, experts = 7168, 2048, 160
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    inputs = layer(5, hidden, intermediate, experts, 1, low=experts - 1)
    assert inputs.down_proj.numel() > 2**31
    small = check_inputs(
        inputs.hidden_states, inputs.gate_up_proj[-1:], inputs.down_proj[-1:],
        torch.zeros_like(inputs.top_k_index), inputs.top_k_weights,
    )  # fmt: skip
    assert_close(small, uninterrupted(inputs))


@pytest.mark.parametrize("few", [1, 7, 64, 300])
def test_batch_invariance(few):
    """The bits of some tokens alone are those that they have among 3000."""
    inputs = replace(layer(3000, 640, 320, 8, 2), batch_invariant=True)
    whole = uninterrupted(inputs)
    chosen = torch.randperm(3000, device="cuda")[:few]
    batch = ("hidden_states", "top_k_index", "top_k_weights")
    alone = replace(inputs, **{name: vars(inputs)[name][chosen] for name in batch})
    assert torch.equal(uninterrupted(alone), whole[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_of_torchs_products_and_norms(dtype):
    def block(x):
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(dtype)
        return F.linear(F.silu(F.linear(x, up)), down, bias).sum(-1)

    g = torch.Generator("cuda").manual_seed(0)
    up, down, bias, x = (
        torch.randn(shape, generator=g, device="cuda", dtype=dtype)
        for shape in ((1500, 1024), (640, 1500), (640,), (3000, 1024))
    )
    with torch.no_grad(), batch_invariant():
        whole = block(x)
        for few in (1, 7, 64, 300, 2000):
            chosen = torch.randperm(3000, device="cuda")[:few]
            assert torch.equal(block(x[chosen]), whole[chosen])


@pytest.mark.parametrize("preset", ["tiny", "tiny-deepseek-v3"])
def test_a_batch_invariant_engine(preset):
    """Each request has the tokens and the margins that it has alone, in chunks and preempted as well."""
    model = make_preset(preset).to("cuda")
    prompts = [torch.randint(128, (n,)).tolist() for n in (1500, 5, 40, 300, 1, 64, 1025)]
    options = {"limits": Limits(kv_tokens=8192, prefill_tokens=1024), "batch_invariant": True}
    alone = served(model, prompts, 8, together=False, **options)
    assert served(model, prompts, 8, together=True, **options) == alone


@pytest.mark.parametrize("activation", ["silu", own_gate], ids=["fused", "function"])
def test_warm_up_leaves_nothing_to_compile(activation):
    from qllm_ops.kernels import moe as kernels

    flag = PriorityFlag("cuda")
    load_kernels(layer(1, 640, 320, 8, 2, activation=activation), flag)
    names = ("route", "gate_up", "down", "combine")

    def compiled():
        device = torch.cuda.current_device()
        return sum(len(getattr(kernels, name).device_caches[device][0]) for name in names)

    before = compiled()
    for tokens in (1, 16, 17, 100, 500, 2000):
        inputs = layer(tokens, 640, 320, 8, 2, activation=activation)
        uninterrupted(inputs)
        triton_moe(inputs, flag, 0).step(None)
        triton_moe(inputs, flag, 1).step(None)
        # A slice of a larger batch, whose routing lies at an address that is no multiple of 16.
        larger = layer(tokens + 1, 640, 320, 8, 2, activation=activation)
        batch = ("hidden_states", "top_k_index", "top_k_weights")
        uninterrupted(replace(larger, **{name: getattr(larger, name)[1:] for name in batch}))
    assert compiled() == before

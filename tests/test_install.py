"""The swap: the same model as before, preemptible; what cannot be swapped is refused, never wrong."""

import asyncio
import copy
import pickle
import random
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import transformers
from tiny_models import OTHER_LAYOUTS, REFUSED, SUPPORTED, needs_pickle, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qllm_ops import PriorityFlag, models, moe_reference
from qllm_ops.models import (
    UnsupportedExpertsError,
    current_preemption,
    install,
    make_preset,
    preemptible,
    quantize_experts,
    save_preset,
    uninstall,
)
from qllm_ops.testing import flipping

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
WAIT_S = 20


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def in_thread(function, *args):
    """Start ``function`` in a thread; the returned call waits for its result."""
    box = {}

    def body():
        try:
            box["result"] = function(*args)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def result():
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the thread stands still"
        if "error" in box:
            raise box["error"]
        return box["result"]

    result.alive = thread.is_alive
    return result


def parking_flag():
    """A flag, and an event that is set when somebody first stands still at it."""
    parked = threading.Event()
    return PriorityFlag(on_event=lambda kind, priority, now: kind == "park" and parked.set()), parked


# -- the same model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_same_logits_and_same_tokens_as_eager(name):
    model = make_preset(name)
    model.set_experts_implementation("eager")
    wanted = logits(model)
    generate = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), **generate)

    report = install(model)
    got = logits(model)
    assert len(report) == 2
    assert not torch.equal(got, torch.zeros_like(got))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **generate), tokens)


SAID = {
    "gpt_oss": "E=8 H=64 I=48  silu(alpha=1.702, limit=7, up_offset=1), interleaved, transposed, biases",
    "openai_privacy_filter": "silu(alpha=1.702, limit=7, up_offset=1), transposed, biases",
    "nemotron_h": "E=8 H=64 I=48  relu2, no gate",
    "deepseek_v4": "silu(limit=10)",
    "muse_spark_text": "E=8 H=32 I=48  silu, a norm after each expert",
}


@pytest.mark.parametrize("model_type", OTHER_LAYOUTS)
def test_other_layouts(model_type):
    """The model's own numbers, bits that no pause changes, and a report that says what was found."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")

    @torch.no_grad()
    def last():
        return model(IDS, use_cache=False)[0]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_bias", "post_expert_norm.weight")):
                parameter.normal_()  # zeros and ones would hide that they were left out
    wanted = last()
    flag = PriorityFlag()
    assert SAID[model_type] in str(install(model, flag))
    got = last()
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with flipping(flag):
        for _ in range(3):
            assert torch.equal(last(), got)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_stands_still_inside_it():
    torch.compiler.reset()
    model = make_preset("tiny")
    flag, parked = parking_flag()
    install(model, flag)
    wanted = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS).logits, wanted)
    flag.pause(0)
    thread_result = in_thread(lambda: compiled(IDS).logits)
    assert parked.wait(WAIT_S)
    flag.resume(0)
    assert torch.equal(thread_result(), wanted)
    # A body that says otherwise is heard by the same graph; and a copy is not taken for the original.
    flag.pause(0)
    with preemptible(None):
        assert torch.equal(compiled(IDS).logits, wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(torch.compile(twin, backend="aot_eager")(IDS).logits, wanted)
    flag.resume(0)


def test_on_the_triton_kernels():
    """In the interpreter here, for the wiring; the kernels have tests of their own."""
    model = make_preset("tiny")
    model.set_experts_implementation("eager")
    ids = IDS[:1, :6].to(model.device)
    wanted = logits(model, ids)
    report = install(model, PriorityFlag(), backend="triton")
    assert report.modules[0].backend == "triton"
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_padding_and_an_empty_batch():
    model = make_preset("tiny")
    model.set_experts_implementation("eager")
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    with torch.no_grad():
        wanted = model(IDS, attention_mask=mask).logits
        install(model)
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits, wanted, rtol=0, atol=1e-5)
        experts = model.model.layers[0].mlp.experts
        index = torch.empty(0, 2, dtype=torch.int64)
        assert experts(torch.empty(0, 64), index, torch.empty(0, 2)).shape == (0, 64)


def test_bfloat16_is_close_to_float32():
    model = make_preset("tiny")
    experts = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(9, 64), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    wanted = moe_reference(x, experts.gate_up_proj, experts.down_proj, index, weights)
    install(model.to(torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):  # both kinds of router exist
        got = experts(x.bfloat16(), index, weights.to(dtype))
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().max() <= 3e-2 * wanted.abs().max()


def test_by_name_alone(tmp_path):
    """experts_implementation="qllm" works without install, through every door of transformers."""
    save_preset("tiny", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="qllm")
    model = make_preset("tiny")
    before = logits(model)
    model.set_experts_implementation("qllm")
    with models.experts.recorded_calls() as calls:
        assert torch.equal(logits(model), logits(loaded))
    assert len(calls) == 4
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", ["", "mlp.gate", "mlp.experts", "layers.1.mlp.experts"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_in_grad_mode_works_and_a_backward_is_refused(compiled, trained):
    """Whether the gradient is one of hidden states, of the router alone, or of the experts alone."""
    model = make_preset("tiny")
    install(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trained in name
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    out = run(IDS).logits
    assert torch.equal(out.detach(), logits(model))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()


# -- install and uninstall -----------------------------------------------------------------------------


def test_report():
    report = install(make_preset("tiny-qwen3-moe"), PriorityFlag(), 1, backend="torch")
    first = report.modules[0]
    assert report.model == "Qwen3MoeForCausalLM"
    assert (first.name, first.class_name) == ("model.layers.0.mlp.experts", "Qwen3MoeExperts")
    assert (first.num_experts, first.hidden_size, first.intermediate_size) == (12, 64, 48)
    assert (first.layout, first.dtype, first.backend) == ("silu", torch.float32, "torch")
    assert "2 experts modules" in str(report)
    assert "model.layers.1.mlp.experts  Qwen3MoeExperts  E=12 H=64 I=48  silu  float32  cpu  torch" in str(
        report
    )


def test_install_leaves_the_random_state_alone():
    model = make_preset("tiny").train()
    state = torch.get_rng_state()
    install(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_keeps_the_experts_and_not_the_flag():
    model, flag = make_preset("tiny"), PriorityFlag()
    install(model, flag)
    flag.pause(0)
    twin = copy.deepcopy(model)
    assert in_thread(logits, twin)().shape == (2, 24, 128)
    assert uninstall(twin)
    assert torch.equal(logits(twin), logits(make_preset("tiny")))
    assert (twin.config._experts_implementation, model.config._experts_implementation) == (
        "grouped_mm",
        "qllm",
    )
    assert not uninstall(twin)


def test_a_copy_is_a_model_of_its_own():
    (flag, parked), other = parking_flag(), PriorityFlag()
    model = make_preset("tiny")
    install(model, flag)
    twin = copy.deepcopy(model)
    wanted = logits(model)
    install(twin, other, 1)
    assert (heard(model), heard(twin)) == ([(flag, 0)] * 2, [(other, 1)] * 2)
    flag.pause(0)
    standing = in_thread(logits, model)
    assert parked.wait(WAIT_S)
    assert torch.equal(logits(twin), wanted)
    assert uninstall(twin)
    assert standing.alive()
    flag.resume(0)
    assert torch.equal(standing(), wanted)
    assert heard(model) == [(flag, 0)] * 2


READ = """
import pickle, sys, torch
model, ids, wanted = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    assert torch.equal(model(ids).logits, wanted)
"""


@needs_pickle
def test_a_pickle_of_an_installed_model_is_read_by_a_process_that_knows_nothing_of_us(tmp_path):
    model, flag = make_preset("tiny"), PriorityFlag()
    install(model, flag)
    with (tmp_path / "model").open("wb") as file:
        pickle.dump((model, IDS, logits(model)), file)
    flag.pause(0)
    with (tmp_path / "model").open("rb") as file:
        again, _, wanted = pickle.load(file)
    assert torch.equal(in_thread(logits, again)(), wanted)  # the experts, not the flag
    assert uninstall(again)
    assert again.config._experts_implementation == "grouped_mm"
    subprocess.run([sys.executable, "-c", READ, tmp_path / "model"], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"flag": "cuda"}, TypeError, "flag must be a PriorityFlag"),
        ({"flag": PriorityFlag(), "priority": 2}, ValueError, "priority must be"),
        ({"priority": -1}, ValueError, "priority must be"),
        ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model, flag = make_preset("tiny"), PriorityFlag()
    before = model.config._experts_implementation
    with pytest.raises(error, match=message):
        install(model, **arguments)
    assert model.config._experts_implementation == before
    assert not uninstall(model)
    install(model, flag, 1)
    with pytest.raises(error, match=message):
        install(model, **arguments)
    assert heard(model) == [(flag, 1)] * 2


def heard(model):
    """The (flag, priority) that each experts call of one forward pass polls; None where it polls none."""
    calls = []
    experts = models.experts
    originals = experts.moe, experts.MoeRun

    def listen(original):
        def call(*args, flag=None, priority=0, **kwargs):
            calls.append(None if flag is None else (flag, priority))
            return original(*args, flag=flag, priority=priority, **kwargs)

        return call

    experts.moe, experts.MoeRun = map(listen, originals)
    try:
        logits(model)
    finally:
        experts.moe, experts.MoeRun = originals
    return calls


def test_not_a_model():
    model = make_preset("tiny")
    for other, said in (
        (nn.Linear(2, 2), "got Linear$"),
        (nn.Sequential(nn.Sequential(nn.Tanh(), model)), r"got Sequential, which has one: pass its \.0\.1$"),
        (nn.DataParallel(model), r"got DataParallel, which has one: pass its \.module$"),
        (torch.compile(model, backend="eager"), r"got OptimizedModule, which has one: pass its \._orig_mod$"),
        (
            types.SimpleNamespace(model=model),
            r"got SimpleNamespace, which has one: pass its \.model$",
        ),  # a pipeline
        (type(model), "got the class MixtralForCausalLM$"),
        (model.config, "got MixtralConfig$"),
        ("a/folder", "got str; qllm_ops.models.load reads one from a folder"),
    ):
        for call in (install, uninstall, lambda model: quantize_experts(model, "int4")):
            with pytest.raises(TypeError, match="^model must be a transformers PreTrainedModel, " + said):
                call(other)
    assert not uninstall(model)
    with torch.device("meta"):
        empty = make_preset("tiny")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts has no weights in memory"):
        install(empty)


# -- who is preempted ------------------------------------------------------------------------------------


def test_which_flag_a_forward_listens_to():
    model, mine, other = make_preset("tiny"), PriorityFlag(), PriorityFlag()

    def flags():
        first, second = heard(model)
        assert first == second
        return first

    install(model)
    assert flags() is None
    install(model, mine, 1)
    assert flags() == (mine, 1)
    assert current_preemption() is None
    with preemptible(other, 0) as outer:
        assert current_preemption() is outer
        assert (outer.flag, outer.priority, outer.granularity) == (other, 0, "tile")
        assert flags() == (other, 0)
        with preemptible(None):
            assert flags() is None
            assert current_preemption().flag is None
        for coarse in ("layer", None):
            with preemptible(other, 1, coarse):
                assert flags() is None
        assert flags() == (other, 0)
        assert in_thread(current_preemption)() is None
        assert asyncio.run(asyncio.to_thread(flags)) == (other, 0)
        assert in_thread(flags)() == (mine, 1)
        with pytest.raises(KeyError), preemptible(mine, 1):
            raise KeyError
        assert flags() == (other, 0)
    assert flags() == (mine, 1)
    uninstall(model)
    model.set_experts_implementation("qllm")
    assert flags() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((object(), 0), TypeError, "flag must be"),
        ((PriorityFlag(), 2), ValueError, "priority must be"),
        ((PriorityFlag(), 0, "expert"), ValueError, "granularity must be"),
    ],
)
def test_bad_preemption(arguments, error, message):
    with pytest.raises(error, match=message), preemptible(*arguments):
        pass


@pytest.mark.parametrize("granularity", ["tile", "layer"])
def test_a_forward_stands_still_inside_a_layer_while_another_overtakes(granularity):
    model = make_preset("tiny")
    flag, parked = parking_flag()
    install(model, flag)
    low_ids, high_ids = IDS[:1], IDS[1:]
    low_wanted, high_wanted = logits(model, low_ids), logits(model, high_ids)
    low = threading.local()

    def pause_here(*_):
        # In the second layer, after its router: attention and the first layer are behind.
        if getattr(low, "here", False):
            flag.pause(0, "test", timeout_s=WAIT_S)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(pause_here)

    def low_pass():
        low.here = True
        with preemptible(flag, 0, granularity) as preemption:
            out = logits(model, low_ids)
        assert preemption.wasted_tiles == 0
        return out

    standing = in_thread(low_pass)
    assert parked.wait(WAIT_S)
    for _ in range(3):
        with preemptible(flag, 1, granularity):
            assert torch.equal(logits(model, high_ids), high_wanted)
        assert standing.alive()
    flag.resume(0, "test")
    assert torch.equal(standing(), low_wanted)
    assert flag.expired == 0


def test_without_granularity_a_pause_is_not_looked_at():
    model, flag = make_preset("tiny"), PriorityFlag()
    install(model, flag)
    wanted = logits(model)
    flag.pause(0)

    def run():
        with preemptible(flag, 0, None):
            return logits(model)

    assert torch.equal(in_thread(run)(), wanted)


@pytest.mark.parametrize("name", SUPPORTED)
def test_random_pauses_change_no_bit(name):
    model = make_preset(name)
    ids = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(2))
    parks = []
    flag = PriorityFlag(on_event=lambda kind, priority, now: kind == "park" and parks.append(now))
    install(model, flag)
    wanted = logits(model, ids)
    done = threading.Event()

    def flip():
        choice = random.Random(0)
        while not done.is_set():
            flag.pause(0)
            time.sleep(choice.random() * 1e-3)
            flag.resume(0)
            time.sleep(choice.random() * 2e-3)

    flipping = in_thread(flip)
    try:
        until = time.monotonic() + WAIT_S
        while len(parks) < 20 and time.monotonic() < until:
            assert torch.equal(logits(model, ids), wanted)
    finally:
        done.set()
        flipping()
    assert len(parks) >= 20


def test_two_models_with_two_flags():
    (flag, parked), other_flag = parking_flag(), PriorityFlag()
    paused, running = make_preset("tiny"), make_preset("tiny-olmoe")
    install(paused, flag)
    install(running, other_flag)
    wanted, running_wanted = logits(paused), logits(running)
    flag.pause(0)
    standing = in_thread(logits, paused)
    assert parked.wait(WAIT_S)
    assert torch.equal(logits(running), running_wanted)
    assert standing.alive()
    flag.resume(0)
    assert torch.equal(standing(), wanted)


def test_two_models_with_one_flag():
    flag, _ = parking_flag()
    models_ = [make_preset("tiny"), make_preset("tiny-olmoe")]
    for model in models_:
        install(model, flag)
    wanted = [logits(model) for model in models_]
    flag.pause(0)
    standing = [in_thread(logits, model) for model in models_]
    time.sleep(0.1)
    assert all(result.alive() for result in standing)
    flag.resume(0)
    assert all(torch.equal(result(), want) for result, want in zip(standing, wanted, strict=True))


def test_two_threads_on_one_model_with_a_flag_each():
    """Each thread's body pauses with its own flag only, though the model and its install are shared."""
    model = make_preset("tiny")
    install(model)
    wanted = logits(model)
    (first, parked), (second, second_parked) = parking_flag(), parking_flag()

    def listening_to(flag):
        with preemptible(flag, 0):
            return logits(model)

    first.pause(0)
    standing = in_thread(listening_to, first)
    assert parked.wait(WAIT_S)
    assert torch.equal(in_thread(listening_to, second)(), wanted)
    second.pause(0)
    other = in_thread(listening_to, second)
    assert second_parked.wait(WAIT_S)
    first.resume(0)
    assert torch.equal(standing(), wanted)
    assert other.alive()
    second.resume(0)
    assert torch.equal(other(), wanted)


@pytest.mark.parametrize("share_config", [False, True])
def test_installing_and_uninstalling_one_model_while_another_runs(share_config):
    running, flag = make_preset("tiny"), PriorityFlag()
    install(running, flag)
    wanted = logits(running)
    other = type(running)(running.config).eval() if share_config else make_preset("tiny")
    stop = threading.Event()

    def run():
        passes = 0
        while not stop.is_set() or passes < 3:
            assert torch.equal(logits(running), wanted)
            passes += 1
        return passes

    with flipping(flag):
        passes = in_thread(run)
        for _ in range(10):
            install(other, PriorityFlag(), 1)
            assert uninstall(other)
        stop.set()
        assert passes() >= 3
    uninstall(running)
    assert running.config._experts_implementation != "qllm"


def test_two_threads_install_models_that_share_a_config():
    first = make_preset("tiny")
    both = [first, type(first)(first.config).eval()]
    before = first.config._experts_implementation
    for _ in range(5):
        for result in [in_thread(install, model) for model in both]:
            assert len(result()) == 2
        assert first.config._experts_implementation == "qllm"
        for result in [in_thread(uninstall, model) for model in both]:
            assert result()
        assert first.config._experts_implementation == before


def test_a_refused_install_leaves_a_shared_config_to_the_model_that_has_it():
    good = make_preset("tiny")
    bad = type(good)(good.config).eval()
    bad.model.layers[1].mlp.forward = lambda x: x
    before = good.config._experts_implementation
    for others, expected in (((), before), ((good,), "qllm")):
        for model in others:
            install(model)
        with pytest.raises(UnsupportedExpertsError):
            install(bad)
        assert good.config._experts_implementation == expected
        assert not uninstall(bad)
    uninstall(good)
    assert good.config._experts_implementation == before


@pytest.mark.parametrize(
    "change", [lambda model, flag: install(model, flag, 1), lambda model, _: uninstall(model)]
)
def test_a_pass_that_stands_still_goes_by_the_flag_that_it_began_with(change):
    model, other = make_preset("tiny"), PriorityFlag()
    flag, parked = parking_flag()
    install(model, flag)
    wanted = logits(model)
    flag.pause(0)
    standing = in_thread(logits, model)
    assert parked.wait(WAIT_S)
    change(model, other)
    assert torch.equal(in_thread(logits, model)(), logits(model))  # nobody else waits for the old flag
    assert standing.alive()
    flag.resume(0)
    torch.testing.assert_close(standing(), wanted, rtol=0, atol=1e-5)  # the layers after it may be another's


# -- refusals ------------------------------------------------------------------------------------------

REASONS = {
    "doge": ["DogeCDMoE: its experts are rows of two embeddings"],
    "llama": ["LlamaForCausalLM has no MoE experts"],
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_architectures(model_type):
    model = tiny_model(model_type)
    before = model.config._experts_implementation
    error = ValueError if model_type == "llama" else UnsupportedExpertsError
    for message in REASONS[model_type]:
        with pytest.raises(error, match=message):
            install(model)
    assert model.config._experts_implementation == before


def test_experts_that_a_forward_does_not_reach():
    model = make_preset("tiny")
    before = model.config._experts_implementation
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(
        UnsupportedExpertsError, match=r"never reaches 1 of its 2 .*model\.layers\.1\.mlp\.experts"
    ):
        install(model)
    assert model.config._experts_implementation == before
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        install(model)
    assert model.config._experts_implementation == before


def test_one_refused_module_among_good_ones_refuses_all():
    model = make_preset("tiny")
    model.model.layers[1].mlp.experts.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedExpertsError, match=r"ignored: extra \(model\.layers\.1\.mlp\.experts\)$"):
        install(model)
    assert model.config._experts_implementation != "qllm"

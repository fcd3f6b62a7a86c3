"""Experts that transformers does not dispatch: their own numbers, and a model given back as it was."""

import copy
import pickle

import pytest
import torch
from conformity import Row, output_of, tiny_model
from tiny_models import defaults_of, needs_pickle
from torch import nn

from qllm_ops import PriorityFlag
from qllm_ops.models import UnsupportedExpertsError, install, preemptible, uninstall
from qllm_ops.models.adapters import is_adopted
from qllm_ops.models.experts import UNSUITED, experts_layout
from qllm_ops.models.install import find_experts

CLASSES = {
    "dbrx": ("DbrxForCausalLM", "DbrxExperts"),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeMoE"),
    "llama4": ("Llama4ForCausalLM", "Llama4TextMoe"),
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashExperts"),
    "step3p7": ("Step3p7ForConditionalGeneration", "Step3p7Experts"),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersExperts"),
}
FUSED = ("dbrx", "switch_transformers")
T = 6


def make(name):
    model_class, experts_class = CLASSES[name]
    module, experts = Row(f"transformers.models.{name}.modeling_{name}", experts_class, False).load()
    return tiny_model(getattr(module, model_class), experts)


def adapted(model):
    return [module for _, module, _ in find_experts(model)]


def same_state(state, wanted):
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_while_installed_and_the_model_afterwards(name):
    model = make(name)
    before, wanted = copy.deepcopy(model.state_dict()), output_of(model)
    named = [(key, parameter.requires_grad) for key, parameter in model.named_parameters()]
    for _ in range(2):
        report = install(model)
        assert {module.class_name for module in report.modules} == {CLASSES[name][1]}
        assert all(module.fused == (name != "step3p7") for module in report.modules)
        assert install(model) == report
        same_state(model.state_dict(), before)
        assert (output_of(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert uninstall(model)
        same_state(model.state_dict(), before)
        assert [(key, parameter.requires_grad) for key, parameter in model.named_parameters()] == named
        assert not any(is_adopted(module) for module in adapted(model))
        assert torch.equal(output_of(model), wanted)


@pytest.mark.parametrize("name", CLASSES)
def test_weights_are_in_memory_once(name):
    model = make(name)
    size = sum(parameter.numel() for parameter in model.parameters())
    install(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == size


@pytest.mark.parametrize("name", FUSED)
def test_save_load_and_copy_an_installed_model(name, tmp_path):
    model = make(name)
    install(model)
    wanted = output_of(model)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).eval()
    same_state(saved.state_dict(), model.state_dict())

    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(1.5)
    twin = copy.deepcopy(model)
    twin.load_state_dict(saved.state_dict())
    same_state(twin.state_dict(), saved.state_dict())
    install(saved)
    assert torch.equal(output_of(twin), output_of(saved))
    assert torch.equal(output_of(model), wanted)
    incomplete = saved.state_dict()
    incomplete.pop(next(key for key in incomplete if ".experts." in key))
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(incomplete)
    assert uninstall(twin)
    same_state(twin.state_dict(), saved.state_dict())
    assert not any(is_adopted(module) for module in adapted(twin))


@needs_pickle
@pytest.mark.parametrize("name", CLASSES)
def test_a_pickle_of_an_installed_model_is_one_too(name):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    install(model)
    again = pickle.loads(pickle.dumps(model))
    assert all(map(is_adopted, adapted(again)))
    same_state(again.state_dict(), before)
    assert torch.equal(output_of(again), output_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # of which the other has none
    assert uninstall(again)
    assert not any(map(is_adopted, adapted(again)))
    same_state(again.state_dict(), before)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dbrx", "longcat_flash", "step3p7"])
@torch.no_grad()
def test_indices_that_are_not_here_negative_weights_and_no_tokens(name, weights_dtype):
    model = make(name)
    module = adapted(model)[0]
    hidden = module.down_proj.shape[1] if hasattr(module, "down_proj") else module.hidden_size
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(T, hidden, generator=draw)
    index = torch.rand(T, getattr(module, "total_experts", 8), generator=draw).argsort(1)[:, :3]
    weights = torch.randn(T, 3, generator=draw).to(weights_dtype)
    given = (x[None] if name == "dbrx" else x, index)
    skipped = torch.rand(T, 3, generator=draw) < 0.3
    wanted = module(*given, weights), module(*given, weights.masked_fill(skipped, 0))
    install(model)
    got = module(*given, weights), module(given[0], index.masked_fill(skipped, -1), weights)
    for ours, own in zip(got, wanted, strict=True):
        assert (ours - own).abs().max() <= 1e-5 * own.abs().max()
    assert module(given[0][..., :0, :], index[:0], weights[:0]).shape == given[0][..., :0, :].shape


@torch.no_grad()
def test_a_token_beyond_the_capacity_of_its_expert_is_dropped():
    model = make("switch_transformers")
    install(model)
    module = adapted(model)[0]
    one_hot = torch.zeros(2, 1, 8, dtype=torch.int64)
    one_hot[0, 0, 3] = 1
    output = module(torch.ones(2, 64), one_hot, torch.ones(2, 1))
    assert output[0].any()
    assert not output[1].any()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_computes_something_else_is_refused_and_left_as_it_was(name, monkeypatch):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    last = adapted(model)[-1]  # the ones before it have been adopted by then
    kind = type(last)
    own = kind.forward

    def changed(self, *args):
        output = own(self, *args)
        if self is not last:
            return output
        return (output[0] * 1.2, *output[1:]) if isinstance(output, tuple) else output * 1.2

    monkeypatch.setattr(kind, "forward", changed)
    with pytest.raises(UnsupportedExpertsError, match=f"{CLASSES[name][1]} .* computes something else"):
        install(model)
    same_state(model.state_dict(), before)
    assert not any(is_adopted(module) for module in adapted(model))


def test_an_activation_that_is_replaced_is_looked_at_again():
    model = make("jetmoe")
    install(model)
    for module in adapted(model):
        module.activation = nn.GELU()
    got = output_of(model)
    uninstall(model)
    wanted = output_of(model)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    adapted(model)[0].activation = nn.Tanh()
    with pytest.raises(UnsupportedExpertsError, match="JetMoeMoE: its activation is not fused"):
        install(model)


class Wrapper(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("llama4", "experts", "Llama4TextMoe: .* replaced: 'Wrapper' object has no attribute 'act_fn'"),
        ("switch_transformers", "expert_1.wi", "Switch.* replaced: it has no 'expert_1.wi.weight'"),
    ],
)
def test_a_part_that_is_wrapped_is_named(name, part, said):
    """As peft does it: whatever the wrapper adds would be left out."""
    model = make(name)
    module = adapted(model)[-1]
    module.set_submodule(part, Wrapper(module.get_submodule(part)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedExpertsError, match=said):
        install(model)
    same_state(model.state_dict(), before)


def test_a_model_in_training_mode_is_compared_without_dropout_and_stays_in_it():
    model = make("switch_transformers").train()
    install(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
@pytest.mark.parametrize("name", ["dbrx", "llama4"])
def test_the_users_defaults_are_not_obeyed(name, default):
    model = make(name)
    with defaults_of(default):
        assert len(install(model)) == 2


def test_a_paused_thread_can_install():
    flag = PriorityFlag()
    flag.pause(0)
    with preemptible(flag):
        install(make("llama4"))


def test_a_later_error_gives_back_what_was_adopted():
    model = make("dbrx")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="triton"):
        install(model, backend="abacus")
    same_state(model.state_dict(), before)
    assert not any(is_adopted(module) for module in adapted(model))


def test_adapted_experts_of_a_shallow_copy_are_the_models():
    model = make("llama4")
    install(model)
    assert uninstall(copy.copy(model))
    assert all(map(is_adopted, adapted(model)))
    assert uninstall(model)
    assert not any(map(is_adopted, adapted(model)))


def test_attention_experts_stay_as_they_are():
    model = make("jetmoe")
    assert all(type(module).__name__ == "JetMoeMoE" for module in adapted(model))
    assert any(type(module).__name__ == "JetMoeMoA" for module in model.modules())


@pytest.mark.parametrize("name", UNSUITED)
def test_classes_that_are_refused_say_why(name):
    module = type(name, (nn.Module,), {})()
    with pytest.raises(UnsupportedExpertsError, match=f"{name} is not supported .*{UNSUITED[name][:20]}"):
        experts_layout(module)

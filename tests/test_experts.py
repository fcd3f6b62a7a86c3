"""Recognising experts: an activation by what it does, and whatever `moe` does not compute, refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from quantized_models import dense_model
from tiny_models import OTHER_LAYOUTS, defaults_of
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from qllm_ops import Activation, PriorityFlag
from qllm_ops.models import UnsupportedExpertsError, install
from qllm_ops.models.experts import experts_forward, experts_layout
from qllm_ops.models.install import find_experts
from qllm_ops.models.presets import make_preset
from qllm_ops.models.quantize import hold
from qllm_ops.testing import quantize


class Experts(nn.Module):
    """The usual experts, with room to differ."""

    act_fn = staticmethod(F.silu)

    def __init__(self, config):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 5))
        self.down_proj = nn.Parameter(torch.randn(4, 5, 6))

    def expert(self, x, e):
        gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[e])

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for t, k in torch.cartesian_prod(*(torch.arange(n) for n in top_k_index.shape)).tolist():
            out[t] += self.expert(hidden_states[t], top_k_index[t, k]) * top_k_weights[t, k]
        return out


class Packed(torch.Tensor):
    """As libraries that quantise make them."""


def variant(**changes):
    """An instance of a decorated class made of Experts and ``changes``."""
    flags = {key: changes.pop(key) for key in list(changes) if key.startswith(("is_", "has_"))}
    experts = use_experts_implementation(type("VariantExperts", (Experts,), changes))(
        SimpleNamespace(_experts_implementation="qllm")
    )
    for key, value in flags.items():
        setattr(experts, key, value)
    return experts


def float_gate(self, gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate) * up).to(gate_up.dtype)


def clamped_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=7.0)) * up


def clamped_up(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up.clamp(-1000.0, 1000.0)


def swapped(self, gate_up):
    up, gate = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_both(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


def shifted(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=3.5)
    return gate * torch.sigmoid(1.5 * gate) * (up.clamp(-3.5, 3.5) + 0.25)


def gated_expert(self, x, e):
    return F.linear(self._apply_gate(F.linear(x, self.gate_up_proj[e])), self.down_proj[e])


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "silu"),
        ({"act_fn": ACT2FN["silu"]}, "silu"),
        ({"act_fn": staticmethod(lambda x: x / (1 + torch.exp(-x)))}, "silu"),
        ({"act_fn": ACT2FN["gelu"]}, "gelu"),
        ({"act_fn": ACT2FN["gelu_pytorch_tanh"]}, "gelu_tanh"),
        ({"act_fn": ACT2FN["gelu_new"]}, "gelu_tanh"),
        ({"_apply_gate": float_gate, "act_fn": staticmethod(F.gelu)}, "gelu"),
        ({"act_fn": ACT2FN["relu"]}, "relu"),
        ({"act_fn": ACT2FN["relu2"]}, "relu2"),
        ({"act_fn": ACT2FN["quick_gelu"]}, Activation("silu", alpha=1.702)),
        ({"_apply_gate": clamped_both, "expert": gated_expert}, Activation("silu", limit=7.0)),
        ({"_apply_gate": shifted, "expert": gated_expert}, Activation("silu", 1.5, 3.5, 0.25)),
        # What no kernel fuses is computed by the module's own method.
        ({"act_fn": ACT2FN["mish"]}, None),
        ({"act_fn": torch.tanh}, None),
        ({"_apply_gate": clamped_gate, "expert": gated_expert}, None),
        ({"_apply_gate": clamped_up, "expert": gated_expert}, None),
        ({"_apply_gate": swapped, "expert": gated_expert}, None),
    ],
)
@torch.no_grad()
def test_activation_is_found_by_what_it_does(changes, activation):
    experts = variant(**changes)
    wanted = Activation(activation) if isinstance(activation, str) else activation
    assert experts_layout(experts).activation == wanted
    x, weights = torch.randn(7, 5), torch.randn(7, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    own = type(experts).forward.__wrapped__(experts, x, index, weights)
    torch.testing.assert_close(experts(x, index, weights), own, rtol=1e-4, atol=1e-4)


def interleaved(self, gate_up):
    return F.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


def clamped_expert(self, x, e):
    gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
    return F.linear(F.silu(gate.clamp(max=10.0)) * up, self.down_proj[e])


def weighted_input(self, hidden_states, top_k_index, top_k_weights):
    scaled = hidden_states * top_k_weights[:, :1]
    return Experts.forward(self, scaled, top_k_index, torch.ones_like(top_k_weights))


OBSERVED = "its own forward computes something else"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"act_fn": staticmethod(lambda gate, up: gate * up)}, "could not be compared"),
        ({"expert": clamped_expert}, OBSERVED),
        ({"expert": lambda self, x, e: F.layer_norm(Experts.expert(self, x, e), (x.shape[-1],))}, OBSERVED),
        ({"forward": weighted_input}, OBSERVED),
        ({"forward": lambda self, x, index: x}, "could not be compared"),
        ({"has_bias": True}, "no gate_up_proj_bias; no down_proj_bias"),
        ({"has_gate": False}, "ignored: gate_up_proj; no up_proj"),
        ({"is_transposed": True}, "gate_up_proj is .* beside down_proj"),
        ({"has_post_expert_norm": True}, "no post_expert_norm"),
        # Flags that the class's own forward does not follow.
        ({"_apply_gate": interleaved}, OBSERVED),
    ],
)
def test_refused_variants(changes, reason):
    experts = variant(**changes)
    with pytest.raises(UnsupportedExpertsError, match=f"VariantExperts is not supported.*{reason}"):
        experts(torch.randn(3, 5), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: setattr(m, "extra", nn.Linear(2, 2)),
            "tensors that would be ignored: extra.bias, extra.weight",
        ),
        (lambda m: m.double(), "gate_up_proj has dtype torch.float64, wanted [^(]*;"),
        (lambda m: m.to(torch.float8_e5m2), r"gate_up_proj has dtype torch.float8_e5m2, .* \(quantised\?\)"),
        (lambda m: delattr(m, "gate_up_proj"), "no gate_up_proj"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(4, 30))), "down_proj has shape"),
        (
            lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(4, 5, 6).as_subclass(Packed))),
            "down_proj is a Packed, not a plain tensor",
        ),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(4, 6, 5))), "gate_up_proj is .* beside"),
    ],
)
def test_refused_tensors(change, reason):
    experts = variant()
    change(experts)
    with pytest.raises(UnsupportedExpertsError, match=reason):
        experts_layout(experts)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek-v3", *OTHER_LAYOUTS])
def test_the_users_defaults_are_not_obeyed(name, default):
    wanted, model = install(dense_model(name)), dense_model(name)
    with defaults_of(default):
        assert install(model) == wanted


def test_a_layout_is_looked_at_again_when_the_activation_is_replaced():
    experts = variant()
    assert experts_layout(experts).activation == Activation("silu")
    experts.act_fn = F.gelu
    assert experts_layout(experts).activation == Activation("gelu")
    experts.act_fn = torch.tanh
    assert experts_layout(experts).activation is None


def test_experts_quantised_to_fp8():
    """They ask another registry, where the name must lead to the same function."""
    config = SimpleNamespace(
        hidden_size=128,
        num_local_experts=2,
        intermediate_size=128,
        hidden_act="silu",
        _experts_implementation="qllm",
    )
    quantised = use_experts_implementation(
        type("QuantisedExperts", (FP8Experts,), {}), experts_interface=FP8ExpertsInterface()
    )
    experts = quantised(config, block_size=(128, 128))
    for parameter in experts.parameters():
        parameter.data.zero_()
    batch = torch.zeros(1, 128), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(
        UnsupportedExpertsError,
        match=r"QuantisedExperts is not supported.*gate_up_proj: scales must be positive.*down_proj: scales",
    ):
        experts(*batch)
    for scales in (experts.gate_up_proj_scale_inv, experts.down_proj_scale_inv):
        scales.data.fill_(1)
    assert torch.equal(experts(*batch), torch.zeros(1, 128))


def test_a_graph_that_outlives_its_module_says_so():
    tokens = torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    experts = variant()
    experts(*tokens)
    number = experts._qllm_handle.number
    assert torch.equal(torch.ops.qllm_ops.experts(*tokens, number), experts(*tokens))
    del experts
    with pytest.raises(RuntimeError, match=rf"experts module {number}, which no longer exists"):
        torch.ops.qllm_ops.experts(*tokens, number)


def test_importing_registers_one_function():
    assert ExpertsInterface()["qllm"] is experts_forward
    assert FP8ExpertsInterface()["qllm"] is experts_forward


def test_experts_whose_weights_are_computed():
    """As peft adapts those of Mixtral: they are parametrised while a forward pass runs, and no longer."""

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    index, weights = torch.arange(14).view(7, 2) % 4, torch.rand(7, 2)
    hidden_states, experts = torch.randn(7, 5), variant()
    known, wanted = variant(), variant()
    experts_layout(known)
    for each in (experts, known, wanted):
        each.load_state_dict(experts.state_dict())
    wanted.down_proj.data *= 2
    for each in (experts, known):
        parametrize.register_parametrization(each, "down_proj", Twice())
    with torch.no_grad():
        output = experts_forward(wanted, hidden_states, index, weights)
        assert torch.equal(experts_forward(known, hidden_states, index, weights), output)
        with pytest.raises(UnsupportedExpertsError, match=r"ignored: parametrizations.*call install before"):
            experts_forward(experts, hidden_states, index, weights)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("format", ["mxfp4", "int4_asymmetric_128"])
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_an_exported_model_has_quantised_weights_with_it(format, tmp_path):
    """As they lie in memory: where rows are whole words, and zero points beside their scales."""
    model, ids = make_preset("tiny"), torch.arange(6)[None]
    for name, module, _ in find_experts(model):
        for leaf in ("gate_up_proj", "down_proj"):
            hold(model, f"{name}.{leaf}", quantize(getattr(module, leaf), format))
    install(model)
    wanted = Logits(model)(ids)
    program = torch.export.export(Logits(model), (ids,), strict=False)
    assert torch.equal(program.module()(ids), wanted)
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(ids), wanted)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_model_has_its_experts_weights_with_it(tmp_path):
    model, ids = make_preset("tiny"), torch.arange(6)[None]
    install(model)
    program = torch.export.export(Logits(model), (ids,), strict=False)
    called = {str(node.target) for node in program.graph.nodes if "qllm_ops" in str(node.target)}
    assert called == {"qllm_ops.moe.default"}
    wanted = Logits(model)(ids)
    torch.export.save(program, tmp_path / "model.pt2")
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(ids), wanted)
    with pytest.raises(Exception, match=r"strict must be False in torch\.export"):
        torch.export.export(Logits(model), (ids,), strict=True)
    install(model, PriorityFlag())
    with pytest.raises(ValueError, match=r"flag must be None in torch\.export"):
        torch.export.export(Logits(model), (ids,), strict=False)

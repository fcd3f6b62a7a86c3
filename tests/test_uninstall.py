"""A model given back as it was, and what it shares with another installed one left to that one."""

import copy

import pytest
import torch
from test_install import heard, logits
from tiny_models import stretched_model

from qllm_ops import PriorityFlag
from qllm_ops.models import install, make_preset, quantize_experts, uninstall
from qllm_ops.models.install import installed
from qllm_ops.models.rotary import OwnPositions


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_uninstall_restores(implementation):
    model = make_preset("tiny")
    model.set_experts_implementation(implementation)
    before = logits(model)
    assert not uninstall(model)
    install(model)
    install(model, PriorityFlag(), 1)
    assert model.config._experts_implementation == "qllm"
    assert uninstall(model)
    assert model.config._experts_implementation == implementation
    assert torch.equal(logits(model), before)
    assert not uninstall(model)


def test_models_that_share_a_config():
    first = make_preset("tiny")
    second = type(first)(first.config)
    before = first.config._experts_implementation
    install(first)
    install(second)
    uninstall(first)
    assert second.config._experts_implementation == "qllm"
    uninstall(second)
    assert second.config._experts_implementation == before


@pytest.mark.parametrize("share", [lambda model: model.model, copy.copy], ids=["inner", "shallow copy"])
def test_what_another_model_shares_stays_installed(share):
    model, flag = stretched_model("dynamic"), PriorityFlag()
    before, wanted = model.config._experts_implementation, logits(model)
    install(model, flag)
    other = share(model)
    install(other, flag) if other is model.model else None
    assert uninstall(other)
    assert not uninstall(other)
    assert heard(model) == [(flag, 0)] * 2
    assert isinstance(model.model.rotary_emb, OwnPositions)
    assert uninstall(model)
    assert not isinstance(model.model.rotary_emb, OwnPositions)
    assert model.config._experts_implementation == before
    assert torch.equal(logits(model), wanted)


def test_a_part_of_a_model_that_an_engine_serves_is_served():
    model = make_preset("tiny")
    with installed(model):
        for other in (model.model, copy.copy(model)):
            for change in (install, uninstall, lambda model: quantize_experts(model, "int4")):
                with pytest.raises(RuntimeError, match="while an engine serves it; close the engine first"):
                    change(other)
        install(make_preset("tiny"))
    assert install(model.model)

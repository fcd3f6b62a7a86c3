"""What a forward pass changes on a model: found wherever it is kept, and only where something changes."""

import pytest
import torch
from tiny_models import STRETCHED, stretched_model
from torch import nn

from qllm_ops.models import make_preset
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.shared import changed_by

IDS = torch.arange(40)[None]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(3))
        self.calls, self.cache, self.seen = 0, {"keys": [1]}, []
        self.config = type("Config", (), {})()
        self.config.kind = {"name": "plain"}


@pytest.mark.parametrize(
    ("change", "named"),
    {
        "nothing": (lambda b: b.table + 1, []),
        "the same value again": (lambda b: setattr(b, "calls", 0), []),
        "an equal dict": (lambda b: setattr(b, "cache", {"keys": [1]}), []),
        "a number": (lambda b: setattr(b, "calls", 1), ["Block.calls (0)"]),
        "a new attribute": (lambda b: setattr(b, "last", None), ["Block.last (0)"]),
        "an attribute that goes": (lambda b: delattr(b, "seen"), ["Block.seen (0)"]),
        "a list inside": (lambda b: b.cache["keys"].append(2), ["Block.cache (0)"]),
        "a buffer written to": (lambda b: b.table.add_(1), ["Block.table (0)"]),
        "the same values written": (lambda b: b.table.zero_(), ["Block.table (0)"]),
        "another buffer": (
            lambda b: b.register_buffer("table", torch.zeros(3), persistent=False),
            ["Block._non_persistent_buffers_set (0)", "Block.table (0)"],
        ),
        "a weight": (lambda b: b.weight.add_(1), ["Block.weight (0)"]),
        "a config": (lambda b: setattr(b.config, "kind", "x"), ["Config.kind (config of 0)"]),
        "inside a config": (lambda b: b.config.kind.update(name="x"), ["Config.kind (config of 0)"]),
        "two things": (
            lambda b: (setattr(b, "calls", 2), b.seen.append(1)),
            ["Block.calls (0)", "Block.seen (0)"],
        ),
    }.values(),
)
def test_changed_by(change, named):
    model = nn.Sequential(Block())
    with torch.inference_mode():
        assert changed_by(model, lambda: change(model[0])) == named


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_transformers_rotary_embeddings_are_found(kind):
    model = stretched_model(kind)
    with torch.no_grad():
        changed = changed_by(model, lambda: model(IDS))
    assert "MixtralRotaryEmbedding.inv_freq (model.rotary_emb)" in changed


@pytest.mark.parametrize("kind", STRETCHED)
def test_the_engine_takes_them(kind):
    model = stretched_model(kind)
    with Engine(model, limits=Limits(kv_tokens=64, kv_reserve=0)) as engine:
        assert len(engine.submit([1, 2, 3], max_new_tokens=3).result(60)) == 3
        with torch.no_grad():
            assert changed_by(model, lambda: model(IDS)) == []


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (
            lambda mlp, out: setattr(mlp, "last", out),
            r"MixtralSparseMoeBlock\.last \(model\.layers\.1\.mlp\)",
        ),
        (lambda mlp, out: mlp.experts.config.update({"mode": object()}), r"MixtralConfig\.mode"),
    ],
)
def test_the_engine_refuses_a_model_that_changes_itself(hook, named):
    model = make_preset("tiny")
    model.model.layers[1].mlp.register_forward_hook(lambda mlp, _, out: hook(mlp, out))
    before = (model.config._attn_implementation, model.config._experts_implementation)
    with pytest.raises(
        ValueError, match=rf"MixtralForCausalLM: a forward pass changes {named}.*; lanes that"
    ):
        Engine(model)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before

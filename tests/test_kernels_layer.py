"""Our layers through the `kernels` library's kernelize; and by its rules where it is not installed."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from qllm_ops import PriorityFlag
from qllm_ops.models import KERNELS_LAYER, install, make_preset, preemptible
from qllm_ops.models.experts import recorded_calls
from qllm_ops.testing import flipping

IDS = torch.arange(40)[None]
needs_kernels = pytest.mark.skipif(
    not is_kernels_available(),
    reason=f"this transformers takes kernels >={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}, not installed",
)


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def check(model, wanted):
    """Ours is computed, on every layer, and can be preempted."""
    with recorded_calls() as calls:
        got = logits(model)
    assert len(calls) == model.config.num_hidden_layers
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    flag = PriorityFlag()
    with flipping(flag), preemptible(flag):
        assert torch.equal(logits(model), got)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        model(IDS).logits.sum().backward()


# -- through kernelize -----------------------------------------------------------------------------------


def kernelized(model, layer, mode):
    from kernels import LocalLayerRepository, kernelize, use_kernel_mapping

    ours = LocalLayerRepository(repo_path=KERNELS_LAYER, layer_name=layer)
    with use_kernel_mapping({layer: {"cpu": {mode: ours}}}, inherit_mapping=False):
        return kernelize(model, mode=mode, device="cpu")


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
def test_any_experts_class(compiled, monkeypatch):
    from kernels import Mode, replace_kernel_forward_from_hub

    monkeypatch.setattr(MixtralExperts, "kernel_layer_name", None, raising=False)  # and gone afterwards
    replace_kernel_forward_from_hub(MixtralExperts, "Experts")
    model = make_preset("tiny")
    wanted = logits(model)
    model = kernelized(model, "Experts", Mode.INFERENCE | Mode.TORCH_COMPILE if compiled else Mode.INFERENCE)
    assert model.config._experts_implementation != "qllm"
    check(model, wanted)
    if compiled:
        torch.compiler.reset()
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(graph), wanted, rtol=0, atol=1e-5)
    install(model, PriorityFlag())  # both ways in at once
    check(model, wanted)


@needs_kernels
def test_gpt_oss_by_the_name_that_transformers_gave_it():
    from kernels import Mode

    model = tiny_model("gpt_oss")
    wanted = logits(model)
    check(kernelized(model, "MegaBlocksMoeMLP", Mode.INFERENCE), wanted)


@needs_kernels
def test_the_example():
    example = Path(__file__).parent.parent / "examples" / "kernelize.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kernelized" in done.stdout


# -- without the library: what it does, by hand ------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch):
    """The package as the library imports it: from its path, by the id in its metadata."""
    name = json.loads((KERNELS_LAYER / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, KERNELS_LAYER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.layers


def test_the_layers_keep_the_librarys_rules(layers):
    for layer in (layers.Experts, layers.MegaBlocksMoeMLP):
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) <= {"has_backward", "can_torch_compile"}


@pytest.mark.parametrize(("model", "class_name", "layer"), [
    (lambda: make_preset("tiny"), "MixtralExperts", "Experts"),
    (lambda: tiny_model("gpt_oss"), "GptOssExperts", "Experts"),
    (lambda: tiny_model("gpt_oss"), "GptOssMLP", "MegaBlocksMoeMLP"),
])  # fmt: skip
def test_a_forward_that_is_ours(model, class_name, layer, layers):
    model = model()
    wanted = logits(model)
    for module in model.modules():
        if type(module).__name__ == class_name:
            module.forward = types.MethodType(getattr(layers, layer).forward, module)
    check(model, wanted)

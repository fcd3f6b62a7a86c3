"""Test set-up that must come before triton is imported, and the Hypothesis profiles."""

import os

# Two lanes and other processes share the cores: an OpenMP thread that spins holds up everyone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a GPU a stream that stands still holds up those that share a hardware queue with it; 8 are the default.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

# Without a GPU the kernels run under Triton's interpreter, which is chosen when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

_unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=25, **_unhurried)
settings.register_profile("thorough", max_examples=500, **_unhurried)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """What one test leaves off would make another one fail."""
    yield
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, "gradients are off after this test"


@pytest.fixture
def poisoned_memory():
    """Fill every torch.empty with NaN, so that an element that no tile wrote cannot hide."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

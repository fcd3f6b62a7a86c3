"""What the device at hand can run, and what it is told where it cannot."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tile_layers import DTYPES, MIXTRAL, archs, dtypes, model_layers

from qllm_ops import device as module
from qllm_ops.device import arch_of, broken_interpreter, fit_device, fit_shared, unsupported
from qllm_ops.quantized import ROW_GROUP, W8A8
from qllm_ops.tiles import EXIT_US, TileConfig, layer_configs, shared_bytes

CUDA = torch.device("cuda:0")


@pytest.fixture
def device(monkeypatch):
    """device(name, capability, shared): what torch says of CUDA, afterwards."""

    def forget():
        unsupported.cache_clear()
        module._shared_bytes_of.cache_clear()

    def pretend(name, capability, hip=None, **properties):
        forget()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))

    yield pretend
    forget()


def test_a_device_that_is_too_old_is_told_what_to_do(device):
    device("Tesla T4", (7, 5), shared_memory_per_block_optin=65536)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0") as error:
        fit_device(layer_configs(**MIXTRAL), torch.bfloat16, CUDA)
    for part in ("cuda:0 (Tesla T4) has 7.5", 'backend="torch"'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arch", "name", "capability", "hip", "properties"),
    [
        ("sm_90", "NVIDIA H200", (9, 0), None, {"shared_memory_per_block_optin": 232448}),
        ("sm_80", "NVIDIA A100", (8, 0), None, {"shared_memory_per_block_optin": 166912}),
        ("sm_86", "NVIDIA RTX 4090", (8, 9), None, {"shared_memory_per_block_optin": 101376}),
        ("gfx942", "AMD Instinct MI300X", (9, 4), "6.4", {"shared_memory_per_block": 65536}),
        ("gfx942", "AMD Instinct MI300X", (9, 4), "6.4", {"shared_memory_per_block_optin": 0}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_devices_run_the_heuristics_as_they_are(device, arch, name, capability, hip, properties, dtype):
    device(name, capability, hip, **properties)
    for layer in model_layers():
        for max_exit_us in (EXIT_US, float("inf"), 1e-3):
            configs = layer_configs(**layer, dtype=dtype, arch=arch, max_exit_us=max_exit_us)
            assert fit_device(configs, dtype, CUDA) == configs


@given(archs, dtypes, st.sampled_from(list(model_layers())), st.integers(12 * 1024, 300 * 1024))
def test_tiles_shrink_until_they_fit(arch, dtype, layer, available):
    for phase, config in layer_configs(**layer, dtype=dtype, arch=arch).items():
        found = fit_shared(phase, config, dtype, available)
        if shared_bytes(phase, config, dtype) <= available:
            assert found == config
        elif phase != "combine":
            # block_k of 16 and two stages are the least that still loads ahead.
            assert shared_bytes(phase, found, dtype) <= available or found.block_n == 16
            assert min(found.block_n, found.block_k, found.num_stages * 8) >= 16
            assert (found.block_m, found.num_warps) == (config.block_m, config.num_warps)


def test_fewer_stages_come_before_smaller_tiles():
    config = TileConfig(128, 128, 64, 8, 4)
    assert fit_shared("down", config, torch.bfloat16, 99 * 1024) == replace(config, num_stages=3)


def test_a_device_with_too_little_shared_memory_is_told_what_to_do(device):
    device("a small one", (8, 6), shared_memory_per_block_optin=8 * 1024)
    configs = layer_configs(**{**MIXTRAL, "dtype": torch.float32})
    with pytest.raises(ValueError, match="bytes of shared memory") as error:
        fit_device(configs, torch.float32, CUDA)
    for part in ("cuda:0 (a small one) has 8192", 'backend="torch"', "float16 or bfloat16 take half"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="bytes of shared memory") as error:
        fit_device(layer_configs(**MIXTRAL), torch.bfloat16, CUDA)
    assert "take half" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "capability", "hip", "words"),
    [
        ("NVIDIA A100", (8, 0), None, ["needs compute capability 8.9", "cuda:0 (NVIDIA A100) has 8.0"]),
        ("NVIDIA RTX 3090", (8, 6), None, ["needs compute capability 8.9", "has 8.6"]),
        ("AMD Instinct MI300X", (9, 4), "6.4", ["no AMD device", "e4m3fnuz", "cuda:0 (AMD Instinct MI300X)"]),
    ],
)
def test_a_device_without_float8_products_is_told_what_to_do(device, name, capability, hip, words):
    device(name, capability, hip, shared_memory_per_block_optin=101376, shared_memory_per_block=65536)
    layer = {**MIXTRAL, "arch": arch_of(CUDA)}
    fit_device(layer_configs(**layer, weights="fp8"), torch.bfloat16, CUDA, "fp8")  # not refused
    with pytest.raises(ValueError, match="fp8_activations=True needs") as error:
        fit_device(layer_configs(**layer, weights=W8A8), torch.bfloat16, CUDA, W8A8)
    for part in (*words, "fp8_activations=False runs there", 'backend="torch"'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "capability", "shared"), [("NVIDIA H200", (9, 0), 232448), ("NVIDIA RTX 4090", (8, 9), 101376)]
)
def test_devices_with_float8_products_run_the_heuristics_as_they_are(device, name, capability, shared):
    device(name, capability, shared_memory_per_block_optin=shared)
    for layer in model_layers():
        for max_exit_us in (EXIT_US, float("inf"), 1e-3):
            arguments = {**layer, "dtype": torch.bfloat16, "max_exit_us": max_exit_us}
            configs = layer_configs(**arguments, arch=arch_of(CUDA), weights=W8A8)
            assert fit_device(configs, torch.bfloat16, CUDA, W8A8) == configs
            assert {configs[phase].block_k for phase in ("gate_up", "down")} == {ROW_GROUP}


@given(st.sampled_from(("sm_90", "sm_86", "interpreter")), st.integers(12 * 1024, 300 * 1024))
def test_a_turn_is_a_group_of_activations_whatever_the_memory(arch, available):
    for phase, config in layer_configs(**{**MIXTRAL, "arch": arch}, weights=W8A8).items():
        if phase != "combine":
            found = fit_shared(phase, config, torch.bfloat16, available, W8A8)
            assert (found.block_k, found.exit_k) == (ROW_GROUP, 0)


def test_a_cpu_is_never_refused():
    configs = layer_configs(**{**MIXTRAL, "arch": "interpreter"})
    assert unsupported(torch.device("cpu")) is None
    assert fit_device(configs, torch.bfloat16, torch.device("cpu")) is configs


@pytest.mark.parametrize(
    ("name", "capability", "arch"),
    [("A100", (8, 0), "sm_80"), ("A10", (8, 6), "sm_86"), ("RTX 4090", (8, 9), "sm_86"),
     ("NVIDIA H200", (9, 0), "sm_90"), ("NVIDIA GH200 480GB", (9, 0), "sm_90"),
     ("NVIDIA H100 80GB HBM3", (9, 0), "sm_90_h100"), ("B200", (10, 0), "sm_100"),
     ("Thor", (11, 0), "sm_100"),
     ("RTX 5090", (12, 0), "sm_86"), ("T4", (7, 5), "sm_86")],
)  # fmt: skip
def test_arch_of_a_cuda_device(device, name, capability, arch):
    device(name, capability)
    assert arch_of(torch.device("cuda")) == arch


def test_arch_of_other_devices(monkeypatch):
    assert arch_of(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    assert arch_of(torch.device("cuda")) == "gfx942"


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [
        ("3.6.0", "2.4.6", False), ("3.6.0", "2.10.1", False), ("3.6.0", "2.3.5", True),
        ("3.7.1", "2.4.6", True), ("3.10.0+git1", "2.5.0", True),
    ],
)  # fmt: skip
def test_which_interpreters_run(triton, numpy, runs):
    """Seen with these of Triton up to 3.9.0 and of NumPy up to 2.4.6."""
    problem = broken_interpreter(triton, numpy)
    assert problem is None if runs else f"of triton {triton} does not run with numpy {numpy}" in problem

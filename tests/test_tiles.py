"""The choice of tiles: what the compiler takes, within the time of an exit, few sets of them per layer."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.tiles import (
    EXIT_US,
    MODELS,
    MULTIPROCESSORS,
    PHASES,
    ROW_CLASSES,
    arch_of,
    layer_configs,
    shared_bytes,
    shipped_configs,
    tile_us,
    token_counts,
)

ARCHS = ("sm_90", "sm_80", "sm_86", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
archs, dtypes = st.sampled_from(ARCHS), st.sampled_from(DTYPES)


@st.composite
def layer_sizes(draw) -> dict[str, int]:
    experts = draw(st.integers(1, 512))
    return {
        "num_experts": experts,
        "top_k": draw(st.integers(1, min(experts, 16))),
        "hidden_size": draw(st.integers(1, 20000)),
        "intermediate_size": draw(st.integers(1, 30000)),
    }


@given(layer_sizes(), st.integers(1, 10**6), archs, dtypes)
def test_every_configuration_can_be_compiled(sizes, num_tokens, arch, dtype):
    for phase, config in layer_configs(num_tokens=num_tokens, dtype=dtype, arch=arch, **sizes).items():
        for value in (config.block_m, config.block_n, config.block_k, config.num_warps):
            assert value > 0
            assert value & (value - 1) == 0, (phase, config)
        assert config.num_stages >= 1
        assert config.programs_per_sm >= 1
        assert (config.split_k == 1) or phase == "down"
        if phase != "combine":
            # The least that the matrix units take, and that all resident programs can have.
            assert min(config.block_m, config.block_n, config.block_k) >= 16
            bytes_wanted = config.programs_per_sm * shared_bytes(phase, config, dtype)
            assert bytes_wanted <= MULTIPROCESSORS[arch].shared_bytes, (phase, config)


@given(layer_sizes(), archs, dtypes)
def test_a_layer_has_as_many_sets_of_tiles_as_there_are_classes_of_rows(sizes, arch, dtype):
    """So that everything can be compiled in advance: token_counts reaches every set that any T reaches."""

    def configs(num_tokens):
        return tuple(layer_configs(num_tokens=num_tokens, dtype=dtype, arch=arch, **sizes).values())

    counts = token_counts(sizes["top_k"], sizes["num_experts"])
    assert len(counts) <= len(ROW_CLASSES)
    known = {configs(num_tokens) for num_tokens in counts}
    samples = {1, 2, 3, 10**6, *(max(1, count + d) for count in counts for d in (-2, -1, 0, 1, 100))}
    assert {configs(num_tokens) for num_tokens in samples} <= known


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tile_is_no_longer_than_an_exit_may_take(model, dtype):
    """On an H200 at its peak rates. What is over is known, and none of it is in down."""
    hidden, intermediate, experts, top_k = MODELS[model]
    late = set()
    for num_tokens in token_counts(top_k, experts):
        rows = num_tokens * top_k / experts
        read_once = next(once for most, _, once in ROW_CLASSES if rows <= most)
        configs = layer_configs(
            num_tokens=num_tokens, top_k=top_k, num_experts=experts, hidden_size=hidden,
            intermediate_size=intermediate, dtype=dtype, arch="sm_90",
        )  # fmt: skip
        for phase, k in (("gate_up", hidden), ("down", intermediate)):
            us = tile_us(phase, configs[phase], k, dtype, "sm_90", read_once)
            if us > EXIT_US:
                late.add((phase, configs[phase].block_m, round(us)))
    known = {
        "Mixtral-8x7B": {("gate_up", 64, 33), ("gate_up", 128, 33)},
        "DeepSeek-V3": {("gate_up", 64, 57), ("gate_up", 128, 57), ("gate_up", 128, 39)},
    }
    assert late == known.get(model, set())


@given(archs, dtypes, st.integers(1, 10**5))
def test_a_longer_sum_never_gets_a_larger_tile(arch, dtype, num_tokens):
    areas = []
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        sizes = {"top_k": 2, "num_experts": 8, "hidden_size": size, "intermediate_size": size}
        configs = layer_configs(num_tokens=num_tokens, dtype=dtype, arch=arch, **sizes)
        areas.append([configs[phase].block_m * configs[phase].block_n for phase in ("gate_up", "down")])
    for shorter, longer in itertools.pairwise(areas):
        assert all(a >= b for a, b in zip(shorter, longer, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_configurations_cover_every_phase(arch, dtype):
    shipped = shipped_configs(arch, dtype)
    assert {phase for phase, _ in shipped} == set(PHASES)
    assert set(shipped.values()) <= set(MODELS)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_90"),
     ((12, 0), "sm_86"), ((7, 5), "sm_86")],
)  # fmt: skip
def test_arch_of_a_cuda_device(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch_of(torch.device("cuda")) == arch


def test_arch_of_other_devices(monkeypatch):
    assert arch_of(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    assert arch_of(torch.device("cuda")) == "gfx942"

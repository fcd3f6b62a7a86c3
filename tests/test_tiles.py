"""The choice of tiles: what the compiler takes, within the time of an exit, few sets of them per layer."""

import hashlib
import itertools
import json
import math
from dataclasses import asdict, astuple, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tile_layers import ARCHS, DTYPES, LAYER, MIXTRAL, archs, dtypes, model_layers

from qllm_ops import tiles
from qllm_ops.tiles import (
    EXIT_US,
    INTERPRETER,
    MIN_WEIGHT_ROWS,
    MODELS,
    MULTIPROCESSORS,
    PHASES,
    ROW_CLASSES,
    TUNED,
    TileConfig,
    TileKey,
    layer_configs,
    leave_us,
    new_entry,
    shared_bytes,
    shipped_configs,
    table_path,
    tile_config,
    tile_us,
    token_counts,
)


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
            if arch in ("sm_80", "sm_86"):
                # mma.sync has what it multiplies in registers, so its stage is none of the memory's: compiled
                # for sm_80, 16 x 32 x 256 in four stages takes 73728 bytes of the 98304 that are estimated.
                bytes_wanted = bytes_wanted // config.num_stages * (config.num_stages - 1)
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


HALFWAY = {
    "sm_90": {
        "Mixtral-8x7B": {("gate_up", 64, 33), ("gate_up", 128, 33)},
        "DeepSeek-V3": {("gate_up", 64, 57), ("gate_up", 128, 57), ("gate_up", 128, 39)},
    },
    "sm_90_h100": {
        "Mixtral-8x7B": {("gate_up", 64, 46), ("gate_up", 128, 46), ("down", 64, 40), ("down", 128, 40)},
        "DeepSeek-V3": {
            ("gate_up", 16, 40), ("gate_up", 32, 40), ("gate_up", 64, 80), ("gate_up", 128, 80),
            ("gate_up", 128, 39),
        },
        "gpt-oss-20b": {("gate_up", 64, 32), ("gate_up", 128, 32)},
    },
}  # fmt: skip
"""Which tiles are left inside, their rows and how long they take as a whole, in microseconds."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", HALFWAY)
def test_a_tile_is_no_longer_than_an_exit_may_take(arch, model, dtype):
    """At the peak rates of an H200 and an H100; or a program may leave inside of it, where narrowing does not
    suffice."""
    hidden, intermediate, experts, top_k = MODELS[model]
    halfway = set()
    for num_tokens in token_counts(top_k, experts):
        rows = num_tokens * top_k / experts
        read_once = next(once for most, _, once in ROW_CLASSES if rows <= most)
        configs = layer_configs(
            num_tokens=num_tokens, top_k=top_k, num_experts=experts, hidden_size=hidden,
            intermediate_size=intermediate, dtype=dtype, arch=arch,
        )  # fmt: skip
        for phase, k in (("gate_up", hidden), ("down", intermediate)):
            arguments = (phase, configs[phase], k, dtype, arch, read_once)
            if configs[phase].exit_k:
                halfway.add((phase, configs[phase].block_m, round(tile_us(*arguments))))
            assert leave_us(*arguments) <= EXIT_US
    assert halfway == HALFWAY[arch].get(model, set())


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
    assert set(shipped.values()) <= {*MODELS, *(path.name for path in TUNED.glob("*.json"))}


# -- the time of an exit, chosen ---------------------------------------------------------------------------

# Of astuple() of every configuration that MODELS reach, 16 and 32 bits. Who changes a heuristic on purpose
# writes the new one here; who does not has found out that it changed.
CHOSEN = {
    "sm_100": ("7a0eb13ef8ad", "99b682a187af"),
    "sm_90": ("2c869e6ea8fe", "fced06a022d5"),
    "sm_90_h100": ("be4b3d58c5bf", "c947a1e8671b"),
    "sm_80": ("45dd71839fbc", "3d74dc9f6162"),
    "sm_86": ("0575d98acef4", "d284a08d2aa3"),
    "gfx942": ("7f5010636087", "71d6022ee94f"),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device_name", [None, "a device that nobody tuned"])
def test_the_heuristics_choose_what_they_chose(arch, dtype, device_name):
    lines = []
    for layer in model_layers():
        sizes = (layer["hidden_size"], layer["intermediate_size"], layer["num_experts"], layer["top_k"])
        configs = layer_configs(**layer, dtype=dtype, arch=arch, device_name=device_name)
        lines += [
            f"{' '.join(map(str, (*sizes, layer['num_tokens'])))} {phase} {astuple(config)}"
            for phase, config in configs.items()
        ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    assert digest == CHOSEN[arch][dtype.itemsize == 4]


@given(layer_sizes(), st.integers(1, 10**5), archs, dtypes, st.floats(1, 200), st.floats(1, 200))
def test_a_shorter_exit_never_gets_a_longer_tile(sizes, num_tokens, arch, dtype, one, other):
    arguments = {"num_tokens": num_tokens, "dtype": dtype, "arch": arch, **sizes}
    _, _, read_once = tiles.row_class(num_tokens, sizes["top_k"], sizes["num_experts"])
    sums = {"gate_up": sizes["hidden_size"], "down": sizes["intermediate_size"]}
    shorter = layer_configs(**arguments, max_exit_us=min(one, other))
    longer = layer_configs(**arguments, max_exit_us=max(one, other))
    for phase, k in sums.items():
        times = [tile_us(phase, c[phase], k, dtype, arch, read_once) for c in (shorter, longer)]
        # Once fewer, narrower tiles suffice, a sum need not be cut as often.
        assert times[0] <= times[1] or times[0] <= min(one, other)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_limit_the_tiles_are_the_fastest_and_sums_whole(arch, dtype):
    for layer in model_layers():
        longest = layer_configs(**layer, dtype=dtype, arch=arch, max_exit_us=float("inf"))
        for phase in ("gate_up", "down"):
            tables = tiles.TILES_16_BIT
            table = tiles.TILES_32_BIT if dtype.itemsize == 4 else tables[tiles.TILES_OF.get(arch, arch)]
            _, block_m, _ = tiles.row_class(layer["num_tokens"], layer["top_k"], layer["num_experts"])
            wanted = replace(table[phase][max(block_m, 16)], programs_per_sm=longest[phase].programs_per_sm)
            assert longest[phase] == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exit_that_cannot_be_had_gets_the_smallest_tiles(dtype):
    for layer in model_layers():
        configs = layer_configs(**layer, dtype=dtype, arch="sm_90", max_exit_us=1e-3)
        gate_up, down = configs["gate_up"], configs["down"]
        assert 2 * gate_up.block_n == MIN_WEIGHT_ROWS[gate_up.block_m]
        assert down.block_n == MIN_WEIGHT_ROWS[down.block_m]
        assert 1 <= down.split_k <= tiles.MAX_PARTS
        for phase, k in (("gate_up", layer["hidden_size"]), ("down", layer["intermediate_size"])):
            c = configs[phase]
            # Left as often as pays, in 16 bits; a sum that is too short for two pieces is not left at all.
            shortest = 2 * c.num_stages * c.block_k
            if dtype.itemsize == 4 or k // c.split_k < 2 * shortest:
                assert c.exit_k == 0
            else:
                assert shortest <= c.exit_k < k // c.split_k
                assert c.exit_k % c.block_k == 0


@given(
    st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 16384), st.sampled_from([16, 64, 256]),
    st.integers(1, 4), st.sampled_from([(2, 1), (2, 2), (4, 1)]),
)  # fmt: skip
def test_large_parts_take_no_more_than_the_activations(pairs, hidden, inner, block_n, parts, sizes):
    size, times = sizes
    hidden *= 16
    down = TileConfig(16, block_n, 16, 4, 2, split_k=parts)
    width = tiles.partial_width(pairs, hidden, inner, down, size, times)
    assert 1 <= width <= hidden
    assert 1 + 2 * math.ceil(hidden / width) <= tiles.MAX_PHASES
    if width == hidden:
        return
    assert width % block_n == 0
    assert pairs * parts * hidden * size * times > tiles.PARTIAL_BYTES
    # A chunk is at least a column block, and there are only so many launches.
    assert parts * width * times <= max(inner, parts * times * max(block_n, hidden // 15 + block_n))


def test_an_unaligned_output_is_computed_in_one_chunk():
    down = TileConfig(128, 128, 64, 8, 4)
    assert tiles.partial_width(10**6, 2048, 768, down, 2) == 768
    assert tiles.partial_width(10**6, 2048, 768, down, 2, times=2) == 384
    assert tiles.partial_width(10**6, 2040, 768, down, 2) == 2040
    assert tiles.partial_width(100, 2048, 768, down, 2) == 2048


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), True, "30", None])
@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_an_exit_of_no_positive_time_is_refused(arch, wrong):
    layer = next(model_layers())
    with pytest.raises(ValueError, match="max_exit_us must be a positive number"):
        layer_configs(**layer, dtype=torch.bfloat16, arch=arch, max_exit_us=wrong)


# -- tuned tables ------------------------------------------------------------------------------------------

NAME = "NVIDIA H200"
KEY = TileKey("down", 256, 4096, 14336, "bfloat16")
TILES = TileConfig(128, 128, 64, 8, 3, 1, 2)
MEASURED = {"ratio": 0.9}  # by nobody: a test


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    """write_table(entry, ..., head): the table of NAME, and no other."""
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles.tuned_table.cache_clear()

    def write(*entries, **head):
        provenance = {"date": "today", "versions": {}, "command": "a test"}
        table = {"device": NAME, "arch": "sm_90", **provenance, "entries": list(entries), **head}
        table_path(NAME).write_text(json.dumps(table))
        tiles.tuned_table.cache_clear()

    yield write
    tiles.tuned_table.cache_clear()


def test_a_tuned_entry_is_chosen_for_its_device_and_key_alone(write_table):
    write_table(new_entry(KEY, TILES, MEASURED))
    tuned, plain = layer_configs(**MIXTRAL, device_name=NAME), layer_configs(**MIXTRAL)
    assert tuned == {**plain, "down": replace(TILES, split_k=4)}  # of which each takes no more than 30 us
    assert layer_configs(**MIXTRAL, device_name=NAME, max_exit_us=100)["down"] == TILES
    other = {**MIXTRAL, "device_name": NAME}
    for change in ({"num_tokens": 1100}, {"dtype": torch.float16}, {"intermediate_size": 14272}):
        assert layer_configs(**{**other, **change}) == layer_configs(**{**MIXTRAL, **change})
    assert layer_configs(**{**other, "device_name": "NVIDIA H100"}) == plain


def test_every_phase_and_the_last_class_of_rows_can_be_tuned(write_table):
    keys = [
        TileKey("gate_up", float("inf"), 14336, 4096, "bfloat16"),
        TileKey("combine", float("inf"), 4096, 2, "bfloat16"),
    ]
    configs = [TileConfig(128, 64, 32, 8, 5), TileConfig(2, 512, 1, 8, 1, 4)]
    write_table(*(new_entry(k, c, MEASURED) for k, c in zip(keys, configs, strict=True)))
    found = layer_configs(**{**MIXTRAL, "num_tokens": 10**5}, device_name=NAME, max_exit_us=100)
    assert [found["gate_up"], found["combine"]] == configs


def test_a_tuned_tile_that_takes_too_long_is_made_smaller_by_the_same_rule(write_table):
    write_table(new_entry(KEY, replace(TILES, block_n=256, split_k=1), MEASURED))
    tuned = layer_configs(**MIXTRAL, device_name=NAME)["down"]
    assert tuned == replace(TILES, block_n=128, split_k=4)  # as the heuristic's, with the entry's stages
    assert tuned == replace(layer_configs(**MIXTRAL)["down"], num_stages=3)
    longest = layer_configs(**MIXTRAL, device_name=NAME, max_exit_us=float("inf"))["down"]
    assert longest == replace(TILES, block_n=256, split_k=1)


@given(exit_us=st.floats(0.1, 500), split_k=st.sampled_from([1, 2, 3, 4]), k=st.integers(16, 20000))
def test_a_tuned_sum_is_never_cut_into_fewer_parts(exit_us, split_k, k):
    config = replace(TILES, split_k=split_k)
    found = tiles.within_exit("down", config, k, torch.bfloat16, "sm_90", False, exit_us)
    assert split_k <= found.split_k <= tiles.MAX_PARTS


def test_a_table_is_read_once(write_table, monkeypatch):
    write_table(new_entry(KEY, TILES, MEASURED))
    first = layer_configs(**MIXTRAL, device_name=NAME)
    table_path(NAME).unlink()
    assert layer_configs(**MIXTRAL, device_name=NAME) == first


def test_the_interpreter_reads_no_table(write_table):
    table_path("cpu").write_text("not JSON")
    assert layer_configs(**{**MIXTRAL, "arch": "interpreter"}, device_name="cpu") == INTERPRETER


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H200", "NVIDIA H200.json"), ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB.json"),
     ("AMD Radeon / W7900 (TM)", "AMD Radeon _ W7900 _TM_.json"), ("../../etc/x", "_.._etc_x.json")],
)  # fmt: skip
def test_a_device_name_becomes_a_safe_file_name(name, file):
    assert table_path(name) == TUNED / file


def changed(**fields):
    return new_entry(KEY, replace(TILES, **fields), MEASURED)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "must have the fields"),
        ([], "must have the fields"),
        ({**new_entry(KEY, TILES, MEASURED), "tiles": None}, "must have the fields"),
        ({**new_entry(KEY, TILES, MEASURED), "tiles": {"block_m": 128}}, "must give all of block_m"),
        (new_entry(replace(KEY, phase="router"), TILES, MEASURED), "phase, dtype or class of rows"),
        (new_entry(replace(KEY, most_rows=100), TILES, MEASURED), "phase, dtype or class of rows"),
        (new_entry(replace(KEY, dtype="int8"), TILES, MEASURED), "phase, dtype or class of rows"),
        (new_entry(replace(KEY, k=0), TILES, MEASURED), "positive integers as n and k"),
        (changed(num_stages=0), "positive integers"),
        (changed(num_warps=2.0), "positive integers"),
        (changed(block_n=96), "powers of two"),
        (changed(block_m=256), "must have a block_m of"),
        (changed(split_k=5), "splits k into 5"),
        (new_entry(replace(KEY, phase="gate_up"), TILES, MEASURED), "splits k into 2"),
        (changed(num_stages=8), "does not fit: 1 programs of 262144 bytes .* has 232448"),
        (changed(programs_per_sm=3), "does not fit: 3 programs of 98304 bytes"),
    ],
)
def test_an_entry_that_is_wrong_is_named_with_its_file(write_table, entry, problem):
    good = new_entry(replace(KEY, most_rows=64), TILES, MEASURED)
    write_table(good, entry)
    with pytest.raises(ValueError, match=problem) as error:
        layer_configs(**MIXTRAL, device_name=NAME)
    assert str(table_path(NAME)) in str(error.value)
    assert "entry 1 (" in str(error.value)


def test_a_key_that_is_there_twice_is_refused(write_table):
    write_table(changed(), changed(num_stages=2))
    with pytest.raises(ValueError, match=r"entry 1 \(down, up to 256 rows, n = 4096, .*\) is there twice"):
        layer_configs(**MIXTRAL, device_name=NAME)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"device": "NVIDIA H200", "entries": []}', "\x00"],
)
def test_a_file_that_is_no_table_is_named(write_table, text):
    table_path(NAME).write_text(text)
    with pytest.raises(ValueError, match=r"NVIDIA H200\.json: .*tuned table"):
        layer_configs(**MIXTRAL, device_name=NAME)


@pytest.mark.parametrize(
    "head", [{"device": "NVIDIA H100"}, {"arch": "sm_80"}, {"arch": "sm_1"}, {"entries": 3}], ids=str
)
def test_a_table_of_something_else_is_named(write_table, head):
    write_table(**{"entries": [], **head})
    with pytest.raises(ValueError, match=rf"NVIDIA H200\.json: .*{next(iter(head))}"):
        layer_configs(**MIXTRAL, device_name=NAME)


def test_what_a_table_ships_is_compiled_by_the_tests(write_table):
    config = replace(TILES, block_k=32)
    write_table(new_entry(KEY, config, MEASURED))
    assert shipped_configs("sm_90", torch.bfloat16)["down", config] == "NVIDIA H200.json"
    assert ("down", config) not in shipped_configs("sm_90", torch.float16)
    assert ("down", config) not in shipped_configs("sm_80", torch.bfloat16)


def test_the_tables_that_are_shipped_are_good():
    for path in TUNED.glob("*.json"):
        table = tiles.read_table(path)
        assert table_path(table["device"]) == path
        assert tiles.tuned_table(table["device"], table["arch"])


def test_one_phase_alone_takes_the_same_arguments(write_table):
    write_table(new_entry(KEY, TILES, MEASURED))
    found = tile_config("down", n=4096, k=14336, **LAYER, max_exit_us=100, device_name=NAME)
    assert asdict(found) == asdict(TILES)

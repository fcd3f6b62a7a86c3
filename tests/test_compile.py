"""What the compiler makes of the kernels, on a machine without a GPU.

Every tile configuration that a known model reaches, compiled in another process (tests/compile_kernels.py).
By default all of them for sm_90 in bfloat16, and the largest and the smallest for the rest (in float16, which
compiles as bfloat16 does, the largest; for sm_100 in bfloat16 only); HYPOTHESIS_PROFILE=thorough compiles all
of them for all.
"""

import functools
import itertools
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from other_process import records_of

from qllm_ops.plan import SORTED_PAIRS, route_warps
from qllm_ops.quantized import W8A8
from qllm_ops.tiles import MAX_PARTS, PHASES, TileConfig, layer_configs, shared_bytes, shipped_configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = (("sass", True), ("has_flag", False), ("even", False), ("dependent", True))
PRODUCTS = ("gate_up", "down")
nvidia = pytest.mark.parametrize("arch", ["sm_100", "sm_90", "sm_90_h100", "sm_80", "sm_89"])
# sm_89: float8 by float8 only; an H100: what it has beside an H200's
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

POLL = re.compile(r"\bld\.volatile\.global\.b32")
LARGE = {
    "sm_100": "tcgen05.mma",
    "sm_90": "wgmma.mma_async",
    "sm_90_h100": "wgmma.mma_async",
}  # of 64 rows and more
PRODUCT = re.compile(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync|fma\.rn\.f32")
MATRIX_PRODUCT = r"(?:wgmma\.mma_async|mma\.sync)\S+"
TICKET = re.compile(r"\batom\.\S*relaxed\S*\.add")


def requests(arch: str) -> list[dict]:
    if arch == "sm_89":
        return float8_requests(arch)
    if arch == "sm_90_h100":
        return requests_of_an_h100()
    chosen = []
    for dtype in DTYPES if arch in ("sm_90", "sm_80") or (THOROUGH and arch == "sm_100") else ("bf16",):
        for phase in PHASES:
            configs = [config for name, config in shipped_configs(arch, DTYPES[dtype]) if name == phase]
            configs.sort(key=lambda config: (config.block_m * config.block_n, config.split_k))
            if phase == "combine":
                configs.append(replace(configs[0], split_k=MAX_PARTS, num_stages=3))  # of down's parts
            if not THOROUGH and (arch, dtype) != ("sm_90", "bf16"):
                configs = configs[-1:] if dtype == "fp16" else [configs[0], configs[-1]]
            base = {"kernel": phase, "arch": arch, "dtype": dtype}
            chosen += [{**base, "config": asdict(config)} for config in configs]
            if (arch, dtype) == ("sm_90", "bf16") and phase != "combine":
                largest = chosen[-1]
                chosen += [{**largest, change: value} for change, value in VARIANTS]
                chosen += [{**base, "config": asdict(config), "layout": "gpt_oss"} for config in configs]
                if phase == "gate_up":
                    chosen += [{**base, "config": asdict(config), "layout": "aria"} for config in configs]
                    chosen += [{**largest, "activation": name} for name in ("gelu", "gelu_tanh")]
                    chosen.append({**largest, "layout": "llama4"})
                    chosen.append({**largest, "activation": "relu2", "layout": "ungated"})
    chosen += float8_requests(arch) if arch == "sm_90" else []
    routes = [
        {**chosen[0], "kernel": "route", "count": count}
        | {"config": {**chosen[0]["config"], "num_warps": route_warps(count), "programs_per_sm": 1}}
        for count in (0, *SORTED_PAIRS)
    ]
    if arch == "sm_90":
        combine = next(request for request in chosen if request["kernel"] == "combine")
        routes += [{**request, "dependent": True} for request in (routes[0], combine)]
    return [*chosen, *quantized_requests(arch), *routes]


QUANTIZED = ("fp8", "mxfp4", "int4", "int4_asymmetric", "int4_128", "int4_128_asymmetric")


def tiles_of(format: str) -> str:
    """The format as tiles are chosen by it: groups and zero points change none."""
    return format if format == W8A8 else format.split("_")[0]


def quantized_requests(arch: str) -> list[dict]:
    """The products with quantised weights; mxfp4 with what else gpt-oss has."""
    chosen = []
    for dtype, format in itertools.product(DTYPES if THOROUGH else ("bf16",), QUANTIZED):
        layout = "gpt_oss_rows" if format == "mxfp4" else "plain"
        for phase in PRODUCTS:
            configs = [
                c for name, c in shipped_configs(arch, DTYPES[dtype], tiles_of(format)) if name == phase
            ]
            configs.sort(key=lambda config: (config.block_m * config.block_n, config.split_k))
            if not THOROUGH and (arch != "sm_90" or format not in ("fp8", "mxfp4", "int4")):
                configs = configs[:1] if arch == "gfx942" else [configs[0], configs[-1]]
            base = {"kernel": phase, "arch": arch, "dtype": dtype, "format": format, "layout": layout}
            chosen += [{**base, "config": asdict(config)} for config in configs]
            uneven = layer_configs(
                num_tokens=8192, top_k=2, num_experts=8, hidden_size=4112, intermediate_size=4112,
                dtype=DTYPES[dtype], arch=arch, weights=tiles_of(format),
            )[phase]  # fmt: skip
            chosen.append({**base, "config": asdict(uneven), "even": False})
            if (arch, dtype, phase) == ("sm_90", "bf16", "gate_up"):
                chosen.append({**base, "layout": "plain", "config": asdict(configs[0]), "sass": True})
    return chosen


def requests_of_an_h100() -> list[dict]:
    """The tiles that its slower memory makes smaller, and the largest and the smallest of the others."""
    chosen = []
    for format, phase in itertools.product((None, "fp8", "mxfp4", "int4"), PRODUCTS):
        of_h200, of_h100 = (
            [config for name, config in shipped_configs(arch, torch.bfloat16, format) if name == phase]
            for arch in ("sm_90", "sm_90_h100")
        )
        of_h100.sort(key=lambda config: (config.block_m * config.block_n, config.split_k))
        smaller = [config for config in of_h100 if config not in of_h200]
        for config in dict.fromkeys((of_h100[0], *smaller, of_h100[-1])):
            base = {"kernel": phase, "arch": "sm_90_h100", "dtype": "bf16", "config": asdict(config)}
            layout = {"layout": "gpt_oss_rows" if format == "mxfp4" else "plain"}
            chosen.append(base if format is None else {**base, **layout, "format": format})
    return chosen


def float8_requests(arch: str) -> list[dict]:
    """Float8 by float8, with another layout as well."""
    chosen = []
    for dtype in ("bf16", "fp16") if THOROUGH else ("bf16",):
        for phase in PRODUCTS:
            table = {"sm_89": "sm_86"}.get(arch, arch)
            configs = [c for name, c in shipped_configs(table, DTYPES[dtype], W8A8) if name == phase]
            configs.sort(key=lambda config: (config.block_m * config.block_n, config.split_k))
            if not THOROUGH and arch != "sm_90":
                configs = [configs[0], configs[-1]]
            base = {"kernel": phase, "arch": arch, "dtype": dtype, "format": W8A8}
            chosen += [{**base, "config": asdict(config)} for config in configs]
            chosen += [{**chosen[-1], "even": False}, {**chosen[-1], "layout": "gpt_oss_rows"}]
    return chosen


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(arch): the records of everything that was compiled for it."""

    @functools.cache
    def run(arch: str) -> list[dict]:
        where = tmp_path_factory.mktemp(arch)
        return records_of("compile_kernels.py", requests(arch), where)

    return run


def select(records: list[dict], kernels=PHASES, **wanted) -> list[dict]:
    found = [record for record in records if record["kernel"] in kernels]
    for key, (default, value) in wanted.items():
        found = [record for record in found if record.get(key, default) == value]
    assert found, "nothing was compiled that this test could look at"
    return found


WITH_FLAG = {"has_flag": (True, True)}
PLAIN = {
    "activation": ("silu", "silu"), "layout": ("plain", "plain"), "even": (True, True),
    "format": (None, None),
}  # fmt: skip


def name(record: dict) -> str:
    return " ".join(str(record.get(key)) for key in ("arch", "dtype", "format", "kernel", "config"))


def loops(ptx: str) -> list[str]:
    """The text of every loop: from a label to the last branch back to it."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\$L__BB\S+:", line)}
    ends: dict[str, int] = {}
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)
        if target and labels[target.group(1)] < i:
            ends[target.group(1)] = i
    return ["\n".join(lines[labels[label] : end + 1]) for label, end in ends.items()]


@nvidia
def test_no_register_is_spilled(compiled, arch):
    for record in select(compiled(arch), (*PHASES, "route")):
        assert record["stack"] == 0, name(record)
        assert record["local"] == 0, name(record)
        assert record["registers"] <= 255, name(record)


def test_the_routing_program_sorts_by_a_network(compiled):
    """Which has no loop: one over the pairs, each against all, took ten times as long for 256 of them."""
    records = select(compiled("sm_90"), ("route",))
    assert {record["count"] for record in records} == {0, *SORTED_PAIRS}
    for record in records:
        assert bool(loops(Path(record["ptx"]).read_text())) == (record["count"] == 0), name(record)


@pytest.mark.parametrize(
    ("arch", "limit"),
    [("sm_100", 228), ("sm_90", 228), ("sm_90_h100", 228), ("sm_80", 164), ("sm_89", 100), ("gfx942", 64)],
)
def test_all_resident_programs_fit_the_multiprocessor(compiled, arch, limit):
    driver_kb = 0 if arch == "gfx942" else 1  # of every program's shared memory
    for record in select(compiled(arch)):
        programs = record["config"]["programs_per_sm"]
        assert programs * (record["shared"] / 1024 + driver_kb) <= limit, name(record)
        if record.get("format"):
            config = TileConfig(**record["config"])
            most = shared_bytes(record["kernel"], config, DTYPES[record["dtype"]], tiles_of(record["format"]))
            assert record["shared"] <= most, name(record)
        if "registers" in record:
            # Registers are given out in steps of 8 per thread.
            registers = -(-record["registers"] // 8) * 8 * 32 * record["config"]["num_warps"]
            assert programs * registers <= 65536, name(record)


@nvidia
def test_one_thread_polls_while_a_tile_is_stored(compiled, arch):
    for record in select(compiled(arch), **WITH_FLAG):
        ptx = Path(record["ptx"]).read_text()
        tile_loops = [loop for loop in loops(ptx) if TICKET.search(loop)]
        exits = record["config"]["exit_k"] > 0
        assert len(tile_loops) == 1 or exits, name(record)
        tile_loop = max(tile_loops, key=len)
        # With tickets that were given back, the compiler may enter it at two places.
        assert all(loop in tile_loop for loop in tile_loops), name(record)
        *inside, poll = POLL.finditer(tile_loop)
        # The blocks of a loop that is entered at two places stand in another order than they run in.
        ticket = TICKET.search(tile_loop, poll.end())
        assert exits or ticket, name(record)
        assert exits or "st.global" in tile_loop[poll.end() : ticket.start()], name(record)
        if record["kernel"] in PRODUCTS:
            assert re.search(PRODUCT, tile_loop[: poll.start()]), f"{name(record)}: polled before the sums"
        # One before the first tile, and one after every tile; one inside of the sums where they have an exit.
        assert len(inside) == exits, name(record)
        assert len(POLL.findall(ptx)) == 2 + exits, name(record)
        polled_sums = [loop for loop in loops(ptx) if POLL.search(loop) and not TICKET.search(loop)]
        assert len(polled_sums) == exits, name(record)
        assert all(re.search(PRODUCT, loop) for loop in polled_sums), name(record)
        # It is one thread's: the whole program must see the same value.
        assert all(re.search(r"@%p\d+ *$", ptx[: found.start()]) for found in POLL.finditer(ptx)), name(
            record
        )


def test_a_dependent_launch_waits_before_it_looks_at_memory(compiled):
    records = compiled("sm_90")
    dependent = select(records, (*PHASES, "route"), dependent=(False, True))
    assert {record["kernel"] for record in dependent} == {*PHASES, "route"}
    for record in dependent:
        ptx = Path(record["ptx"]).read_text()
        (wait,) = re.finditer(r"griddepcontrol\.wait", ptx)
        (launch,) = re.finditer(r"griddepcontrol\.launch_dependents", ptx)
        first = re.search(r"\b(ld|st|atom|red|cp\.async)\S*global", ptx)
        assert wait.start() < launch.start() < first.start(), name(record)
        assert not re.search(r"\bbra\b", ptx[: launch.start()]), f"{name(record)}: some threads may not wait"
    for record in select(records, (*PHASES, "route"), dependent=(False, False)):
        assert "griddepcontrol" not in Path(record["ptx"]).read_text(), name(record)


def test_without_a_flag_the_poll_is_gone_and_nothing_else(compiled):
    records = compiled("sm_90")
    for without in select(records, has_flag=(True, False)):
        ptx = Path(without["ptx"]).read_text()
        assert "volatile" not in ptx
        (beside, *_) = [
            r
            for r in select(records, **WITH_FLAG, **PLAIN)
            if all(r[key] == without[key] for key in ("kernel", "dtype", "config"))
        ]
        other = Path(beside["ptx"]).read_text()
        for instruction in ("wgmma.mma_async", "cp.async.cg", "st.global", "atom."):
            assert ptx.count(instruction) == other.count(instruction), instruction


@nvidia
def test_the_inner_loop_loads_ahead_while_it_multiplies(compiled, arch):
    records = select(compiled(arch), PRODUCTS, even=(True, True))
    records += [r for r in compiled(arch) if r.get("format") and not r.get("even", True)]
    for record in records:
        ptx = Path(record["ptx"]).read_text()
        inner = [
            loop
            for loop in loops(ptx)
            if not TICKET.search(loop) and not POLL.search(loop) and "cp.async.cg" in loop
        ]
        assert inner, f"{name(record)}: no asynchronous copy in the inner loop"
        for loop in inner:
            assert re.search(PRODUCT, loop), name(record)
            if record["dtype"] != "fp32":
                # 16 bytes at a time and around the registers, however the weights lie.
                assert not re.search(r"\bld\.global", loop), name(record)
                short = {int(size, 16) for size in re.findall(r"cp\.async\.ca.*?, (0x\w+)", loop)}
                assert short == shorter_copies(record), name(record)
        # A group may still be under way when its turn's products begin.
        waits = [int(n) for loop in inner for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)]
        assert waits, name(record)
        # Of two stages, the other's copies begin when this one's are in registers.
        assert max(waits) > 0 or record["config"]["num_stages"] == 2, name(record)


@nvidia
def test_the_combine_loads_the_next_experts_ahead(compiled, arch):
    if arch in ("sm_89", "sm_90_h100"):
        pytest.skip("no combine of its own")
    for record in select(compiled(arch), ("combine",)):
        ptx = Path(record["ptx"]).read_text()
        assert "cp.async.cg" in ptx, name(record)
        waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
        assert max(waits) > 0, name(record)


def shorter_copies(record: dict) -> set[int]:
    """Bytes of copies below 16: words of scales, and values where a thread's share of a tile is no more."""
    config = TileConfig(**record["config"])
    if not record.get("format"):
        return set()
    rows = config.block_n * (2 if record["kernel"] == "gate_up" else 1)
    share = rows * config.block_k // (1 if "fp8" in record["format"] else 2) // (32 * config.num_warps)
    if "fp8" not in record["format"] and not record.get("even", True):
        share = min(share, 8)  # which 16 columns have: no more are seen to be inside together
    return {4, share} if share < 16 else {4}  # of words of zero points too


@nvidia
def test_16_bit_tiles_use_the_matrix_units(compiled, arch):
    for record in select(compiled(arch), PRODUCTS):
        ptx = Path(record["ptx"]).read_text()
        if record["dtype"] == "fp32":
            # IEEE: no tensor core rounds the factors to 10 bits.
            assert "mma" not in ptx, name(record)
        elif arch in LARGE and record["config"]["block_m"] >= 64:
            assert LARGE[arch] in ptx, name(record)
        else:
            assert "mma.sync" in ptx, name(record)


@pytest.mark.parametrize("arch", ["sm_90", "sm_89"])
def test_float8_is_multiplied_as_it_lies(compiled, arch):
    for record in select(compiled(arch), PRODUCTS, format=(None, W8A8)):
        ptx = Path(record["ptx"]).read_text()
        (inner,) = [
            loop for loop in loops(ptx) if re.search(MATRIX_PRODUCT, loop) and not TICKET.search(loop)
        ]
        products = re.findall(MATRIX_PRODUCT, inner)
        config = TileConfig(**record["config"])
        if arch == "sm_90" and config.block_m < 64:
            # Its own float8 products are of 64 rows. Below that Triton takes float16, which has every float8.
            assert {product.endswith("m16n8k16.row.col.f32.f16.f16.f32") for product in products} == {True}
            continue
        assert all(".e4m3.e4m3" in product for product in products), name(record)
        assert not re.search(r"cvt\S*\.f16x2\.e4m3x2", ptx), f"{name(record)}: float8 is widened"
        assert re.search(r"cvt\.rn\.satfinite\.e4m3x2", inner), f"{name(record)}: nothing is quantised"
        rows = config.block_n * (2 if record["kernel"] == "gate_up" else 1)
        if arch == "sm_90":  # 32 columns of 64 rows in each product of four warps
            assert len(products) == config.block_k // 32, name(record)
        else:  # 16 rows, 8 columns and 32 of the sums in each product of a warp
            whole = config.block_m * rows * config.block_k // (16 * 8 * 32)
            assert len(products) == whole // config.num_warps, name(record)


def test_machine_code_polls_strongly_and_multiplies_on_wgmma(compiled):
    for record in select(compiled("sm_90"), PRODUCTS, sass=(False, True), format=(None, None)):
        sass = Path(record["sass_file"]).read_text()
        polls = 3 if record["config"]["exit_k"] else 2
        assert len(re.findall(r"LDG\S*\.STRONG\.SYS", sass)) == polls, name(record)
        assert "HGMMA" in sass
        assert "LDGSTS" in sass
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name(record)}: local memory is used"


def test_amd_compiles(compiled):
    for record in select(compiled("gfx942")):
        assembly = Path(record["amdgcn"]).read_text()
        assert "s_endpgm" in assembly
        if record["kernel"] != "combine":
            assert "mfma" in assembly, name(record)


@pytest.mark.parametrize(
    ("format", "most"),
    [
        ("fp8", 3.4), ("mxfp4", 3.1), ("int4", 3.3), ("int4_128", 3.1), ("int4_asymmetric", 3.7),
        ("int4_128_asymmetric", 3.1),
    ],
)  # fmt: skip
def test_a_quantised_weight_takes_few_instructions_at_decode(compiled, format, most):
    """All of the inner loop, for each weight that a thread widens: perf/NOTES.md says what they may take."""
    (record,) = select(compiled("sm_90"), ("gate_up",), sass=(False, True), format=(None, format))
    config = TileConfig(**record["config"])
    assert config.block_m == 8
    loop = inner_loop(Path(record["sass_file"]).read_text())
    weights = 2 * config.block_n * config.block_k / (32 * config.num_warps)
    assert len(loop) / weights <= most
    # Every weight once: no two warps do the same.
    products = sum(instruction.startswith("HMMA.16816") for instruction in loop)
    assert products * config.num_warps == 2 * config.block_n * config.block_k * config.block_m / (16 * 8 * 16)


def inner_loop(sass: str) -> list[str]:
    """The instructions of the smallest loop that multiplies."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z].*?);", sass)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    loops = []
    for end, instruction in code:
        target = re.match(r"BRA\b.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < end:
            loops.append([text for address, text in code if int(target[1], 16) <= address <= end])
    return min((loop for loop in loops if any("HMMA" in text for text in loop)), key=len)

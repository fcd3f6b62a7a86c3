"""What the compiler makes of the kernels, on a machine without a GPU.

Every tile configuration that a known model reaches, compiled in one other process (tests/compile_kernels.py).
By default all of them for sm_90 in bfloat16, and the largest and the smallest for the rest;
HYPOTHESIS_PROFILE=thorough compiles all of them for all.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qllm_ops.tiles import MAX_PARTS, PHASES, shipped_configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRIX = (
    ("sm_90", "bf16"), ("sm_90", "fp16"), ("sm_90", "fp32"),
    ("sm_80", "bf16"), ("sm_80", "fp16"), ("sm_80", "fp32"),
    ("gfx942", "bf16"),
)  # fmt: skip
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

# Both orders are written by one version of the compiler or another.
POLL = re.compile(r"\bld\.(global\.)?(relaxed\.sys|sys\.relaxed)")
TICKET = re.compile(r"\batom\.\S*relaxed\S*\.add")


def requests() -> list[dict]:
    chosen = []
    for arch, dtype in MATRIX:
        everything = THOROUGH or (arch, dtype) == ("sm_90", "bf16")
        for phase in PHASES:
            configs = [config for name, config in shipped_configs(arch, DTYPES[dtype]) if name == phase]
            configs.sort(key=lambda config: (config.block_m * config.block_n, config.split_k))
            if phase == "combine":
                configs.append(replace(configs[0], split_k=MAX_PARTS))  # of what down has left in parts
            for config in configs if everything else {configs[0], configs[-1]}:
                chosen.append({"kernel": phase, "arch": arch, "dtype": dtype, "config": asdict(config)})
    largest = [request for request in chosen if request["arch"] == "sm_90" and request["dtype"] == "bf16"]
    for phase in ("gate_up", "down"):
        request = max(
            (request for request in largest if request["kernel"] == phase),
            key=lambda request: request["config"]["block_m"] * request["config"]["block_n"],
        )
        chosen.append({**request, "sass": True})
        chosen.append({**request, "has_flag": False})
        chosen.append({**request, "even": False})
    for activation in ("gelu", "gelu_tanh"):
        chosen.append({**chosen[-6], "sass": False, "activation": activation})
    chosen.append({**chosen[0], "kernel": "route"})
    return chosen


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    where = tmp_path_factory.mktemp("kernels")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(where / "cache")}
    script = Path(__file__).with_name("compile_kernels.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(where)], input=json.dumps(requests()), env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def select(records: list[dict], *archs: str, kernels=PHASES, **wanted) -> list[dict]:
    found = [r for r in records if r["arch"] in archs and r["kernel"] in kernels]
    for key, (default, value) in wanted.items():
        found = [r for r in found if r.get(key, default) == value]
    assert found, "nothing was compiled that this test could look at"
    return found


WITH_FLAG = {"has_flag": (True, True)}


def name(record: dict) -> str:
    return f"{record['arch']} {record['dtype']} {record['kernel']} {record['config']}"


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


def test_no_register_is_spilled(records):
    for record in select(records, "sm_80", "sm_90", kernels=(*PHASES, "route")):
        assert record["stack"] == 0, name(record)
        assert record["local"] == 0, name(record)
        assert record["registers"] <= 255, name(record)


def test_all_resident_programs_fit_the_multiprocessor(records):
    limit = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
    for record in select(records, *limit):
        programs = record["config"]["programs_per_sm"]
        assert programs * (record["shared"] + 1024) <= limit[record["arch"]] + 1024, name(record)
        if "registers" in record:
            # Registers are given out in steps of 8 per thread.
            registers = -(-record["registers"] // 8) * 8 * 32 * record["config"]["num_warps"]
            assert programs * registers <= 65536, name(record)


def test_poll_is_a_relaxed_load_inside_the_tile_loop(records):
    for record in select(records, "sm_80", "sm_90", **WITH_FLAG):
        ptx = Path(record["ptx"]).read_text()
        tile_loops = [loop for loop in loops(ptx) if TICKET.search(loop)]
        assert len(tile_loops) == 1, name(record)
        (tile_loop,) = tile_loops
        poll, ticket = POLL.search(tile_loop), TICKET.search(tile_loop)
        assert poll, name(record)
        assert poll.start() < ticket.start(), name(record)
        assert "st.global" in tile_loop[: poll.start()], f"{name(record)}: no tile is stored before the poll"
        # One before the first tile, and one after every tile: none inside of the sums.
        assert len(POLL.findall(ptx)) == 2, name(record)
        assert "volatile" not in "".join(re.findall(r"\bld\S+", ptx)), name(record)


def test_without_a_flag_the_poll_is_gone_and_nothing_else(records):
    for without in select(records, "sm_90", has_flag=(True, False)):
        ptx = Path(without["ptx"]).read_text()
        assert ".sys" not in ptx
        (beside, *_) = [
            r
            for r in select(records, "sm_90", **WITH_FLAG, even=(True, True), activation=("silu", "silu"))
            if all(r[key] == without[key] for key in ("kernel", "dtype", "config"))
        ]
        other = Path(beside["ptx"]).read_text()
        for instruction in ("wgmma.mma_async", "cp.async.cg", "st.global", "atom."):
            assert ptx.count(instruction) == other.count(instruction), instruction


def test_the_inner_loop_loads_ahead_while_it_multiplies(records):
    product = {"sm_90": r"wgmma\.mma_async|mma\.sync|fma\.rn\.f32", "sm_80": r"mma\.sync|fma\.rn\.f32"}
    for record in select(records, "sm_80", "sm_90", kernels=("gate_up", "down"), even=(True, True)):
        ptx = Path(record["ptx"]).read_text()
        inner = [loop for loop in loops(ptx) if not TICKET.search(loop) and "cp.async.cg" in loop]
        assert inner, f"{name(record)}: no asynchronous copy in the inner loop"
        assert all(re.search(product[record["arch"]], loop) for loop in inner), name(record)
        # A group may still be under way when its turn's products begin.
        waits = [int(n) for loop in inner for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)]
        assert waits, name(record)
        assert max(waits) > 0, name(record)


def test_16_bit_tiles_use_the_matrix_units(records):
    for record in select(records, "sm_80", "sm_90", kernels=("gate_up", "down")):
        ptx = Path(record["ptx"]).read_text()
        if record["dtype"] == "fp32":
            # IEEE: no tensor core rounds the factors to 10 bits.
            assert "mma" not in ptx, name(record)
        elif record["arch"] == "sm_90" and record["config"]["block_m"] >= 64:
            assert "wgmma.mma_async" in ptx, name(record)
        else:
            assert "mma.sync" in ptx, name(record)


def test_machine_code_polls_strongly_and_multiplies_on_wgmma(records):
    for record in select(records, "sm_90", kernels=("gate_up", "down"), sass=(False, True)):
        sass = Path(record["sass_file"]).read_text()
        assert len(re.findall(r"LDG\S*\.STRONG\.SYS", sass)) == 2, name(record)
        assert "HGMMA" in sass
        assert "LDGSTS" in sass
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name(record)}: local memory is used"


def test_amd_compiles(records):
    for record in select(records, "gfx942"):
        assembly = Path(record["amdgcn"]).read_text()
        assert "s_endpgm" in assembly
        if record["kernel"] != "combine":
            assert "mfma" in assembly, name(record)

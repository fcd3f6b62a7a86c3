"""`perf/bench_moe.py`: its arithmetic, what it makes of peers that fail, and a run on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import bench_moe  # noqa: E402
import bench_torch_moe  # noqa: E402
import check_speed  # noqa: E402
import goals  # noqa: E402
import layers  # noqa: E402
import peer_kernels  # noqa: E402
import peers  # noqa: E402
from context import Context  # noqa: E402

from qllm_ops import QuantizedWeight  # noqa: E402

CPU = torch.device("cpu")
TINY = layers.TINY
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def context() -> Context:
    return Context(CPU, "torch", False, True, time.monotonic() + 30, {})


def spread(median: float) -> dict[str, float]:
    return {"n": 9, "p25": median * 0.9, "p50": median, "p75": median * 1.1, "p99": median * 1.3}


def case(shape: str = "OLMoE-1B-7B", tokens: int = 32, **fields) -> dict:
    return {"shape": shape, "tokens": tokens, "ratio": {}, "graph_us": {"qllm": spread(100.0)}, **fields}


# -- bytes, floors, rates ----------------------------------------------------------------------------------


def test_bytes_that_must_move_count_every_expert_that_is_hit_once():
    shape = layers.Shape("small", 8, 4, 6, 2)
    index = torch.tensor([[0, 1], [1, 0], [5, 1]])
    weights, activations = 3 * (3 * 4 * 8), 2 * 3 * 8
    assert layers.bytes_to_move(shape, index) == 2 * (weights + activations)
    assert layers.bytes_to_move(shape, index, itemsize=4) == 4 * (weights + activations)


def test_an_expert_elsewhere_costs_no_bytes():
    shape = layers.Shape("small", 8, 4, 6, 2)
    index = torch.tensor([[-1, 6], [2, 7]])
    assert layers.bytes_to_move(shape, index) == 2 * (1 * 3 * 4 * 8 + 2 * 2 * 8)


@pytest.mark.parametrize(("format", "per_number"), [("fp8", 1), ("mxfp4", 0.53125), ("int4", 0.515625)])
def test_bytes_of_quantised_weights_are_values_and_scales_of_the_experts_that_are_hit(format, per_number):
    shape = layers.Shape("small", 256, 256, 4, 2)
    pair = layers.quantized(layers.weights(shape, torch.bfloat16, CPU), format)
    scales = (
        4 * (4 * 2 + 2 * 2) if format == "fp8" else 0
    )  # a float for 128 x 128; per_number has the others'
    assert layers.stored_bytes(pair) == 3 * 256 * 256 * per_number + scales
    inputs = [(torch.empty(1, 256, dtype=torch.bfloat16), *pair, torch.tensor([[0, 3]]), None)]
    found = check_speed.floor(shape, inputs, bandwidth=1e6, rate=1e15)
    assert found["floor_us"] == pytest.approx(2 * layers.stored_bytes(pair) + 2 * 2 * 256)


def test_floor_is_the_mean_over_the_routings():
    shape = layers.Shape("small", 8, 4, 6, 2)
    pair = layers.weights(shape, torch.bfloat16, CPU)
    inputs = [(torch.empty(1, 8).bfloat16(), *pair, torch.tensor(i), None) for i in ([[0, 1]], [[0, 0]])]
    found = check_speed.floor(shape, inputs, bandwidth=1e6, rate=1e15)
    weights = [2 * 3 * 4 * 8 * n for n in (2, 1)]
    assert found["floor_us"] == pytest.approx(sum(weights) / 2 + 2 * 2 * 8)
    assert found["bound_by"] == "memory"


def test_rates_are_of_what_must_be_done_over_our_time():
    inputs = [layers.layer_inputs(TINY, 16, layers.weights(TINY, torch.bfloat16, CPU))]
    row = check_speed.against_device(TINY, inputs, 1e9, 1e12, ours_us=500.0)
    assert row["flops"] == 6 * 16 * 2 * 64 * 96
    assert row["bytes"] == layers.bytes_to_move(TINY, inputs[0][3])
    assert row["memory_floor_us"] == pytest.approx(row["bytes"] / 1e3)
    assert row["of_copy"] == pytest.approx(row["memory_floor_us"] / 500)
    assert row["of_matmul"] == pytest.approx(row["arithmetic_floor_us"] / 500)
    assert row["floor_us"] == max(row["memory_floor_us"], row["arithmetic_floor_us"])


# -- goals -------------------------------------------------------------------------------------------------


def test_geometric_mean():
    assert goals.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert goals.geometric_mean([1.0, 2.0, 4.0]) == pytest.approx(2.0)


def test_the_best_peer_is_the_fastest():
    graph = {"qllm": spread(100.0), "slow": spread(300.0), "fast": spread(110.0)}
    row = case(graph_us=graph, ratio={"slow": spread(3.0), "fast": spread(1.1)})
    assert goals.best_peer(row) == ("fast", row["ratio"]["fast"])
    assert goals.best_peer(case()) is None
    assert goals.best_peer({"shape": "x", "tokens": 1, "error": "none"}) is None


def test_without_a_result_nothing_is_measured():
    rows = goals.goals(None)
    assert len(rows) == 13
    assert {(row.measured, row.met) for row in rows} == {("not measured", None)}


MEMORY = {"peak_bytes": 300, "output_bytes": 100, "intermediate_bytes": 100}  # MiB


def document(device_type: str = "cuda", **changes) -> dict:
    peer = {"graph_us": {"qllm": spread(100.0), "vllm": spread(130.0)}, "ratio": {"vllm": spread(1.3)}}
    small, large = {"overhead": 0.001, "noise": -0.001}, {"overhead": 0.004, "noise": 0.0}
    cases = [
        case(tokens=32, of_copy=0.93, of_matmul=0.1, polling=small, memory=None, **peer),
        case(tokens=8192, of_copy=0.2, of_matmul=0.7, polling=large, **peer)
        | {"memory": {name: n * 2**20 for name, n in MEMORY.items()}},
    ]
    exits = [
        {"shape": "a", "tokens": 32, "left_early": 90, "lost_tiles": 0, "device_us": spread(20.0)},
        {"shape": "b", "tokens": 32, "left_early": 10, "lost_tiles": 40, "programs": 4, "device_us": None},
    ]
    cases[1] |= changes
    return {"device_type": device_type, "cases": cases, "exits": exits}


def met(found: dict) -> dict[str, bool | None]:
    keys = ("lowest", "mean", "decode", "Mixtral", "Qwen3", "OLMoE", "polling", "exit", "lost", "memory")
    keys += ("fp8", "mxfp4", "int4")
    return dict(zip(keys, (goal.met for goal in goals.goals(found)), strict=True))


def test_goals_that_are_met_and_those_without_a_case():
    found = met(document())
    quantised = ["fp8", "mxfp4", "int4"]
    assert [key for key, value in found.items() if value is None] == ["Mixtral", "Qwen3", *quantised]
    assert all(value is not False for value in found.values())
    assert "0 in 100 preemptions" in goals.goals(document())[8].measured


def test_a_cpu_measures_no_rates_of_a_gpu():
    found = met(document("cpu"))
    assert {found[key] for key in ("decode", "Mixtral", "Qwen3", "OLMoE")} == {None}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"ratio": {"vllm": spread(0.99)}}, {"lowest", "mean"}),
        ({"tokens": 256, "of_copy": 0.89}, {"decode"}),
        ({"of_matmul": 0.64}, {"OLMoE"}),
        ({"shape": "Mixtral-8x7B", "of_matmul": 0.74}, {"Mixtral"}),
        ({"polling": {"overhead": 0.02, "noise": 0.0}}, {"polling"}),
        ({"memory": {name: n * 2**20 + (name == "peak_bytes") for name, n in MEMORY.items()}}, {"memory"}),
    ],
)
def test_a_goal_that_is_missed(change, missed):
    assert {key for key, value in met(document(**change)).items() if value is False} == missed


def test_quantised_layers_are_held_against_the_dense_ones_and_against_no_goal_of_theirs():
    found = document()
    slow = {
        "of_copy": 0.1,
        "ratio": {"vllm": spread(0.5)},
        "graph_us": {"qllm": spread(9), "vllm": spread(4)},
    }
    for format, times, tokens in (
        ("fp8", 1.8, 32), ("fp8", 1.0, 33), ("mxfp4", 3.1, 1), ("mxfp4", 2.9, 8), ("int4", 3.0, 32),
    ):  # fmt: skip
        row = case(tokens=tokens, format=format, times_faster_than_dense=spread(times), polling=None, **slow)
        found["cases"].append(row)
    judged = met(found)
    assert (judged["fp8"], judged["mxfp4"], judged["int4"]) == (True, False, True)
    assert "lowest 2.90x (OLMoE-1B-7B mxfp4 T=8), of 2 cases" in goals.goals(found)[11].measured
    assert {key for key, value in judged.items() if value is False} == {"mxfp4"}
    assert {met(found | {"device_type": "cpu"})[key] for key in ("fp8", "mxfp4", "int4")} == {None}


@pytest.mark.parametrize("overhead", [-0.1, 0.004, 0.1])
def test_a_cost_that_is_lost_in_the_noise_is_neither_met_nor_missed(overhead):
    found = document()
    for row in found["cases"]:
        row["polling"] = {"overhead": overhead, "noise": -0.02}
    assert met(found)["polling"] is None
    assert "noise 2.00 %" in goals.polling(found["cases"]).measured


def test_exits_are_judged_by_the_slowest_case_and_lost_tiles_in_all():
    found = document()
    found["exits"][0] |= {"device_us": {"n": 200, "p99": 31.0}, "lost_tiles": 5}
    assert (met(found)["exit"], met(found)["lost"]) == (False, False)


# -- peers -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    pair = layers.weights(TINY, torch.float32, CPU)
    return pair, [layers.layer_inputs(TINY, 9, pair)]


def compared(tiny, bound) -> dict:
    row = {"shape": "tiny", "tokens": 9, "peers": {}}
    check_speed.compare(context(), row, tiny[1], bound, 0.0)
    return row


def test_a_peer_is_compared_only_if_its_output_is_ours(tiny):
    def wrong(tensors):
        return lambda: layers.reference(tensors) * 1.1

    def right(tensors):
        return lambda: layers.reference(tensors)

    row = compared(tiny, {"wrong": wrong, "right": right})
    assert list(row["ratio"]) == ["right"]
    assert set(row["graph_us"]) == {"qllm", "batch_invariant", "right"}
    assert set(row["ratio"]) == {"right"}
    assert row["batch_invariant_times_as_long"]["n"] >= 7
    assert "is not ours" in row["peers"]["wrong"]


def test_a_peer_that_fails_is_reported(tiny):
    def fails(tensors):
        def call():
            raise RuntimeError("no kernel image")

        return call

    def absent(tensors):
        raise peers.Absent("too large")

    row = compared(tiny, {"fails": fails, "absent": absent})
    assert row["peers"] == {"fails": "RuntimeError: no kernel image", "absent": "too large"}
    assert goals.best_peer(row) is None


def test_peers_say_why_they_are_absent(tiny, monkeypatch):
    bound, absent = peers.bind(peers.PEERS, TINY, tiny[0])
    assert set(bound) == {"grouped_mm", "batched_mm"}
    assert absent == dict.fromkeys(("vllm", "triton_kernels"), "it runs on a GPU only")
    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert set(peers.bind(("vllm", "triton_kernels"), TINY, tiny[0])[1].values()) == {"not installed"}


def test_peers_have_only_some_formats(tiny, monkeypatch):
    quantised = {format: layers.quantized(tiny[0], format) for format in layers.FORMATS[1:]}
    for format, pair in quantised.items():
        bound, absent = peers.bind(peers.PEERS, TINY, pair)
        assert not bound  # all of them need a GPU
        none = {
            name
            for name, why in absent.items()
            if why == f"it has no {format} experts that can be called alone"
        }
        wanted = {"fp8": {"triton_kernels"}, "mxfp4": {"vllm"}, "int4": {"triton_kernels"}}[format]
        assert none == wanted | ({"grouped_mm", "batched_mm"} if format != "fp8" else set())
    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    _, absent = peers.bind(peers.TRANSFORMERS, TINY, quantised["fp8"])
    assert all("its FP8 kernels cannot be had" in why for why in absent.values())


def quantised_case(tiny, format):
    pair = layers.quantized(tiny[0], format)
    return pair, [layers.with_weights(tensors, pair) for tensors in tiny[1]]


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_vllm_is_given_quantised_weights_as_it_has_them(tiny, monkeypatch, format):
    """Against a stand-in that unpacks what it is given."""

    def unpack(values, scale, block):
        rows, columns = block
        if values.dtype == torch.uint8:
            values = torch.stack([values & 15, values >> 4], -1).flatten(2).float() - 8
        wide = scale.float().repeat_interleave(rows, 1) if rows > 1 else scale.float()
        return values.float() * wide.repeat_interleave(columns, 2)[:, : values.shape[1], : values.shape[2]]

    def config(w1_scale, w2_scale, block_shape):
        assert w1_scale.is_contiguous()
        assert w2_scale.is_contiguous()
        return w1_scale, w2_scale, (max(1, block_shape[0]), block_shape[1])

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, quant_config):
        first, second, block = quant_config
        wide = unpack(w1, first, block), unpack(w2, second, block)
        return layers.reference((hidden_states, *wide, topk_ids.long(), topk_weights))

    names = {"fp8": "fp8_w8a8_moe_quant_config", "int4": "int4_w4a16_moe_quant_config"}
    library = SimpleNamespace(fused_experts=fused_experts, **{names[format]: config})
    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(peers, "_import", lambda name: library)
    pair, inputs = quantised_case(tiny, format)
    row = compared((pair, inputs), peers.bind(["vllm"], TINY, pair)[0])
    assert row["errors"]["vllm"] < 1e-5


def test_transformers_fp8_experts_are_given_ours(tiny, monkeypatch):
    """Its own forward, with a stand-in for the kernels that it downloads."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def grouped(x, weight, scale, offsets, tokens_per_expert, block_size):
        wide = fp8._dequantize_fp8_weight(weight, scale, block_size, torch.float32)
        sizes = tokens_per_expert.int().tolist()
        return torch.cat([rows @ w.T for rows, w in zip(x.split(sizes), wide, strict=True)])

    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(fp8, "load_finegrained_fp8_kernel", lambda: SimpleNamespace(grouped_matmul=grouped))
    pair, inputs = quantised_case(tiny, "fp8")
    row = compared((pair, inputs), peers.bind(["grouped_mm"], TINY, pair)[0])
    assert row["peers"] == {}
    assert row["errors"]["grouped_mm"] < 1e-5


def test_batched_mm_is_for_few_tokens(tiny):
    many = layers.layer_inputs(TINY, peers.MOST_TOKENS + 1, tiny[0])
    with pytest.raises(peers.Absent):
        peers.batched_mm(TINY, tiny[0])(many)


def test_transformers_peers_have_our_output(tiny):
    row = compared(tiny, peers.bind(peers.TRANSFORMERS, TINY, tiny[0])[0])
    assert set(row["ratio"]) == {"grouped_mm", "batched_mm"}
    assert max(row["errors"].values()) < 1e-4


def test_vllm_is_given_what_its_router_gives(tiny, monkeypatch):
    """Against a stand-in: the package itself needs a GPU."""

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
        assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
        return layers.reference((hidden_states, w1, w2, topk_ids.long(), topk_weights))

    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(peers, "_import", lambda name: SimpleNamespace(fused_experts=fused_experts))
    assert compared(tiny, peers.bind(["vllm"], TINY, tiny[0])[0])["errors"]["vllm"] < 1e-5


class TritonKernels:
    """A stand-in for triton_kernels with the meaning of its arguments, in torch."""

    @staticmethod
    def topk(x, k, apply_softmax, y_indx):
        assert x.shape == (y_indx.shape[0], TINY.num_experts)
        assert y_indx.dtype == torch.int16
        flat = y_indx.flatten().long()
        order = flat.argsort(stable=True).int()
        count = torch.bincount(flat, minlength=TINY.num_experts).int()
        return SimpleNamespace(mask_metadata=SimpleNamespace(col_sum=count, col_sorted_indx=order))

    @staticmethod
    def make_ragged_tensor_metadata(slice_sizes, n_total_rows):
        assert slice_sizes.sum() == n_total_rows
        return slice_sizes.tolist()

    @staticmethod
    def matmul(
        a, b, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None, gammas=None,
        fused_activation=None, precision_config=None,
    ):  # fmt: skip
        assert b.stride(-2) == 1  # the inner dimension is contiguous
        if precision_config is not None:
            blocks = b.mT.unflatten(2, (-1, 16))
            b = QuantizedWeight.from_mxfp4(blocks, precision_config.mT.contiguous()).dequantize().mT
        rows = a if gather_indx is None else a[gather_indx]
        y = torch.cat([x @ w for x, w in zip(rows.split(a_ragged_metadata), b, strict=True)])
        if fused_activation is not None:
            y = torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]
        if gammas is not None:
            y = y * gammas[:, None]
        return y if scatter_indx is None else torch.empty_like(y).index_copy_(0, scatter_indx.long(), y)

    @staticmethod
    def reduce(x, dim):
        return x.sum(dim), None

    @staticmethod
    def FnSpecs(name, fn, fn_arg_names, reduction_n):
        return (name, fn, fn_arg_names, reduction_n)

    @staticmethod
    def FusedActivation(specs, fn_args):
        return specs

    @staticmethod
    def PrecisionConfig(b_mx_scale):
        return b_mx_scale

    @staticmethod
    def make_default_matmul_mxfp4_w_layout(mx_axis):
        assert mx_axis == -2

    @staticmethod
    def make_default_matmul_mxfp4_w_scale_layout(mx_axis, num_warps):
        assert mx_axis == -2

    @staticmethod
    def wrap_torch_tensor(tensor, dtype=None):
        return tensor

    @staticmethod
    def convert_layout(tensor, layout):
        return tensor

    silu_and_mul = FP4 = None


def test_triton_kernels_is_given_its_layout_and_order(tiny, monkeypatch):
    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(peers, "_import", lambda name: TritonKernels)
    assert compared(tiny, peers.bind(["triton_kernels"], TINY, tiny[0])[0])["errors"]["triton_kernels"] < 1e-5


def test_triton_kernels_is_given_mxfp4_in_its_layout(tiny, monkeypatch):
    monkeypatch.setattr(peers, "_on_gpu", lambda pair: None)
    monkeypatch.setattr(peers, "_import", lambda name: TritonKernels)
    pair, inputs = quantised_case(tiny, "mxfp4")
    row = compared((pair, inputs), peers.bind(["triton_kernels"], TINY, pair)[0])
    assert row["errors"]["triton_kernels"] < 1e-5


@triton.jit
def _activate(x_ptr, y_ptr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    y = peer_kernels.silu_and_mul(tl.load(x_ptr + 8 * rows + columns))
    tl.store(y_ptr + 4 * rows + tl.arange(0, 4)[None, :], y)


@INTERPRETED
def test_the_activation_given_to_triton_kernels():
    x, y = torch.randn(4, 8), torch.empty(4, 4)
    _activate[(1,)](x, y)
    torch.testing.assert_close(y, torch.nn.functional.silu(x[:, ::2]) * x[:, 1::2])


# -- a run on a CPU ----------------------------------------------------------------------------------------


def run(*options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(PERF / "bench_moe.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.parametrize(
    ("format", "off", "compared"), [("fp8", 1.05, True), ("fp8", 1.2, False), ("int4", 1.05, False)]
)
def test_only_peers_of_fp8_may_round_their_activations(tiny, format, off, compared):
    _, inputs = quantised_case(tiny, format)
    row = {"shape": "tiny", "tokens": 9, "peers": {}}
    peer = {"vllm": lambda tensors: lambda: layers.reference(tensors) * off}
    check_speed.compare(context(), row, inputs, peer, 0.0, dense=tiny[1])
    assert ("vllm" in row["ratio"]) == compared
    assert "bf16" not in row["ratio"]
    assert row["times_faster_than_dense"]["n"] >= 7


@pytest.mark.parametrize(
    ("format", "dtype"), [("fp8", torch.bfloat16), ("fp8", torch.float32), ("int4", torch.bfloat16)]
)
def test_float8_activations_are_timed_where_they_can_be(format, dtype):
    dense = layers.weights(TINY, dtype, CPU)
    inputs = [layers.with_weights(layers.layer_inputs(TINY, 9, dense), layers.quantized(dense, format))]
    row = {"shape": "tiny", "tokens": 9, "peers": {}}
    check_speed.compare(context(), row, inputs, {}, 0.0)
    assert ("fp8_activations_faster" in row) == ((format, dtype) == ("fp8", torch.bfloat16))
    assert row["ratio"] == {}
    if "fp8_activations_faster" in row:
        assert 0.01 < row["fp8_activations_rms"] < 0.1


def test_float8_activations_that_come_out_otherwise_are_not_timed(monkeypatch):
    dense = layers.weights(TINY, torch.bfloat16, CPU)
    inputs = [layers.with_weights(layers.layer_inputs(TINY, 9, dense), layers.quantized(dense, "fp8"))]
    moe = check_speed.moe
    doubled = lambda *x, **options: moe(*x, **options) * (1 + options.get("fp8_activations", False))  # noqa: E731
    monkeypatch.setattr(check_speed, "moe", doubled)
    row = {"shape": "tiny", "tokens": 9, "peers": {}}
    check_speed.compare(context(), row, inputs, {}, 0.0)
    assert "off by" in row["peers"]["fp8_activations"]
    assert "fp8_activations_faster" not in row


def test_what_widening_costs_is_measured_against_dense_weights(monkeypatch, capsys):
    monkeypatch.setattr(bench_torch_moe, "SHAPES", [(32, 48, 4, 2)])
    monkeypatch.setattr(bench_torch_moe, "TOKENS", [3])
    formats = ["bf16", "fp8", "mxfp4", "int4"]
    args = SimpleNamespace(threads=1, dtype="float32", formats=formats, seconds=0.0)
    (row,) = bench_torch_moe.formats_rows(args)
    assert row["shape"] == {"H": 32, "I": 48, "E": 4, "K": 2, "T": 3}
    assert list(row["times_as_long"]) == formats
    calls = bench_torch_moe.in_formats((32, 48, 4, 2, 3), torch.float32, formats)
    want = calls.pop("qllm")()
    for format, most in (("bf16", 0.02), ("fp8", 0.2), ("mxfp4", 0.8), ("int4", 0.8)):
        off = (calls[format]().float() - want).abs().max() / want.abs().max()
        assert 0 < off < most


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench_moe") / "out.json"
    asked = (
        "--models",
        "tiny",
        "--tokens",
        "256",
        "8",
        "--seconds",
        "0.5",
        "--formats",
        "bf16",
        "int4",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    return run(*asked), out


def test_a_run_on_a_cpu_measures_what_a_cpu_can(on_cpu):
    done, out = on_cpu
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    kinds = [(row["format"], row["tokens"]) for row in found["cases"]]
    assert kinds == [("bf16", 8), ("bf16", 256), ("int4", 8), ("int4", 256)]
    for row in found["cases"][2:]:
        assert row["times_faster_than_dense"]["n"] >= 7
        assert "no int4 experts" in row["peers"]["grouped_mm"]
        activations = 2 * row["tokens"] * TINY.hidden_size * 4
        dense = found["cases"][row["tokens"] == 256]["bytes"] - activations
        assert row["bytes"] - activations < 0.2 * dense  # 4 bits and scales, of 32
    for row in found["cases"][:2]:
        assert set(row["graph_us"]) >= {"qllm", "grouped_mm"}
        assert row["ratio"]["grouped_mm"]["n"] >= 7
        assert row["of_copy"] > 0
        assert row["of_matmul"] < 1
        assert {"overhead", "noise"} <= row["polling"].keys()
        assert row["memory"] is None
        assert row["peers"]["vllm"]
    left, quantised = found["exits"]
    assert (quantised["format"], quantised["lost_tiles"]) == ("int4", 0)
    assert (left["tokens"], left["writer"], left["lost_tiles"]) == (256, "step", 0)
    assert (found["device_type"], found["dtype"]) == ("cpu", "float32")
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert met(found)["lowest"] is not None
    assert {met(found)[key] for key in ("decode", "OLMoE", "exit", "memory")} == {None}


def test_it_prints_the_table_and_draws(on_cpu):
    done, out = on_cpu
    for text in (
        "tiny T=8",
        "tiny int4 T=8",
        "grouped_mm",
        "not compared: vllm",
        "geometric mean",
        "not measured",
    ):
        assert text in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_the_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("--out", str(tmp_path / "out.json"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_case_that_fails_is_a_row(capsys, monkeypatch):
    monkeypatch.setattr(check_speed, "compare", lambda *rest: 1 / 0)
    monkeypatch.setattr(bench_moe, "one_exit", lambda *rest: {"shape": "tiny", "tokens": 4})
    args = SimpleNamespace(peers=["grouped_mm"], tokens=[4], seconds=0.0)
    found = {"dtype": "float32", "absent": {}, "cases": [], "exits": [], "left_out": []}
    found["ceilings"] = {"copy_bytes_per_s": {"p50": 1e9}, "product_flops_per_s": {"p50": 1e12}}
    bench_moe.one_model(args, context(), found, TINY, layers.weights(TINY, torch.float32, CPU), "bf16")
    assert found["cases"][0]["error"].startswith("ZeroDivisionError")
    found |= {"device": "cpu", "device_type": "cpu", "date": "2026-11-23"}
    assert any("ZeroDivisionError" in line for line in bench_moe.table(found))

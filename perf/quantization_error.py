"""What quantised experts cost in bits and in precision, per format, beside published ways of quantising.

    python perf/quantization_error.py --out result.json

Runs on any machine. One layer of the sizes of OLMoE-1B-7B, but with fewer experts (--experts), weights drawn
from a normal distribution and from Student's t of 3 degrees of freedom, whose largest numbers are far from
the others. Errors are relative RMS: of the weights, and of the layer's output in float32 with the quantised
weights against the weights before, of 64 tokens of normal hidden states.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from context import cpu_name
from layers import OLMOE, Shape, layer_inputs, with_weights  # which makes qllm_ops importable
from performance_page import WEIGHTS, error_cells
from torch import Tensor

from qllm_ops import QuantizedWeight, moe, quantize_fp8, quantize_int4, quantize_mxfp4
from qllm_ops.quantized import CODES

GAUSSIAN, HEAVY = WEIGHTS

TOKENS = 64


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        bits: of a number with its share of a scale, by arithmetic.
        published: name -> what it makes of a dense weight, in float32. What cannot be imported raises
            ImportError.
    """

    name: str
    quantize: Callable[[Tensor], QuantizedWeight]
    bits: float
    published: dict[str, Callable[[Tensor], Tensor]]


# -- published ways --------------------------------------------------------------------------------------


def transformers_fp8(dense: Tensor) -> Tensor:
    """transformers' `Fp8Quantize`, blocks of 128 x 128."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    values, scales = quantizer._quantize_one("w", dense).values()
    return QuantizedWeight.from_fp8(values, scales).dequantize()


def compressed_tensors(dense: Tensor, group_size: int) -> Tensor:
    """compressed-tensors' symmetric integers, in the dtype of the weight, by the extremes of a group."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    experts = []
    for expert in dense:
        groups = expert.unflatten(1, (-1, group_size))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        experts.append(fake_quantize(expert, scales, zeros, args).float())
    return torch.stack(experts)


def symmetric_int4(dense: Tensor, group_size: int) -> Tensor:
    """The same by its formula: numbers of -8 to 7."""
    groups = dense.unflatten(2, (-1, group_size))
    scales = (groups.abs().amax(3, keepdim=True) / 7.5).float()
    return ((groups.float() / scales).round().clamp(-8, 7) * scales).flatten(2)


def ocp_mxfp4(dense: Tensor) -> Tensor:
    """The OCP specification's power of two: the largest one in the group, over the largest of the values."""
    return _mxfp4(dense, lambda peaks: 2.0 ** (peaks.log2().floor() - 2))


def uncut_mxfp4(dense: Tensor) -> Tensor:
    """The least power of two that cuts nothing off."""
    return _mxfp4(dense, lambda peaks: 2.0 ** (peaks / 6).log2().ceil())


def _mxfp4(dense: Tensor, scale_of: Callable[[Tensor], Tensor]) -> Tensor:
    groups = dense.float().unflatten(2, (-1, 32))
    scales = scale_of(groups.abs().amax(3, keepdim=True))
    codes = torch.tensor(sorted(set(CODES["mxfp4"])), device=dense.device)
    middles = (codes[1:] + codes[:-1]) / 2
    return (codes[torch.bucketize(groups / scales, middles)] * scales).flatten(2)


def int4(group_size: int) -> Format:
    return Format(
        f"int4, groups of {group_size}",
        lambda dense: quantize_int4(dense, group_size),
        4 + 16 / group_size,
        {
            "its formula in float32": lambda dense: symmetric_int4(dense, group_size),
            "compressed-tensors": lambda dense: compressed_tensors(dense, group_size),
        },
    )


FORMATS = {
    "fp8": Format("fp8, 128 x 128", quantize_fp8, 8 + 32 / 128**2, {"transformers": transformers_fp8}),
    "mxfp4": Format("mxfp4", quantize_mxfp4, 4 + 8 / 32, {"OCP": ocp_mxfp4, "nothing cut off": uncut_mxfp4}),
    "int4": int4(128),
    "int4-64": int4(64),
    "int4-32": int4(32),
}


# -- measuring -------------------------------------------------------------------------------------------


def random_weight(
    shape: tuple[int, ...], kind: str = GAUSSIAN, std: float = 0.02, dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Normal numbers, or Student's t of three degrees of freedom before they are scaled."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=draw)
    if kind == HEAVY:
        numbers /= sum(torch.randn(shape, generator=draw).square() for _ in range(3)).div_(3).sqrt_()
    return (std * numbers).to(dtype)


def relative_rms(got: QuantizedWeight | Tensor, want: Tensor) -> float:
    wide = got.dequantize() if isinstance(got, QuantizedWeight) else got.float()
    return float((wide - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt())


def measure(shape: Shape, kind: str, format: Format) -> dict[str, object]:
    """One format on one layer's weights of one kind."""
    pair = dense_pair(shape, kind)
    quantized = tuple(map(format.quantize, pair))
    numel = sum(weight.numel() for weight in pair)
    wide = tuple(weight.float() for weight in pair)
    tensors = layer_inputs(shape, TOKENS, wide)
    return {
        "bits": 8 * sum(weight.nbytes for weight in quantized) / numel,
        "weights": _over_both(quantized, pair),
        "published": _published(format, pair),
        "output": relative_rms(moe(*with_weights(tensors, quantized), backend="torch"), moe(*tensors)),
    }


def dense_pair(shape: Shape, kind: str) -> tuple[Tensor, Tensor]:
    """(E, 2I, H) and (E, H, I) in bfloat16, as checkpoints are before they are quantised."""
    e, i, h = shape.num_experts, shape.intermediate_size, shape.hidden_size
    return random_weight((e, 2 * i, h), kind, h**-0.5), random_weight((e, h, i), kind, i**-0.5, seed=1)


def _over_both(got: tuple[QuantizedWeight | Tensor, ...], pair: tuple[Tensor, Tensor]) -> float:
    """Of all numbers of the layer, each weight's by its own size: they differ in scale."""
    sizes = [weight.numel() for weight in pair]
    parts = [size * relative_rms(g, w) ** 2 for size, g, w in zip(sizes, got, pair, strict=True)]
    return (sum(parts) / sum(sizes)) ** 0.5


def _published(format: Format, pair: tuple[Tensor, Tensor]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for name, dequantized in format.published.items():
        try:
            found[name] = _over_both(tuple(map(dequantized, pair)), pair)
        except ImportError as error:
            found[name] = f"not installed: {error}"
    return found


def main() -> None:
    args = parse()
    torch.set_grad_enabled(False)
    shape = replace(OLMOE, num_experts=args.experts, top_k=min(OLMOE.top_k, args.experts))
    rows = []
    for key in args.formats:
        format = FORMATS[key]
        row = {"format": format.name, "bits_by_arithmetic": format.bits}
        row |= {kind: measure(shape, kind, format) for kind in WEIGHTS}
        rows.append(row)
        print(" | ".join(error_cells(row)), flush=True)
    if args.out:
        args.out.write_text(json.dumps({**provenance(shape), "rows": rows}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--experts", type=int, default=4, help="experts of the layer (default 4)")
    args = parser.parse_args()
    if args.experts < 1:
        parser.error(f"--experts must be at least 1, got {args.experts}")
    return args


def provenance(shape: Shape) -> dict:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "compressed-tensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", "perf/quantization_error.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_name(),
        "shape": {
            "H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "K": shape.top_k,
            "T": TOKENS,
        },
        "versions": versions,
    }  # fmt: skip


if __name__ == "__main__":
    main()

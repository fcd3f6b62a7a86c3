"""What the device at hand is, and what it can run: refused in a sentence, before anything is launched."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch.torch_version import TorchVersion

from qllm_ops.quantized import W8A8
from qllm_ops.tiles import MULTIPROCESSORS, TileConfig, dtype_name, shared_bytes

LEAST_CAPABILITY = (8, 0)
"""Products of bfloat16 and copies from memory to shared memory that nobody waits for begin here, and so
does what Triton supports."""

FLOAT8_CAPABILITY = (8, 9)
"""Products of float8 begin here."""


def fit_device(
    configs: dict[str, TileConfig], dtype: torch.dtype, device: torch.device, weights: str | None = None
) -> dict[str, TileConfig]:
    """The configurations of a layer as ``device`` can run them. To be called before anything is launched.

    Tiles that need more shared memory than a program may have become smaller. What the device cannot do
    at all raises ValueError, which says what it has, what is needed and what to do instead.
    """
    if device.type == "cpu":
        return configs
    refusal = unsupported(device) or (without_float8(device) if weights == W8A8 else None)
    if refusal:
        raise ValueError(refusal)
    available = _shared_bytes_of(device)
    fitting = {}
    for phase, config in configs.items():
        fitting[phase] = fit_shared(phase, config, dtype, available, weights)
        needed = shared_bytes(phase, fitting[phase], dtype, weights)
        if needed > available:
            half = ", and float16 or bfloat16 take half of it" if dtype.itemsize == 4 else ""
            raise ValueError(
                f"the least tiles of {phase} in {dtype_name(dtype)} need {needed} bytes of shared memory, "
                f'{_describe(device)} has {available} for one program; backend="torch" needs none{half}'
            )
    return fitting


@functools.cache
def unsupported(device: torch.device) -> str | None:
    """Why ``device`` cannot run the Triton kernels whatever the layer; None if it can."""
    if device.type == "cpu" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    return (
        f'backend="triton" needs compute capability {_dotted(LEAST_CAPABILITY)} or newer (products of '
        f"bfloat16, asynchronous copies), {_describe(device)} has {_dotted(capability)}; "
        'backend="torch" runs there'
    )


def without_float8(device: torch.device) -> str | None:
    """Why ``device`` has no products of float8 by float8; None if it has."""
    instead = (
        'fp8_activations=False runs there with weights in float8, and backend="torch" computes the same as '
        "fp8_activations=True"
    )
    if torch.version.hip is not None:
        return (
            "fp8_activations=True needs products of float8_e4m3fn, for which no AMD device is taken "
            f"(gfx942 multiplies float8_e4m3fnuz), {_describe(device)} is one; {instead}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability >= FLOAT8_CAPABILITY:
        return None
    return (
        f"fp8_activations=True needs compute capability {_dotted(FLOAT8_CAPABILITY)} or newer (products of "
        f"float8_e4m3fn), {_describe(device)} has {_dotted(capability)}; {instead}"
    )


def broken_interpreter(triton: str, numpy: str) -> str | None:
    """Why the interpreter of this Triton does not run with this NumPy, by their versions; None if it does."""
    if TorchVersion(triton) < "3.7" and TorchVersion(numpy) >= "2.4":
        return (
            f"the interpreter of triton {triton} does not run with numpy {numpy}: it needs triton 3.7 or "
            "newer, or a numpy below 2.4"
        )
    return None


def fit_shared(
    phase: str, config: TileConfig, dtype: torch.dtype, available: int, weights: str | None = None
) -> TileConfig:
    """``config`` with less in shared memory, until it fits or is at its smallest."""
    while phase != "combine" and shared_bytes(phase, config, dtype, weights) > available:
        # Fewer loads under way hurt less than shorter ones, and those less than narrower tiles.
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 16 and weights != W8A8:
            config = replace(config, block_k=config.block_k // 2)  # still a divisor of exit_k
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config


@functools.cache
def _shared_bytes_of(device: torch.device) -> int:
    """Shared memory that one program may have. Which of the two torch knows depends on its build."""
    properties = torch.cuda.get_device_properties(device)
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    most = max(getattr(properties, name, 0) for name in names)
    return most or MULTIPROCESSORS[arch_of(device)].shared_bytes


def _describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def arch_of(device: torch.device) -> str:
    """The table that ``device`` uses: the newest architecture that is not newer, by name."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9 and "H100" in torch.cuda.get_device_name(device):
        return "sm_90_h100"  # whose memory is slower than an H200's
    if major >= 9:
        # 11.x have the matrix units of 10.x; 12.x are cards with 99 KB of shared memory again.
        return "sm_90" if major < 10 else "sm_100" if major < 12 else "sm_86"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"

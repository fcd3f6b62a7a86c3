"""A device for Triton that is not there: kernels are compiled for it, and their PTX runs on this CPU.

Everything is Triton's own but the last step, which tests/ptx.py does: how arguments are specialised, what is
compiled, the order of parameters. Tensors stay on the CPU. For a process without TRITON_INTERPRET.
"""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ptx
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


class Device:
    """Triton's driver, as far as launches need one. Triton keeps what it has compiled for a device by its
    number, which is the capability: one Device of each in a process.

    Attributes:
        between: called whenever a block of a launch goes on to its next atomic operation.
    """

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.draw = random.Random(0)
        self.between: Callable[[], None] = lambda: None
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[capability]},
        )

    def use(self) -> None:
        """Launch on this device from now on."""
        driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source, metadata):
        """What runs a compiled kernel: called with the grid, six things of Triton's, and all arguments."""
        code = Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")).read_text()
        kinds = list(source.signature.values())

        def run(blocks, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            assert (y, z) == (1, 1)
            passed = [
                bytes_of(argument) if isinstance(argument, torch.Tensor) else int(argument)
                for argument, kind in zip(arguments, kinds, strict=True)
                if kind != "constexpr"
            ]
            ptx.launch(
                code, 32 * metadata.num_warps, metadata.shared, passed, blocks,
                seed=self.draw.randrange(2**32), between=self.between,
            )  # fmt: skip

        return run


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """From where it begins to the end of its memory."""
    begin = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()[begin:]

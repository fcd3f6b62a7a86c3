"""Hugging Face MoE models on qllm-ops: swap their experts, load them, make small ones.

Importing this package registers the experts implementation "qllm" with transformers.
"""

from pathlib import Path

from .checkpoint import CheckpointError, check_safetensors, load
from .experts import Preemption, UnsupportedExpertsError, current_preemption, preemptible, warming_up
from .install import InstalledExperts, InstallReport, install, uninstall
from .presets import PRESETS, Preset, make_preset, save_preset
from .quantize import quantize_experts

KERNELS_LAYER = Path(__file__).parent / "kernels_layer"
"""Folder of a package for the `kernels` library, with the layers Experts and MegaBlocksMoeMLP."""

__all__ = [
    "KERNELS_LAYER",
    "PRESETS",
    "CheckpointError",
    "InstallReport",
    "InstalledExperts",
    "Preemption",
    "Preset",
    "UnsupportedExpertsError",
    "check_safetensors",
    "current_preemption",
    "install",
    "load",
    "make_preset",
    "preemptible",
    "quantize_experts",
    "save_preset",
    "uninstall",
    "warming_up",
]

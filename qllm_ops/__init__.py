"""qllm-ops: Mixture-of-Experts operators that can be left at the next tile and taken up again."""

from qllm_ops.activation import ACTIVATIONS, Activation
from qllm_ops.flag import FULL, PriorityFlag
from qllm_ops.invariant import NotInvariantError, batch_invariant
from qllm_ops.moe import MoeRun, moe, moe_reference, warm_up
from qllm_ops.quantized import QuantizedWeight, quantize_fp8, quantize_int4, quantize_mxfp4

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "FULL",
    "Activation",
    "MoeRun",
    "NotInvariantError",
    "PriorityFlag",
    "QuantizedWeight",
    "batch_invariant",
    "moe",
    "moe_reference",
    "quantize_fp8",
    "quantize_int4",
    "quantize_mxfp4",
    "warm_up",
]

"""What a peer lacks and is given, for Triton: in a module of its own, because Triton looks names up there."""

import triton
import triton.language as tl


@triton.jit
def silu_and_mul(x):
    """silu(gate) * up of the columns gate 0, up 0, gate 1, up 1, ..."""
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up

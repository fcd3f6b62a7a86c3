"""A number that kernels are compiled with."""

import triton.language as tl


class Constant(tl.constexpr):
    """A tl.constexpr with a name. At every launch Triton compares all that a kernel uses with what they were
    when it was compiled; where the answer is a tl.constexpr again, that takes a microsecond for each."""

    def __ne__(self, other):
        return self.value != getattr(other, "value", other)

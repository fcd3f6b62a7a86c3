"""Our operator as a package of the `kernels` library, which loads it from its path under another name."""

from . import layers

__all__ = ["layers"]

"""What counts as a number where one is asked for: Python's and NumPy's, and neither truth values nor tensors.

A tensor would have to be waited for, and is another one when it is written to.
"""

from __future__ import annotations

from numbers import Integral, Real


def is_integer(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))

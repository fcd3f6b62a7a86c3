"""Where scales and zero points of a quantised weight lie: as kernels read them, in words of 4 bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def in_words(scales: Tensor, zeros: Tensor | None, group: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as kernels read them: in words of 4 bytes, the least that they load ahead."""
    if zeros is None:
        return _with_whole_words(scales), None
    if not zeros_lie_beside(group, scales.dtype):
        return _with_whole_words(scales), _with_whole_words(zeros)
    if are_beside(scales, zeros):
        return scales, zeros
    words = scales.new_zeros(*scales.shape, 2)
    words[..., 0] = scales
    beside = words.view(torch.uint8)[..., 2]
    beside.copy_(zeros)
    return words[..., 0], beside


def zeros_lie_beside(group: int, scales: torch.dtype) -> bool:
    """Whether a zero point shares a word with its scale, two bytes further.

    Where a tile has one group of a row, kernels would have to choose another byte of a word at each turn, for
    which they take the weights through shared memory. In shorter groups a word each is too much memory.
    """
    return group >= 128 and scales.itemsize == 2


def apart(scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For files, which take no memory of two dtypes, and safetensors none between rows."""
    if zeros is None:
        return scales.contiguous(), None
    # `contiguous` would leave a single element where it is.
    scales, zeros = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (scales, zeros))
    return scales, zeros


def are_beside(scales: Tensor, zeros: Tensor | None) -> bool:
    if zeros is None or scales.itemsize != 2 or not _in_order(scales, 2 * scales.shape[2], 2):
        return False
    doubled = tuple(2 * stride for stride in scales.stride())
    return zeros.stride() == doubled and zeros.data_ptr() == scales.data_ptr() + 2


def _with_whole_words(scales: Tensor) -> Tensor:
    """The scales, with rows that begin at multiples of 4 bytes.

    What lies between rows is read, and multiplied by zero: it must be numbers, so it is never the caller's.
    """
    experts, rows, columns = scales.shape
    in_word = 4 // scales.itemsize
    stride = -(-columns // in_word) * in_word
    if columns == stride and _in_order(scales, stride, 1):
        return scales
    padded = scales.new_zeros(experts, rows, stride)
    padded[..., :columns] = scales
    return padded[..., :columns]


def _in_order(tensor: Tensor, row: int, column: int) -> bool:
    """Whether kernels find rows of that stride, and experts, where they look for them: in whole words.

    `is_contiguous` would not do: it has no opinion on strides of dimensions of one element, nor on addresses.
    """
    strides = (tensor.shape[1] * row, row, column)
    return tensor.stride() == strides and tensor.data_ptr() % 4 == 0

"""Where a factor lies in memory.

Products of equal values are equal to the last bit only where the same kernel runs, and a CPU's BLAS chooses its
kernels by strides and addresses: a factor that is a slice of an SVD, or of a file that was read whole, gives other
last bits than its copy does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes. torch's allocator aligns to this on CPUs; a safetensors file only to eight."""


def is_fresh(tensor: Tensor) -> bool:
    """Whether a tensor's memory layout is that of a new tensor; True for meta tensors and shards."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return True
    return tensor.is_contiguous() and (tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0)


def fresh(tensor: Tensor) -> Tensor:
    """The tensor itself if its layout is that of a new one, else a copy."""
    return tensor if is_fresh(tensor) else tensor.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def lay_out(module: nn.Module) -> bool:
    """Give parameters of a module the layout of new tensors. Returns whether any changed."""
    misplaced = [p for p in module._parameters.values() if p is not None and not is_fresh(p)]
    for parameter in misplaced:
        parameter.data = fresh(parameter.data)
    return bool(misplaced)

"""Tensors laid out as new ones, so that what is loaded computes exactly what was saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes. torch's allocator aligns to this on CPUs; a safetensors file only to eight."""


def fresh(tensor: Tensor) -> Tensor:
    """The tensor itself if its layout is that of a new one (or it is a meta tensor or a shard), else a copy: a CPU's
    BLAS chooses its kernels by strides and addresses, so a slice of an SVD, or of a file, gives other last bits.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    if tensor.is_contiguous() and (tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0):
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def lay_out(module: nn.Module) -> bool:
    """Give parameters of a module the layout of new tensors. Returns whether any changed."""
    changed = False
    for parameter in module._parameters.values():
        if parameter is not None and (copy := fresh(parameter)) is not parameter:
            parameter.data, changed = copy, True
    return changed

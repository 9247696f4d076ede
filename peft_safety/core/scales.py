"""Weights that are not what their dtype says: FP8 is read with its scales, torchao's and HQQ's by their own
`dequantize`, every other kind is refused by name.

A subclass of `nn.Linear` is dense if it holds a plain tensor of a floating dtype of two bytes or more, and computes
`x W^T + b` (tried on a few inputs where the forward is not `nn.Linear`'s own).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_safety.errors import UnsupportedLayerError

FP8_SCALES = {
    "FP8Linear": "weight_scale_inv",
    "FbgemmFp8Linear": "weight_scale",
    "CompressedTensorsFP8Linear": "weight_scale",
}
"""transformers' FP8 layers, and the parameter with their scales: a single one, one per row, or one per block."""
READABLE = "Load the model in 16 bit, or in 4 or 8 bit by bitsandbytes, or leave this layer out of target_modules."
FORWARD_TOLERANCE = 0.01
"""Largest relative difference from `x W^T + b` of a dense layer's forward. bf16 rounding is below half of it."""
PROBES = 4
LIBRARIES = ("torchao", "hqq")
"""Those that give the dense weight `(out, in)` of one layer."""


def is_fp8(layer: nn.Module) -> bool:
    """Whether this is one of transformers' FP8 layers with a weight of one byte per value."""
    return type(layer).__name__ in FP8_SCALES and getattr(getattr(layer, "weight", None), "itemsize", 0) == 1


def scale_of(layer: nn.Module, name: str) -> Tensor:
    """The scales of an FP8 layer in fp32, in a shape that broadcasts over its weight `(out, in)`."""
    weight: Any = layer.weight
    scale = getattr(layer, FP8_SCALES[type(layer).__name__], None)
    where = f"{name}: {type(layer).__name__} of {weight.dtype} {tuple(weight.shape)}"
    if not isinstance(scale, Tensor) or not weight.dtype.is_floating_point or weight.ndim != 2:
        raise UnsupportedLayerError(f"{where} without its scales, or packed. {READABLE}")
    rows, columns = weight.shape
    scale = scale.detach().float().to(weight.device)
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    block = getattr(layer, "block_size", None)
    if block is None and scale.numel() == rows and scale.ndim <= 2 and max(scale.shape) == rows:
        return scale.reshape(rows, 1)
    height, width = (int(size) for size in block or (0, 0))
    if min(height, width) < 1 or tuple(scale.shape) != (-(-rows // height), -(-columns // width)):
        raise UnsupportedLayerError(f"{where} has scales {tuple(scale.shape)} for blocks of {block}. {READABLE}")
    return scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def from_fp8(layer: nn.Module, name: str) -> Tensor:
    return layer.weight.detach().float() * scale_of(layer, name)  # type: ignore[union-attr, operator]


def requantized_fp8(layer: nn.Module, delta: Tensor, name: str) -> Tensor:
    scale, dtype = scale_of(layer, name), layer.weight.dtype
    limit = torch.finfo(dtype).max  # type: ignore[arg-type]
    return ((from_fp8(layer, name) + delta) / scale).clamp(-limit, limit).to(dtype).float() * scale  # type: ignore[call-overload, arg-type]


def library(layer: nn.Module) -> str | None:
    """Which of `LIBRARIES` holds the weight of a layer and can give it back."""
    if type(layer).__name__ == "HQQLinear" and hasattr(layer, "dequantize"):
        return "hqq"
    kind: Any = type(getattr(layer, "weight", None))
    theirs = any(base.__name__ == "TorchAOBaseTensor" for base in kind.__mro__)
    return "torchao" if theirs and kind.dequantize is not Tensor.dequantize else None


def dequantized(layer: nn.Module, name: str) -> Tensor:
    """The dense weight `(out, in)` of such a layer, fp32, by its own library."""
    source: Any = layer if library(layer) == "hqq" else layer.weight
    shape = (layer.out_features, layer.in_features)
    try:
        weight = source.dequantize().detach().float()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as problem:
        reason = f"{library(layer)} cannot dequantize its weight here ({type(problem).__name__})"
        raise refusal(layer, name, reason) from problem
    if tuple(weight.shape) != shape or weight.is_meta:
        raise refusal(layer, name, f"its weight dequantizes to {tuple(weight.shape)} on {weight.device}, not {shape}")
    return weight  # type: ignore[no-any-return]


def unreadable(layer: nn.Module) -> str | None:
    """Why the weight of this layer cannot be read; None for dense ones, transformers' FP8 and those of `LIBRARIES`."""
    if library(layer) is not None:
        return None
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return "it has no weight of its own (packed)"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype.is_floating_point and (weight.itemsize > 1 or is_fp8(layer)):
        return None
    return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}, without scales that can be read here"


def is_packed(layer: nn.Module) -> bool:
    """Whether this looks like a linear layer of an unsupported quantization (GPTQ, AWQ, HQQ, EETQ, BitNet, ...)."""
    sized = any(hasattr(layer, feature) for feature in ("in_features", "infeatures"))
    held = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
    return sized and any(t.ndim >= 2 and (not t.dtype.is_floating_point or t.itemsize == 1) for t in held)


def refusal(layer: nn.Module, name: str, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(f"{name}: this {type(layer).__name__} is not supported: {reason}. {READABLE}")


@torch.no_grad()
def sample_forward(layer: nn.Module, name: str, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """`W[rows, columns]` of a packed weight `(out, width)`, fp32, on the CPU: the outputs for unit vectors. Tries the
    dtypes that its kernel may take; an UnsupportedLayerError says that it takes none.
    """
    held = [t for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta]
    own = [t.dtype for t in held if t.is_floating_point() and t.itemsize > 1]
    places = torch.arange(len(columns))
    x = torch.zeros(len(columns) + 1, width)  # the last one stays zero: its output is the bias
    x[places, columns] = 1.0
    problem: Exception | None = None
    for dtype in dict.fromkeys((*own, torch.float16, torch.bfloat16, torch.float32)):
        try:
            with torch.autocast(held[0].device.type, enabled=False):
                output = layer(x.to(device=held[0].device, dtype=dtype)).float().cpu()
            return (output[:-1] - output[-1])[places, rows]
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, IndexError) as error:
            problem = error
    reason = unreadable(layer) or "its weight is packed"
    raise refusal(layer, name, f"{reason}, and its forward takes no {tuple(x.shape)} inputs here") from problem


@torch.no_grad()
def check_forward(layer: nn.Module, name: str) -> None:
    """Refuse a dense layer whose own forward is not `x W^T + b`: it scales, quantizes or splits the weight."""
    if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
        return
    weight: Any = layer.weight
    x = torch.randn(PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.autocast(weight.device.type, enabled=False):
            # in this order: after its own forward, accelerate may have taken the bias away again
            expected, output = F.linear(x, weight, layer.bias), layer.forward(x)  # type: ignore[arg-type]
        error = math.inf
        if isinstance(output, Tensor) and output.shape == expected.shape:
            size = expected.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
            error = float((output.float() - expected.float()).norm() / size)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ImportError, AssertionError) as problem:
        reason = f"its own forward cannot be compared with x W^T + b ({type(problem).__name__})"
        raise refusal(layer, name, reason) from problem
    if error > FORWARD_TOLERANCE:
        reason = f"its own forward does not compute x W^T + b with its weight (relative difference {error:.2g})"
        raise refusal(layer, name, reason)

"""The base weights under an adapter: which layers can be protected, their dense weight, and their fingerprint.

A fingerprint is a few hundred sampled values of a weight. Compared by relative distance, it tells another model of
equal shapes apart, and still recognizes the same model in another precision.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import kinds, scales
from peft_safety.core.parameters import expert_shape, owner_of, stacked_weight
from peft_safety.core.projection import all_finite
from peft_safety.errors import SubspaceError, UnsupportedLayerError

SAMPLES = 256
#: Largest relative distance between two fingerprints of one model. bf16 rounding stays below 0.4 %; NF4 moves Gaussian
#: weights by 9 %, int8 by 1 %; unrelated weights are at 140 %.
DISTANCE_DENSE = 0.01
DISTANCE_QUANTIZED = 0.35
_BITSANDBYTES = {"Linear4bit": "4bit", "LinearNF4": "4bit", "LinearFP4": "4bit", "Linear8bitLt": "8bit"}


def quantization(layer: nn.Module) -> str | None:
    """`"4bit"`, `"8bit"` (bitsandbytes), `"fp8"` (transformers), one of `scales.LIBRARIES`, `"packed"` (a weight that
    cannot be read) or None.
    """
    kind = "fp8" if scales.is_fp8(layer) else _BITSANDBYTES.get(type(layer).__name__, scales.library(layer))
    if kind is None and not supported(layer):
        return "packed" if scales.is_packed(layer) else None
    weight = getattr(layer, "weight", None)
    if kind is None and (weight is None or is_whole(weight)) and scales.unreadable(layer) is not None:
        return "packed"
    return kind


def precision(layers: Mapping[str, nn.Module]) -> str:
    """The `quantization` of these base layers, "dense" if none has any."""
    return min({kind for layer in layers.values() if (kind := quantization(layer)) is not None}, default="dense")


def supported(layer: nn.Module) -> bool:
    """Whether this layer is of a kind that can be protected. Whether its weight can be read, see `check_readable`."""
    return is_linear(layer) or kinds.shape(layer) is not None


def is_linear(layer: nn.Module) -> bool:
    """Whether this is a linear layer or a Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def check_readable(layer: nn.Module, name: str) -> None:
    """An UnsupportedLayerError refuses what is not dense, of bitsandbytes, transformers' FP8, torchao's or HQQ's."""
    if scales.library(layer) is not None:
        return
    if not supported(layer):
        known = "Linear, Conv1D, convolution, embedding or bitsandbytes layer"
        reason = "its weight is packed" if scales.is_packed(layer) else f"it is no {known}"
        raise scales.refusal(layer, name, reason)
    weight = getattr(layer, "weight", None)
    own = type(layer).__name__ not in _BITSANDBYTES and (weight is None or is_whole(weight))
    if own and (problem := scales.unreadable(layer)) is not None:
        raise scales.refusal(layer, name, problem)
    if not is_linear(layer):
        kinds.check(layer, name)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, whose weight is stored as `(in, out)`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def shape(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)`, whatever the storage; of fused experts those of one expert, of a convolution
    channels and numbers of a patch, of an embedding its width and the number of tokens.
    """
    if (special := expert_shape(layer) or kinds.shape(layer)) is not None:
        return special
    if is_conv1d(layer):
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])  # type: ignore[index, union-attr]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def split_dimension(layer: nn.Module) -> int | None:
    """Along which dimension of its matrix `(out, in)` tensor parallelism splits a layer between processes, or None.
    The rows of an embedding's weight are its inputs.
    """
    weight: Any = getattr(layer, "weight", None)
    names = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()
    if "tp" not in names:
        return None
    placement = weight.placements[names.index("tp")]
    if not placement.is_shard():
        return None
    return 1 - int(placement.dim) % 2 if kinds.is_embedding(layer) else int(placement.dim) % 2


def check_inputs(layer: nn.Module, name: str) -> None:
    """An UnsupportedLayerError refuses a layer of whose inputs each process sees a part."""
    if split_dimension(layer) == 1:
        raise UnsupportedLayerError(
            f"{name}: tensor parallelism splits the inputs of this {type(layer).__name__} {shape(layer)} between "
            "processes (row-wise), so that none of them sees whole ones. Leave it out of target_modules."
        )


def is_whole(weight: Any) -> bool:
    """Whether a weight can be read here: a tensor, not on the meta device, not a shard of DTensor or DeepSpeed."""
    sharded = hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")
    return isinstance(weight, Tensor) and not weight.is_meta and not sharded


def from_int8(values: Tensor, scale: Tensor) -> Tensor:
    """bitsandbytes' 8-bit weight `(out, in)` with its row scales `SCB (out,)`, as fp32."""
    return values.float() * (scale.float().view(-1, 1).to(values.device) / 127.0)


@torch.no_grad()
def stored_weight(layer: nn.Module, name: str = "the layer") -> Tensor:
    """The weight `(out_features, in_features)` on its own device: a dense one as it is, a quantized one in fp32."""
    check_readable(layer, name)
    if scales.library(layer) is not None:
        return scales.dequantized(layer, name)
    weight: Any = layer.weight
    if split_dimension(layer) is not None:
        return weight.detach().full_tensor()  # type: ignore[no-any-return]  # all processes come here
    if _is_offloaded(layer, weight):
        with _fetched(layer):
            return stored_weight(layer, name)
    if not is_whole(weight):
        raise UnsupportedLayerError(f"{name}: its weight is on the meta device or sharded. Calibrate or load earlier.")
    kind = quantization(layer)
    if kind == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        if getattr(weight, "quant_state", None) is None:
            raise UnsupportedLayerError(f"{name}: 4-bit weight without its state. Move the model to its device first.")
        return dequantize_4bit(*_unpacked(weight)).float()
    if kind == "8bit":
        scale = getattr(weight, "SCB", None)
        scale = getattr(getattr(layer, "state", None), "SCB", None) if scale is None else scale
        if scale is None or weight.dtype != torch.int8:
            raise UnsupportedLayerError(f"{name}: 8-bit weight without scales. Move the model to its device first.")
        return from_int8(weight.data, scale)
    if kind == "fp8":
        return scales.from_fp8(layer, name)
    if is_conv1d(layer):
        return weight.detach().T
    if not is_linear(layer):
        return kinds.as_matrix(layer, weight.detach())
    scales.check_forward(layer, name)
    return weight.detach()


def _is_offloaded(layer: nn.Module, weight: Tensor) -> bool:
    """Whether accelerate keeps the weight on disk or in host memory."""
    return weight.is_meta and getattr(getattr(layer, "_hf_hook", None), "weights_map", None) is not None


@contextmanager
def _fetched(layer: Any) -> Iterator[None]:
    """Have accelerate bring a layer's weights in."""
    layer._hf_hook.pre_forward(layer)
    try:
        yield
    finally:
        layer._hf_hook.post_forward(layer, None)


def dense_weight(layer: nn.Module, name: str = "the layer") -> Tensor:
    """`stored_weight` as fp32. A copy only where one is needed."""
    return stored_weight(layer, name).float()


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight and its state in the usual layout, also where bitsandbytes has repacked it."""
    if not _is_packed(weight):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # which the conversion changes
    absmax = state.absmax.T.reshape(-1).float()  # transposed while packed; the conversion restores only nested ones
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested = absmax, False
    return data, state


def _is_packed(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _repacking(model: nn.Module) -> list[Any]:
    """The layers whose 4-bit weights bitsandbytes may repack."""
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from repacking 4-bit weights inside the block (see `stay_unpacked`)."""
    layers = _repacking(model)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, without repacking of 4-bit weights (see `unpacked`)."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with unpacked(model):
            yield
    finally:
        for module, flag in training:
            module.training = flag


@torch.no_grad()
def stay_unpacked(model: nn.Module) -> None:
    """Unpack the 4-bit weights of this model, and keep bitsandbytes from packing them again, as one forward in eval
    mode on a CPU with AVX512-BF16 does: no gradient passes through a packed weight, and nothing says so.
    """
    layers = _repacking(model)
    if layers:
        _say_unpacked()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if _is_packed(layer.weight):
            layer.weight.data, layer.weight.quant_state = _unpacked(layer.weight)
            layer.quant_state = layer.weight.quant_state


@cache
def _say_unpacked() -> None:
    logging.getLogger(__name__).warning(
        "This model trains an adapter on 4-bit weights: bitsandbytes' packed format for CPUs with AVX512-BF16 is "
        "switched off for it, because no gradient passes through packed weights. Other models keep it."
    )


@torch.no_grad()
def merge_error(layer: nn.Module, delta: Tensor, name: str) -> float:
    """What a merge into this k-bit layer misses of `dW (out, in)`: `||Q(W + dW) - W - dW|| / ||dW||`; nan for zero,
    and for a library whose way to quantize is not known here.
    """
    if quantization(layer) in scales.LIBRARIES:
        return math.nan
    before = dense_weight(layer, name)
    delta = delta.to(before)
    return float((requantized(layer, delta, name) - before - delta).norm() / delta.norm())


def nf4_config(dtype: torch.dtype) -> Any:
    """bitsandbytes' NF4 with double quantization, for loading a model; products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    nf4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)


@torch.no_grad()
def requantized(layer: nn.Module, delta: Tensor, name: str) -> Tensor:
    """`Q(W + dW)` as a dense fp32 `(out_features, in_features)`. The layer is not changed."""
    if quantization(layer) == "fp8":
        return scales.requantized_fp8(layer, delta, name)
    merged = dense_weight(layer, name) + delta
    if quantization(layer) == "4bit":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        state: Any = layer.weight.quant_state  # type: ignore[union-attr]
        options = {"blocksize": state.blocksize, "quant_type": state.quant_type, "compress_statistics": state.nested}
        return dequantize_4bit(*quantize_4bit(merged.to(state.dtype), **options)).float()
    scale = merged.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
    return (merged / scale).round() * scale


def fingerprint(layer: nn.Module, name: str) -> Tensor:
    """`SAMPLES` evenly spaced values of the flattened `(out, in)` weight, fp32, on the CPU; refused if not finite.
    Those of a packed weight are what its forward gives. Of fused experts, convolutions and embeddings, as their
    parameter is stored.
    """
    special = kinds.shape(layer) is not None
    if special:
        check_readable(layer, name)
    stack: Any = layer.weight if special else stacked_weight(layer)
    if stack is not None:
        if _is_offloaded(owner_of(layer), stack):
            with _fetched(owner_of(layer)):
                return fingerprint(layer, name)
        if not is_whole(stack):
            raise UnsupportedLayerError(f"{name}: its weight is on the meta device or sharded. Load it whole.")
        values = sample(stack.detach().flatten(1)).float()
    elif quantization(layer) == "packed":
        values = scales.sample_forward(layer, name, *_sampled(*shape(layer)), shape(layer)[1])
    else:
        values = sample(dense_weight(layer, name))
    if not all_finite(values):
        raise SubspaceError(f"{name}: the base weight {shape(layer)} holds NaN or Inf. Load intact base weights.")
    return values


def sample(weight: Tensor) -> Tensor:
    """The sampled values behind a fingerprint, of a dense `(out, in)` weight."""
    rows, columns = _sampled(*weight.shape)  # no copy of a transposed view
    return weight[rows.to(weight.device), columns.to(weight.device)].cpu()


@cache
def _sampled(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the sampled values."""
    index = torch.linspace(0, m * n - 1, SAMPLES, dtype=torch.float64).round().long()
    return index // n, index % n


def distance(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).norm() / reference.norm().clamp(min=torch.finfo(torch.float32).tiny))


def check_fingerprints(
    expected: Mapping[str, Tensor], layers: Mapping[str, nn.Module], *, quantized: bool = False
) -> None:
    """Compare fingerprints `(SAMPLES,)` with the layers of the same names. A SubspaceError names the worst."""
    quantized = quantized or any(quantization(layer) for layer in layers.values())
    limit = DISTANCE_QUANTIZED if quantized else DISTANCE_DENSE
    common = sorted(expected.keys() & layers.keys())
    distances = {name: distance(fingerprint(layers[name], name), expected[name]) for name in common}
    if not all(value <= limit for value in distances.values()):
        worst = max(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])
        raise SubspaceError(
            f"{worst}: this subspace belongs to other base weights than this {shape(layers[worst])} layer (relative "
            f"distance of the fingerprints {distances[worst]:.3g}, limit {limit:g}). Load the base model it was "
            "calibrated on, or calibrate a new one with SafetySubspace.from_activations."
        )

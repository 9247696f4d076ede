"""The size of an update's output, `E||dW x||`, beside `E||W x||`, in one streaming pass that keeps no activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.audit.metrics import Update
from peft_safety.calibration.activations import adapters_off
from peft_safety.calibration.moments import Batch, Positions, exact_matmul, run, selected
from peft_safety.errors import CalibrationError


@dataclass(frozen=True)
class Interference:
    """Mean lengths over the positions that count.

    Attributes:
        update: `E||dW x||`.
        weight: `E||W x||`, without the bias.
        tokens: how many positions.
    """

    update: float
    weight: float
    tokens: int

    @property
    def share(self) -> float:
        """`E||dW x|| / E||W x||`; NaN where the layer computes nothing."""
        return self.update / self.weight if self.weight > 0 else float("nan")


def interference(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    updates: Mapping[str, Update],
    batches: Sequence[Batch],
    *,
    positions: Positions = "response",
    progress: bool = True,
    what: str = "interference",
) -> dict[str, Interference]:
    """Run the bare base model over the batches once, and measure every layer.

    Args:
        layers: base layers by name.
        updates: of the same names.
        batches: `input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`.
        positions: those with a label ("response"), those without ("prompt"), or all that have attention ("all").

    Raises:
        CalibrationError: a layer saw no such position, or its inputs or outputs are not finite.
        ConfigError: an adapter is merged into the base weights.
    """
    # ||dW x|| = ||S V^T x||: as many columns as the rank, and no cancellation between the two products of a residual
    probes = {name: (update.right * update.values).float() for name, update in updates.items()}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    masks: tuple[Tensor, ...] = ()

    def expect(*following: Tensor) -> None:
        nonlocal masks
        masks = following

    def record(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, y = selected(name, args[0], *masks), selected(name, output, *masks)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            y = y - bias.float()
        probes[name] = probes[name].to(x.device)
        with torch.autocast(device_type=x.device.type, enabled=False), exact_matmul():
            outputs = (x @ probes[name], y)
            lengths = torch.stack([v.norm(dim=1, dtype=torch.float32).double().sum() for v in outputs])
        sums[name] = sums[name] + lengths if name in sums else lengths
        counts[name] += x.shape[0]

    with adapters_off(model), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(record, name)).remove)
        run(model, batches, expect, positions=positions, progress=progress, what=what)
    result = {}
    for name, count in counts.items():
        if count == 0:
            raise CalibrationError(
                f"{name}: the layer saw no token that counts. Give rows with a response, or positions='all'."
            )
        update, weight = (float(total) / count for total in sums[name])
        if not update < float("inf") or not weight < float("inf"):
            raise CalibrationError(f"{name}: its inputs or outputs hold NaN or Inf. Load the model in float32.")
        result[name] = Interference(update, weight, count)
    return result

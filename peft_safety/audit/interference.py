"""The size of an update's output, `E||dW x||`, beside `E||W x||`; one streaming pass, no activation is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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


class _Lengths:
    """Hooks on base layers that add up `||dW x||` and `||W x||`."""

    def __init__(self, layers: Mapping[str, nn.Module], updates: Mapping[str, Update]) -> None:
        self.layers = dict(layers)
        # ||dW x|| = ||S V^T x||: as many rows as the rank, and no cancellation between the two products of a residual
        self.probes = {name: (update.right * update.values).mT.float() for name, update in updates.items()}
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.layers, 0)
        self.masks: tuple[Tensor, ...] = ()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    def expect(self, *masks: Tensor) -> None:
        self.masks = masks

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not self.masks:
                return
            x, y = selected(name, args[0], *self.masks), selected(name, output, *self.masks)
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor):
                y = y - bias.float()
            self.probes[name] = self.probes[name].to(x.device)
            with torch.autocast(device_type=x.device.type, enabled=False), exact_matmul():
                lengths = torch.stack(
                    [
                        torch.linalg.vector_norm(v, dim=1, dtype=torch.float32).double().sum()
                        for v in (x @ self.probes[name].mT, y)
                    ]
                )
            self.sums[name] = self.sums[name] + lengths if name in self.sums else lengths
            self.counts[name] += x.shape[0]

        return hook

    def found(self, name: str) -> Interference:
        if self.counts[name] == 0:
            raise CalibrationError(
                f"{name}: the layer saw no token that counts. Give rows with a response, or positions='all'."
            )
        update, weight = (float(total) / self.counts[name] for total in self.sums[name])
        if not update < float("inf") or not weight < float("inf"):
            raise CalibrationError(f"{name}: its inputs or outputs hold NaN or Inf. Load the model in float32.")
        return Interference(update, weight, self.counts[name])


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
    lengths = _Lengths(layers, updates)
    with adapters_off(model), lengths.watching():
        run(model, batches, lengths.expect, positions=positions, progress=progress, what=what)
    return {name: lengths.found(name) for name in layers}

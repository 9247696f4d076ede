"""What an update does to general and harmful inputs, `E||dW x||` beside `E||W x||`, and the data behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_safety.audit.metrics import Update
from peft_safety.calibration.batches import Batch, Counted, Positions, is_tokenized, to_batches
from peft_safety.calibration.models import adapters_off, tokenizer_of
from peft_safety.calibration.moments import exact_matmul, run
from peft_safety.calibration.positions import selected
from peft_safety.data import load, refusal_pairs
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.evaluation import self_responses

Calibration = Literal["auto"] | Mapping[str, Rows] | None
KINDS = ("general", "harmful")
SPLIT = "calibration"
ANSWER_TOKENS = 24
"""Tokens of the model's own answers to the general prompts, as in this package's benchmark."""


@dataclass(frozen=True)
class Interference:
    """Means over the positions that count: `update` is `E||dW x||`, `weight` is `E||W x||` without the bias."""

    update: float
    weight: float
    tokens: int

    @property
    def share(self) -> float:
        """`E||dW x|| / E||W x||`; NaN where the layer computes nothing."""
        return self.update / self.weight if self.weight > 0 else float("nan")


def calibration_sets(
    model: nn.Module, calibration: Calibration, tokenizer: Any, progress: bool
) -> dict[str, tuple[list[Batch], dict[str, Any]]]:
    """By kind, the batches, and their `source` and a hash of their content (`data`); empty for None."""
    if calibration is None:
        return {}
    auto = isinstance(calibration, str) and calibration == "auto"
    if not auto and not (isinstance(calibration, Mapping) and set(calibration) == set(KINDS)):
        given = list(calibration) if isinstance(calibration, Mapping) else calibration
        raise ConfigError(f"calibration={given!r}. Use None, 'auto', or a mapping with the keys {KINDS}.")
    sources = dict.fromkeys(KINDS, "given")
    if isinstance(calibration, str):
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        prompts = [row["prompt"] for row in load("general_prompts", SPLIT)]
        with adapters_off(model):
            general = self_responses(bare, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, progress=progress)
        calibration = {"general": general, "harmful": refusal_pairs(SPLIT)}
        sources["general"] = f"peft_safety general prompts, {SPLIT} split, answered by the base model"
        sources["harmful"] = f"peft_safety refusal pairs, {SPLIT} split"
    sets = {}
    for kind in KINDS:
        data = as_rows(calibration[kind], f"calibration[{kind!r}]", CalibrationError)
        if data and not is_tokenized(data) and tokenizer is None:
            tokenizer = tokenizer_of(model)
        batches, digest = to_batches(data, tokenizer, batch_size=8, max_length=512)
        sets[kind] = (batches, {"source": sources[kind], "data": digest})
    return sets


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
    """Run the bare base model over the batches once, and measure every layer at the positions that count."""
    # ||dW x|| = ||S V^T x||: as many columns as the rank, and no cancellation between the two products of a residual
    probes = {name: (update.right * update.values).float() for name, update in updates.items()}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    which = Counted(())

    def expect(following: Counted) -> None:
        nonlocal which
        which = following

    def record(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, y = selected(name, args[0], which), selected(name, output, which)
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
            raise CalibrationError(f"{name}: saw no token that counts. Give rows with a response, or positions='all'.")
        update, weight = (float(total) / count for total in sums[name])
        if not update < float("inf") or not weight < float("inf"):
            raise CalibrationError(f"{name}: its inputs or outputs hold NaN or Inf. Load the model in float32.")
        result[name] = Interference(update, weight, count)
    return result

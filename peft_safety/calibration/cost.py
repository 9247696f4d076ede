"""What a calibration will cost, before it is run: one batch is measured, everything else is counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from peft_safety.calibration.bases import DENSE_LIMIT
from peft_safety.calibration.batches import size_of
from peft_safety.calibration.budget import bytes_of, groups, together
from peft_safety.calibration.models import adapters_off
from peft_safety.calibration.moments import collect, inputs_of
from peft_safety.calibration.prepare import Job, input_needs, prepare
from peft_safety.calibration.sizes import ALL_TOKENS
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.projection import OVERSAMPLING, POWER_ITERATIONS, Side
from peft_safety.core.subspace import DEFAULT_DTYPE, DTYPES
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError

DENSE_WORK, QR_WORK = 10, 6
"""Operations of a dense eigendecomposition in units of n^3, and of a QR in units of n k^2, at the speed of a matrix
product; measured on two CPU cores for n from 576 to 1536."""
PROBE = 512
"""Size of the product that is timed."""


@dataclass(frozen=True)
class CalibrationCost:
    """What a calibration will take: distinct `inputs` of the `modules` that get a basis, `tokens` of all `passes` with
    padding (samples, of data without tokens), at most `file_bytes`, `memory_bytes` beside the model, and times
    extrapolated from one batch and one product.
    """

    modules: int
    inputs: int
    passes: int
    tokens: int
    file_bytes: int
    memory_bytes: int
    budget_bytes: int
    pass_seconds: float
    decomposition_seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cost(
    model: nn.Module, data: Rows, *, memory: str | int | None = None, dtype: str = DEFAULT_DTYPE, **options: Any
) -> CalibrationCost:
    """What `estimate` with these arguments will take; for them and for the errors, see there. Runs two batches."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}. Use one of {', '.join(DTYPES)}.")
    device, job = next(model.parameters()).device, prepare(model, data, **options)
    budget = bytes_of(memory, device)
    with adapters_off(model):
        leaders = inputs_of(model, job.layers, job.sources[0][0], job.positions)
        needs = input_needs(job, leaders)
        parts = groups(job.layers, leaders, needs, budget)
        per_token = _seconds_per_token(model, job, parts[0])
    held = [{leader: needs[leader] for name in part if (leader := leaders.get(name, name))} for part in parts]
    tokens = len(parts) * sum(size_of(batch) for rows, _ in job.sources for batch in rows)
    stored, operations, made = 4 * weights.SAMPLES * len(job.layers), 0, set()
    for name, sides in job.sizes.items():
        shape = weights.shape(job.layers[name])
        if kinds.is_embedding(job.layers[name]):  # sees at most as many tokens as there are
            shape = shape[0], min(shape[1], tokens)
        for side, size in sides.items():
            if size is ALL_TOKENS:
                stored += 12 * shape[1]
                continue
            key = (leaders.get(name, name) if side == "in" else name, side, size)
            if key not in made:
                made.add(key)
                k = min(job.wanted[name, side] or size.limit(shape, side), size.most or max(shape))
                stored += k * (DTYPES[dtype].itemsize * shape[0 if side == "out" else 1] + 4)
                operations += _operations(shape, side, k, contrastive=len(job.sources) > 1)
    return CalibrationCost(
        modules=len(job.layers),
        inputs=sum(map(len, held)),
        passes=len(parts) * len(job.sources),
        tokens=tokens,
        file_bytes=stored,
        memory_bytes=max(
            together(x.values()) + (len(job.sources) - 1) * sum(one.held for one in x.values()) for x in held
        ),
        budget_bytes=budget,
        pass_seconds=tokens * per_token,
        decomposition_seconds=operations * _seconds_per_operation(device),
    )


def _seconds_per_token(model: nn.Module, job: Job, layers: Mapping[str, nn.Module]) -> float:
    """Of the middle batch by length, the second moments of a group of layers included."""
    batches = [batch for rows, _ in job.sources for batch in rows]
    middle = sorted(batches, key=size_of)[len(batches) // 2]
    started = time.perf_counter()
    moments = collect(model, layers, [middle], positions=job.positions, progress=False, what="one batch")
    for name in filter(moments.reaches, layers):
        if not kinds.is_embedding(layers[name]):
            moments.moment(name)  # waits for the device
    return (time.perf_counter() - started) / size_of(middle)


def _operations(shape: tuple[int, int], side: Side, k: int, contrastive: bool) -> int:
    """Multiplications and additions behind one basis; see `bases`."""
    m, n = shape
    d = m if side == "out" else n
    width, steps, rounding = min(k + OVERSAMPLING, d), POWER_ITERATIONS + 2, QR_WORK * d * k**2
    if contrastive:
        return 2 * DENSE_WORK * d**3 + rounding
    if side == "in":
        iterated = steps * (2 * n**2 * width + QR_WORK * n * width**2)
        return (DENSE_WORK * n**3 if n <= DENSE_LIMIT else iterated) + rounding
    if 2 * width > min(shape):
        return DENSE_WORK * (n**3 + m * n * min(shape)) + rounding
    return steps * (2 * n * (n + 2 * m) * width + QR_WORK * m * width**2) + rounding


def _seconds_per_operation(device: torch.device) -> float:
    square = torch.ones(PROBE, PROBE, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    float((square @ square)[0, 0])
    started = time.perf_counter()
    float((square @ square)[0, 0])
    return (time.perf_counter() - started) / (2 * PROBE**3)

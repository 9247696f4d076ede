"""How much an input basis covers: of its calibration data, and of a benign task that must still be learned.

An update that is projected by `P = I - Q Q^T` sees a task only through `P x`. Where `E||P x||^2 / E||x||^2` is almost
zero, learning stalls.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.calibration.bases import check_moment
from peft_safety.calibration.batches import data_of, to_batches
from peft_safety.calibration.grouped import GroupedMoments
from peft_safety.calibration.moments import Moment
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core.projection import is_tokens, project_out
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data.rows import Rows
from peft_safety.errors import CalibrationError

STALL_SHARE = 0.01
"""Warn below this median share of the task's energy outside the null spaces. On SmolLM2-135M the packaged task has
0.17 outside a quarter of the dimensions and 0.09 outside half of them, and is still learned."""
TASK_ENERGY = 0.99
"""The rank of the task's inputs is the number of directions that hold this share of their energy."""


@dataclass(frozen=True)
class TaskShare:
    """What a null space leaves of a task's inputs at one module: `free` is `E||P x||^2 / E||x||^2`; `rank` directions
    hold `TASK_ENERGY` of the inputs, and `rank_free` of `P x`. `curve (k,)` is `free` if only the first 1, 2, ..., k
    directions are taken; empty for a set of tokens.
    """

    free: float
    rank: int | None = None
    rank_free: int | None = None
    curve: Tensor = field(default_factory=lambda: torch.zeros(0), compare=False)


@dataclass(frozen=True)
class ModuleCoverage:
    """One module's null space, `k` of its `features`. `covered` is the share of the calibration data's energy inside,
    `curve (k,)` that inside the first 1, 2, ..., k directions; None and empty where the subspace does not say.
    """

    name: str
    features: int
    k: int
    covered: float | None
    curve: Tensor
    task: TaskShare | None = None


def coverage(subspace: SafetySubspace, task: Mapping[str, TaskShare] | None = None) -> list[ModuleCoverage]:
    """Every module with an input basis, in the order of the subspace."""
    known = subspace.provenance.get("covered", {})
    rows = []
    for name, sides in subspace.bases.items():
        if "in" not in sides:
            continue
        if is_tokens(sides["in"]):
            continue  # a set of tokens covers all that was seen
        n, k = sides["in"].shape
        covered, spectrum = known.get(name), subspace.spectra.get(name, {}).get("in")
        curve = torch.zeros(0)
        if covered is not None and spectrum is not None:
            energy = spectrum.double().square().cumsum(0)
            curve = covered * energy / energy[-1]
        rows.append(ModuleCoverage(name, int(n), int(k), covered, curve, (task or {}).get(name)))
    return rows


def task_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    subspace: SafetySubspace,
    rows: Rows,
    *,
    tokenizer: Any = None,
    ranks: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
    memory: str | int | None = None,
    progress: bool = True,
) -> tuple[GroupedMoments, dict[str, TaskShare]]:
    """The second moments of a task's inputs at all tokens, and their share outside the null space of each layer that
    has an input basis and that the task reaches; with `ranks`, by two eigendecompositions for each input. A
    CalibrationError says that the subspace was calibrated on these rows, or that inputs are zero or not finite, or
    reach no layer.
    """
    layers = {name: layer for name, layer in layers.items() if "in" in subspace.bases.get(name, {})}
    batches, digest = to_batches(rows, tokenizer, batch_size=batch_size, max_length=max_length, model=model)
    if digest == subspace.provenance.get("data"):
        raise CalibrationError(
            f"the task data are the {sum(len(data_of(batch)) for batch in batches)} rows that the subspace was "
            "calibrated on, which the update must not see. Give rows of the task."
        )
    if not layers:
        raise CalibrationError("the subspace has no input basis of any of the layers. Calibrate on this model.")
    widths = {name: subspace.bases[name]["in"].shape[-1] for name in layers}
    moments = GroupedMoments(model, layers, batches, widths, memory=memory, progress=progress)
    computed: dict[tuple[int, str], TaskShare] = {}
    shares = {}
    for name in filter(moments.reaches, layers):
        basis = subspace.bases[name]["in"]
        key = (id(basis), moments.leader(name))
        if key not in computed:
            moment = moments.operator(name)
            dense = ranks and isinstance(moment, TokenRows)
            computed[key] = _share(moment.dense() if dense else moment, basis, name, ranks)  # type: ignore[union-attr]
        shares[name] = computed[key]
    if not shares:
        raise CalibrationError("the task data reach no layer with an input basis. Give rows with tokens that count.")
    return moments, shares


@torch.no_grad()
def _share(moment: Moment, basis: Tensor, name: str, ranks: bool) -> TaskShare:
    total = check_moment(moment, name)
    if isinstance(moment, TokenCounts):
        u = basis.to(moment.device)
        hidden = moment.counts[u] if is_tokens(u) else moment.counts @ u.to(moment.dtype).square()
        return TaskShare(max(0.0, 1 - float(hidden.sum()) / total))
    q = basis.to(device=moment.device, dtype=moment.dtype)
    # the diagonal of P S P sums to that of S without that of Q Q^T S; fp64 leaves ten digits of a millionth
    curve = (1 - (q * (moment @ q)).sum(0).cumsum(0) / total).clamp(min=0).cpu()
    free = float(curve[-1]) if len(curve) else 1.0
    if not ranks or isinstance(moment, TokenRows):
        return TaskShare(free, curve=curve)
    return TaskShare(free, _rank(moment), _rank(project_out(q, project_out(q, moment), "in")), curve)


def _rank(moment: Tensor) -> int:
    values = torch.linalg.eigvalsh((moment + moment.mT) / 2).flip(0).clamp(min=0)
    return int((values.cumsum(0) < TASK_ENERGY * values.sum()).sum()) + 1


def warn_if_stalled(shares: Mapping[str, TaskShare]) -> float:
    """Median of `E||P x||^2 / E||x||^2` over the modules; warns when it is below `STALL_SHARE`."""
    middle = statistics.median(share.free for share in shares.values())
    if middle < STALL_SHARE:
        worst = min(shares, key=lambda name: shares[name].free)
        warnings.warn(
            f"the task lies inside the null space: the update sees {middle:.2g} of its energy (median of "
            f"{len(shares)} modules; below {STALL_SHARE:g} learning stalls), and {shares[worst].free:.2g} at {worst}. "
            "Use a smaller safety_rank, safety_energy or safety_rank_pattern, or calibrate on harmful prompts only.",
            stacklevel=2,
        )
    return middle

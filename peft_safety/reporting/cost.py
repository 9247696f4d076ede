"""The cost of a calibration as a table."""

from __future__ import annotations

from peft_safety.calibration.cost import CalibrationCost
from peft_safety.reporting import render

NOTE = (
    "Times are rough: passes from one batch that was run, decompositions from counted operations. With an energy, the "
    "file is at most so large."
)


def show(cost: CalibrationCost) -> None:
    """Print it."""
    rows = [
        ["modules", f"{cost.modules}, with {cost.inputs} distinct inputs"],
        ["subspace file", _size(cost.file_bytes)],
        ["memory beside the model", f"{_size(cost.memory_bytes)}, {_size(cost.budget_bytes)} allowed"],
        ["passes over the data", f"{cost.passes}, {cost.tokens} tokens in all"],
        ["time of the passes", f"{cost.pass_seconds:.3g} s"],
        ["time of the decompositions", f"{cost.decomposition_seconds:.3g} s"],
    ]
    render.show("What this calibration will take (nothing written)", render.table(["", ""], rows), notes=[NOTE])


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"

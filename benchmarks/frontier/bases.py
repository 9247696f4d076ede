"""The bases that the arms use: estimated once in a process, then cut or made random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.frontier.bench import Bench
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.data import task_prompts
from peft_safety import SafetySubspace
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows, refusal_pairs
from peft_safety.data.contexts import in_context
from peft_safety.data.own_contexts import KINDS, in_data_context

LARGEST = {"in": 1 / 2, "out": 0.9}
"""Bases are estimated once at this share of the dimensions and then cut: the top eigenvectors are nested."""
TARGETS = "all-linear"


def randomly(cell: Cell, subspace: SafetySubspace) -> SafetySubspace:
    """The subspace, or for the control "random" a random one of equal ranks."""
    return subspace.randomized(cell.seed) if cell.control == "random" else subspace


def inputs(bench: Bench, cell: Cell, rows: Sequence[Any] = ()) -> SafetySubspace:
    """GuardSpace's input bases of a cell, at `LARGEST`. With the knob `contexts` each row is used in so many, too;
    with `own` in so many contexts of the training rows, of the kind `own_kind` if it is given, with `clean` but those
    of the task's validation rows.
    """
    knobs = cell.options()
    contexts, own, kind = knobs.get("contexts", 0), knobs.get("own", 0), knobs.get("own_kind")
    kinds = KINDS if kind is None else (kind,)

    def make() -> SafetySubspace:
        harmful, general = bench.refusals(cell.calibration), calibration_rows("guardspace", "general")
        random.Random(0).shuffle(general)
        half = cell.calibration // 2
        data = {"harmful": harmful, "general": general[: cell.calibration], "both": harmful[:half] + general[:half]}[
            cell.basis
        ]
        clean = [{"prompt": prompt} for prompt in task_prompts("validation")] if knobs.get("clean") else []
        further = in_data_context(data, rows, own, cell.seed, tokenizer=bench.tokenizer, kinds=kinds, clean=clean)
        data = [*data, *in_context(data, contexts, tokenizer=bench.tokenizer), *further]
        return _estimate(bench, data, "guardspace", LARGEST["in"], positions=cell.positions)

    of_rows = (own, kind, cell.attack, cell.poison, cell.seed, knobs.get("screen"), knobs.get("clean")) if own else ()
    return bench.subspace(("in", cell.basis, cell.positions, cell.calibration, contexts, *of_rows), make)


def outputs(bench: Bench) -> SafetySubspace:
    """SaLoRA's output bases, at `LARGEST`."""
    return bench.subspace(
        ("out",), lambda: _estimate(bench, refusal_pairs("calibration", CALIBRATION_PAIRS), "salora", LARGEST["out"])
    )


def _estimate(bench: Bench, data: Sequence[Any], method: str, rank: float, **options: Any) -> SafetySubspace:
    common: dict[str, Any] = {
        "tokenizer": bench.tokenizer,
        "target_modules": TARGETS,
        "allow_fewer": True,
        "progress": False,
    }
    return SafetySubspace.from_activations(bench.model, data, method=method, rank=rank, **common, **options)

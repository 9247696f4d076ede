"""Two judges side by side, and one judge on responses whose kinds are known."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft_safety.errors import DataError
from peft_safety.evaluation.judges.base import Judge, Verdict, verdicts_of


def agreement(a: Sequence[Verdict], b: Sequence[Verdict]) -> dict[str, Any]:
    """How far two judges agree on the same responses.

    Returns: `n`, the pairs that both decided; `undecided`, the others; `share` of the n that are equal; Cohen's
        `kappa` (J. Cohen, Educ. Psychol. Meas. 20, 1960), None where chance alone agrees always; and `table`, the
        count of each pair of verdicts ("refusal/other").
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} and {len(b)} verdicts. Give both judges' verdicts on the same responses.")
    pairs = [pair for pair in zip(a, b, strict=True) if Verdict.UNDECIDED not in pair]
    n = len(pairs)
    table = {f"{x.value}/{y.value}": count for (x, y), count in sorted(Counter(pairs).items())}
    result: dict[str, Any] = {"n": n, "undecided": len(a) - n, "share": None, "kappa": None, "table": table}
    if n:
        first, second = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
        equal = sum(x is y for x, y in pairs)
        chance = sum(first[verdict] * second[verdict] for verdict in Verdict)  # of n * n
        result["share"] = equal / n
        if chance < n * n:
            result["kappa"] = (n * equal - chance) / (n * n - chance)
    return result


def check_control(judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, int]:
    """The judge's verdicts on a control set, which holds responses of several kinds, as counts.

    Warns if all are the same: the judge does not tell the kinds apart, so its other figures say nothing.
    """
    counts = Counter(verdict.value for verdict in verdicts_of(judge, prompts, responses))
    if len(counts) == 1:
        (only,) = counts
        said = f'judge {judge.name!r} says "{only}" of all {counts[only]} responses of the control set'
        warnings.warn(
            f"{said}: it does not tell them apart. Check the model, its template and its budget.", stacklevel=2
        )
    return dict(counts)

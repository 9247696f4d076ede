"""The table: what plain LoRA passes, and how the other arms end there, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft

from benchmarks.common import RESULTS, record
from benchmarks.peft_suite.arms import ARMS
from benchmarks.peft_suite.plugin import finished
from benchmarks.peft_suite.run import passing, results_file
from peft_safety import errors
from peft_safety.errors import PeftSafetyError

NAME = "peft_suite"
WIDTH = 80
OTHERS = "others"
TYPED = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, PeftSafetyError)}
"""Names of this package's errors."""
KINDS: tuple[tuple[str, str], ...] = (
    ("r above a layer's width", r"exceeds the layer's|no linear layer is wider"),
    ("DoRA", r"use_dora is not supported"),
    ("experts: target_parameters", r"target_parameters is not supported|under ParamWrapper cannot be protected"),
    ("activated LoRA", r"alora_invocation_tokens is not supported"),
    ("lora_bias", r"lora_bias is not supported"),
    ("BD-LoRA", r"use_bdlora is not supported"),
    ("VeLoRA", r"velora_config is not supported"),
    ("QALoRA", r"use_qalora is not supported"),
    ("KaSA", r"kasa_config is not supported"),
    ("MonteCLoRA", r"monteclora_config is not supported"),
    ("Arrow", r"arrow_config is not supported"),
    ("layer_replication", r"layer_replication is not supported"),
    ("Megatron", r"megatron_config is not supported"),
    ("rewriting initializations", r"(loftq|corda|lora_ga|eva)_config is not supported|init_lora_weights="),
    ("MultiheadAttention", r"MultiheadAttention.*cannot be protected"),
    ("embeddings", r"Embedding.*cannot be protected"),
    ("convolutions", r"Conv[123]d.*cannot be protected"),
    ("pickled saving", r"safe_serialization=False"),
    ("bias", r"bias='"),
    ("merging of tied weights", r"tied"),
    ("low-level tuner", r"builds no layers that can be protected|built by itself"),
    ("no layer matches", r"gave no LoRA layer|Give a list of names that the model has"),
    ("combinations", r"do not share one safety subspace"),
    ("ranks, alphas, dropout", r"is no rank|lora_alpha=|lora_dropout="),
    ("a layer class of the user's own", r"under MyLora"),
    ("a factor that was overwritten", r"has changed, and may see protected inputs|holds NaN or Inf"),
    ("layers of a single feature", r"one of its modules, has no basis"),
    ("another base model", r"belongs to other base weights"),
    ("loading onto another adapter", r"Load it under a new name|Use another adapter_name"),
)
"""Kinds of refusals, and what their messages say."""
DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    (
        "lora_A takes no gradient",
        "frozen",
        r"requires_grad|layer_indexing|gradient_checkpointing|test_(training|inference_mode)|status_with|nb_(params_small|trainable)|riemannian",
    ),
    ("VeLoRA is left out", "frozen", r"^test_velora|velora_config-"),
    ("the rows of A are ours", "frozen", r"test_lora_(linear_init_(default|gaussian)|init_orthogonal)"),
    ("a constrained or frozen factor stays fp32", "frozen", r"adapter_dtype"),
    ("the model holds a copy of the config", "", r"from_pretrained_config_construction|test_lora_conversion\["),
    ("equal A and weights of unequal sign", "frozen", r"weighted_adapter_with_different_scaling\[.*weights4"),
)
"""What is so by design, in which arm (empty: in each), and the tests that plain LoRA passes and that expect the
contrary. docs/compatibility.md says so.
"""


def kind_of(row: dict[str, Any], arm: str = "") -> tuple[str, str]:
    """What became of a test: "passed", "refused", "by design" or "undeclared", and the kind. A test that expects an
    error of PEFT's and gets a typed one is refused, too.
    """
    if row["outcome"] == "passed":
        return "passed", ""
    typed = [*row.get("chain", ())[:1], *reversed(row.get("raised", ()))]
    for entry in typed:
        if entry["error"] in TYPED:
            name = next((name for name, says in KINDS if re.search(says, entry["says"], re.DOTALL)), "")
            return "refused", name or f"{entry['error']}: {entry['says'][:50]}"
    for name, where, tests in DIFFERENCES:
        if row["outcome"] == "failed" and where in ("", arm) and re.search(tests, row["test"]):
            return "by design", name
    first = (row.get("chain") or [{"error": row["outcome"], "says": ""}])[0]
    return "undeclared", f"{first['error']}: {first['says'][:50]}"


def counted(folder: Path, arm: str, files: Iterable[str]) -> Counter[tuple[str, str]]:
    """Tests of an arm by outcome and kind, of those that plain LoRA passes; those that have not run are "missing"."""
    result: Counter[tuple[str, str]] = Counter()
    for file in files:
        rows = finished(results_file(folder, arm, file))
        for test in passing(folder, file):
            result[kind_of(rows[test], arm) if test in rows else ("missing", "")] += 1
    return result


def report(folder: Path, files: Sequence[str], out: Path = RESULTS) -> None:
    """Print the table of every arm that has run, and write the counts to `out/peft_suite.jsonl`."""
    rows = []
    for arm in ARMS:
        if arm != "plain" and (folder / "results" / arm).is_dir():
            counts = counted(folder, arm, files)
            print("\n".join(table(arm, counts)))
            rows += [{"arm": arm, "outcome": o, "kind": k, "tests": n} for (o, k), n in summed(counts).items()]
    record(NAME, rows, {"peft": peft.__version__}, out)


def summed(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """The counts with what has no name of its own put together, the largest first."""
    named = {name for name, *_ in (*KINDS, *DIFFERENCES)}
    result: Counter[tuple[str, str]] = Counter()
    for (outcome, kind), number in counts.items():
        result[outcome, kind if not kind or kind in named else OTHERS] += number
    return Counter(dict(result.most_common()))


def table(arm: str, counts: Counter[tuple[str, str]]) -> list[str]:
    """Lines of at most `WIDTH` characters."""
    sums: Counter[str] = Counter()
    for (outcome, _), number in counts.items():
        sums[outcome] += number
    head = ", ".join(f"{number} {outcome}" for outcome, number in sorted(sums.items()))
    lines = [f"{arm}: of {sums.total()} tests that plain LoRA passes, {head}"]
    for (outcome, kind), number in counts.most_common():
        if kind:
            text = " ".join(kind.split())
            lines.append(f"  {number:5}  {outcome:10}  {text}"[:WIDTH])
    return [*lines, ""]

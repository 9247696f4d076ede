"""The sections of costs.md and operations.md, each from the results file of its benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import recorded
from benchmarks.frontier.results import facts
from benchmarks.frontier.tables import NOTHING, Table
from benchmarks.pages import Section

Row = dict[str, Any]
TRAINING, OPERATIONS = "results/costs.md", "results/operations.md"


def times(value: float, digits: int = 2) -> str:
    """A ratio."""
    return f"{value:.{digits}f}"


def between(text: str, digits: int = 2) -> str:
    """Quartiles "low-high" as an interval."""
    low, _, high = text.partition("-")
    return f"[{float(low):.{digits}f}, {float(high):.{digits}f}]"


def of(page_of: str, tables: Callable[[list[Row]], Sequence[Table]], *notes: str, unless: str = "") -> Section:
    """The section of a results file: its tables, which have the file's name, the notes, and where the figures come
    from. `unless`: the text where there is no such file.
    """
    name = tables.__name__

    def text(folder: Path, page: Path) -> str:
        if unless and not (folder / f"{name}.jsonl").is_file():
            return unless
        environment, rows = recorded(name, folder)
        lines = [line for table in tables(rows) for line in (*table.markdown(), "")]
        lines += [f"- {note}" for note in notes]
        lines += [f"- Environment: {facts(environment, ('figures',))}."]
        lines += [f"- Written by `python -m benchmarks.report {name}` from `benchmarks/results/{name}.jsonl`."]
        return "\n".join(lines)

    return Section(name, page_of, text)


def train_step(rows: list[Row]) -> list[Table]:
    """Of both forms that the results file has had: one ratio a row by two clocks, or two ratios by one."""
    timed, memory = ([row for row in rows if ("tokens" in row) == kind] for kind in (True, False))
    lines = []
    for row in timed:
        place = (row["base"], str(row["tokens"]))
        if "ratio" in row:
            figures = (f"{times(row[clock], 3)} {between(row[f'{clock} quartiles'], 3)}" for clock in ("cpu", "wall"))
            lines.append((*place, row["ratio"], *figures, str(row["goal"])))
        else:
            step = f"{times(row['salora/lora'], 3)} {between(row['quartiles'], 3)}"
            lines.append((*place, "salora/lora", step, "-", "at most 1.05"))
            lines.append((*place, "dense C/salora", times(row["dense C/salora"]), "-", "at least 1.5"))
    peaks = []
    for row in memory:
        arms = [key.removesuffix(" MiB") for key in row if key.endswith(" MiB")]
        ratios = (f"{row[f'{arm} MiB']:.0f} ({times(row[f'{arm} MiB'] / row['lora MiB'])})" for arm in arms)
        peaks += [(row["base"], arm, ratio) for arm, ratio in zip(arms, ratios, strict=True)]
    headings = ("base", "tokens", "step", "processor time", "wall clock", "goal")
    return [Table(headings, lines, labels=3), Table(("base", "arm", "peak memory, MiB"), peaks, labels=2)]


def scale(rows: list[Row]) -> list[Table]:
    trained = [row for row in rows if "step s" in row]
    plain = trained[0]
    lines = [
        (
            row["arm"],
            f"{row['peak MiB'] / 1024:.1f} GiB ({times(row['peak MiB'] / plain['peak MiB'])})",
            f"{row['step s']:.3f} s ({times(row['step s'] / plain['step s'])})",
            f"{row['adapter MiB']:.0f} MiB ({times(row['adapter MiB'] / plain['adapter MiB'])})",
        )
        for row in trained
    ]
    goals = [("goal, frozen", "1.01", "1.00", "1.10"), ("goal, window", "1.03", "1.02", "1.10")]
    return [Table(("8B-shaped QLoRA", "peak memory", "step", "saved adapter"), [*lines, *goals])]


def scale_whole(rows: list[Row]) -> list[Table]:
    units = {" s": ("s", 0), " MiB": ("MiB", 0)}
    lines = []
    for key, value in rows[0].items():
        unit, digits = next((found for end, found in units.items() if key.endswith(end)), ("", None))
        name = key.removesuffix(f" {unit}") if unit else key
        lines.append((name, f"{value:.0e}" if digits is None else f"{value:.{digits}f} {unit}"))
    return [Table(("1.5B-shaped model, once", "measured"), lines)]


def median(rows: list[Row], part: str, mode: str, arm: str) -> Row:
    return next(row for row in rows if (row["part"], row["mode"], row["arm"]) == (part, mode, arm))


def ops_gpu(rows: list[Row]) -> list[Table]:
    """The figures that have goals, from the medians."""

    def ratio(what: str, part: str, one: str, other: str, goal: str) -> tuple[str, ...]:
        values = [
            times(median(rows, part, mode, one)["us"] / median(rows, part, mode, other)["us"])
            for mode in ("eager", "graphed")
        ]
        return (what, *values, goal)

    def share(what: str, part: str, arm: str, goal: str) -> tuple[str, ...]:
        return (what, *(times(median(rows, part, mode, arm)["of floor"]) for mode in ("eager", "graphed")), goal)

    block, token = "one 7B block, 4,096 tokens", "one token through a 7B model"
    (dequantized,) = {row["part"] for row in rows if row["part"].startswith("K2")}
    steps = [median(rows, "K6", mode, "one call a module")["us"] / 1e3 for mode in ("eager", "graphed")]
    lines = [
        ratio(f"{block}: plain LoRA of PEFT / this, frozen A", "K1", "peft LoRA", "this, frozen A", "1.1"),
        ratio(f"{block}: plain LoRA of PEFT / this, B projected", "K1", "peft LoRA", "this", "1.1"),
        ratio(f"{block}: matrix products alone / this, frozen A", "K1", "bare GEMM", "this, frozen A", "0.85"),
        ratio(f"{block}: dense form of SaLoRA / this, B projected", "K1", "naive SaLoRA", "this", "1.2"),
        ratio("its q, k and v: one by one / one function", "K1 q, k, v", "one by one", "one function", NOTHING),
        ratio("its gate and up: one by one / one function", "K1 gate, up", "one by one", "one function", NOTHING),
        share("dequantizing: share of the copy bandwidth", dequantized, "dequantized", "0.85"),
        ratio("dequantizing: bitsandbytes / this", dequantized, "bitsandbytes", "dequantized", "1.3"),
        ratio(f"{token}: plain LoRA of PEFT / a kernel since removed", "K3", "peft LoRA", "this", "1.5"),
        ("projecting all factors of a 7B adapter", *(f"{step:.1f} ms" for step in steps), "0.2 ms"),
    ]
    return [Table(("on a GPU", "eager", "as a CUDA graph", "goal"), lines)]


def ops_cpu(rows: list[Row]) -> list[Table]:
    bare = {row["part"] for row in rows if row["arm"] == "bare GEMM"}
    lines = [
        (
            row["part"],
            row["arm"],
            f"{row['us'] / 1e3:.2f} [{row['low'] / 1e3:.2f}, {row['high'] / 1e3:.2f}]",
            times(1 / row["of floor"], 1) if row["part"] in bare else "-",
        )
        for row in rows
    ]
    return [Table(("", "arm", "ms", "of the products alone"), lines, labels=2)]


def saved_bytes(rows: list[Row]) -> list[Table]:
    lines = [
        (
            row["base"],
            row["arm"],
            f"{row['MiB a block']:.1f}",
            f"{row['of the adapter']:.2f}",
            times(row["of LoRA's"]),
        )
        for row in rows
    ]
    return [Table(("base", "", "MiB a block", "of it for the adapter", "of plain LoRA's"), lines, labels=2)]


def loading(rows: list[Row]) -> list[Table]:
    lines = [
        (
            row[""],
            f"{row['CPU s']:.2f} ({times(row['CPU s, ratio'])})",
            f"{row['peak MiB']:.0f} ({times(row['peak MiB, ratio'])})",
        )
        for row in rows
    ]
    return [Table(("loading with the base", "CPU s", "peak MiB"), [*lines, ("goal", "1.5", "1.1")])]


def calibration(rows: list[Row]) -> list[Table]:
    row, memory = rows[0], [row for row in rows if "peak MiB" in row]
    one = (
        f"{row['layers']} layers, {row['pairs']} pairs",
        f"{row['one pass s']:.0f}",
        f"{row['a pass per layer s']:.0f} (from {row['timed for layers']} layers)",
        f"{row['faster']:.0f}",
    )
    tables = [Table(("", "one pass, s", "a pass per layer, s", "times faster"), [one])]
    if memory:
        lines = [(str(row["pairs"]), f"{row['peak MiB']:.0f}") for row in memory]
        tables.append(Table(("pairs", "peak MiB"), lines))
    return tables


def safe_lora(rows: list[Row]) -> list[Table]:
    lines = []
    for row in rows:
        other = "dense" if "dense s" in row else "read"
        ratio = row.get("dense/streamed") or row["streamed/read"]
        peak = row.get("streamed MiB") or row.get("MiB")
        lines.append(
            (
                row["what"],
                f"{row['streamed s']:.2f}",
                f"{row[f'{other} s']:.2f} ({'dense form' if other == 'dense' else 'only reading'})",
                f"{ratio:.2f} {between(row['quartiles'])}",
                "-" if peak is None else f"{peak:.0f}",
                f"{row['dense MiB']:.0f}" if "dense MiB" in row else "-",
            )
        )
    headings = ("", "s", "compared with, s", "ratio", "peak MiB", "of the dense form")
    return [Table(headings, lines)]


def subspace(rows: list[Row]) -> list[Table]:
    single, whole = ([row for row in rows if key in row] for key in ("weight", "model"))
    one = [
        (
            row["weight"],
            f"{row['full/randomised']:.0f} {between(row['quartiles'], 0)}",
            f"{100 * row['energy of top 32']:.1f} %",
        )
        for row in single
    ]
    many = [(row["model"], f"{row['s']:.1f}", f"{row['peak MiB']:.0f}") for row in whole]
    return [
        Table(("", "full SVD / this, time", "energy of the top 32"), [*one, ("goal", "150", "99.5 %")]),
        Table(("", "s", "peak MiB"), many),
    ]


def fusion(rows: list[Row]) -> list[Table]:
    lines = [
        (
            row["way"],
            f"{row['step s']:.2f}",
            f"{row['mask and optimizer MiB']:.0f}",
            times(row["/ floor"]),
        )
        for row in rows
    ]
    return [Table(("", "s a mask step", "mask and optimizer, MiB", "of three fp32 copies"), lines)]


NO_WHOLE = "No figures yet: not run since the command above began to save its results."
SECTIONS = (
    of(OPERATIONS, ops_gpu, "Ratios of medians; above 1: this is faster. bf16."),
    of(TRAINING, train_step, "Brackets: quartiles of interleaved rounds. SmolLM2-135M, rank 16 on all layers."),
    of(TRAINING, loading, "In brackets the ratio to a plain LoRA. SmolLM2-135M, r = 16; the least of all rounds."),
    of(TRAINING, scale, "In brackets the ratio to plain LoRA. Three steps, the fastest counts: times are rough."),
    of(TRAINING, scale_whole, "Once. On a CPU processor seconds.", unless=NO_WHOLE),
    of(TRAINING, saved_bytes, "Counted, not timed: MiB that autograd saves in a decoder block, 512 tokens."),
    of(OPERATIONS, calibration, "SaLoRA's bases, SmolLM2-135M, k = 32."),
    of(OPERATIONS, safe_lora, "Brackets: quartiles. Goals: 40 times for one weight, at most 2.5 of reading."),
    of(OPERATIONS, subspace, "Bases of the weights, k = 32. Brackets: quartiles."),
    of(OPERATIONS, fusion, "SOMF: 40 million logits, those of a LoRA of a 7B model."),
    of(
        OPERATIONS,
        ops_cpu,
        "fp32, forward and backward; median and quartiles. `this`: the reference backend.",
    ),
)

"""The arms: ways to fine-tune. Each takes the bench and a cell, and returns the model and facts about its training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.frontier.adapters import norm, project_randomly, scale, truncated
from benchmarks.frontier.attacks import attack_of
from benchmarks.frontier.bases import TARGETS, inputs, outputs, randomly
from benchmarks.frontier.bench import Bench, Facts, timed
from benchmarks.frontier.cells import Cell, needs
from benchmarks.frontier.screened import own_pairs, training_rows
from peft_safety import SafetyAnchorCallback, repair_adapter
from peft_safety.calibration.batches import to_batches
from peft_safety.calibration.coverage import task_inputs
from peft_safety.calibration.moments import collect
from peft_safety.core.targets import target_layers
from peft_safety.data import load, preference_pairs, refusal_pairs
from peft_safety.data.contexts import in_context
from peft_safety.errors import ConfigError, DivergedError
from peft_safety.evaluation import self_responses
from peft_safety.layers.adapters import adapter_layers
from peft_safety.methods.guardspace.directions import blind_rows
from peft_safety.recipes.bench import GENERAL_TOKENS

ANCHORS = 64
"""Refusals that an anchor holds: as many as GuardSpace calibrates on."""
TASK_ROWS = 32
"""Training rows that give the directions of the task's inputs."""
Made = tuple[Any, Facts]


def run_cell(bench: Bench, cell: Cell) -> Facts:
    """Make the model of a cell and measure it.

    Raises:
        ConfigError: an unknown arm or setting. DivergedError: weights or a loss that are not finite.
    """
    try:
        bench.use(cell.load)
        measures = bench.measures(cell)
        tuned, facts = run_arm(bench, cell)
        figures = measures(tuned, bench.tokenizer)
        figures |= measures.attacked(tuned, bench.tokenizer, attack_of(cell.attack))
        if bench.model is not None and tuned is not bench.model:
            bench.model = tuned.unload()
    except BaseException:
        bench.model = None  # it may still carry a part of an adapter
        raise
    return {**figures, **facts, "device": device()}


def device() -> str:
    """The name of the device that cells run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run_arm(bench: Bench, cell: Cell) -> Made:
    """Make the model of a cell.

    Raises:
        ConfigError: an unknown arm, or a control that it does not have.
    """
    if cell.arm not in ARMS:
        raise ConfigError(f"arm {cell.arm!r} is unknown. Choose one of {', '.join(ARMS)}.")
    if cell.control not in ("", "random", "scaled") or (cell.control == "random" and cell.arm not in RANDOM):
        raise ConfigError(
            f"arm {cell.arm!r} has no control {cell.control!r}: 'scaled' goes with every arm, 'random' with "
            f"{', '.join(RANDOM)}."
        )
    return scaled(bench, cell) if cell.control == "scaled" else ARMS[cell.arm](bench, cell)


def scaled(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA, all modules scaled by one factor to the norm of the method: is the method more than a smaller
    update?
    """
    kept = [row for other in needs(cell) if (row := bench.cache.get(other)) is not None]
    if kept and "diverged" in kept[0]:
        raise DivergedError(f"{cell.label()}: the method whose norm it takes has diverged.")
    if not kept:
        raise RuntimeError(f"{cell.label()}: its {cell.arm} has not run; run the cells in their order.")
    directory, facts = bench.plain(cell)
    factor = kept[0]["norm"] / facts["norm"]
    tuned = bench.attach(directory)
    scale(tuned, factor)
    return tuned, {**costs(facts), "factor": factor, "norm": norm(tuned)}


def costs(facts: Facts) -> Facts:
    """The facts of a plain adapter that also hold for a model that is made from it."""
    return {
        name: facts[name]
        for name in ("steps", "loss", "train_seconds", "train_cpu_seconds", "added_mib")
        if name in facts
    }


def aligned(bench: Bench, cell: Cell) -> Made:
    """No fine-tune."""
    return bench.model, {}


def lora(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA, unprotected."""
    directory, facts = bench.plain(cell)
    return bench.attach(directory), facts


def screened(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA on the rows that the screen keeps."""
    rows, made = training_rows(bench, cell)
    tuned, facts = bench.train(cell, bench.config(), rows)
    return tuned, {**made, **facts}


def mixed(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA with refusals added to the training rows. They are those that GuardSpace calibrates on; `share` is
    their number as a share of the rows.
    """
    rows = bench.rows(cell)
    safety = bench.refusals(max(1, round(cell.options()["share"] * len(rows))), cell.seed)
    return bench.train(cell, bench.config(), [*rows, *safety])


def anchored(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA with an anchor. Knobs: `anchor` rows of a step, `anchor_every` so many steps, `anchor_weight`, and
    `anchor_on` "refusals" or, as a control, "everyday": everyday prompts with the model's own answers.
    """
    anchors = anchors_of(bench, cell)
    tuned, facts = bench.train(cell, bench.config(), bench.rows(cell), callbacks=anchors)
    return tuned, {**facts, **anchor_costs(anchors)}


def anchors_of(bench: Bench, cell: Cell) -> list[SafetyAnchorCallback]:
    """The anchor of a cell; none without its knob. Half of its requests are behind random contexts."""
    knobs = cell.options()
    if "anchor" not in knobs:
        return []
    rows: list[Any] = bench.refusals(ANCHORS)
    if knobs.get("anchor_on", "refusals") == "everyday":
        prompts = [row["prompt"] for row in load("everyday_requests", "calibration")]
        rows = self_responses(bench.model, bench.tokenizer, prompts, max_new_tokens=GENERAL_TOKENS, progress=False)
    rows = [*rows[::2], *in_context(rows[1::2], 1, cell.seed)]
    options = {name: knobs[f"anchor_{name}"] for name in ("every", "weight") if f"anchor_{name}" in knobs}
    return [SafetyAnchorCallback(bench.tokenizer, rows, rows=knobs["anchor"], seed=cell.seed, **options)]


def anchor_costs(anchors: list[SafetyAnchorCallback]) -> Facts:
    """Seconds of the training that the anchor took."""
    return {"anchor_seconds": round(sum(anchor.seconds for anchor in anchors), 2)} if anchors else {}


def salora(bench: Bench, cell: Cell) -> Made:
    """SaLoRA: `k` output directions of safe responses; below 1 a share of the dimensions."""
    made: Facts = {}
    with timed(made, "setup"):
        subspace = randomly(cell, truncated(outputs(bench), cell.options()["k"], "out"))
    tuned, facts = bench.train(cell, bench.config("salora", subspace=subspace), bench.rows(cell))
    return tuned, {**made, **facts}


def guard(bench: Bench, cell: Cell) -> Made:
    """GuardSpace. Knobs: `train` is the form ("A", "B", "window"), `rows` where the rows of a frozen A come from
    ("task", "random"), `window` its size, `r` the rank; with `combine` ("salora") it is also protected on the output
    side, in `k` directions. `screen` screens the rows first, `contexts` calibrates in random contexts, `own` in
    those of the rows (of the kind `own_kind`), `anchor` is as in `anchored`.
    """
    (rows, made), knobs = training_rows(bench, cell), cell.options()
    with timed(made, "setup"):
        subspace = truncated(inputs(bench, cell, rows), cell.fraction)
        if "combine" in knobs:
            subspace = subspace.beside(truncated(outputs(bench), knobs["k"], "out"))
        subspace = randomly(cell, subspace)
        task = _task_batches(bench, rows)
    shares = task_inputs(bench.model, target_layers(bench.model, TARGETS), subspace, task, progress=False)[1]
    made["task_free"] = sorted(share.free for share in shares.values())[len(shares) // 2]
    given = {"train": "A"} | {name: knobs[name] for name in ("train", "window", "combine", "r") if name in knobs}
    if "rows" in knobs:
        given |= {"a_init": knobs["rows"], "task_data": task if knobs["rows"] == "task" else None}
    anchors = anchors_of(bench, cell)
    tuned, facts = bench.train(cell, bench.config("guardspace", subspace=subspace, **given), rows, callbacks=anchors)
    return tuned, {**made, **facts, **anchor_costs(anchors)}


def task(bench: Bench, cell: Cell) -> Made:
    """LoRA whose A starts from the directions that the task's inputs use most, without a null space: A is frozen
    (`train=B`) or trained (`train=A`). The control of GuardSpace's frozen form.
    """
    made: Facts = {}
    rows = bench.rows(cell)
    tuned = get_peft_model(bench.model, bench.config())
    layers = adapter_layers(tuned, "default")
    with timed(made, "setup"), torch.no_grad():
        base = {name: layer.get_base_layer() for name, layer in layers.items()}
        moments = collect(tuned, base, _task_batches(bench, rows), positions="all", progress=False)
        for name, layer in layers.items():
            a, moment = layer.lora_A["default"].weight, moments.moment(name)
            a.copy_(blind_rows(moment.new_zeros(a.shape[1], 0), a.shape[0], moment=moment))
            a.requires_grad_(cell.options()["train"] == "A")
    tuned, facts = bench.train(cell, None, rows, model=tuned)
    return tuned, {**made, **facts}


def blind(bench: Bench, cell: Cell) -> Made:
    """Plain LoRA, made blind to GuardSpace's null space after its training."""
    directory, facts = bench.plain(cell)
    made = costs(facts)
    with timed(made, "setup"), tempfile.TemporaryDirectory() as folder:
        subspace = randomly(cell, truncated(inputs(bench, cell), cell.fraction))
        report = repair_adapter(directory, subspace, Path(folder, "repaired"))
        tuned = bench.attach(Path(folder, "repaired"))
    removed = sorted(module.removed for module in report.modules)
    return tuned, {**made, "removed": removed[len(removed) // 2], "norm": norm(tuned)}


def _task_batches(bench: Bench, rows: list[Any]) -> list[Any]:
    return to_batches(rows[:TASK_ROWS], bench.tokenizer, batch_size=8, max_length=bench.protocol.max_length)[0]


def second(bench: Bench, cell: Cell) -> Made:
    """GuardSpace merged into the weights, and then a second fine-tune by plain LoRA on the same rows. The bench loads
    its model again afterwards.
    """
    merged, first = guard(bench, replace(cell, arm="guard"))
    options = replace(bench.options(cell), seed=cell.seed + 100)
    merged = merged.merge_and_unload()
    again, facts = bench.train(cell, bench.config(), bench.rows(cell), options=options, model=merged)
    bench.model = None
    return again, {**facts, "first_norm": first["norm"]}


def safe_lora(bench: Bench, cell: Cell) -> Made:
    """Safe LoRA, applied to the adapter of plain LoRA. Its control projects onto equally many random directions."""
    from peft_safety import apply_safe_lora

    directory, facts = bench.plain(cell)
    tuned, made, options = bench.attach(directory), costs(facts), cell.options()
    with timed(made, "setup"):
        if cell.control == "random":
            kind = options.get("projection")
            if kind not in ("topk", "soft") or options.get("select") != "all":
                raise ConfigError(
                    f"{cell.label()}: only the true projectors on all modules (topk, soft) have a random control."
                )
            project_randomly(
                tuned, int(options["rank"]), 1 / (1 + options["penalty"]) if kind == "soft" else 0.0, cell.seed
            )
        else:
            report = apply_safe_lora(tuned, str(bench.unaligned), str(bench.directory), progress=False, **options)
            made["repaired"] = len(report.selected)
    return tuned, {**made, "norm": norm(tuned)}


def reattach(bench: Bench, cell: Cell) -> Made:
    """The *unaligned* model is fine-tuned; then its adapter is attached to the aligned model without training. It is
    as if the safety patch were attached to the fine-tuned model.
    """
    from peft_safety.recipes.load import load_model

    bare, _ = load_model(bench.unaligned)
    tuned, facts = bench.train(cell, bench.config(), bench.rows(cell), model=bare)
    name = bench.protocol.adapter_key(cell)
    bench.discard(name)  # of a run that was killed here
    bench.publish(bench.cache.folder / "adapters" / name, lambda staged: tuned.save_pretrained(str(staged)))
    try:
        return bench.attach(bench.cache.folder / "adapters" / name), facts
    finally:
        bench.discard(name)


def patch(bench: Bench, cell: Cell) -> Made:
    """A safety patch, trained on the fine-tuned model with the package's own refusals and orthogonal to its adapter;
    `steps` steps. `unseen`: see `own_pairs`.
    """
    from peft_safety.recipes.patch import PatchOptions, patch_config
    from peft_safety.recipes.patch import patch as train_patch
    from peft_safety.recipes.watch import Stopping

    directory, facts = bench.plain(cell)
    made, steps, defaults = costs(facts), int(cell.options()["steps"]), PatchOptions()
    kinds = ("harmful", "general", "everyday", "contrast", "self_written")
    training = replace(defaults.training, seed=cell.seed, progress=False)
    share = training.batch_size * steps / training.epochs / sum(getattr(defaults, name) for name in kinds)
    sizes = {name: max(1, round(share * getattr(defaults, name))) for name in kinds}
    options = replace(
        defaults, **sizes, prior_patches=("task",), validation=8, stopping=Stopping(every=10_000), training=training
    )
    tuned = bench.attach(directory, "task")
    if cell.control == "random":
        from peft_safety.recipes.patch import general_rows

        subspace = patch_config(
            tuned, bench.tokenizer, replace(options, prior_patches=()), general_rows(tuned, bench.tokenizer, options)
        ).subspace
        options = replace(options, subspace=subspace.randomized(cell.seed))
    with timed(made, "setup"):
        both, run = train_patch(
            tuned, bench.tokenizer, options, refusals=own_pairs(bench, cell, refusal_pairs, options.harmful)
        )
    made |= {"patch_steps": run.training.steps, "patch_norm": norm(both)}
    return both, {**made, "norm": (facts["norm"] ** 2 + made["patch_norm"] ** 2) ** 0.5}


def somf(bench: Bench, cell: Cell) -> Made:
    """SOMF: a mask over the components of the fine-tuned adapter, learned by DPO on the package's own pairs
    (`unseen`: see `own_pairs`). Its control is a random mask of equal density.
    """
    from peft_safety import fuse
    from peft_safety.methods.somf import MaskTraining

    directory, facts = bench.plain(cell)
    made, options = costs(facts), cell.options()
    tuned = bench.attach(directory, "task")
    training = MaskTraining(
        lr=options["lr"], max_steps=int(options["steps"]), batch_size=8, max_length=96, seed=cell.seed, progress=False
    )
    quiet: dict[str, Any] = {"model": tuned, "seed": cell.seed}
    name = "default" if cell.control != "random" else "learned"
    with timed(made, "setup"):
        rows = own_pairs(bench, cell, preference_pairs, 8 * training.max_steps)
        report = fuse(
            None, ["task"], tokenizer=bench.tokenizer, data=rows, training=training, adapter_name=name, **quiet
        )
    if cell.control == "random" and report.masks is not None:
        fuse(None, ["task"], mask=report.masks.shuffled(cell.seed), adapter_name="default", **quiet)
    tuned.set_adapter("default")
    return tuned, {**made, "norm": norm(tuned)}


ARMS: dict[str, Callable[[Bench, Cell], Made]] = {
    "aligned": aligned,
    "lora": lora,
    "screened": screened,
    "mixed": mixed,
    "anchored": anchored,
    "salora": salora,
    "guard": guard,
    "task": task,
    "blind": blind,
    "safe_lora": safe_lora,
    "reattach": reattach,
    "patch": patch,
    "somf": somf,
    "second": second,
}
RANDOM = ("salora", "guard", "blind", "safe_lora", "patch", "somf")

"""The main job: fine-tune a model on a task with its safety measured before and after, with or without protection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_safety.calibration.activations import DEFAULT_RANK
from peft_safety.data.rows import Rows
from peft_safety.evaluation.evaluate import Evaluation
from peft_safety.evaluation.judges import KeywordJudge
from peft_safety.recipes.adapter import AdapterOptions, Method
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.load import load_model, poisoned, task_data
from peft_safety.recipes.train import TrainingRun, TrainOptions, finetune
from peft_safety.reporting.report import Report, environment

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_safety.core.subspace import SafetySubspace


@dataclass(frozen=True)
class ProtectReport:
    """What `protect` did.

    Attributes:
        model: the fine-tuned model, adapter attached.
        adapter_dir: where the adapter was saved.
        before: evaluation of the model as given.
        after: evaluation with the adapter, on the same prompts.
        training: what training cost.
        report: the same as a table, JSON, PNG or card section.
    """

    model: PeftModel
    adapter_dir: Path
    before: Evaluation
    after: Evaluation
    training: TrainingRun
    report: Report


def protect(
    model: str | Path | PreTrainedModel,
    data: str | Path | Rows,
    method: Method = "guardspace",
    out_dir: str | Path = "runs/protect",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    r: int = 16,
    lora_alpha: int = 16,
    target_modules: str | list[str] = "all-linear",
    safety_rank: int | float | None = None,
    safety_energy: float | None = None,
    safety_rank_pattern: Mapping[str, int | float] | None = None,
    subspace: SafetySubspace | str = "auto",
    init: Literal["lora", "task", "guardspace"] = "lora",
    task_rank: int = 32,
    basis: Literal["harmful", "general", "both"] | None = None,
    positions: Literal["all", "prompt", "response"] = "all",
    combine: Literal["salora"] | None = None,
    combine_rank: int = DEFAULT_RANK,
    poison: float = 0.0,
    options: TrainOptions | None = None,
    eval_split: str = "test",
    eval_limit: int | None = None,
) -> ProtectReport:
    """Fine-tune on a task by GuardSpace, SaLoRA or plain LoRA, and measure safety and task before and after.

    Writes `adapter/`, `report.json` and `report.png` into `out_dir`.

    Args:
        model: hub id, directory, or a loaded model (which keeps the adapter).
        data: a JSON-lines file, or rows (a list, a data set, a frame, a stream): {prompt, response}, {text, label} or
            {messages}, with or without a `split`.
        safety_rank, safety_energy, safety_rank_pattern: size of the protected subspace; see `AdapterOptions`.
        subspace, init, task_rank, basis, positions, combine, combine_rank: see `AdapterOptions`.
        options: learning rate, epochs, batch size, seed, `report_to`, ...
        poison: fraction of the training rows replaced by a simulated attack, see `poisoned`.
        eval_split: of the packaged prompts and of the task ("validation" while choosing settings, then "test" once).
        eval_limit: prompts and task rows of each kind at most.

    Raises:
        ConfigError, DataError, CalibrationError: before anything is trained or written.
    """
    adapter = AdapterOptions(
        method=method,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        safety_rank=safety_rank,
        safety_energy=safety_energy,
        safety_rank_pattern=safety_rank_pattern,
        subspace=subspace,
        init=init,
        task_rank=task_rank,
        basis=basis,
        positions=positions,
        combine=combine,
        combine_rank=combine_rank,
    )
    options = TrainOptions() if options is None else options
    task = task_data(data, eval_split, eval_limit, options.seed)
    rows = poisoned(task.train, poison, options.seed)
    base, tokenizer = load_model(model, tokenizer)
    config = adapter.config(base, tokenizer, rows, seed=options.seed, progress=options.progress)
    bench = Bench.prepare(base, tokenizer, task, options, split=eval_split, limit=eval_limit)
    before = bench.measure(base, tokenizer)
    tuned, training = finetune(
        base, tokenizer, rows, config, options, labels=task.labels, description=f"fine-tuning ({method})"
    )
    after = bench.measure(tuned, tokenizer)
    out = Path(out_dir)
    tuned.save_pretrained(out / "adapter")
    setting: dict[str, Any] = {
        "method": method,
        "r": r,
        "lora_alpha": lora_alpha,
        "safety_rank": adapter.size,
        "safety_energy": safety_energy,
        "safety_rank_pattern": None if safety_rank_pattern is None else dict(safety_rank_pattern),
        "init": init,
        "poison": poison,
        "seed": options.seed,
    }
    if method == "guardspace":
        setting |= {
            "basis": config.basis,
            "positions": positions,
            "combine": combine,
            "combine_rank": combine_rank if combine else None,
        }
    report = _report(base, before, after, training, {**setting, "lr": options.lr, "batch_size": options.batch_size})
    report.save(out / "report.json")
    report.save_png(out / "report.png")
    report.print()
    return ProtectReport(tuned, out / "adapter", before, after, training, report)


def _report(
    model: PreTrainedModel, before: Evaluation, after: Evaluation, training: TrainingRun, setting: dict[str, Any]
) -> Report:
    method, poison, seed = setting["method"], setting["poison"], setting["seed"]
    attack = f"{100 * poison:g} % of the training rows were a simulated attack." if poison else "No poisoned rows."
    return Report(
        title=f"Fine-tuning by {method}: before and after",
        arms={"before": before.figures(), f"after ({method})": after.figures()},
        notes=(
            f"Judge: {before.judge}. {KeywordJudge.caveat}",
            f"Prompts: the package's {before.split} split. {attack} One seed ({seed}).",
        ),
        environment=environment(seed, model=str(model.config._name_or_path), device=str(model.device)),
        details={
            **setting,
            "before": before.to_json(),
            "after": after.to_json(),
            "training": dataclasses.asdict(training),
        },
    )

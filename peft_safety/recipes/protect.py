"""The main job: fine-tune a model on a task with its safety measured before and after, with or without protection."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.core.environment import environment
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data.rows import Rows
from peft_safety.evaluation.evaluate import Evaluation
from peft_safety.evaluation.judges import KeywordJudge
from peft_safety.recipes.adapter import adapter_config, calibrated
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.load import load_model, poisoned, task_data
from peft_safety.recipes.train import TrainingRun, TrainOptions, finetune
from peft_safety.reporting.report import Report

SIZES = ("r", "lora_alpha", "safety_rank", "safety_energy", "safety_rank_pattern", "combine_rank")
SETTINGS = (*SIZES, "train", "window", "a_init", "init", "basis", "positions", "combine")
"""Fields of a config that the report names."""


@dataclass(frozen=True)
class ProtectReport:
    """The fine-tuned model, its directory, evaluations before and after on the same prompts, the cost, a report."""

    model: PeftModel
    adapter_dir: Path
    before: Evaluation
    after: Evaluation
    training: TrainingRun
    report: Report


def protect(
    model: str | Path | PreTrainedModel,
    data: str | Path | Rows,
    out_dir: str | Path = "runs/protect",
    config: LoraConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    poison: float = 0.0,
    options: TrainOptions | None = None,
    eval_split: str = "test",
    eval_limit: int | None = None,
) -> ProtectReport:
    """Fine-tune on a task by GuardSpace, SaLoRA or plain LoRA, and measure safety and task before and after. Writes
    `adapter/`, `report.json` and `report.png` into `out_dir`.

    Args:
        model: hub id, directory, or a loaded model (which keeps the adapter).
        data: a JSON-lines file, or rows: {prompt, response}, {text, label} or {messages}, with or without a `split`.
        config: of the adapter, see `adapter_config`; default GuardSpace. A subspace "auto" is calibrated on `model`.
        poison: fraction of the training rows replaced by a simulated attack, see `poisoned`.
        eval_split: of the packaged prompts and of the task ("validation" while choosing settings, then "test" once).
        eval_limit: prompts and task rows of each kind at most.

    Raises:
        ConfigError, DataError, CalibrationError: before anything is trained or written.
    """
    options = TrainOptions() if options is None else options
    seed, progress = options.seed, options.progress
    task = task_data(data, eval_split, eval_limit, seed)
    rows = poisoned(task.train, poison, seed)
    base, tokenizer = load_model(model, tokenizer)
    asked: Any = adapter_config() if config is None else config
    method = getattr(asked, "PEFT_KEY", "LORA").lower()
    chosen: Any = calibrated(asked, base, tokenizer, rows, seed=seed, progress=progress)
    bench = Bench.prepare(base, tokenizer, task, options, split=eval_split, limit=eval_limit)
    before = bench.measure(base, tokenizer)
    about = f"fine-tuning ({method})"
    tuned, training = finetune(base, tokenizer, rows, chosen, options, labels=task.labels, description=about)
    after = bench.measure(tuned, tokenizer)
    out = Path(out_dir)
    tuned.save_pretrained(out / "adapter")
    setting = {name: getattr(asked, name) for name in SETTINGS if hasattr(asked, name)}
    if setting.get("safety_rank") is None and isinstance(getattr(chosen, "subspace", None), SafetySubspace):
        setting["safety_rank"] = chosen.subspace.provenance.get("rank")
    setting |= {"method": method, "poison": poison, "seed": seed, "lr": options.lr, "batch_size": options.batch_size}
    results = {"before": before.to_json(), "after": after.to_json(), "training": asdict(training)}
    attack = f"{100 * poison:g} % of the training rows were a simulated attack." if poison else "No poisoned rows."
    report = Report(
        title=f"Fine-tuning by {method}: before and after",
        arms={"before": before.figures(), f"after ({method})": after.figures()},
        notes=(
            f"Judge: {before.judge}. {KeywordJudge.caveat}",
            f"Prompts: the package's {before.split} split. {attack} One seed ({seed}).",
        ),
        environment=environment(seed, model=str(base.config._name_or_path), device=str(base.device)),
        details={**setting, **results},
    )
    report.save(out / "report.json")
    report.save_png(out / "report.png")
    report.print()
    return ProtectReport(tuned, out / "adapter", before, after, training, report)

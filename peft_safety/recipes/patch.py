"""A safety patch: LoRA that learns refusals, and keeps the model's own answers where a refusal would be wrong: there
the loss is the distance from the unpatched model (`recipes.distil`). Training stops where a validation split is best.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.calibration.estimators import SafetySubspace
from peft_safety.calibration.models import adapters_off
from peft_safety.calibration.sizes import check_size_options
from peft_safety.callbacks import SoftPenaltyCallback
from peft_safety.core import files
from peft_safety.core.plain_lora import MANIFEST, read_manifest
from peft_safety.core.training import PATCH_TRAINING, TrainOptions
from peft_safety.data import CALIBRATION_PAIRS, load, refusal_pairs
from peft_safety.data.rows import Row, Rows, as_rows, kind_of
from peft_safety.errors import ArtifactError, ConfigError, DataError, PeftSafetyError
from peft_safety.evaluation.evaluate import Evaluation, self_responses
from peft_safety.evaluation.generate import self_prompts
from peft_safety.evaluation.judges import KeywordJudge
from peft_safety.evaluation.prompts import prompt_set
from peft_safety.methods.ortho_patch.config import SIDES, Basis, Mode, OrthoSafetyPatchConfig, SideName
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.load import TaskData, load_model
from peft_safety.recipes.train import TrainingRun, finetune
from peft_safety.recipes.watch import Look, Stopping, Watch
from peft_safety.reporting import render
from peft_safety.reporting.report import Report, environment

BASIS_ROWS = 480
"""Rows that a basis "auto" is estimated on, at most: drawn from those that the patch is to leave alone."""


@dataclass(frozen=True)
class PatchOptions:
    """What a patch is made of. The defaults were chosen on the validation split with SmolLM2-135M-Instruct.

    Attributes:
        mode, basis, side, safety_rank, safety_energy, safety_rank_pattern, reg_lambda, prior_patches: as in
            `OrthoSafetyPatchConfig`, whose default None takes.
        subspace: as there; "auto" estimates it on the general rows of the patch itself, answers included.
        r, lora_alpha, target_modules: as in `LoraConfig`.
        harmful: requests with refusals, of the package's own. Past the split's size rows repeat.
        general, everyday, contrast: prompts of each kind that the model answers itself: general ones; everyday
            requests in the same forms as the harmful ones ("Help me ...", "Write a ..."), without which a small model
            learns to refuse the form; safe ones that look dangerous.
        self_written: prompts that the model also writes itself (`evaluation.generate.self_prompts`): the wider the
            range of what it is to answer as before, the less it refuses of what nobody thought of.
        answer_tokens: of the model's own answers, which are cut there and then not taught to end.
        distil_weight: of the distance from the unpatched model there, token for token, beside the loss on refusals.
        validation: prompts of each kind in a look at the validation split, at most.
        stopping: when to look, and when to stop.
        training: learning rate, epochs, batch size, seed, ...
    """

    mode: Mode = "hard"
    basis: Basis = "activation"
    side: SideName = "in"
    safety_rank: int | float | None = None
    safety_energy: float | None = None
    safety_rank_pattern: dict[str, int | float] | None = None
    reg_lambda: float | None = None
    subspace: SafetySubspace | str = "auto"
    prior_patches: tuple[str, ...] = ()
    r: int = 8
    lora_alpha: int = 16
    target_modules: str | list[str] = "all-linear"
    harmful: int = 352
    general: int = 156
    everyday: int = 735
    contrast: int = 340
    self_written: int = 600
    answer_tokens: int = 12
    distil_weight: float = 4.0
    validation: int = 88
    stopping: Stopping = field(default_factory=Stopping)
    training: TrainOptions = PATCH_TRAINING

    def __post_init__(self) -> None:
        check_size_options(
            self.safety_rank, self.safety_energy, self.safety_rank_pattern, type(self).__name__, least=0
        )
        for name in ("harmful", "validation", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} makes no patch. Give at least 1.")
        if self.stopping.every < 1 or self.stopping.patience < 1:
            raise ConfigError(f"{self.stopping}: every and patience count steps and looks. Give at least 1.")


@dataclass
class PatchRun:
    """What training a patch cost; the looks at the validation split, the unpatched model first (step 0); and the one
    whose weights were kept.
    """

    training: TrainingRun
    looks: list[Look]
    best: Look | None


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: PatchOptions | None = None,
    *,
    refusals: Rows | None = None,
    general: Rows | None = None,
    adapter_name: str = "default",
) -> tuple[PeftModel, PatchRun]:
    """Train a safety patch and keep the weights of its best look at the validation split.

    Args:
        model: the model to make safer, or a PeftModel with earlier patches (which stay as they are, and active).
        refusals: rows {prompt, response} or {messages} to learn; default the package's requests and refusals.
        general: rows to keep the model's abilities by: {prompt} rows are answered by the model itself; default the
            package's.

    Returns:
        The model under the patch, and what the run did.

    Raises:
        ConfigError, DataError, CalibrationError: before anything is trained.

    Reference: OrthoSafetyPatch, arXiv 2510.09004 (mode "none"); the contrast rows, the early stopping and the
        constraint are ours.
    """
    options = PatchOptions() if options is None else options
    training, seed = options.training, options.training.seed
    learned = as_rows(refusal_pairs("train", options.harmful, seed) if refusals is None else refusals, "refusals")
    kept = general_rows(model, tokenizer, options, general)
    rows: list[Row] = [*learned, *kept]
    random.Random(seed).shuffle(rows)
    config = patch_config(model, tokenizer, options, kept)
    watch = Watch(tokenizer, prompt_set("validation", options.validation, seed), options.stopping)
    watch.look(model, 0)
    tuned, run = finetune(
        model,
        tokenizer,
        rows,
        config,
        training,
        callbacks=[watch, *([SoftPenaltyCallback(adapter_name)] if options.mode == "soft" else [])],
        adapter_name=adapter_name,
        distil_weight=options.distil_weight,
    )
    watch.restore(tuned)
    return tuned, PatchRun(run, watch.looks, watch.best)


def patch_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: PatchOptions, general: Sequence[Row]
) -> OrthoSafetyPatchConfig:
    """The patch's PEFT config. A subspace "auto" is estimated here, on the rows that the patch is to leave alone."""
    subspace, training = options.subspace, options.training
    if isinstance(subspace, str) and subspace == "auto" and options.basis != "weight" and options.safety_rank != 0:
        contrastive = options.basis == "contrastive"
        subspace = SafetySubspace.from_activations(
            model,
            random.Random(training.seed).sample(general, min(BASIS_ROWS, len(general))),
            tokenizer=tokenizer,
            method="ortho_patch",
            rank=options.safety_rank,
            energy=options.safety_energy,
            per_kind=options.safety_rank_pattern,
            sides=SIDES[options.side],
            against=refusal_pairs("calibration", CALIBRATION_PAIRS, training.seed) if contrastive else None,
            target_modules=options.target_modules,
            seed=training.seed,
            allow_fewer=True,
            progress=training.progress,
        )
    shared = {f.name for f in fields(PatchOptions)} & {f.name for f in fields(OrthoSafetyPatchConfig)}
    given = {name: value for name in shared if (value := getattr(options, name)) is not None}
    given |= {"subspace": subspace, "prior_patches": list(options.prior_patches) or None}
    return OrthoSafetyPatchConfig(**given, task_type="CAUSAL_LM")


def general_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: PatchOptions, given: Rows | None = None
) -> list[Row]:
    """Rows on which the patch is to leave the model as it is: those with an answer as they are, prompts alone answered
    by the bare model itself.
    """
    if given is None:
        sets = {"general_prompts": options.general, "everyday_requests": options.everyday}
        given = []
        for name, count in {**sets, "contrast_prompts": options.contrast}.items():
            prompts = [*load(name, "train"), *load(name, "calibration")]
            given += [prompts[index % len(prompts)] for index in range(count)]  # past the end from the start again
        if options.self_written:
            seed, progress = options.training.seed, options.training.progress
            with adapters_off(model):
                written = self_prompts(model, tokenizer, options.self_written, seed=seed, progress=progress)
            given += [{"prompt": prompt} for prompt in written]
    plain = as_rows(given, "general rows")
    asked = {_key(row): row["prompt"] for row in plain if kind_of(row) == "prompt"}
    answers: dict[str, dict[str, Any]] = {}
    if asked:
        limit, progress = options.answer_tokens, options.training.progress
        with adapters_off(model):
            own = self_responses(model, tokenizer, list(asked.values()), max_new_tokens=limit, progress=progress)
        answers = {_key(row): row for row in own}
    answered = [answers.get(_key(row)) if kind_of(row) == "prompt" else row for row in plain]
    rows: list[Row] = [{**row, "distil": True} for row in answered if row is not None]
    if not rows:
        raise DataError(
            "no general rows: nothing would keep the patch from refusing everything. Give general= rows, or counts "
            "of at least 1."
        )
    return rows


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], default=str)


@dataclass(frozen=True)
class PatchReport:
    """The model under the patch, where the patch was saved, evaluations on the same prompts without and with it, what
    training did, and the same as a table, JSON, PNG or card section.
    """

    model: PeftModel
    adapter_dir: Path
    before: Evaluation
    after: Evaluation
    run: PatchRun
    report: Report


def make_patch(
    model: str | Path | PreTrainedModel,
    out_dir: str | Path = "runs/patch",
    options: PatchOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    refusals: Rows | None = None,
    general: Rows | None = None,
    eval_split: str = "test",
    eval_limit: int | None = None,
) -> PatchReport:
    """Train a safety patch with safety and drift measured before and after; writes `adapter/`, `report.json` and
    `report.png` into `out_dir`.

    Args:
        model: hub id, directory, or a loaded model.
        options: `prior_patches` are directories here; they are loaded, stay as they are, and the new patch is measured
            on top of them.
        eval_split: of the packaged prompts ("validation" while choosing settings, then "test" once).
        eval_limit: prompts of each kind at most.

    Raises:
        ConfigError, DataError, CalibrationError, ArtifactError: before anything is trained or written.
    """
    options = PatchOptions() if options is None else options
    render.require_rich()  # before the hours, for the table at the end
    out = Path(out_dir)
    files.check_place(out / "adapter" / MANIFEST)
    for directory in options.prior_patches:
        read_manifest(Path(directory), warn=False)
    base, tokenizer = load_model(model, tokenizer)
    earlier, names = _with_priors(base, options.prior_patches)
    no_task = TaskData([], [], [])
    bench = Bench.prepare(earlier, tokenizer, no_task, options.training, split=eval_split, limit=eval_limit)
    before = bench.measure(earlier, tokenizer)
    tuned, run = patch(earlier, tokenizer, replace(options, prior_patches=names), refusals=refusals, general=general)
    after = bench.measure(tuned, tokenizer)
    tuned.save_pretrained(str(out / "adapter"), selected_adapters=["default"])
    seed, step = options.training.seed, run.best.step if run.best else run.training.steps
    plain = (str, int, float, list, tuple, dict)
    report = Report(
        title=f"Safety patch ({options.mode}): before and after",
        arms={"before": before.figures(), "after": after.figures()},
        notes=(
            f"Judge: {before.judge}. {KeywordJudge.caveat}",
            f"Prompts: the package's {before.split} split. One seed ({seed}). Kept: the weights of step {step}.",
        ),
        environment=environment(seed, model=str(base.config._name_or_path), device=str(base.device)),
        details={
            "options": {name: value for name, value in vars(options).items() if isinstance(value, plain)},
            "before": before.to_json(),
            "after": after.to_json(),
            "looks": [asdict(look) for look in run.looks],
            "training": asdict(run.training),
        },
    )
    report.print()
    report.write(out)
    return PatchReport(tuned, out / "adapter", before, after, run, report)


def _with_priors(model: PreTrainedModel, directories: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The model under earlier patches, all active, and their names on it."""
    tuned: Any = model
    names = tuple(f"prior{index}" for index in range(len(directories)))
    for name, directory in zip(names, directories, strict=True):
        try:
            if tuned is model:
                tuned = PeftModel.from_pretrained(model, directory, adapter_name=name)
            else:
                tuned.load_adapter(directory, name)
        except PeftSafetyError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"{directory}: the earlier patch does not fit this model: {error}"
            raise ArtifactError(f"{problem}. Give one that was trained on it.") from error
    if names:
        tuned.base_model.set_adapter(list(names))
    return tuned, names

"""Fine-tuning with the Hugging Face Trainer: chat template, response-only loss, fixed seeds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.data.chat import Collator, can_trim, encode_rows
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

LEARNING_RATE = 5e-4
"""Peak learning rate of an adapter where none is given, in Python and on the command line: the smallest tried at which
plain LoRA learns the task of
examples/demo.py in one epoch (validation split: accuracy 44 %, against 25 % at 3e-4 and 48 % at 1e-3)."""
PATCH_LEARNING_RATE = 2e-3
"""That of a safety patch, which learns one short kind of answer and is stopped early (validation split of
examples/patch.py).
"""
LOGGING_STEPS = 5


@dataclass(frozen=True)
class TrainingRun:
    """What a fine-tuning run cost.

    Attributes:
        seconds: wall-clock time of the training loop.
        steps: optimizer steps.
        rows: training rows that were used.
        loss: mean training loss, nats a response token.
        last_loss: loss of the last logged step.
        peak_memory_mib: CUDA memory allocated at most during the run; on CPU the resident memory of the whole process
            at most.
        trainable_parameters: number of trained parameters.
    """

    seconds: float
    steps: int
    rows: int
    loss: float
    last_loss: float
    peak_memory_mib: float
    trainable_parameters: int


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        lr: AdamW's peak learning rate, decayed linearly to 0.
        epochs: passes over the rows.
        max_steps: optimizer steps; overrides `epochs` when positive.
        batch_size: rows a device and step.
        gradient_accumulation: batches a step.
        max_length: tokens kept of each row, from the left.
        warmup_steps: steps of linear warm-up.
        seed: of the adapter's initialization and the order of the rows.
        report_to: as in `transformers.TrainingArguments` ("none", "tensorboard", "wandb", ...).
        save_steps: write a Trainer checkpoint every so many steps into `checkpoint_dir`; None writes none.
        checkpoint_dir: needed with `save_steps`.
        progress: show a bar on stderr.
    """

    lr: float = LEARNING_RATE
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 512
    warmup_steps: int = 0
    seed: int = 0
    report_to: str = "none"
    save_steps: int | None = None
    checkpoint_dir: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.save_steps is not None and self.checkpoint_dir is None:
            raise ConfigError(f"save_steps = {self.save_steps} needs a checkpoint_dir to write to.")
        for name in ("lr", "epochs", "batch_size", "gradient_accumulation", "max_length"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)} cannot train anything. Give a positive number.")


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    peft_config: PeftConfig | None,
    options: TrainOptions | None = None,
    *,
    labels: Sequence[Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    description: str = "training",
    adapter_name: str = "default",
    distil_weight: float = 1.0,
) -> tuple[PeftModel, TrainingRun]:
    """Put an adapter on `model`, or take the one that is there, and train it on `rows`, with a loss on the assistant's
    tokens only.

    Args:
        model: the model to adapt; PEFT injects its layers in place. A PeftModel gets a further adapter; those it has
            stay active, and frozen.
        rows: {prompt, response}, {text, label} or {messages} rows; those with `"distil": True` are not learned but
            kept, see `recipes.distil`.
        peft_config: any LoRA-like config; the adapter's random initialization is seeded too. None trains the active
            adapter of a PeftModel on.
        labels: every label of a classification task; default those of `rows`.
        callbacks: added to the Trainer's.
        description: label of the progress bar.
        distil_weight: of the loss on the rows to keep, token for token.

    Returns:
        The PeftModel, and what the run cost.

    Raises:
        DataError: malformed rows. ConfigError: no config, and no PeftModel whose active adapter trains.
    """
    from peft import PeftModel
    from transformers import PrinterCallback, Trainer, set_seed

    from peft_safety.core import base_weights as weights
    from peft_safety.recipes.distil import distilling_trainer

    options = TrainOptions() if options is None else options
    features = encode_rows(tokenizer, rows, options.max_length, labels)
    set_seed(options.seed)
    if peft_config is None and not (
        isinstance(model, PeftModel) and any(parameter.requires_grad for parameter in model.parameters())
    ):
        raise ConfigError(
            "peft_config=None trains the active adapter on, and nothing of this model trains. Give a config, or load "
            "with is_trainable=True."
        )
    weights.stay_unpacked(model)
    peft_model = model if peft_config is None else _with_adapter(model, peft_config, adapter_name)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(options, scratch, pin_memory=model.device.type == "cuda")
        distil = any("distil" in feature for feature in features)
        kind = distilling_trainer(distil_weight) if distil else Trainer
        collator = Collator(tokenizer, distil, trim=can_trim(peft_model))
        trainer = kind(
            peft_model, arguments, data_collator=collator, train_dataset=features, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        if options.progress:
            trainer.add_callback(_progress_bar(description))
        run = _timed(trainer, peft_model, len(features))
    return peft_model, run


def _with_adapter(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    from peft import PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    there = list(model.active_adapters)
    model.add_adapter(name, config)
    model.base_model.set_adapter([*there, name])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in f"{key}." and "lora_" in key)
    return model


def _arguments(options: TrainOptions, scratch: str, pin_memory: bool) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(options.checkpoint_dir or scratch),
        learning_rate=options.lr,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        warmup_steps=options.warmup_steps,
        weight_decay=0.0,
        seed=options.seed,
        report_to=options.report_to,
        save_strategy="no" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        logging_steps=LOGGING_STEPS,
        disable_tqdm=True,  # `_progress_bar` takes one line
        dataloader_pin_memory=pin_memory,
        remove_unused_columns=False,
    )


def _timed(trainer: Trainer, model: PeftModel, rows: int) -> TrainingRun:
    cuda = model.device.type == "cuda"
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainingRun(
        seconds=round(seconds, 2),
        steps=result.global_step,
        rows=rows,
        loss=result.training_loss,
        last_loss=losses[-1] if losses else result.training_loss,
        peak_memory_mib=round(_peak_memory(cuda) / 2**20, 1),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )


def _peak_memory(cuda: bool) -> int:
    """Bytes: allocated at most on the current CUDA device since the last reset, or resident at most in this process
    since it began.
    """
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _progress_bar(description: str) -> TrainerCallback:
    """A one-line bar with the running loss, in place of the Trainer's printed logs."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps,
                desc=description,
                unit="step",
                leave=False,
                disable=not state.is_world_process_zero,
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Bar()

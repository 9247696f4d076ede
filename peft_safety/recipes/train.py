"""Fine-tuning with the Hugging Face Trainer: chat template, response-only loss, fixed seeds."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from peft_safety.core import base_weights as weights
from peft_safety.core.training import LEARNING_RATE, TrainOptions
from peft_safety.data.chat import Collator, can_trim, encode_rows
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.recipes.distil import DistillingTrainer

__all__ = ["LEARNING_RATE", "TrainOptions", "TrainingRun", "finetune"]


@dataclass(frozen=True)
class TrainingRun:
    """What a run cost: losses in nats a response token, the mean and the last; memory of CUDA, or of the process."""

    seconds: float
    steps: int
    rows: int
    loss: float
    last_loss: float
    peak_memory_mib: float
    trainable_parameters: int

    @classmethod
    def of(cls, trainer: Trainer, result: TrainOutput, rows: int, trainable: int) -> TrainingRun:
        """What a trainer's `train()` gave. ZeRO-3 hides the sizes of parameters, so `trainable` is counted before."""
        cuda = trainer.args.device.type == "cuda"
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return cls(
            seconds=round(result.metrics["train_runtime"], 2),
            steps=result.global_step,
            rows=rows,
            loss=result.training_loss,
            last_loss=losses[-1] if losses else result.training_loss,
            peak_memory_mib=round((torch.cuda.max_memory_allocated() if cuda else _peak_resident()) / 2**20, 1),
            trainable_parameters=trainable,
        )


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    peft_config: PeftConfig | None,
    options: TrainOptions | None = None,
    *,
    labels: Sequence[Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    adapter_name: str = "default",
    distil_weight: float = 1.0,
) -> tuple[PeftModel, TrainingRun]:
    """Put an adapter on a model, or take its own, and train it on rows, with a loss on the assistant's tokens only.

    Args:
        model: a PeftModel gets a further adapter; those it has stay active and frozen.
        rows: {prompt, response}, {text, label} or {messages} rows; those with `"distil": True` are not learned but
            kept, with `distil_weight`, see `recipes.distil`.
        peft_config: any LoRA-like config. None trains the active adapter of a PeftModel on.
        labels: every label of a classification task; default those of `rows`.

    Raises:
        DataError: malformed rows. ConfigError: no config, and no PeftModel whose active adapter trains.
    """
    options = TrainOptions() if options is None else options
    features = encode_rows(tokenizer, rows, options.max_length, labels)
    set_seed(options.seed)
    trains = isinstance(model, PeftModel) and any(parameter.requires_grad for parameter in model.parameters())
    if peft_config is None and not trains:
        raise ConfigError("peft_config=None, and no adapter of the model trains. Give a config, or is_trainable=True.")
    weights.stay_unpacked(model)
    tuned: Any = model if peft_config is None else _with_adapter(model, peft_config, adapter_name)
    cuda = model.device.type == "cuda"
    distil = any("distil" in feature for feature in features)
    collator = Collator(tokenizer, distil, trim=can_trim(tuned))
    kind: Any = partial(DistillingTrainer, weight=distil_weight) if distil else Trainer
    with tempfile.TemporaryDirectory() as scratch:
        arguments = options.arguments(scratch, cuda, save_strategy="no", disable_tqdm=True)
        trainer = kind(tuned, arguments, data_collator=collator, train_dataset=features, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        if options.progress:
            trainer.add_callback(_Bar())
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        result = trainer.train()
    tuned.zero_grad(set_to_none=True)
    trainable = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    return tuned, TrainingRun.of(trainer, result, len(features), trainable)


def _with_adapter(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    active = list(model.active_adapters)
    model.add_adapter(name, config)
    model.base_model.set_adapter([*active, name])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in f"{key}." and "lora_" in key)
    return model


def _peak_resident() -> int:
    """Most resident memory of this process since it began, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Bar(ProgressCallback):
    """The Trainer's bar on one line, with the running loss instead of printed logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

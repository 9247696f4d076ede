"""How something is trained: what fine-tuning and the training of a mask share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.core.checks import check_positive

if TYPE_CHECKING:
    from transformers import TrainingArguments

LEARNING_RATE = 5e-4
"""Default peak learning rate of an adapter: the smallest tried at which plain LoRA learns the task of examples/demo.py
in one epoch (validation split: accuracy 44 %, against 25 % at 3e-4 and 48 % at 1e-3)."""
LOGGING_STEPS = 5
HOLDOUT = 0.15
"""Share of a data set without splits that is held out for evaluation."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        lr: AdamW's peak learning rate, decayed linearly to 0.
        epochs, max_steps: passes over the rows; optimizer steps, which override them when positive.
        batch_size: rows a device and step.
        max_length: tokens kept of each row, from the left.
        seed: of the adapter's initialization and the order of the rows.
        report_to: as in `transformers.TrainingArguments`.
        progress: show a bar on stderr.
    """

    lr: float = LEARNING_RATE
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    report_to: str = "none"
    progress: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "lr", "epochs", "batch_size", "max_length")

    def arguments(self, folder: str | Path, cuda: bool, **more: Any) -> TrainingArguments:
        """The Trainer's arguments; `folder` is for checkpoints."""
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=str(folder),
            learning_rate=self.lr,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.batch_size,
            seed=self.seed,
            report_to=self.report_to,
            logging_steps=LOGGING_STEPS,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,
            **more,
        )


PATCH_TRAINING = TrainOptions(lr=2e-3, epochs=2, batch_size=16, max_length=128)
"""Of a safety patch, which learns one short kind of answer and keeps the best of its looks at a validation split."""

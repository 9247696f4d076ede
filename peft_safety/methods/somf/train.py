"""Training a mask with transformers' Trainer: checkpoints, resume, accelerate and `report_to` come along.

TRL's DPOTrainer does not fit: it prepares PEFT configs and reference models of its own, where here only logits exist.
The loss is the same. Difference from SOMF's reference code: the reference model is the aligned one, not the policy
under a random untrained mask drawn again at every forward pass.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_safety.calibration.activations import tokenizer_of
from peft_safety.data import preference_pairs, refusal_pairs
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.forward import MaskedModel
from peft_safety.methods.somf.masks import stream
from peft_safety.methods.somf.objectives import (
    Batches,
    Features,
    dpo_loss,
    features_of,
    response_log_probs,
    sft_loss,
)
from peft_safety.methods.somf.options import MaskTraining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

LOGGING_STEPS = 5


@dataclass(frozen=True)
class MaskRun:
    """What training a mask cost, and where it ended.

    Attributes:
        seconds: of the training loop.
        steps: optimizer steps, those before a resume included.
        rows: rows that were used.
        loss: mean over the run.
    """

    seconds: float
    steps: int
    rows: int
    loss: float


def train_mask(
    masked: MaskedModel, tokenizer: PreTrainedTokenizerBase | None, rows: Rows | None, training: MaskTraining
) -> MaskRun:
    """Train the logits of `masked` in place.

    Args:
        tokenizer: None takes the one that is stored with the model.
        rows: {prompt, chosen, rejected} for DPO, {prompt, response} for SFT; None takes the package's requests,
            refusals and openings.

    Raises:
        DataError: malformed rows.
        ConfigError: nothing to resume from, a checkpoint of another mask, or logits that are not finite.
    """
    tokenizer = tokenizer_of(masked.model) if tokenizer is None else tokenizer
    if rows is None:
        rows = (preference_pairs if training.objective == "dpo" else refusal_pairs)("train", seed=training.seed)
    features = features_of(rows, tokenizer, training.objective, training.max_length)
    with masked.attached(), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(masked, features, Batches(tokenizer, training.objective), training, scratch)
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(training))
    masked.zero_grad(set_to_none=True)
    if not all(bool(torch.isfinite(logit).all()) for logit in masked.logit_list):
        raise ConfigError(f"training diverged at lr={training.lr:g}: the mask's logits are not finite. Lower lr.")
    return MaskRun(
        seconds=round(result.metrics["train_runtime"], 2),
        steps=result.global_step,
        rows=len(features),
        loss=result.training_loss,
    )


def _last_checkpoint(training: MaskTraining) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    if not training.resume:
        return None
    folder = str(training.checkpoint_dir)
    last: str | None = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is None:
        raise ConfigError(f"{folder} holds no checkpoint to resume from. Leave resume out, or give the right folder.")
    return last


def _trainer(
    masked: MaskedModel, features: Features, batches: Batches, training: MaskTraining, scratch: str
) -> Trainer:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class MaskTrainer(Trainer):
        """Tells the model which noise to draw: by step and micro-batch, so that a resumed run draws the same."""

        loss_is_scaled_for_ga = False
        at_step, micro = -1, 0

        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            step = self.state.global_step
            self.micro = self.micro + 1 if self.at_step == step else 0
            self.at_step = step
            masked.step_seed = stream(masked.options.seed, training.seed, step, self.micro)
            tokens, labels = (inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]
            outputs = model(*tokens)
            if training.objective == "dpo":
                reference = masked.reference(*tokens)
                policy = response_log_probs(outputs.logits, labels)
                loss = dpo_loss(policy, response_log_probs(reference.logits, labels), training.beta)
            else:
                loss = sft_loss(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    arguments = TrainingArguments(
        output_dir=str(training.checkpoint_dir or scratch),
        learning_rate=training.lr,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        weight_decay=0.0,
        seed=training.seed,
        report_to=training.report_to,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        logging_steps=LOGGING_STEPS,
        disable_tqdm=not training.progress,
        use_cpu=not masked.logit_list[0].is_cuda,  # the logits are trained where the model is
        dataloader_pin_memory=masked.logit_list[0].is_cuda,
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=training.bf16,
    )
    # nn.DataParallel would copy the layers and leave the hooks' factors where they are; DDP works.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = MaskTrainer(masked, arguments, data_collator=batches, train_dataset=features)
    trainer.remove_callback(PrinterCallback)
    return trainer

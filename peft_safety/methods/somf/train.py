"""Training a mask with transformers' Trainer: checkpoints, resume, accelerate and `report_to` come along.

TRL's DPOTrainer does not fit: it prepares PEFT configs and reference models of its own, and saves whole adapters,
where here only logits exist. The loss is the same; the reference's log-probabilities are computed once, before the
first step.

Differences from SOMF's reference code: the reference model is the aligned one, not the policy under a random untrained
mask drawn again at every forward pass.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_safety.data.rows import Rows
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.estimate.activations import tokenizer_of
from peft_safety.methods.somf.forward import MaskedModel, Mode
from peft_safety.methods.somf.fusions import stream
from peft_safety.methods.somf.objectives import (
    Batches,
    Features,
    dpo_loss,
    features_of,
    package_rows,
    response_log_probs,
    sft_loss,
)
from peft_safety.methods.somf.options import MaskTraining
from peft_safety.methods.somf.storage import load_masks, save_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

LOGITS_FILE = "mask_logits.safetensors"
LOGGING_STEPS = 5


@dataclass(frozen=True)
class MaskRun:
    """What training a mask cost, and where it ended.

    Attributes:
        seconds: of the training loop; `reference_seconds` of the reference's log-probabilities.
        steps: optimizer steps, those before a resume included.
        rows: rows that were used.
        loss: mean over the run; `last_loss` of the last logged step.
        trainable_parameters: logits.
        density: expected, after training.
    """

    seconds: float
    reference_seconds: float
    steps: int
    rows: int
    loss: float
    last_loss: float
    trainable_parameters: int
    density: float


def train_mask(
    masked: MaskedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows | None, training: MaskTraining
) -> MaskRun:
    """Train the logits of `masked` in place.

    Args:
        rows: {prompt, chosen, rejected} for DPO, {prompt, response} for SFT; None takes the package's requests,
            refusals and openings.

    Raises:
        DataError: malformed rows. ConfigError: nothing to resume from, or a checkpoint of another mask.
            PeftSafetyError: the loss is not finite.
    """
    features = features_of(
        package_rows(training.objective, training.seed) if rows is None else rows,
        tokenizer,
        training.objective,
        training.max_length,
    )
    batches = Batches(tokenizer, training.objective)
    with masked.attached():
        started = time.perf_counter()
        if training.objective == "dpo":
            _add_reference(masked, features, batches, training)
        reference_seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as scratch:
            trainer = _trainer(masked, features, batches, training, scratch)
            started = time.perf_counter()
            result = trainer.train(resume_from_checkpoint=_last_checkpoint(training))
            seconds = time.perf_counter() - started
    masked.zero_grad(set_to_none=True)
    if not all(bool(torch.isfinite(logit).all()) for logit in masked.logits.values()):
        raise ConfigError(f"training diverged at lr={training.lr:g}: the mask's logits are not finite. Lower lr.")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return MaskRun(
        seconds=round(seconds, 2),
        reference_seconds=round(reference_seconds, 2),
        steps=result.global_step,
        rows=len(features),
        loss=result.training_loss,
        last_loss=losses[-1] if losses else result.training_loss,
        trainable_parameters=sum(logit.numel() for logit in masked.logits.values()),
        density=float(masked.density().detach()),
    )


def trained_logits(
    masked: MaskedModel, tokenizer: PreTrainedTokenizerBase | None, rows: Rows | None, training: MaskTraining
) -> tuple[dict[str, Tensor], MaskRun]:
    """`train_mask`; the logits on the CPU, and what it cost. Default: the tokenizer that is stored with the model."""
    run = train_mask(masked, tokenizer_of(masked.model) if tokenizer is None else tokenizer, rows, training)
    return {name: logit.detach().cpu().clone() for name, logit in masked.logits.items()}, run


def _last_checkpoint(training: MaskTraining) -> str | None:
    if not training.resume:
        return None
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(str(training.checkpoint_dir))
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ConfigError(
            f"{folder} holds no checkpoint to resume from. Leave resume out, or give the checkpoint_dir of the run "
            "that was cut off."
        )
    return found


@torch.no_grad()
def _add_reference(masked: MaskedModel, features: Features, batches: Batches, training: MaskTraining) -> None:
    """Log-probabilities of both responses under the reference model, once for all epochs."""
    from tqdm.auto import tqdm

    mode: Mode = training.reference
    masked.eval()
    masked.mode = mode
    device = masked.logit_list[0].device
    order = sorted(range(len(features)), key=lambda i: len(features[i]["chosen"]["input_ids"]))
    try:
        with tqdm(total=len(order), desc="reference", unit="pair", disable=not training.progress, leave=False) as bar:
            for start in range(0, len(order), training.batch_size):
                chosen = order[start : start + training.batch_size]
                batch = {key: value.to(device) for key, value in batches([features[i] for i in chosen]).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                    logits = masked(batch["input_ids"], batch["attention_mask"]).logits
                found = response_log_probs(logits, batch["labels"]).view(2, -1).T.tolist()
                for i, pair in zip(chosen, found, strict=True):
                    features[i]["reference"] = pair
                bar.update(len(chosen))
    finally:
        masked.mode = "fused"


def _trainer(
    masked: MaskedModel, features: Features, batches: Batches, training: MaskTraining, scratch: str
) -> Trainer:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class MaskTrainer(Trainer):
        """Saves and loads logits only, and tells the model which noise to draw: by step and micro-batch, so that a
        resumed run draws the same.
        """

        loss_is_scaled_for_ga = False
        at_step, micro = -1, 0

        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            step = self.state.global_step
            self.micro = self.micro + 1 if self.at_step == step else 0
            self.at_step = step
            masked.step_seed = stream(masked.options.seed, training.seed, step, self.micro)
            outputs = model(inputs["input_ids"], inputs["attention_mask"])
            if training.objective == "dpo":
                loss = dpo_loss(
                    response_log_probs(outputs.logits, inputs["labels"]), inputs["reference"], training.beta
                )
            else:
                loss = sft_loss(outputs.logits, inputs["labels"])
            target = masked.options.target_density
            if target is not None:
                loss = loss + masked.options.density_penalty * (masked.density() - target).square()
            return (loss, outputs) if return_outputs else loss

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_logits(masked.logits, folder / LOGITS_FILE, {"step": self.state.global_step})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            found = load_masks(Path(resume_from_checkpoint) / LOGITS_FILE)
            if not isinstance(found, dict):
                raise ArtifactError(
                    f"{resume_from_checkpoint}: {LOGITS_FILE} holds masks, not logits. Give a checkpoint of a mask."
                )
            masked.load_logits(found)

    arguments = TrainingArguments(
        output_dir=str(training.checkpoint_dir or scratch),
        learning_rate=training.lr,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        warmup_steps=training.warmup_steps,
        weight_decay=0.0,
        seed=training.seed,
        report_to=training.report_to,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        logging_steps=LOGGING_STEPS,
        disable_tqdm=not training.progress,
        dataloader_pin_memory=masked.logit_list[0].is_cuda,
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=training.bf16,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # nn.DataParallel would copy the layers and leave the hooks' factors where they are; use DDP
    trainer = MaskTrainer(masked, arguments, data_collator=batches, train_dataset=features)
    trainer.remove_callback(PrinterCallback)
    return trainer

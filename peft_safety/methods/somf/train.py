"""Training a mask with transformers' Trainer, by DPO (safe answers are preferred) or SFT. TRL's DPOTrainer does not
fit: it prepares PEFT configs and reference models of its own. Difference from SOMF's code: the reference model of DPO
is the aligned one, not the policy under an untrained mask.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint

from peft_safety.calibration.models import tokenizer_of
from peft_safety.core import base_weights as weights
from peft_safety.core.projection import all_finite
from peft_safety.data import preference_pairs, refusal_pairs
from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_each, encode_rows, row_losses
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import ConfigError, DataError
from peft_safety.methods.somf.masks import Shape, concrete, noise, stream
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.updates import MaskOf

Features = list[dict[str, Any]]
SIDES = ("chosen", "rejected")


class MaskedModel(nn.Module):
    """What the Trainer sees: the logits, 0 at first. The frozen model is no submodule: nobody moves or saves it."""

    model: nn.Module
    fused = True  # False for DPO's reference, the safe model without any task
    step_seed = 0  # decides the noise of the next forward pass

    def __init__(
        self, model: nn.Module, shapes: Mapping[str, Shape], options: FuseOptions, device: torch.device
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.options, self.names = options, list(shapes)
        self.logit_list = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes.values())

    @property
    def logits(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.logit_list, strict=True))

    def samples(self) -> MaskOf:
        """The masks of this step: concrete samples, drawn whenever they are asked for, equal for equal seeds."""
        logits, temperature, seed = self.logits, self.options.temperature, self.step_seed
        return lambda name: concrete(logits[name], noise(logits[name], stream(seed, name)), temperature)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            problem = f"the stored logits are of other modules or another granularity ({error})"
            raise ConfigError(f"{problem}. Use the options they were trained with.") from error

    def train(self, mode: bool = True) -> MaskedModel:
        """The base model stays in eval mode, without dropout, unless gradient checkpointing needs train mode."""
        super().train(mode)
        self.model.train(mode and any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules()))
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    @torch.no_grad()
    def reference(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """`forward` of the safe model without any task."""
        training = self.training
        self.eval()
        self.fused = False
        try:
            return self(input_ids, attention_mask)
        finally:
            self.fused = True
            self.train(training)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Freeze the model, and hook into it; undone at the end, whatever happens."""
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.callback(setattr, module, "training", module.training)
            for parameter in self.model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
            stack.enter_context(weights.unpacked(self.model))
            self._attach(stack)
            self.model.requires_grad_(False)
            yield

    def _attach(self, stack: ExitStack) -> None:
        """Hooks, for those that need some."""


@dataclass(frozen=True)
class MaskRun:
    """What training a mask cost: seconds, optimizer steps (those before a resume too), rows; and the mean loss."""

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
        rows: {prompt, chosen, rejected} for DPO, {prompt, response} for SFT; None takes the package's own.
    """
    tokenizer = tokenizer_of(masked.model) if tokenizer is None else tokenizer
    if rows is None:
        rows = (preference_pairs if training.objective == "dpo" else refusal_pairs)("train", seed=training.seed)
    features = features_of(rows, tokenizer, training.objective, training.max_length)
    folder, last = str(training.checkpoint_dir), None
    if training.resume and (last := get_last_checkpoint(folder) if Path(folder).is_dir() else None) is None:
        raise ConfigError(f"{folder} holds no checkpoint to resume from. Leave resume out, or give the right folder.")
    with masked.attached(), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(masked, features, Batches(tokenizer), training, scratch)
        result = trainer.train(resume_from_checkpoint=last)
    masked.zero_grad(set_to_none=True)
    if not all(map(all_finite, masked.logit_list)):
        raise ConfigError(f"training diverged at lr={training.lr:g}: the mask's logits are not finite. Lower lr.")
    return MaskRun(round(result.metrics["train_runtime"], 2), result.global_step, len(features), result.training_loss)


def features_of(rows: Rows, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int) -> Features:
    """Tokens and labels: one sequence per row for SFT, `chosen` and `rejected` for DPO."""
    if objective == "sft":
        return encode_rows(tokenizer, rows, max_length)
    rows, encoded = as_rows(rows), []
    for index, row in enumerate(rows):
        if not row.keys() >= {"prompt", *SIDES}:
            raise DataError(f"row {index} has {sorted(row)}. DPO needs rows {{prompt, chosen, rejected}}.")
    for side in SIDES:
        answered = [{"prompt": r["prompt"], "response": r[side], "truncated": r.get("truncated")} for r in rows]
        encoded.append(encode_each(tokenizer, answered, max_length))
    pairs: Features = [dict(zip(SIDES, pair, strict=True)) for pair in zip(*encoded, strict=True) if all(pair)]
    lost = f"{len(rows) - len(pairs)} of {len(rows)} pairs have no response token within {max_length} tokens"
    if not pairs:
        raise DataError(f"{lost}. Raise max_length.")
    if len(pairs) < len(rows):
        warnings.warn(f"{lost} and are left out", stacklevel=2)
    return pairs


class Batches(Collator):
    """Collates features; of pairs all chosen sequences, then all rejected ones."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if "chosen" in features[0]:
            features = [feature[side] for side in SIDES for feature in features]
        return super().__call__(features)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean of `-log sigmoid(beta [chosen - rejected of the policy - the same of the reference])`, of `(2 pairs,)` log-
    probabilities, the chosen ones first (Rafailov et al., arXiv 2305.18290, equation 7).
    """
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


class MaskTrainer(Trainer):
    """Tells the model which noise to draw: by step and micro-batch, so that a resumed run draws the same."""

    loss_is_scaled_for_ga = False
    at_step, micro = -1, 0

    def __init__(self, masked: MaskedModel, training: MaskTraining, *args: Any, **kwargs: Any) -> None:
        super().__init__(masked, *args, **kwargs)
        self.masked, self.training = masked, training

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        self.micro = self.micro + 1 if self.at_step == step else 0
        self.at_step = step
        self.masked.step_seed = stream(self.masked.options.seed, self.training.seed, step, self.micro)
        tokens, labels = (inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]
        outputs = model(*tokens)
        losses = row_losses(outputs.logits, labels)
        if self.training.objective == "dpo":
            loss = dpo_loss(-losses, -row_losses(self.masked.reference(*tokens).logits, labels), self.training.beta)
        else:  # cross entropy, averaged over the response tokens
            loss = losses.sum() / (labels[:, 1:] != IGNORE_INDEX).sum()
        return (loss, outputs) if return_outputs else loss


def _trainer(
    masked: MaskedModel, features: Features, batches: Batches, training: MaskTraining, scratch: str
) -> MaskTrainer:
    on_gpu = masked.logit_list[0].is_cuda  # the logits are trained where the model is
    arguments = training.arguments(
        training.checkpoint_dir or scratch,
        on_gpu,
        gradient_accumulation_steps=training.gradient_accumulation,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        disable_tqdm=not training.progress,
        use_cpu=not on_gpu,
        label_names=["labels"],
        bf16=training.bf16,
    )
    # nn.DataParallel would copy the layers and leave the hooks' factors where they are; DDP works.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = MaskTrainer(masked, training, arguments, data_collator=batches, train_dataset=features)
    trainer.remove_callback(PrinterCallback)
    return trainer

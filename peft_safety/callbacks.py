"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_safety.layers import protected_leaves
from peft_safety.methods.protected import assert_protected
from peft_safety.projection import coefficients


class SafetyMonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Checks that the adapter is protected when training begins, whenever it is saved, and when it ends; logs the largest leak as `safety_leak`.

    Raises:
        ProtectionError: from the event at which protection was found to be lost.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert_protected(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert_protected(kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert_protected(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None:
            logs["safety_leak"] = largest_leak(kwargs["model"])
            if state.log_history:  # the Trainer has made its own copy, the one that trainer_state.json keeps, before it calls us
                state.log_history[-1]["safety_leak"] = logs["safety_leak"]


@torch.no_grad()
def largest_leak(model: nn.Module) -> float:
    """Largest `||U^T B|| / ||B||` over the raw weights of all leaves, with one host synchronisation. Gathers sharded weights: every rank must call it."""
    worst = torch.zeros(())
    for _, leaf in protected_leaves(model):
        weight = leaf.raw()
        if leaf.basis is None or weight.is_meta:
            continue
        w = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).float()
        part = torch.linalg.matrix_norm(coefficients(leaf.basis.to(w.device), w, leaf.side))
        worst = torch.maximum(worst.to(w.device), part / torch.linalg.matrix_norm(w).clamp(min=torch.finfo(torch.float32).tiny))
    return float(worst)

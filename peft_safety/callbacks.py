"""Trainer callbacks: watch the protection while training, repair a Safe LoRA adapter at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_safety.errors import ConfigError
from peft_safety.layers import protected_leaves
from peft_safety.methods.protected import assert_protected, config_table
from peft_safety.methods.safe_lora import RepairReport, SafeLoRAConfig, apply_safe_lora, safe_lora_dir
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


class SafeLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Applies Safe LoRA, as the adapter's `SafeLoRAConfig` says, when training ends; save afterwards.

    Args:
        checkpoints: also repair a copy of the adapter of every checkpoint, in its sub-directory `safe_lora`. Training itself is not touched.

    Attributes:
        report: of the repair at the end, or None.

    Raises:
        ConfigError: at the beginning of training, if the adapter has no `SafeLoRAConfig` or was repaired already.
    """

    def __init__(self, adapter_name: str = "default", checkpoints: bool = False, progress: bool = True) -> None:
        self.adapter_name, self.checkpoints, self.progress = adapter_name, checkpoints, progress
        self.report: RepairReport | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        config = config_table(kwargs["model"]).get(self.adapter_name)
        if not isinstance(config, SafeLoRAConfig) or config.safe_lora is not None:
            found = f"a {type(config).__name__}" if not isinstance(config, SafeLoRAConfig) else "repaired already"
            raise ConfigError(f"SafeLoRACallback: adapter {self.adapter_name!r} is {found}. Train a fresh adapter made with SafeLoRAConfig.")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.checkpoints or not state.is_world_process_zero:
            return
        config = config_table(kwargs["model"])[self.adapter_name]
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        folder = folder if self.adapter_name == "default" else folder / self.adapter_name
        safe_lora_dir(folder, config.unaligned, config.aligned, folder / "safe_lora", progress=False, **config.repair_options())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        config = config_table(model)[self.adapter_name]
        options = {"adapter_name": self.adapter_name, "progress": self.progress, **config.repair_options()}
        self.report = apply_safe_lora(model, config.unaligned, config.aligned, **options)


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

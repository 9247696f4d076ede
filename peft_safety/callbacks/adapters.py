"""Trainer callbacks: watch the protection while training, repair a Safe LoRA adapter at its end."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from peft_safety.callbacks.steps import before_steps, log_value
from peft_safety.core import certificate, files, subspace_file
from peft_safety.core.projection import coefficients, project_wide
from peft_safety.errors import ConfigError
from peft_safety.layers import protected_leaves
from peft_safety.layers.adapters import config_table
from peft_safety.methods.ortho_patch import SoftPenalty
from peft_safety.methods.safe_lora import RepairReport, SafeLoRAConfig, apply_safe_lora, safe_lora_dir
from peft_safety.registry.frozen import set_task_directions
from peft_safety.registry.protection import assert_protected, protected_configs


class SafetyMonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Checks that the adapter is protected when training begins, whenever it is saved, and when it ends; logs the
    largest leak as `safety_leak`. Of a checkpoint that is pushed to the hub, the Trainer takes PEFT's two files only;
    this takes the others of a protected adapter.

    Raises:
        ProtectionError: at one of these moments: the adapter is not protected.
    """

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        assert_protected(kwargs["model"])

    on_save = on_train_end = on_train_begin

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        if not (state.is_world_process_zero and checkpoint.is_dir()):
            return
        for name in (certificate.FILE_NAME, subspace_file.FILE_NAME):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, folder / name)
            else:
                files.drop(folder / name)  # of an earlier run by another method

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None:
            log_value(logs, state, "safety_leak", largest_leak(kwargs["model"]))


class TaskDirectionsCallback(TrainerCallback):  # type: ignore[misc]
    """Makes the rows of a frozen `lora_A` (`GuardSpaceConfig(train="B")`) from the first rows of the Trainer's own
    data set when training begins. A resumed run keeps those that it has.

    Args:
        adapter_name: of the adapter with a frozen `lora_A`.
        rows: of the data set.
        batch_size: rows of a forward.

    Raises:
        ConfigError, UnsupportedLayerError: at the beginning of training, see `registry.frozen.set_task_directions`.
        CalibrationError: rows with fewer tokens than r, or without any.
    """

    def __init__(self, adapter_name: str = "default", rows: int = 32, batch_size: int = 8) -> None:
        self.adapter_name, self.rows, self.batch_size = adapter_name, rows, batch_size

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            return
        loader = kwargs["train_dataloader"]
        rows = list(islice(loader.dataset, self.rows))
        batches = [loader.collate_fn(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        set_task_directions(kwargs["model"], batches, self.adapter_name)


class SafeLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Applies Safe LoRA, as the adapter's `SafeLoRAConfig` says, when training ends; save afterwards.

    Args:
        adapter_name: of the adapter to repair.
        checkpoints: also repair a copy of the adapter of every checkpoint, in its sub-directory `safe_lora`. Training
            itself is not touched.
        progress: show a bar.

    Attributes:
        report: of the repair at the end, or None.

    Raises:
        ConfigError: at the beginning of training, if the adapter has no `SafeLoRAConfig` or was repaired already.
    """

    def __init__(self, adapter_name: str = "default", checkpoints: bool = False, progress: bool = True) -> None:
        self.adapter_name, self.checkpoints, self.progress = adapter_name, checkpoints, progress
        self.report: RepairReport | None = None

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        config = config_table(kwargs["model"]).get(self.adapter_name)
        if not isinstance(config, SafeLoRAConfig) or config.safe_lora is not None:
            state = "repaired already" if isinstance(config, SafeLoRAConfig) else f"a {type(config).__name__}"
            remedy = "Train a new one from SafeLoRAConfig."
            raise ConfigError(f"SafeLoRACallback: adapter {self.adapter_name!r} is {state}. {remedy}")

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not self.checkpoints or not state.is_world_process_zero:
            return
        config = config_table(kwargs["model"])[self.adapter_name]
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        folder = folder if self.adapter_name == "default" else folder / self.adapter_name
        options = {"progress": False, **config.repair_options()}
        safe_lora_dir(folder, config.unaligned, config.aligned, folder / "safe_lora", **options)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        config = config_table(model)[self.adapter_name]
        options = {"adapter_name": self.adapter_name, "progress": self.progress, **config.repair_options()}
        self.report = apply_safe_lora(model, config.unaligned, config.aligned, **options)


class SoftPenaltyCallback(TrainerCallback):  # type: ignore[misc]
    """Trains an adapter with `OrthoSafetyPatchConfig(mode="soft")`: adds its penalty's exact gradient right before
    each optimizer step, after accumulation, clipping and loss scaling. The loss that the user sees stays the task's;
    the penalty, without its weight, is logged as `soft_penalty`.

    Args:
        adapter_name: of the adapter in mode "soft".

    Raises:
        ConfigError: when training begins: an adapter in another mode; DeepSpeed, which takes the gradients away.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self.penalty: SoftPenalty | None = None
        self._hook: Any = None

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.on_train_end()  # a run that an exception ended has left its hook
        self.penalty = SoftPenalty(kwargs["model"], self.adapter_name)
        remedy = "Train without DeepSpeed, or use mode='hard'."
        self._hook = before_steps(type(self).__name__, kwargs["optimizer"], self.penalty.before_step, remedy)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and self.penalty is not None:
            log_value(logs, state, "soft_penalty", self.penalty.value())

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


@torch.no_grad()
def largest_leak(model: nn.Module) -> float:
    """Largest `||U^T B|| / ||B||` of all leaves, certified ones included. Gathers sharded weights: on every rank."""
    certificates = [config._certificate for config in protected_configs(model).values() if config._certificate]
    worst = torch.tensor(max((entry.leak for c in certificates for entry in c.modules.values()), default=0.0))
    for _, leaf in protected_leaves(model):
        weight = leaf.raw()
        if leaf.basis is None or weight.is_meta:
            continue
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        basis = leaf.basis.to(whole.device)
        w = project_wide(basis, whole, leaf.side).float()
        part = torch.linalg.matrix_norm(coefficients(basis, w, leaf.side))
        total = torch.linalg.matrix_norm(w).clamp(min=torch.finfo(torch.float32).tiny)
        worst = torch.maximum(worst.to(w.device), part / total)
    return float(worst)

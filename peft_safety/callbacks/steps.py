"""What callbacks need of the Trainer: a hook before each optimizer step, whole parameters, and its logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from peft_safety.core import base_weights as weights
from peft_safety.errors import ConfigError


def before_steps(what: str, optimizer: Any, hook: Callable[..., None], remedy: str) -> Any:
    """Call `hook(optimizer, args, kwargs)` before each optimizer step: after accumulation, clipping and unscaling.
    Returns a handle to remove it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper skips steps torch never sees
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{what}: a {type(optimizer).__name__} takes no hook before its step. {remedy}")
    return optimizer.register_step_pre_hook(hook)


def refuse_shards(what: str, model: nn.Module) -> None:
    """A ConfigError for a model whose parameters are split over processes."""
    split = next((name for name, p in model.named_parameters() if not weights.is_whole(p)), None)
    split = split or next(
        (n for n, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"), None
    )
    if split is not None:
        raise ConfigError(f"{what}: {split} is sharded or on the meta device. Train in one process, or with DDP.")


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def averaged(value: Tensor) -> Tensor:
    """The mean over the processes, in place: all of them go on with the same bits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def log_value(logs: dict[str, Any], state: TrainerState, name: str, value: float) -> None:
    """Into this step's logs, and into the copy in the state, which trainer_state.json keeps."""
    logs[name] = value
    if state.log_history:
        state.log_history[-1][name] = value

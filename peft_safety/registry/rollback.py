"""What a failed injection or load has changed in a model is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from peft_safety.errors import ArtifactError, PeftSafetyError
from peft_safety.registry.protection import protected_configs

FOREIGN = (LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What PEFT raises when a stored adapter does not fit."""


class Before:
    """Everything of a model that PEFT changes when it injects or loads: modules, attributes, gradient flags, the table
    of configs, and the values of an adapter that exists. The base weights' values are not copied: nothing writes them.
    """

    def __init__(self, model: nn.Module, adapter_name: str, *others: nn.Module) -> None:
        modules = dict.fromkeys((*model.modules(), *others))
        owners: list[Any] = [*modules, *protected_configs(model).values()]
        self.classes = [(module, type(module)) for module in modules]
        # bitsandbytes keeps one state on a layer and on its weight; only the two together may change
        self.attributes = [(vars(x), dict(vars(x))) for x in owners if "quant_state" not in vars(x)]
        tables = [value for x in owners for value in vars(x).values() if isinstance(value, (dict, list, set))]
        self.containers = [(table, table.copy()) for table in tables]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        own = [x for name, x in tensors.items() if adapter_name in name.split(".")]
        self.values = [(x, x.data, x.detach().clone()) for x in own]

    @torch.no_grad()
    def restore(self) -> None:
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for table, content in (*self.attributes, *self.containers):
            table.clear()
            table.extend(content) if isinstance(table, list) else table.update(content)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for tensor, data, values in self.values:
            data.copy_(values)
            tensor.data = data


@contextmanager
def undone(before: Before, what: str) -> Iterator[None]:
    """An error in the block leaves the model as it was before. What PEFT cannot load is an ArtifactError."""
    try:
        yield
    except BaseException as error:
        before.restore()
        refuse_unfit(error, what)
        raise


def refuse_unfit(error: BaseException, what: object) -> None:
    if isinstance(error, FOREIGN) and not isinstance(error, (PeftSafetyError, torch.OutOfMemoryError)):
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ArtifactError(f"{what} cannot be loaded ({reason}). Copy or save the adapter again.") from error

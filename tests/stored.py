"""Weights of a model given as tensors by module name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from peft_safety.core.checkpoints import Matrix


class TensorWeights:
    """A `Weights` without model or file."""

    def __init__(self, label: str, tensors: dict[str, Tensor]) -> None:
        self.label, self.tensors = label, tensors

    def open(self, name: str, transposed: bool = False) -> AbstractContextManager[Matrix]:
        w = self.tensors[name]
        return nullcontext(Matrix((w.shape[0], w.shape[1]), None, lambda start, stop: w[:, start:stop]))

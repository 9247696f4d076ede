"""The arms: which class the tests get for `LoraConfig`. Calibration is replaced by a random basis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import peft

LoraConfig: Any = peft.LoraConfig
"""What the copied tests import. `install` sets it before they are collected."""

ARMS: dict[str, Callable[[], Any]] = {}
SHARE = 4
"""A random basis takes one direction in this many, as the calibrated one does by default."""


def arm(function: Callable[[], Any]) -> Callable[[], Any]:
    ARMS[function.__name__] = function
    return function


@arm
def plain() -> Any:
    """PEFT's own class."""
    return peft.LoraConfig


@arm
def frozen() -> Any:
    """GuardSpace with a blind, frozen `lora_A` of random rows."""
    return _guardspace(train="B", a_init="random")


@arm
def projected() -> Any:
    """GuardSpace with both factors trained and `lora_A` projected."""
    return _guardspace(train="A")


@arm
def salora() -> Any:
    """SaLoRA: both factors trained and `lora_B` projected."""
    from peft_safety import SaLoRAConfig

    _random_bases()
    return SaLoRAConfig


def install(name: str) -> Any:
    """Make this arm's class the one that the tests import."""
    globals()["LoraConfig"] = ARMS[name]()
    return LoraConfig


def _guardspace(**defaults: str) -> Any:
    """The class itself with other defaults: a subclass would not be the one that PEFT loads."""
    from peft_safety import GuardSpaceConfig

    _random_bases()
    original = GuardSpaceConfig.__init__

    @functools.wraps(original)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**defaults, **kwargs})

    GuardSpaceConfig.__init__ = with_defaults  # type: ignore[method-assign]
    return GuardSpaceConfig


def _random_bases() -> None:
    """Calibration needs a language model and text; PEFT's tests have neither."""
    from peft_safety import GuardSpaceConfig
    from peft_safety.methods.base import ProtectedConfig

    def calibrate(self: Any, model: Any, layers: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        return random_subspace(layers, "in" if "window" in self.basis_sides else self.basis_sides[0])

    for cls in (ProtectedConfig, GuardSpaceConfig):
        cls.calibrate = calibrate  # type: ignore[method-assign]


def random_subspace(layers: Mapping[str, Any], side: Any) -> Any:
    """A `SafetySubspace` with random orthonormal columns for each layer, and random tokens for the inputs of an
    embedding; layers of one feature are left out.
    """
    import torch

    from peft_safety import SafetySubspace
    from peft_safety.core import base_weights as weights
    from peft_safety.core import kinds
    from peft_safety.core.projection import orthonormalize
    from peft_safety.core.subspace import NARROW

    bases, narrow = {}, []
    for index, (name, layer) in enumerate(layers.items()):
        size, groups = weights.shape(layer)[0 if side == "out" else 1], kinds.groups(layer) if side == "out" else 1
        if size // groups < 2:
            narrow.append(name)
            continue
        generator = torch.Generator().manual_seed(index)
        if kinds.is_embedding(layer) and side == "in":
            bases[name] = {side: torch.randperm(size, generator=generator)[: max(1, size // SHARE)]}
            continue
        shape = size // groups, max(1, size // groups // SHARE)
        blocks = [orthonormalize(torch.randn(*shape, generator=generator)) for _ in range(groups)]
        bases[name] = {side: torch.block_diag(*blocks)}
    return SafetySubspace(bases, provenance={"method": "random", "left_out": {NARROW: narrow}})

"""What `SafetySubspace.from_activations` and `from_weights` call: they warn once about layers that are left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_safety.calibration.activations import estimate
from peft_safety.calibration.leaving_out import warn_left_out
from peft_safety.calibration.weights import estimate_from_weights
from peft_safety.core.subspace import ESTIMATORS, SafetySubspace

__all__ = ["SafetySubspace", "from_activations", "from_weights"]


def from_activations(model: nn.Module, data: Any, **options: Any) -> SafetySubspace:
    return _announced(estimate(model, data, **options))


def from_weights(model: nn.Module, **options: Any) -> SafetySubspace:
    return _announced(estimate_from_weights(model, **options))


def _announced(subspace: SafetySubspace) -> SafetySubspace:
    left_out, what = subspace.left_out, "the subspace, and so of an adapter on it"
    warn_left_out(left_out, len(left_out) + len(subspace.bases), what, stacklevel=4)
    return subspace


ESTIMATORS |= {"activations": from_activations, "weights": from_weights}

"""From PEFT's LoRA layers to updates: which adapters can be audited, and what their factors are."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from peft_safety import weights
from peft_safety.errors import ConfigError, UnsupportedLayerError
from peft_safety.layers import stored_factors
from peft_safety.methods.base import INITS
from peft_safety.orthogonality.metrics import Update, decompose

UNFIT = {
    "use_dora": "DoRA rescales the update after lora_B",
    "lora_bias": "the bias of lora_B is an update of its own",
    "use_qalora": "QALoRA pools inputs inside its own layers",
    "use_bdlora": "BD-LoRA has its own block-diagonal lora_B",
    "kasa_config": "KaSA has its own singular values between the factors",
    "arrow_config": "Arrow routes between adapters",
    "velora_config": "VeLoRA replaces lora_A by its own layer",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "alora_invocation_tokens": "activated LoRA updates some tokens only",
    "target_parameters": "fused 3-D (MoE) parameters have no singular vectors of their own",
}
ORIGINAL_INITS = (*INITS, "eva")
"""Values of `init_lora_weights` that leave the base weight as it was. With the others `s B A` is the update of a
rewritten weight.
"""


def check_config(config: Any, what: str) -> None:
    """Refuse an adapter whose update is not `s B A` on the original base weight (or, with a residual of this package,
    `s (B A - B0 A0)`).

    Raises:
        ConfigError: names the feature.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{what} is a {type(config).__name__}, whose update is no product of two factors. Audit a LoRA adapter."
        )
    for name, reason in UNFIT.items():
        if getattr(config, name, None):
            raise ConfigError(f"{what}: {name} cannot be audited: {reason}. Audit an adapter trained without it.")
    if config.init_lora_weights not in ORIGINAL_INITS:
        raise ConfigError(
            f"{what}: init_lora_weights={config.init_lora_weights!r} rewrote the base weight. Convert it to a plain "
            "LoRA on the original base first."
        )


def update_of(name: str, layer: LoraLayer, adapter: str) -> Update:
    """The update of one layer, as its forward computes it.

    Raises:
        ConfigError: an adapter is merged into the layer, or a factor is not finite. UnsupportedLayerError: a factor
            that cannot be read here.
    """
    if layer.merged:
        raise ConfigError(f"{name}: an adapter is merged into the base weight. Call unmerge_adapter() first.")
    leaves = layer.lora_A[adapter], layer.lora_B[adapter]
    if not all(weights.is_whole(leaf.weight) for leaf in leaves):
        raise UnsupportedLayerError(
            f"{name}: its factors are sharded or on the meta device. Save the adapter and audit the directory."
        )
    a, b = (factor.cpu().double() for factor in stored_factors(*leaves))
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigError(
            f"{name}: lora_A {tuple(a.shape)} or lora_B {tuple(b.shape)} holds NaN or Inf. Load the last good "
            "checkpoint."
        )
    return decompose(a, b, float(layer.scaling[adapter]))

"""Which options of LoRA go with a plain update, and which with a protected one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from peft_safety.errors import ConfigError

MAX_ALPHA = 1e6
MAX_RANK = 65_536
INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that start from a zero update and leave the base weight unchanged."""
ORIGINAL_INITS = (*INITS, "eva")
"""Values of `init_lora_weights` that leave the base weight unchanged."""
NOT_PLAIN = {
    "use_dora": "DoRA rescales the update after lora_B",
    "lora_bias": "the bias of lora_B is an update of its own",
    "use_qalora": "QALoRA pools inputs inside its own layers",
    "use_bdlora": "BD-LoRA has its own block-diagonal lora_B",
    "kasa_config": "KaSA rewrites the base weight and has its own singular values between the factors",
    "arrow_config": "Arrow routes between adapters",
    "velora_config": "VeLoRA stores a direction beside the factors",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "alora_invocation_tokens": "activated LoRA updates some tokens only",
    "target_parameters": "PEFT adds these updates to a weight and calls no lora_A, so that only a frozen one is blind",
}
"""LoRA features whose update is not `s B A` on the original base weight, and why."""
NOT_PROTECTED = {
    **NOT_PLAIN,
    "loftq_config": "LoftQ rewrites the base weight",
    "corda_config": "CorDA rewrites the base weight",
    "lora_ga_config": "LoRA-GA rewrites the base weight",
    "eva_config": "EVA initializes the factors itself",
    "layer_replication": "replicated layers rebuild the base model",
    "megatron_config": "Megatron's parallel layers shard lora_B but not the basis",
}
"""LoRA features that a protected adapter cannot have."""
WITH_FROZEN_A = ("alora_invocation_tokens", "target_parameters")
"""Those among them that one with a frozen `lora_A` can have."""
SAME_UPDATE = ("velora_config",)
"""Those that change gradients only. The file of such an adapter holds more than factors."""
WITH_PROJECTION = ("alora_invocation_tokens", *SAME_UPDATE)
"""Those that one with projected factors can have: they say which tokens are updated, or how the gradient is made."""


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Refuse, by a ConfigError, ranks, alphas, dropouts and patterns of them that PEFT accepts but are not usable."""
    values = {}
    for kind in ("rank_pattern", "alpha_pattern"):
        table = fields.get(kind) or {}
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: {kind} is a {type(table).__name__}. Use a table of names and numbers.")
        values[kind] = {f"{kind}[{name!r}]": value for name, value in table.items()}
    for field, r in {"r": fields.get("r"), **values["rank_pattern"]}.items():
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= MAX_RANK:
            raise ConfigError(f"{where}: {field}={r!r} is no rank. Use an integer from 1 to {MAX_RANK}.")
    for field, alpha in {"lora_alpha": fields.get("lora_alpha"), **values["alpha_pattern"]}.items():
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= MAX_ALPHA:
            raise ConfigError(f"{where}: {field}={alpha!r}. Use a finite number above 0 and at most {MAX_ALPHA:g}.")
    dropout = fields.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"{where}: lora_dropout={dropout!r}. Use a number in [0, 1).")


def check_features(
    config: Any,
    what: str,
    features: Mapping[str, str] = NOT_PLAIN,
    inits: tuple[bool | str, ...] = ORIGINAL_INITS,
    allowed: Collection[str] = (),
) -> None:
    """Refuse, by a ConfigError, an adapter that is no LoRA, or that has one of these features (but those `allowed`) or
    another init.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{what} is a {type(config).__name__}, not a LoRA adapter. Give a LoRA adapter.")
    makers = {field.name: field.default_factory for field in dataclasses.fields(LoraConfig)}
    usual = {name: maker() for name, maker in makers.items() if maker is not dataclasses.MISSING}
    for name, reason in features.items():
        value = getattr(config, name, None)
        empty = isinstance(value, dict) and value != usual.get(name)  # PEFT takes {} for a config, too
        if (value or empty) and name not in allowed:
            raise ConfigError(f"{what}: {name} is not supported: {reason}. Use LoRA without it.")
    if config.init_lora_weights not in inits:
        raise ConfigError(
            f"{what}: init_lora_weights={config.init_lora_weights!r} rewrites the base weight or is untested. Use one "
            f"of {inits}, or convert the adapter to a plain LoRA on the original base first."
        )


def check_plain(config: Any, what: str, allowed: Collection[str] = ()) -> None:
    """Refuse, by a ConfigError, an adapter that is protected or whose update is not `s B A` on the base weights."""
    if hasattr(config, "safety_artifact"):
        kind = type(config).__name__
        raise ConfigError(f"{what} is protected ({kind}); the result would not be. Use peft_safety.export_lora first.")
    check_features(config, what, allowed=allowed)

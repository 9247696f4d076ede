"""Wrapped around PEFT's injection: the protected leaves are put in, or the model is left as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any

from peft import PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core.names import base_model, listed, pin, places, walk
from peft_safety.core.parameters import own_place
from peft_safety.core.snapshot import named
from peft_safety.errors import ConfigError, PeftSafetyError
from peft_safety.layers import FrozenLinear, ProtectedLinear
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry.attach import attach
from peft_safety.registry.checks import check_ahead
from peft_safety.registry.reuse import private
from peft_safety.registry.rollback import Before, refuse_unfit
from peft_safety.registry.tuners import adopt

HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The heads that PEFT's models of these tasks train whole. They add them to the given config after injection, where
the model's own copy no longer gets them."""
MODELS = {PeftModelForTokenClassification: "TOKEN_CLS", PeftModelForQuestionAnswering: "QUESTION_ANS"}
"""These models. One that is built by itself may have a config without a `task_type`."""
BUILDERS = 6
"""Calls between such a model's constructor and the injection, this module's own included."""
LOADERS = ("from_pretrained", "load_adapter")


def inject_adapter(
    original: Callable[..., None], self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """PEFT builds its layers, then `attach` puts the protected leaves in. If anything fails, all of it is undone."""
    given = self.peft_config[adapter_name]
    known: dict[str, ProtectedConfig] = next(
        (vars(m)["_protected"] for m in model.modules() if "_protected" in vars(m)), {}
    )
    if not isinstance(given, ProtectedConfig):
        _check_unprotected(model, adapter_name, given, known.get(adapter_name))
        _warn_uncertain(given)
        return original(self, model, adapter_name, *args, **kwargs)
    config = private(given)
    if (heads := HEADS.get(str(config.task_type or _task_of_caller()))) is not None:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    config._combined = getattr(self, "_combining", False)
    if config._stored is not None:
        pin(config, config._modules, places(model))
    if not config.inference_mode:
        weights.stay_unpacked(model)
    _expand_all_linear(model, config)
    modules = dict(model.named_modules())
    where = [(own, name) for own, name, _ in walk(model, shared=True)]
    before = Before(model, adapter_name, self)
    try:
        with named(given._snapshot):
            check_ahead(model, given)
            adopt(self, given)
            self.peft_config[adapter_name] = config
            config._injecting = True
            original(self, model, adapter_name, *args, **kwargs)
            left_out = attach(model, adapter_name, config, self.peft_config)
        # `places` of a mixed model, which is injected into from outside, would have PEFT's prefix
        gone = {own_place(name) for name in left_out}
        excluded = {place for own, place in where if own in gone}
        _take_out(adapter_name, modules, excluded)
        self.targeted_module_names = [name for name in self.targeted_module_names if name not in excluded]
    except BaseException as error:
        before.restore()
        _reset_table(model, adapter_name, known.get(adapter_name) if before.values else None)
        if isinstance(error, ValueError) and not isinstance(error, PeftSafetyError):  # PEFT's: no module matched
            remedy = "Give a list of names that the model has, 'all-linear', or a pattern of whole names ('.*q_proj')."
            raise ConfigError(f"{type(config).__name__}: {error} {remedy}") from error
        if given._snapshot is not None:
            refuse_unfit(error, given._snapshot.source)
        raise
    finally:
        config._injecting = False
    vars(base_model(model))["_protected"] = {**known, adapter_name: config}
    if config._snapshot is not None:
        if _loads():  # `storage.load_adapter` is next
            vars(self)["_pending"] = (adapter_name, config._snapshot, before)
        config._snapshot = config._stored = None
    return None


def _warn_uncertain(config: Any) -> None:
    """An ordinary LoRA that is only used is the same with and without a certificate; one that is trained is not."""
    source = vars(config).get("_uncertain")
    if source is not None and not config.inference_mode:
        warnings.warn(
            f"{source} trains as an ordinary LoRA. Whether it has a safety_certificate.json, which would protect it, "
            "is unknown: the Hub cannot be reached, and its cache does not say. Load it once with a connection.",
            stacklevel=2,
        )


def _task_of_caller() -> str | None:
    """The task of the model of PEFT's whose constructor is waiting for this injection; None of any other caller."""
    frame = inspect.currentframe()
    for _ in range(BUILDERS):
        builder = None if frame is None else frame.f_locals.get("self")
        task = next((task for kind, task in MODELS.items() if isinstance(builder, kind)), None)
        if frame is None or task is not None:
            return task
        frame = frame.f_back
    return None


def _loads() -> bool:
    """Whether PEFT loads an adapter's factors after this injection. From `get_peft_model` it does not."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name not in LOADERS:
        frame = frame.f_back
    return frame is not None


def _expand_all_linear(model: nn.Module, config: ProtectedConfig) -> None:
    """Replace "all-linear" by the names that PEFT means. PEFT itself would add parameters of a mixture of experts,
    most of which cannot be protected.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    experts = [name for name, parameter in model.named_parameters() if "expert" in name and parameter.ndim == 3]
    targeted = tuple(f".{name}" for name in config.target_parameters or ())
    named = {name.rpartition(".")[0] for name in experts if f".{name}".endswith(targeted)}
    fused = sorted({name.rpartition(".")[0] for name in experts} - named)
    if fused:
        warnings.warn(
            f"the fused parameters of {len(fused)} modules ({listed(fused)}) are no linear layers, and get no "
            "adapter. With train='B', target_parameters=['gate_up_proj', 'down_proj'] protects the experts.",
            stacklevel=4,
        )


def _check_unprotected(model: nn.Module, adapter_name: str, given: Any, existing: ProtectedConfig | None) -> None:
    """Refuse an ordinary adapter under the name of a protected one, whose layers it would replace."""
    for name, module in model.named_modules():
        if isinstance(module, (ProtectedLinear, FrozenLinear)) and name.rpartition(".")[2] == adapter_name:
            _reset_table(model, adapter_name, existing)
            raise ConfigError(
                f"{name}: adapter {adapter_name!r} is protected, and a {type(given).__name__} of this name would "
                "replace its layers by ordinary ones. Use another adapter_name, or delete_adapter first."
            )


def _reset_table(model: nn.Module, adapter_name: str, existing: ProtectedConfig | None) -> None:
    """PEFT enters a config into the model's table before it injects; transformers marks the model, too."""
    table = getattr(model, "peft_config", None)
    if isinstance(table, dict):
        table.pop(adapter_name, None)
        table.update({} if existing is None else {adapter_name: existing})
    if not table:
        vars(model).pop("_hf_peft_config_loaded", None)


def _take_out(adapter_name: str, before: dict[str, nn.Module], names: Collection[str]) -> None:
    """Put replaced modules of these names back, and take the adapter out of layers that existed before."""
    for name in names:
        module = before[name]
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(adapter_name)
        parent, _, child = name.rpartition(".")
        if name and parent in before and getattr(before[parent], child, None) is not module:
            setattr(before[parent], child, module)

"""Layers that cannot be protected, and models that have adapters already: a typed error, the model is as it was."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_safety import SafetySubspace, SaLoRAConfig, assert_protected
from peft_safety.errors import (
    ArtifactError,
    ConfigError,
    SubspaceError,
    UnsupportedLayerError,
)
from tests.hostile import tools
from tests.hostile.injecting import inject, refused
from tests.hostile.tools import Q0
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("quiet")]
NAN = float("nan")


# --- layers
# ---


class Zoo(nn.Module):
    """Layers that PEFT adapts and this package does not protect, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.embedding = nn.Embedding(10, 16, max_norm=1.0)
        self.conv = nn.Conv2d(3, 16, 3, dilation=2)
        self.conv1 = nn.Conv1d(3, 16, 3, dilation=2)
        self.attention = nn.MultiheadAttention(16, 4)


@pytest.mark.parametrize("kind", ["embedding", "conv", "conv1", "attention"])
def test_a_layer_that_cannot_be_protected_is_refused(kind: str) -> None:
    zoo = Zoo()
    basis = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))).Q
    subspace = SafetySubspace({name: {"out": basis} for name in ("linear", kind, "attention.out_proj")})
    refused(
        zoo,
        lambda: inject(zoo, subspace, target_modules=["linear", kind]),
        UnsupportedLayerError,
        kind,
        type(getattr(zoo, kind)).__name__,
    )


def test_a_mixture_of_experts_in_one_tensor_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.ones(4, 8, 8))

    model = Experts()
    subspace = SafetySubspace({"linear": {"out": torch.eye(8)[:, :2]}})
    refused(
        model,
        lambda: inject(model, subspace, target_modules=["linear"], target_parameters=["experts.weight"]),
        ConfigError,
        "target_parameters",
    )


# --- a model that has adapters already
# ---


def test_a_failing_second_adapter_leaves_the_good_one_at_work(space: SafetySubspace, tmp_path: Path) -> None:
    model = tools.trained(tiny_llama(), space)
    ids = tools.tokens()
    expected = model(ids).logits
    damaged = tools.save_good(tmp_path / "damaged")
    tools.tensors(tools.put(tools.B, tools.poke(NAN)))(damaged)
    other = tools.save_good(tmp_path / "other", base_seed=1)
    fewer = SaLoRAConfig(r=4, subspace=space.restricted([Q0]), target_modules="all-linear")
    refused(model, lambda: model.add_adapter("second", fewer), SubspaceError, "no 'out' basis")
    refused(model, lambda: model.load_adapter(str(damaged), "second"), ArtifactError, "NaN")
    refused(model, lambda: model.load_adapter(str(other), "second"), SubspaceError, "other base weights")
    refused(model, lambda: model.load_adapter(str(damaged), "default"), ArtifactError, "NaN")
    refused(model, lambda: model.load_adapter(str(other), "default"), SubspaceError, "other base weights")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(model(ids).logits, expected)
    assert_protected(model)


def test_transformers_own_adapter_methods_leave_no_trace_of_a_failure(
    base: nn.Module, space: SafetySubspace, tmp_path: Path
) -> None:
    other = tools.save_good(tmp_path / "other", base_seed=1)
    fewer = SaLoRAConfig(r=4, subspace=space.restricted([Q0]), target_modules="all-linear")
    refused(base, lambda: base.add_adapter(fewer), SubspaceError, "no 'out' basis")
    refused(base, lambda: inject_adapter_in_model(fewer, base), SubspaceError, "no 'out' basis")
    refused(base, lambda: base.load_adapter(str(other)), SubspaceError, "other base weights")
    model = tiny_llama()
    model.add_adapter(SaLoRAConfig(r=4, subspace=space, target_modules="all-linear"), "good")
    refused(model, lambda: model.add_adapter(fewer, "second"), SubspaceError, "no 'out' basis")
    refused(model, lambda: model.load_adapter(str(other), "second"), SubspaceError, "other base weights")
    assert list(model.peft_config) == ["good"]
    assert model.active_adapters() == ["good"]
    assert_protected(model)


def test_a_plain_lora_beside_it_survives_too(space: SafetySubspace) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "plain")
    ids = tools.tokens()
    expected = model(ids).logits
    fewer = SaLoRAConfig(r=4, subspace=space.restricted([Q0]), target_modules=["q_proj", "k_proj"])
    refused(model, lambda: model.add_adapter("second", fewer), SubspaceError, "no 'out' basis")
    assert torch.equal(model(ids).logits, expected)
    assert model.active_adapters == ["plain"]


def test_every_feature_of_this_peft_is_either_known_or_refused() -> None:
    """A new LoraConfig field may be a new way around the projection: it must be judged before it is let through."""
    from peft_safety.core.features import NOT_PROTECTED

    judged_harmless = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules",
        "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices",
        "qalora_group_size", "runtime_config",
        "ensure_weight_tying",
    }  # fmt: skip
    unknown = set(LoraConfig.__dataclass_fields__) - judged_harmless - set(NOT_PROTECTED)
    assert not unknown, f"peft {peft.__version__} has new fields"

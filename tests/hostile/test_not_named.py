"""Nothing changes that the config does not name: no base weight, no scaling, no plain adapter in a protected merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_safety import SafetySubspace, SaLoRAConfig, assert_protected, verify
from peft_safety.errors import ArtifactError, ConfigError, LossyMergeError, PeftSafetyError, ProtectionError
from peft_safety.methods.safe_lora import safe_lora_dir
from tests.hostile import tools
from tests.peft.cells import protected
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("quiet")]


@pytest.mark.parametrize("field", ["kasa_config", "arrow_config", "monteclora_config"])
def test_an_empty_config_of_a_feature_is_that_feature(field: str, space: SafetySubspace, tmp_path: Path) -> None:
    """PEFT asks whether it is None."""
    if field not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"this PEFT has no {field}")
    with pytest.raises(ConfigError, match=field):
        SaLoRAConfig(subspace=space, **{field: {}})
    directory, base = tools.save_good(tmp_path / "a"), tiny_llama()
    tools.fields(**{field: {}})(directory)
    with tools.unchanged(base), pytest.raises(PeftSafetyError, match=field):
        PeftModel.from_pretrained(base, str(directory))


def test_an_expression_in_modules_to_save_is_not_run(tmp_path: Path) -> None:
    directory, base = tools.save_good(tmp_path / "a"), tiny_llama()
    tools.fields(modules_to_save=["([a-z_.0-9]+)+!"])(directory)
    with tools.unchanged(base), pytest.raises(ArtifactError, match="modules_to_save"):
        PeftModel.from_pretrained(base, str(directory))


@pytest.mark.parametrize("rows", [[10**9], "x", [5, 6]])
def test_token_rows_that_are_not_in_the_adapter_are_refused(rows: Any, tmp_path: Path) -> None:
    directory, base = tools.save_good(tmp_path / "a"), tiny_llama()
    tools.fields(trainable_token_indices=rows)(directory)
    for call in (lambda: PeftModel.from_pretrained(base, str(directory)), lambda: base.load_adapter(str(directory))):
        with tools.unchanged(base), pytest.raises(PeftSafetyError):
            call()


@pytest.mark.parametrize("end", ["model.embed_tokens", "lm_head"])
def test_an_embedding_in_the_adapter_replaces_none_of_the_model(end: str, tmp_path: Path) -> None:
    directory, base = tools.save_good(tmp_path / "a"), tiny_llama()
    key, own = f"{tools.PREFIX}{end}.weight", base.get_submodule(end).weight.detach()
    tools.tensors(lambda t: t.update({key: own + 3.0}), listed=(key,))(directory)
    for call in (lambda: PeftModel.from_pretrained(base, str(directory)), lambda: base.load_adapter(str(directory))):
        with tools.unchanged(base), pytest.raises(ArtifactError, match=rf"{end}\.weight.*does not name it"):
            call()
    tools.tensors(lambda t: t.update({key: own.clone()}), listed=(key,))(directory)
    assert_protected(PeftModel.from_pretrained(base, str(directory)))


def test_hot_swapping_checks_the_fit(tmp_path: Path) -> None:
    good, wide = tools.save_good(tmp_path / "good"), tools.save_good(tmp_path / "wide")
    tools.tensors(lambda t: t.update({tools.A: torch.cat([t[tools.A]] * 2, 1)}))(wide)
    model = PeftModel.from_pretrained(tiny_llama(), str(good)).eval()
    with tools.unchanged(model), pytest.raises(PeftSafetyError, match="q_proj"):
        hotswap_adapter(model, str(wide), "default")
    assert_protected(model)


def test_a_plain_adapter_is_not_merged_with_a_protected_one(space: SafetySubspace) -> None:
    model = tools.trained(tiny_llama(), space)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with tools.unchanged(model), pytest.raises(ProtectionError, match="plain"):
            merge()
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    model.merge_adapter(["plain"])


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_layer_is_not_merged_into_its_quantized_weight(base: str) -> None:
    model = protected(base, "lora", trained=True)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    with tools.unchanged(model), pytest.raises(LossyMergeError, match="would miss"):
        layer.merge()
    assert not layer.merged


def test_a_repaired_adapter_is_sealed_with_its_scaling(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "aligned")
    raw: nn.Module = tiny_llama()
    with torch.no_grad():
        for name, parameter in raw.named_parameters():
            if "proj" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    raw.save_pretrained(tmp_path / "raw")
    plain = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    plain.save_pretrained(str(tmp_path / "plain"))
    repaired, options = tmp_path / "repaired", {"select": "all", "progress": False}
    safe_lora_dir(tmp_path / "plain", tmp_path / "raw", tmp_path / "aligned", repaired, **options)
    verify(repaired)
    path = repaired / tools.MANIFEST
    fields = json.loads(path.read_text())
    for change in (
        {"lora_alpha": 800},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 99}},
        {"target_modules": ["q_proj"]},
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ProtectionError, match="config has changed"):
            verify(repaired)
    path.write_text(json.dumps(fields))
    verify(repaired)

"""What plain LoRA accepts when it saves or merges: `safe_serialization=False`, and factors that are not finite."""

import pytest
import torch
from peft import PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.utils.hotswap import hotswap_adapter

from peft_safety import SafetySubspace, SaLoRAConfig, verify
from peft_safety.core import files
from peft_safety.core.plain_lora import MANIFEST, read_manifest
from peft_safety.errors import ConfigError, ProtectionError
from tests.peft import cells
from tests.peft.frozen_cells import frozen


@pytest.mark.parametrize("form", ["salora", "frozen"])
@pytest.mark.parametrize("positional", [True, False])
def test_no_pickle_is_written(form, positional, tmp_path):
    model = frozen() if form == "frozen" else cells.protected(trained=True)
    named = {} if positional else {"safe_serialization": False, "state_dict": model.state_dict()}
    with pytest.warns(UserWarning, match="is saved as safetensors all the same"):
        model.save_pretrained(tmp_path, *([False, ["default"]] if positional else []), **named)
    assert sorted(path.suffix for path in tmp_path.glob("adapter_model*")) == [".safetensors"]
    verify(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path).eval()
    cells.assert_same_function(cells.logits(loaded), cells.logits(model.eval()))


@pytest.mark.parametrize("form", ["salora", "frozen"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_adapter_is_not_merged_and_peft_s_words_say_so(form, factor, value):
    model = frozen() if form == "frozen" else cells.protected(trained=True)
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    next(p for name, p in model.named_parameters() if factor in name).data[0] = value
    for safe in (True, False):
        says = "NaNs detected in the merged weights. The adapter default seems to be broken"
        with pytest.raises(ProtectionError, match=says):
            model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("form", ["salora", "frozen"])
def test_a_merged_adapter_is_not_swapped(form, tmp_path):
    model = frozen() if form == "frozen" else cells.protected(trained=True)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged into the base weights"):
        hotswap_adapter(model, str(tmp_path), "default")
    model.unmerge_adapter()
    hotswap_adapter(model, str(tmp_path), "default")


@pytest.mark.parametrize(
    ("cls", "heads"),
    [(PeftModelForTokenClassification, {"classifier", "score"}), (PeftModelForQuestionAnswering, {"qa_outputs"})],
)
def test_a_model_of_a_task_that_the_config_does_not_name(cls, heads):
    class Model(torch.nn.Module):
        prepare_inputs_for_generation = None

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(10, 10)
            for head in heads:
                setattr(self, head, torch.nn.Linear(10, 2))

    base = Model()
    space = cells.random_subspace(base, ["linear"])
    with pytest.warns(UserWarning, match="no projection constrains"):
        model = cls(base, SaLoRAConfig(target_modules=["linear"], subspace=space))
    assert set(model.peft_config["default"].modules_to_save) == heads
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(f"{head}.modules_to_save" in name for name in trained) for head in heads)


def test_the_names_of_many_modules_are_read_again(tmp_path):
    """As of a mixture with thousands of experts."""
    names = [f"{'experts.' * 20}{i}.up_proj" for i in range(7000)]
    basis, spectrum = torch.eye(8)[:, :2], torch.ones(2)
    space = SafetySubspace(
        {name: {"out": basis} for name in names},
        spectra={name: {"out": spectrum} for name in names},
        fingerprints={name: torch.ones(256) for name in names},
    )
    config = SaLoRAConfig(subspace=space, target_modules=names)
    config._modules = {name: (config.r, config.lora_alpha) for name in names}
    config.save_pretrained(tmp_path)
    assert (tmp_path / MANIFEST).stat().st_size > files.MAX_JSON_BYTES
    assert read_manifest(tmp_path)["target_modules"] == sorted(names)
    assert SafetySubspace.load(tmp_path).digest == space.digest

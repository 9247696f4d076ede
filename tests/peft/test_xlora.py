"""X-LoRA mixes protected adapters: it saves each of them whole, beside its own classifier."""

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model

from peft_safety import assert_protected, verify
from tests.peft import cells, embedding_cells
from tests.peft.frozen_cells import frozen
from tests.peft.guard_cells import subspace


def adapter(form, seed, **options):
    torch.manual_seed(seed)
    if form == "frozen":
        model = frozen(**options)
        with torch.no_grad():
            for name, factor in model.named_parameters():
                factor.add_(0.1 * torch.randn_like(factor) if "lora_B" in name else 0)
        return model
    return cells.protected(init="task" if form == "residual" else "lora", trained=True, seed=seed, **options)


def mixed(folders, base=None, **options):
    base = cells.base_model() if base is None else base
    base.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters=folders, **options)
    torch.manual_seed(0)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("form", ["frozen", "salora", "residual"])
def test_each_adapter_is_saved_whole(form, tmp_path):
    folders, alone = {}, {}
    for i, targets in enumerate((["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj"])):
        folders[str(i)] = str(tmp_path / f"adapter{i}")
        model = adapter(form, seed=i, target_modules=targets)
        model.save_pretrained(folders[str(i)])
        alone[str(i)] = cells.logits(model.eval())
    model, tokens = mixed(folders), cells.tokens()
    assert_protected(model)
    got = cells.logits(model, tokens)
    assert float((got - cells.logits(cells.base_model(), tokens)).norm()) > 1e-3
    model.save_pretrained(tmp_path / "mixed")
    base = cells.base_model()
    base.config.use_cache = False
    torch.manual_seed(0)  # PEFT 0.21.2 does not save those layers of the classifier that are numbered as adapters are
    loaded = PeftModel.from_pretrained(base, tmp_path / "mixed").eval()
    cells.assert_same_function(cells.logits(loaded, tokens), got)
    for name, expected in alone.items():
        folder = tmp_path / "mixed" / name
        found = verify(folder, cells.base_model(), *([subspace(cells.base_model())] if form == "frozen" else []))
        assert (found.base_checked, found.worst_leak <= 2e-6) == (True, True)
        cells.assert_same_function(
            cells.logits(PeftModel.from_pretrained(cells.base_model(), folder).eval()), expected
        )


def test_what_it_trained_of_an_adapter_is_saved(tmp_path):
    adapter("frozen", seed=0).save_pretrained(tmp_path / "adapter")
    model = mixed({"0": str(tmp_path / "adapter")}, use_trainable_adapters=True)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
    with torch.no_grad():
        layer.lora_B["0"].weight += 1
    model.save_pretrained(tmp_path / "mixed")
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "mixed" / "0")
    stored = next(m for n, m in loaded.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
    torch.testing.assert_close(stored.lora_B["default"].weight, layer.lora_B["0"].weight)


@pytest.mark.parametrize("kind", embedding_cells.INPUTS)
def test_adapters_on_embeddings_are_saved_whole(kind, tmp_path):
    alone = embedding_cells.train(embedding_cells.protected(kind))
    alone.save_pretrained(tmp_path / "adapter")
    model = mixed({"0": str(tmp_path / "adapter")}, base=embedding_cells.base_model())
    model.save_pretrained(tmp_path / "mixed")
    loaded = PeftModel.from_pretrained(embedding_cells.base_model(), tmp_path / "mixed" / "0").eval()
    assert_protected(loaded)
    torch.testing.assert_close(embedding_cells.outputs(loaded), embedding_cells.outputs(alone))

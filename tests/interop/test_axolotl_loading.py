"""What axolotl's loader does around the plugin: it redraws factors, and its trainers make adapters themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from peft_safety import assert_protected
from peft_safety.errors import ConfigError, ProtectionError
from tests.interop.framework_stand_ins import Settings, install_axolotl, load_lora, loaded, redraw
from tests.peft import cells, guard_cells
from tests.tiny import tiny_llama, tiny_tokenizer

FORMS = {
    "frozen": ("guardspace", {}),
    "window": ("guardspace", {"train": "window", "window": 8, "task_data": guard_cells.TASK}),
    "projected": ("guardspace", {"train": "A"}),
    "residual of guardspace": ("guardspace", {"init": "guardspace", "init_data": guard_cells.TASK}),
    "residual of salora": ("salora", {"init": "task", "task_data": guard_cells.TASK, "task_rank": 6}),
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    install_axolotl(monkeypatch)
    from peft_safety.integrations import axolotl

    return axolotl.GuardSpacePlugin()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subspaces() -> dict[str, Any]:
    model = tiny_llama()
    return {"guardspace": guard_cells.subspace(model), "salora": cells.random_subspace(model, cells.targets("linear"))}


@pytest.fixture
def settings(subspaces: dict[str, Any]) -> Any:
    def settings(form: str = "frozen", **keys: Any) -> Settings:
        method, options = FORMS[form]
        own = Settings(method=method, subspace=subspaces[method], **options)
        return Settings(adapter=method, peft_safety=own, **keys)

    return settings


def bare(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_new_adapter_is_not_redrawn(plugin: Any, base: Path, settings: Any, form: str) -> None:
    model = loaded(plugin, settings(form), bare(base)).eval()
    assert_protected(model)
    cells.assert_same_function(cells.logits(model), cells.logits(bare(base)))


@pytest.mark.parametrize("form", ["frozen", "residual of guardspace", "residual of salora"])
def test_another_draw_is_an_error(plugin: Any, base: Path, settings: Any, form: str) -> None:
    """Whoever draws it: a later release, or another plugin."""
    plugin.post_lora_load = lambda cfg, model: redraw(model)
    with pytest.raises(ProtectionError, match="has changed" if form == "frozen" else "is not zero"):
        loaded(plugin, settings(form), bare(base))


def test_a_filled_factor_is_an_error(plugin: Any, base: Path, settings: Any) -> None:
    plugin.post_lora_load = lambda cfg, model: cells.perturb(model)
    with pytest.raises(ProtectionError, match="is not zero"):
        loaded(plugin, settings("projected"), bare(base))


def test_a_saved_adapter_goes_on(plugin: Any, base: Path, settings: Any, tmp_path: Path) -> None:
    """With what it has learned, and with its own directions."""
    first = loaded(plugin, settings(), bare(base))
    assert plugin.rows_of_trainer, "its directions come from the rows"
    for name, weight in first.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    first.save_pretrained(tmp_path / "adapter")
    second = loaded(plugin, settings(lora_model_dir=str(tmp_path / "adapter")), bare(base)).eval()
    assert not plugin.rows_of_trainer
    cells.assert_same_function(cells.logits(second), cells.logits(first.eval()))


@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto"])
def test_a_trainer_that_makes_the_adapter_cannot_continue_one(plugin: Any, base: Path, settings: Any, rl: str) -> None:
    assert not hasattr(loaded(plugin, settings(rl=rl), bare(base)), "peft_config")
    with pytest.raises(ConfigError, match="lora_model_dir"):
        loaded(plugin, settings(rl=rl, lora_model_dir="adapter"), bare(base))


def test_kernels_that_replace_the_attention_leave_no_forward_before_the_adapter(
    plugin: Any, base: Path, settings: Any
) -> None:
    assert_protected(loaded(plugin, settings(lora_qkv_kernel=True), bare(base)))
    for options in ({"task_data": guard_cells.TASK}, {"subspace": "auto"}):
        cfg = settings(lora_o_kernel=True)
        cfg.peft_safety.update(options)
        with pytest.raises(ConfigError, match="lora_o_kernel"):
            loaded(plugin, cfg, bare(base))


def test_other_adapters_are_left_alone(plugin: Any, base: Path) -> None:
    cfg = Settings(adapter="lora")
    assert plugin.load_adapter(bare(base), cfg) is None
    plugin.post_model_load(cfg, load_lora(bare(base), cfg)[0])

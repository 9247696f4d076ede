"""A new method is one file and one line in `registry/types.py`: a toy one, from its first step to loading it again."""

import importlib.util
import sys

import pytest
from peft import PeftModel, get_peft_model, mapping

from peft_safety import assert_protected, verify
from peft_safety.core.adapter_dir import check_adapter
from peft_safety.errors import ArtifactError
from peft_safety.registry import registration, types
from tests.peft import cells

LEAK = 1e-6
FILE = '''
"""Toy: the complement of given output directions, with a field of its own."""

from dataclasses import dataclass, field
from typing import ClassVar

from peft_safety.errors import ConfigError
from peft_safety.methods.base import ProtectedConfig


@dataclass
class ToyConfig(ProtectedConfig):
    toy: int = field(default=1, metadata={"help": "A field of this method."})

    PEFT_KEY: ClassVar[str] = "TOY"

    def __post_init__(self):
        if not isinstance(self.toy, int):
            raise ConfigError(f"ToyConfig: toy={self.toy!r}. Use an integer.")
        super().__post_init__()
'''
TABLES = (
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
    mapping.PEFT_TYPE_TO_TUNER_MAPPING,
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
)


@pytest.fixture
def toy_config(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("toy_method", tmp_path / "toy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_method", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(types, "METHODS", (*types.METHODS, module.ToyConfig))  # the one line
    registration.register_types()
    yield module.ToyConfig
    for table in TABLES:
        table.pop("TOY", None)


def toy(toy_config):
    subspace = cells.random_subspace(cells.base_model(), cells.targets("linear"))
    options = {"r": 4, "target_modules": cells.targets("linear"), "task_type": "CAUSAL_LM", "toy": 3}
    return get_peft_model(cells.base_model(), toy_config(subspace=subspace, **options))


def test_a_new_method_trains_saves_loads_and_does_not_leak(toy_config, tmp_path):
    model = toy(toy_config)
    cells.train(model, cells.adamw, steps=3)
    assert_protected(model)
    assert cells.leak(model) <= LEAK
    model.save_pretrained(tmp_path / "adapter")
    assert check_adapter(tmp_path / "adapter").config["toy"] == 3
    assert verify(tmp_path / "adapter").method == "TOY"
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter")
    assert_protected(loaded)
    assert type(loaded.peft_config["default"]) is toy_config
    assert cells.leak(loaded) <= LEAK
    cells.assert_same_function(cells.logits(loaded), cells.logits(model.eval()))


def test_without_the_line_it_promises_no_protection(toy_config, tmp_path, monkeypatch):
    toy(toy_config).save_pretrained(tmp_path / "adapter")
    with monkeypatch.context() as without:
        for table in TABLES:
            without.delitem(table, "TOY")
        with pytest.raises(ArtifactError, match="'TOY' promises no protection"):
            verify(tmp_path / "adapter")

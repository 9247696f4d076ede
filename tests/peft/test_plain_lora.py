"""The reader and the writer of plain LoRA directories."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_safety import safe_lora_dir
from peft_safety.core.features import NOT_PLAIN, check_features
from peft_safety.core.plain_lora import (
    factor_tensors,
    plain_config,
    read_plain,
    write_plain,
)
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.layers.adapters import adapter_layers
from peft_safety.methods.factors import layer_factors
from tests.peft import cells

TARGETS = ["q_proj", "down_proj"]
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model():
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}, "use_rslora": True}
    return cells.perturb(get_peft_model(cells.base_model(), LoraConfig(r=4, target_modules=TARGETS, **options)))


@pytest.fixture
def stored(model, tmp_path):
    model.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def test_the_factors_are_those_of_the_model_and_survive_writing(model, stored, tmp_path):
    plain = read_plain(stored)
    layers = adapter_layers(model, "default")
    assert set(plain.factors) == set(layers)
    assert plain.extra == {}
    for name, factors in plain.factors.items():
        live = layer_factors(name, layers[name], "default")
        torch.testing.assert_close(factors.a, live.a)
        torch.testing.assert_close(factors.b, live.b)
        assert factors.scaling == pytest.approx(live.scaling)
    pairs = {name: factors.scaled() for name, factors in plain.factors.items()}
    config = plain_config(pairs, plain.fields)
    write_plain(tmp_path / "out", factor_tensors(pairs), config, "# card\n", {"note": [1]})
    again = PeftModel.from_pretrained(cells.base_model(), tmp_path / "out").eval()
    torch.testing.assert_close(cells.logits(again), cells.logits(model.eval()), rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["target_modules"] == sorted(plain.factors)
    assert {factors.scaling for factors in read_plain(tmp_path / "out").factors.values()} == {1.0}


DAMAGE = {
    "a protected adapter under another name": ({"safety_artifact": {}}, ArtifactError, "without its protection"),
    "an alpha that is no number": ({"alpha_pattern": {"q_proj": "x"}}, ConfigError, r"alpha_pattern\['q_proj'\]"),
    "ranks that are no table": ({"rank_pattern": [2]}, ConfigError, "rank_pattern"),
    "a record that is no object": ({"safe_lora": 5}, ArtifactError, "safe_lora"),
    "a type that is no name": ({"peft_type": ["LORA"]}, ConfigError, "LORA"),
    "a rank that is too large": ({"r": 1 << 20}, ConfigError, "no rank"),
    "DoRA": ({"use_dora": True}, ConfigError, "use_dora"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, ConfigError, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_config_is_refused_and_nothing_is_written(stored, case):
    change, error, message = DAMAGE[case]
    path = stored / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = {file.name: file.read_bytes() for file in stored.iterdir()}
    with pytest.raises(error, match=message):
        read_plain(stored)
    with pytest.raises(error, match=message):
        safe_lora_dir(stored, "unaligned", "aligned", stored.parent / "out")
    assert {file.name: file.read_bytes() for file in stored.iterdir()} == before
    assert not (stored.parent / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 32, dtype=torch.int8), "is I8"),
        (torch.full((2, 32), math.nan), "NaN or Inf"),
        (torch.ones(3, 32), r"lora_A \(3, 32\)"),
    ],
)
def test_bad_factors_are_refused(stored, value, message):
    path = stored / "adapter_model.safetensors"
    save_file(load_file(path) | {A_KEY: value}, path)
    with pytest.raises(ArtifactError, match=message):
        read_plain(stored)


@pytest.mark.parametrize("feature", NOT_PLAIN)
def test_every_feature_of_the_table_is_one_of_this_peft_and_is_refused(feature):
    config = LoraConfig(r=2, target_modules=TARGETS)
    assert hasattr(config, feature)
    setattr(config, feature, True)
    with pytest.raises(ConfigError, match=feature):
        check_features(config, "this adapter")

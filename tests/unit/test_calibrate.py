"""`calibrate` gives, before injection, the subspace that `subspace="auto"` gives at injection."""

import pytest
from peft import LoraConfig, get_peft_model

from peft_safety import GuardSpaceConfig, OrthoSafetyPatchConfig, SaLoRAConfig, assert_protected, calibrate
from peft_safety.data import calibration_rows
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.methods import base
from tests.peft.guard_cells import HARMFUL, batches
from tests.tiny import tiny_llama, tiny_tokenizer

COMMON = {"r": 2, "target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]}
KEPT = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
CONFIGS = {
    "salora": lambda: SaLoRAConfig(**COMMON, safety_rank=4),
    "guardspace": lambda: GuardSpaceConfig(**COMMON, safety_rank_pattern={"down_proj": 5}, positions="prompt"),
    "combined": lambda: GuardSpaceConfig(**COMMON, combine="salora", combine_rank=3),
    "frozen": lambda: GuardSpaceConfig(**COMMON, train="B", a_init="random"),
    "contrastive": lambda: OrthoSafetyPatchConfig(**COMMON, safety_rank=4, basis="contrastive", side="both"),
    "weight": lambda: OrthoSafetyPatchConfig(**COMMON, safety_energy=0.5, basis="weight"),
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(base, "calibration_rows", lambda *args: calibration_rows(*args)[:8])


def space(kind, data=None, **options):
    options = {"tokenizer": tiny_tokenizer(), "progress": False, **options}
    return calibrate(tiny_llama(), CONFIGS[kind](), data, **options)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_auto_means(kind, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    auto = get_peft_model(type(model).from_pretrained(tmp_path), CONFIGS[kind]()).peft_config["default"].subspace
    config = CONFIGS[kind]()
    config.subspace = calibrate(model, config, tokenizer=tiny_tokenizer(), progress=False)
    assert config.subspace.digest == auto.digest
    assert set(config.subspace.bases) == KEPT
    assert_protected(get_peft_model(model, config))


def test_ones_own_rows_or_batches_give_another_subspace():
    own = space("guardspace", HARMFUL)
    assert own.provenance["samples"] == len(HARMFUL)
    assert own.digest != space("guardspace").digest
    assert space("guardspace", batches(), tokenizer=None).digest == own.digest


def test_the_memory_budget_is_passed_on():
    with pytest.raises(CalibrationError, match="budget"):
        space("guardspace", memory=1000)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ConfigError, match="LoraConfig has no safety subspace"):
        calibrate(tiny_llama(), LoraConfig())
    with pytest.raises(ConfigError, match="reads weights only"):
        space("weight", HARMFUL)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        calibrate(tiny_llama(), GuardSpaceConfig(target_modules=["query_key_value"]))
    with pytest.raises(ConfigError, match="no tokenizer"):
        calibrate(tiny_llama(), SaLoRAConfig(**COMMON))

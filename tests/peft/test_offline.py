"""A frozen adapter in the Hub's cache, without a connection, with and without its certificate."""

import shutil
import warnings

import huggingface_hub.constants
import pytest
from peft import LoraConfig, PeftModel

from peft_safety import GuardSpaceConfig, assert_protected
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.plain_lora import ADAPTER_FILE
from peft_safety.errors import ArtifactError
from tests.peft import cells
from tests.peft.frozen_cells import frozen, lora_a

COMMIT = "a" * 40
UNKNOWN = r"'somebody/adapter' trains as an ordinary LoRA.*safety_certificate\.json.*unknown"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What huggingface_hub keeps of a repository, without a connection. The content of a folder `adapter` is in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--somebody--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    frozen(a_init="random").save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", repository / "snapshots" / COMMIT)
    return repository


def load(cache, **options):
    """The model, and what was said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(cells.base_model(), "somebody/adapter", cache_dir=cache.parent, **options)
    return model, [str(warning.message) for warning in said if "certificate" in str(warning.message)]


def test_with_its_certificate_it_is_frozen(cache):
    model, said = load(cache, is_trainable=True)
    assert isinstance(model.peft_config["default"], GuardSpaceConfig)
    assert_protected(model)
    assert not said


def test_without_it_training_is_warned_of_unless_the_cache_knows_that_there_is_none(cache):
    (cache / "snapshots" / COMMIT / FILE_NAME).unlink()
    with pytest.warns(UserWarning, match=UNKNOWN):
        model = PeftModel.from_pretrained(
            cells.base_model(), "somebody/adapter", cache_dir=cache.parent, is_trainable=True
        )
    assert type(model.peft_config["default"]) is LoraConfig
    assert any(weight.requires_grad for weight in lora_a(model).values())
    model, _ = load(cache)
    with pytest.warns(UserWarning, match=UNKNOWN):
        model.load_adapter("somebody/adapter", "second", is_trainable=True, cache_dir=cache.parent)
    assert load(cache)[1] == [], "used only, it is the same with and without"
    note = cache / ".no_exist" / COMMIT / FILE_NAME
    note.parent.mkdir(parents=True)
    note.touch()
    assert load(cache, is_trainable=True)[1] == []


def test_a_certificate_without_its_factors_is_refused(cache):
    """There may be a pickle, which PEFT would read."""
    (cache / "snapshots" / COMMIT / ADAPTER_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has a {FILE_NAME}, but its {ADAPTER_FILE} cannot be fetched"):
        load(cache)

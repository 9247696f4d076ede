"""What is taken out of a model, or was only read, is not kept in memory or on the disk."""

import gc
import weakref

import pytest
from peft import PeftConfig, get_peft_model

from peft_safety import assert_protected
from peft_safety.core.snapshot import Snapshot
from tests.peft import cells


@pytest.mark.parametrize("mixed", [False, True])
def test_the_bases_of_a_deleted_adapter(mixed):
    model = get_peft_model(cells.base_model(), cells.config(), mixed=mixed)
    model.add_adapter("second", cells.config(seed=1))
    bases = weakref.ref(model.peft_config["second"].subspace)
    model.delete_adapter("second")
    gc.collect()
    assert bases() is None
    assert_protected(model, "default")


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_the_bases_of_an_unloaded_model(unload):
    model = cells.protected()
    bases = weakref.ref(model.peft_config["default"].subspace)
    base = getattr(model, unload)()
    del model
    gc.collect()
    assert bases() is None
    assert base.training is False


@pytest.mark.parametrize("init", cells.INITS)
def test_the_copy_of_a_directory_of_which_only_the_config_is_used(init, tmp_path):
    saved = cells.protected("linear", init, trained=True)
    saved.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    copy = config._snapshot.path
    model = get_peft_model(cells.base_model(), config)
    del config
    gc.collect()
    assert not copy.exists()
    assert Snapshot.of(copy) is None
    model.load_adapter(str(tmp_path), "default")
    cells.assert_same_function(cells.logits(model.eval()), cells.logits(saved))

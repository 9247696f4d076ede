"""A frozen `lora_A` from the rows that a Trainer has, and what its certificate says of them."""

import pytest
import torch
from transformers import TrainerState

from peft_safety import TaskDirectionsCallback, verify
from peft_safety.data.chat import Collator, encode_rows
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.registry.frozen import set_task_directions
from tests.interop.helpers import token_rows
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies, frozen, lora_a
from tests.peft.guard_cells import TASK, batches, config, subspace
from tests.peft.test_guardspace import trainer
from tests.tiny import tiny_tokenizer


def test_task_directions_come_from_the_trainers_own_data(tmp_path):
    space = subspace(cells.base_model())
    run = trainer(frozen(a_init="random", space=space), tmp_path / "run", max_steps=4, save_steps=2)
    run.add_callback(TaskDirectionsCallback(rows=8, batch_size=4))
    before = copies(run.model)
    assert saved_a_init(run.model, tmp_path / "before") == "random"
    run.train()
    assert saved_a_init(run.model, tmp_path / "after") == "task"
    run.model.add_adapter("copy", run.model.peft_config["default"])
    assert all(torch.equal(weight, lora_a(run.model)[name]) for name, weight in lora_a(run.model, "copy").items())
    run.model.delete_adapter("copy")
    ids = torch.tensor([row["input_ids"] for row in token_rows(32)[:8]])
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]
    assert_frozen(run.model, copies(frozen(space=space, task_data=data)))
    assert any(not torch.equal(weight, before[name]) for name, weight in lora_a(run.model).items())
    resumed = trainer(frozen(a_init="random", space=space), tmp_path / "resumed", max_steps=4)
    resumed.add_callback(TaskDirectionsCallback(rows=16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_frozen(resumed.model, copies(run.model))
    assert saved_a_init(resumed.model, tmp_path / "again") == "task"
    with pytest.raises(ConfigError, match="learned something"):
        TaskDirectionsCallback().on_train_begin(None, TrainerState(), None, **_event(run))
    plain = trainer(cells.protected(), tmp_path / "plain")
    with pytest.raises(ConfigError, match="no frozen factor"):
        TaskDirectionsCallback().on_train_begin(None, TrainerState(), None, **_event(plain))


def test_labels_of_the_last_positions_count_as_all_do(tmp_path):
    space, made = subspace(cells.base_model()), {}
    rows = [{"prompt": f"{number} {'and ' * number}", "response": "tea"} for number in range(6)]
    tokenizer = tiny_tokenizer()
    for trim in (False, True):
        run = trainer(frozen(a_init="random", space=space), tmp_path / str(trim))
        run.train_dataset, run.data_collator = encode_rows(tokenizer, rows, 64), Collator(tokenizer, trim=trim)
        TaskDirectionsCallback(rows=6, batch_size=3).on_train_begin(None, TrainerState(), None, **_event(run))
        made[trim] = run.model
    before = copies(frozen(a_init="random", space=space))
    assert any(not torch.equal(weight, before[name]) for name, weight in lora_a(made[True]).items())
    for name, weight in lora_a(made[True]).items():
        torch.testing.assert_close(weight, lora_a(made[False])[name])


def test_a_certificate_names_the_directions_that_were_taken(tmp_path):
    with pytest.warns(UserWarning, match="without task_data"):
        model = frozen(task_data=None)
    assert saved_a_init(model, tmp_path / "random") == "random"
    assert saved_a_init(frozen(), tmp_path / "task") == "task"


def test_data_that_give_no_directions_leave_the_adapter_and_its_config_as_they_were():
    model = frozen(a_init="random")
    before = copies(model)
    with pytest.raises(CalibrationError, match="cannot give"):
        set_task_directions(model, [{"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}])
    assert_frozen(model, before)
    assert model.peft_config["default"].a_init == "random"


def test_a_combination_of_other_directions_does_not_name_them(tmp_path):
    space = subspace(cells.base_model())
    model = frozen(space=space)
    for name, a_init in (("random", "random"), ("task", "task")):
        data = {} if a_init == "random" else {"task_data": batches(TASK)}
        model.add_adapter(name, config(space, train="B", a_init=a_init, **data))
        model.add_weighted_adapter(["default", name], [0.5, 0.5], f"with {name}", combination_type="svd")
    settings = {name: model.peft_config[f"with {name}"]._certificate.settings for name in ("random", "task")}
    assert {name: named.get("a_init") for name, named in settings.items()} == {"random": None, "task": "task"}
    model.save_pretrained(tmp_path, selected_adapters=["with random"])
    assert "a_init" not in verify(tmp_path / "with random").settings


def saved_a_init(model, folder):
    model.save_pretrained(folder)
    return verify(folder).settings["a_init"]


def _event(run):
    return {"model": run.model, "train_dataloader": run.get_train_dataloader()}

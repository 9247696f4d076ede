"""`fuse` where something is wrong or is cut off: typed errors, nothing written, and runs that go on where they
stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from peft_safety import SaLoRAConfig, fuse
from peft_safety.errors import ArtifactError, ConfigError, DataError, PeftSafetyError
from peft_safety.methods.somf import train as training_module
from tests.peft.cells import base_model, random_subspace
from tests.peft.fusion_cells import PAIRS, QUICK, TARGETS, family, saved
from tests.tiny import tiny_llama, tiny_tokenizer

TASKS = ["task0", "task1"]
PLAIN = {"method": "task_arithmetic"}
LEARN = {"tokenizer": tiny_tokenizer(), "data": PAIRS, "training": QUICK}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return saved(family(), tmp_path_factory.mktemp("adapters"))


def edited(stored, tmp_path, change=None, fields=None):
    """Copies of the three directories, the first task changed."""
    places = {name: shutil.copytree(path, tmp_path / "in" / name) for name, path in stored.items()}
    folder = Path(places["task0"])
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if fields is not None:
        (folder / "adapter_config.json").write_text(
            json.dumps(json.loads((folder / "adapter_config.json").read_text()) | fields)
        )
    return [str(places[name]) for name in ("safe", *TASKS)]


def key(tensors, part):
    return next(name for name in tensors if part in name)


def to_zero(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def halved(tensors):
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:2] if "lora_A" in name else tensor[:, :2]).clone()


BAD_ADAPTERS = {
    "another base": (None, {"base_model_name_or_path": "other/base"}, {}, "trained on"),
    "ranks that do not match element masks": (
        halved,
        {"r": 2, "lora_alpha": 4},
        {"method": "somf", "granularity": "element"},
        "rank 2",
    ),
    "ranks that do not match, continued": (halved, {"r": 2, "lora_alpha": 4}, {"layout": "continued"}, "rank 2"),
    "another key set": (
        lambda t: [t.pop(k) for k in [k for k in t if "down_proj" in k]],
        None,
        {},
        "the same modules",
    ),
    "one factor missing": (lambda t: t.pop(key(t, "lora_B")), None, {}, "missing"),
    "a zero task vector": (to_zero, None, {}, "zero"),
    "NaN": (lambda t: t[key(t, "lora_A")].view(-1)[3:4].fill_(float("nan")), None, {}, "NaN"),
    "Inf": (lambda t: t[key(t, "lora_B")].view(-1)[0:1].fill_(float("inf")), None, {}, "NaN or Inf"),
    "another width": (lambda t: t.update({key(t, "q_proj.lora_A"): torch.ones(4, 16)}), None, {}, "updates a weight"),
    "DoRA": (None, {"use_dora": True}, {}, "DoRA"),
    "alpha zero": (None, {"lora_alpha": 0}, {}, "lora_alpha"),
    "another kind": (None, {"peft_type": "LOHA"}, {}, "LOHA"),
    "an alpha that only a pattern knows": (None, {"alpha_pattern": {"(q|v)_proj": 3}}, {}, "regular expression"),
    "weights that are too many": (None, None, {"weights": (1.0, 2.0, 3.0)}, "3 weights"),
    "a merge of PEFT's": (None, None, {"method": "ties"}, "add_weighted_adapter"),
    "no model to train on": (None, None, {"method": "somf"}, "model="),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapters_are_refused_and_nothing_is_written(stored, tmp_path, case):
    change, fields, options, message = BAD_ADAPTERS[case]
    safe, *tasks = edited(stored, tmp_path, change, fields)
    with pytest.raises(PeftSafetyError, match=message):
        fuse(safe, tasks, out=tmp_path / "out", **{**PLAIN, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file(stored, tmp_path, file):
    safe, *tasks = edited(stored, tmp_path)
    Path(tasks[0], file).unlink()
    with pytest.raises((ArtifactError, ConfigError), match="task0"):
        fuse(safe, tasks, out=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_calls_that_mean_nothing(stored, tmp_path):
    safe, one, two = (stored[name] for name in ("safe", *TASKS))
    same = shutil.copytree(safe, tmp_path / "same")
    calls = [
        ({"tasks": []}, "at least one"),
        ({"tasks": one}, "a list"),
        ({"tasks": [one, one]}, "more than once"),
        ({"tasks": [one, os.path.join(one, ".")]}, "more than once"),
        ({"tasks": [safe]}, "more than once"),
        ({"tasks": [str(same)]}, "holds the same weights"),
        ({"tasks": [one, "nowhere"]}, "nowhere"),
        ({"tasks": [one], "out": one}, "an input"),
        ({"tasks": [one], "out": __file__}, "is a file"),
        ({"tasks": [one], "mask": "x"}, "belongs to method='somf'"),
        ({"tasks": [one], "adapter_name": "new"}, "PeftModel"),
    ]
    for arguments, message in calls:
        with pytest.raises(ConfigError, match=message):
            fuse(safe, **{**PLAIN, "out": tmp_path / "out", **arguments})
    twin = shutil.copytree(one, tmp_path / "twin")
    with pytest.raises(ConfigError, match="same weights"):
        fuse(safe, [one, two, str(twin)], out=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="lambda_"):
        fuse(safe, [one], lambda_=1)


def test_different_base_names_can_be_vouched_for(stored, tmp_path):
    safe, *tasks = edited(stored, tmp_path, fields={"base_model_name_or_path": "other/base"})
    assert fuse(safe, tasks, ignore_base_names=True, **PLAIN).record["modules"] == 6


def test_adapters_of_a_model_that_cannot_be_fused():
    model = family()
    model.add_adapter(
        "safe2",
        SaLoRAConfig(r=4, lora_alpha=8, subspace=random_subspace(base_model(), TARGETS), target_modules=TARGETS),
    )
    with pytest.raises(ConfigError, match="export_lora"):
        fuse("safe2", ["task0"], model=model, **PLAIN)
    model = family()
    model.merge_adapter(["safe"])
    with pytest.raises(ConfigError, match="merged"):
        fuse("safe", ["task0"], model=model, **PLAIN)
    model = family()
    with pytest.raises(ConfigError, match="without such"):
        fuse("safe", ["task0"], model=model, adapter_name="task1", **PLAIN)
    with pytest.raises(ConfigError, match="it has"):
        fuse("safe", ["task9"], model=model, **PLAIN)


def test_fusions_that_independent_adapters_cannot_have():
    model = family(continued=False)
    for options, message in (
        ({"method": "somf", "granularity": "element"}, "not trained on from"),
        ({"method": "task_arithmetic", "layout": "continued"}, "not trained on from"),
    ):
        with pytest.raises(ConfigError, match=message):
            fuse("safe", TASKS, model=model, **{**LEARN, **options})
    with pytest.raises(ConfigError, match="safe adapter"):
        fuse(None, TASKS, model=model, method="task_arithmetic", layout="continued")


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], DataError),
        ([{"prompt": "a", "response": "b"}], DataError),
        ([{"prompt": "a", "chosen": " ", "rejected": "b"}], DataError),
        ([{"prompt": "a" * 300, "chosen": "b", "rejected": "c"}], DataError),
    ],
)
def test_rows_that_cannot_be_trained_on(tmp_path, rows, error):
    model = family()
    with pytest.raises(error):
        fuse("safe", TASKS, model=model, out=tmp_path / "out", **{**LEARN, "data": rows})
    assert not (tmp_path / "out").exists()
    assert all(not module._forward_hooks for module in model.modules())


def test_another_model_than_the_adapters_base(stored, tmp_path):
    with pytest.raises(ConfigError, match="base model"):
        fuse(stored["safe"], [stored["task0"]], model=tiny_llama(hidden=64), out=tmp_path / "out", **LEARN)
    assert not (tmp_path / "out").exists()


def test_masks_of_another_fusion(stored, tmp_path):
    safe, one, two = (stored[name] for name in ("safe", *TASKS))
    fuse(safe, [one], model=base_model(), granularity="rank", out=tmp_path / "masks", **LEARN)
    with pytest.raises(ConfigError, match="masks have"):
        fuse(safe, [one], mask=tmp_path / "masks", granularity="element", out=tmp_path / "out")
    with pytest.raises(ArtifactError, match="missing"):
        fuse(safe, [one, two], mask=tmp_path / "none", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_that_diverges_or_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    model = family()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_module, "dpo_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        fuse("safe", TASKS, model=model, out=tmp_path / "out", adapter_name="fused", **LEARN)
    monkeypatch.setattr(training_module, "dpo_loss", lambda policy, *_: policy.sum() * float("nan"))
    with pytest.raises(ConfigError, match="diverged"):
        fuse("safe", TASKS, model=model, out=tmp_path / "out", adapter_name="fused", **LEARN)
    assert not (tmp_path / "out").exists()
    assert list(model.peft_config) == ["safe", *TASKS]
    assert all(
        torch.equal(parameter, before[name]) and parameter.requires_grad == flags[name]
        for name, parameter in model.named_parameters()
    )
    assert model.active_adapters == ["safe"]


# --- resume ---


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    training = replace(
        QUICK, max_steps=6, save_steps=2, checkpoint_dir=tmp_path / "whole", gradient_accumulation=2, batch_size=2
    )
    whole = fuse("safe", TASKS, model=family(), **{**LEARN, "training": training})
    stored = load_file(tmp_path / "whole/checkpoint-4/model.safetensors")
    assert len(stored) == len(whole.logits), "logits only, no weights of the model"

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    real = training_module._trainer
    monkeypatch.setattr(training_module, "_trainer", lambda *a: (trainer := real(*a), trainer.add_callback(Stop()))[0])
    resumable = replace(training, checkpoint_dir=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        fuse("safe", TASKS, model=family(), **{**LEARN, "training": resumable})
    monkeypatch.setattr(training_module, "_trainer", real)
    resumed = fuse("safe", TASKS, model=family(), **{**LEARN, "training": replace(resumable, resume=True)})
    assert resumed.run.steps == whole.run.steps == 6
    for name, value in whole.logits.items():
        assert torch.equal(resumed.logits[name], value), name


def test_resuming_needs_something_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint_dir"):
        replace(QUICK, resume=True)
    with pytest.raises(ConfigError, match="no checkpoint"):
        fuse(
            "safe",
            TASKS,
            model=family(),
            **{**LEARN, "training": replace(QUICK, resume=True, checkpoint_dir=tmp_path)},
        )
    fuse("safe", TASKS, model=family(), **{**LEARN, "training": replace(QUICK, save_steps=1, checkpoint_dir=tmp_path)})
    again = replace(QUICK, resume=True, max_steps=5, checkpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match="another granularity"):
        fuse("safe", TASKS, model=family(), granularity="rank", **{**LEARN, "training": again})

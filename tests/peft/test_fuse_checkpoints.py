"""`fuse` on full checkpoints: masked, without a mask, refused, and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_safety import fuse
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.methods.somf import Masks, plan_fusion
from peft_safety.methods.somf.fusing import RECORD
from tests.crash.steps import child
from tests.peft.fusion_cells import PAIRS, QUICK, checkpoints, family, logits, saved
from tests.tiny import tiny_llama, tiny_tokenizer

TASKS = ["task0", "task1"]
PLAIN = {"method": "task_arithmetic"}
LEARN = {"tokenizer": tiny_tokenizer(), "data": PAIRS, "training": QUICK}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return saved(family(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_full_checkpoints_become_one(full, tmp_path):
    safe, *tasks = full
    report = fuse(safe, tasks, weights=(0.5, 0.25), out=tmp_path / "out", **PLAIN)
    assert report.facts["layout"] == "checkpoints"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parts = [dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for path in full]
    for name, parameter in found.named_parameters():
        expected = parts[0][name] + 0.5 * (parts[1][name] - parts[0][name]) + 0.25 * (parts[2][name] - parts[0][name])
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["tasks"][1]["name"] == "task1"
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("granularity", ["element", "row", "module"])
def test_a_mask_over_full_weights(full, tmp_path, granularity):
    safe, *tasks = full
    model = AutoModelForCausalLM.from_pretrained(safe).eval()
    before = logits(model)
    options = {"granularity": granularity, "rescale": "none" if granularity == "module" else "mean"}
    report = fuse(None, tasks, model=model, out=tmp_path / "out", **LEARN, **options)
    assert torch.equal(logits(model), before)
    again = fuse(safe, tasks, mask=tmp_path / "out", out=tmp_path / "again", **options)
    assert again.record["density"] == report.record["density"]
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "again"))
    assert torch.equal(logits(one), logits(two))
    assert not torch.allclose(logits(one), before)
    with pytest.raises(ConfigError, match="either safe="):
        fuse(safe, tasks, model=model, **LEARN, **options)


def test_an_empty_mask_gives_the_safe_checkpoint_and_a_full_one_task_arithmetic(full, tmp_path):
    safe, *tasks = full
    shapes = plan_fusion(safe, tasks).mask_shapes
    fuse(safe, tasks, out=tmp_path / "plain", **PLAIN)
    for value, expected in ((0, safe), (1, tmp_path / "plain")):
        masks = Masks({key: torch.full(shape, value, dtype=torch.uint8) for key, shape in shapes.items()})
        fuse(safe, tasks, mask=masks, out=tmp_path / f"all{value}")
        one, two = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (tmp_path / f"all{value}", expected))
        torch.testing.assert_close(logits(one), logits(two))


def test_a_tensor_that_only_a_task_has_is_not_left_out(tmp_path):
    """Its own lm_head, where the safe model ties it to the embedding."""
    for name, tied in (("safe", True), ("task", False)):
        config = LlamaConfig(**tiny_llama().config.to_dict() | {"tie_word_embeddings": tied})
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"task has lm_head\.weight, which the safe model .* ties"):
        fuse(tmp_path / "safe", [tmp_path / "task"], out=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_frozen_layer_stays_in_evaluation_mode(full):
    """While the mask is trained the model is; afterwards each module is as it was."""
    model = AutoModelForCausalLM.from_pretrained(full[0]).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    fuse(None, full[1:], model=model, **LEARN)
    assert [module.training for module in model.modules()] == before


def changed_checkpoint(full, tmp_path, change):
    task = Path(shutil.copytree(full[1], tmp_path / "changed"))
    shard = sorted(task.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return str(task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[next(iter(t))].view(-1)[0:1].fill_(float("nan")), "NaN"),
        (lambda t: t.update({next(iter(t)): torch.ones(3)}), "Fuse 16-bit"),
        (lambda t: t.update({"extra.weight": torch.ones(3)}), "different tensors"),
        (lambda t: t.update({next(iter(t)): next(iter(t.values())).to(torch.int8)}), "Fuse 16-bit"),
    ],
)
def test_bad_checkpoints_are_refused_and_nothing_is_written(full, tmp_path, change, message):
    task = changed_checkpoint(full, tmp_path, change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        fuse(full[0], [task, full[2]], out=tmp_path / "new" / "out", **PLAIN)
    assert not (tmp_path / "new").exists()


def test_checkpoints_that_hold_nothing_to_fuse(full, tmp_path, stored):
    same = shutil.copytree(full[0], tmp_path / "same")
    twin = shutil.copytree(full[1], tmp_path / "twin")
    for tasks, message in (
        ([str(same)], "same weights"),
        ([full[1], str(twin)], "same weights"),
        ([stored["task0"]], "not all are full checkpoints"),
    ):
        with pytest.raises(ConfigError, match=message):
            fuse(full[0], tasks, out=tmp_path / "out", **PLAIN)
    shutil.rmtree(twin)
    shutil.copytree(full[1], twin)
    next(Path(twin).glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        fuse(full[0], [str(twin)], out=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_write_leaves_the_old_result_whole(full, tmp_path):
    """Killed with its weights written: the result that was there before still loads, and the next run cleans up."""
    safe, *tasks = full
    out = tmp_path / "out"
    fuse(safe, tasks, out=out, **PLAIN)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def save_and_die() -> None:
        save = PreTrainedModel.save_pretrained

        def dying(*arguments: Any, **options: Any) -> None:
            save(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        PreTrainedModel.save_pretrained = dying
        fuse(safe, tasks, out=out, **PLAIN, weights=0.5)

    assert child(save_and_die) == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert any(path.name.startswith(".staging") for path in out.iterdir())
    fuse(safe, tasks, out=out, **PLAIN, weights=0.5)
    assert not any(path.name.startswith(".") for path in out.iterdir())

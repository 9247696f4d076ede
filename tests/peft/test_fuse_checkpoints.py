"""`fuse` on full checkpoints: streamed, sharded, masked, as a LoRA, refused, and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_safety import fuse
from peft_safety.errors import CheckpointError, ConfigError
from tests.peft.fusion_cells import PAIRS, QUICK, checkpoints, family, logits, saved
from tests.tiny import tiny_tokenizer

TASKS = ["task0", "task1"]
PLAIN = {"method": "task_arithmetic", "progress": False}
LEARN = {"tokenizer": tiny_tokenizer(), "data": PAIRS, "training": QUICK, "progress": False}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return saved(family(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_full_checkpoints_become_one(full, tmp_path):
    safe, *tasks = full
    report = fuse(
        safe,
        tasks,
        method="task_arithmetic",
        weights=(0.5, 0.25),
        out=tmp_path / "out",
        max_shard_bytes=20_000,
        progress=False,
    )
    assert report.plan.layout == "checkpoints"
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 20_000 + 40_000 for path in shards)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parts = [dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for path in full]
    for name, parameter in found.named_parameters():
        expected = parts[0][name] + 0.5 * (parts[1][name] - parts[0][name]) + 0.25 * (parts[2][name] - parts[0][name])
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["peft_safety.fusion"]["tasks"][1]["name"] == "task1"
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("method", ["dare", "ties", "average"])
def test_every_fusion_of_full_checkpoints(full, tmp_path, method):
    safe, *tasks = full
    fuse(safe, tasks, method=method, out=tmp_path / "out", progress=False)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert bool(torch.isfinite(logits(out)).all())
    assert not torch.allclose(logits(out), logits(AutoModelForCausalLM.from_pretrained(safe).eval()))


@pytest.mark.parametrize("granularity", ["element", "row", "module"])
def test_a_mask_over_full_weights(full, tmp_path, granularity):
    safe, *tasks = full
    model = AutoModelForCausalLM.from_pretrained(safe).eval()
    before = logits(model)
    options = {**LEARN, "granularity": granularity, "rescale": "none" if granularity == "module" else "mean"}
    report = fuse(safe, tasks, model=model, out=tmp_path / "out", **options)
    assert torch.equal(logits(model), before)
    assert report.run.trainable_parameters == report.plan.logits
    again = fuse(
        safe,
        tasks,
        mask=tmp_path / "out",
        out=tmp_path / "again",
        **{k: v for k, v in options.items() if k in ("granularity", "rescale", "progress")},
    )
    assert again.record["density"] == report.record["density"]
    names = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        for name in names
        if name.startswith("model")
    )
    with pytest.raises(ConfigError, match="not the safe checkpoint"):
        fuse(safe, tasks, model=AutoModelForCausalLM.from_pretrained(tasks[0]), **options)


def test_full_checkpoints_as_a_lora_with_its_error(full, tmp_path):
    safe, *tasks = full
    with pytest.warns(UserWarning, match="misses"):
        report = fuse(safe, tasks, method="average", rank=16, out=tmp_path / "out", progress=False)
    assert report.record["rank"] == 16
    assert 0 < report.record["error"] < 1
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(safe), str(tmp_path / "out")).eval()
    assert torch.isfinite(logits(loaded)).all()
    parts = [load_all(path) for path in full]
    for row in report.modules:
        change = sum(part[f"{row.name}.weight"] for part in parts[1:]) / 2 - parts[0][f"{row.name}.weight"]
        a, b = report.factors[row.name]
        assert row.error == pytest.approx(float((change - b @ a).norm() / change.norm()), abs=1e-4)
        assert row.error <= float(torch.linalg.svdvals(change)[16:].norm() / change.norm()) * 1.05 + 1e-5


def load_all(folder):
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


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
        (lambda t: t.update({next(iter(t)): torch.ones(3)}), "Fuse 16-bit checkpoints"),
        (lambda t: t.update({"extra.weight": torch.ones(3)}), "different tensors"),
        (lambda t: t.update({next(iter(t)): next(iter(t.values())).to(torch.int8)}), "Fuse 16-bit checkpoints"),
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
        ([str(same)], "equals the safe"),
        ([full[1], str(twin)], "same weights"),
        ([stored["task0"]], "no full checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            fuse(full[0], tasks, out=tmp_path / "out", **PLAIN)
    shutil.rmtree(twin)
    shutil.copytree(full[1], twin)
    next(Path(twin).glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        fuse(full[0], [str(twin)], out=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal
from peft_safety import fuse
from peft_safety.methods.somf import publish
add, count = publish.Shards.add, []
def add_and_die(self, key, tensor):
    add(self, key, tensor)
    count.append(key)
    if len(count) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
publish.Shards.add = add_and_die
fuse({safe!r}, {tasks!r}, out={out!r}, method="average", max_shard_bytes=20_000, progress=False)
"""


def test_a_killed_write_leaves_the_old_result_whole(full, tmp_path):
    """Killed in the middle of its shards: the result that was there before still loads, and the next run cleans up."""
    safe, *tasks = full
    out = tmp_path / "out"
    fuse(safe, tasks, out=out, max_shard_bytes=20_000, **PLAIN)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    script = KILLED.format(safe=safe, tasks=tasks, out=str(out))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert any(path.name.startswith(".staging") for path in out.iterdir())
    fuse(safe, tasks, out=out, **{**PLAIN, "method": "average"})
    assert not any(path.name.startswith(".") for path in out.iterdir())

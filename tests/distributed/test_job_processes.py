"""`accelerate launch ... peft-safety train`: two processes train as one, on replicas and on shards, and a job that is
killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import yaml

from peft_safety import verify
from peft_safety.errors import ConfigError
from peft_safety.recipes.job.options import STEPS
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import job_on, losses
from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
SAME = {
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-2,
    "safety_rank": 4,
    "eval_limit": 1,
    "held_out": 0.2,
}
"""Whatever the number of processes is."""
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def command(folder, job, processes=2, sharding=(), script=None):
    """The command that runs a job: on shards or by a script of this folder, or else as users do."""
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    arguments = ["train", "--config", str(folder / "job.yaml")]
    if sharding or script:
        path = ROOT / "tests" / "distributed" / (script or "train_sharded.py")
        return [*LAUNCH, *(sharding or ["--multi_gpu"]), str(path), *arguments]
    first = [*LAUNCH, "--multi_gpu"] if processes > 1 else [sys.executable]  # or CPUs
    return [*first, "-m", "peft_safety", *arguments]


def started(folder, words):
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=folder, env=env, **outputs)


def finished(folder, words):
    process = started(folder, words)
    try:
        output = process.communicate(timeout=400)[0]
    finally:
        kill(process)
    assert process.returncode == 0, output[-3000:]
    return output


def kill(process):
    """`kill -9`, the launcher and the processes that it started."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()


def test_two_processes_train_as_one(tmp_path):
    one = job_on(tmp_path, **SAME, max_steps=3, save_steps=3, per_device_train_batch_size=4)
    run_job(Settings.of(**one))
    two = {**one, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    output = finished(tmp_path, command(tmp_path, two))
    assert output.count("[2/6] calibrate") == 1, "one process speaks"
    assert losses(tmp_path / "run", 3) == pytest.approx(losses(tmp_path / "two", 3), abs=1e-5)
    facts = json.loads((tmp_path / "two" / "job.json").read_text())
    assert list(facts) == list(STEPS[1:])
    assert verify(
        tmp_path / "two" / "adapter", tiny_llama(), tmp_path / "two" / "subspace.safetensors"
    ).blindness_checked


def test_what_is_done_is_what_the_first_process_finds_done(tmp_path):
    one = job_on(tmp_path, **SAME, skip=["measure", "report"])
    run_job(Settings.of(**one))
    assert "[3/6] train: done before" in finished(tmp_path, command(tmp_path, one, script="train_apart.py"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_is_killed_goes_on_to_the_losses_of_an_unbroken_one(tmp_path, processes):
    steps = {"max_steps": 40, "save_steps": 5, "skip": ["measure", "report"], "resume_from_checkpoint": True}
    one = job_on(tmp_path, **SAME, **steps, per_device_train_batch_size=4)
    run_job(Settings.of(**one))
    job = {**one, "output_dir": str(tmp_path / "killed"), "per_device_train_batch_size": 4 // processes}
    words, whole = command(tmp_path, job, processes), tmp_path / "killed" / "checkpoint-10" / "trainer_state.json"
    process, until = started(tmp_path, words), time.monotonic() + 300
    while not whole.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    kill(process)
    assert whole.exists(), process.stdout.read()[-3000:]
    assert not (tmp_path / "killed" / "adapter").exists(), "killed in the middle"
    (tmp_path / "killed" / "checkpoint-39").mkdir()  # as one is that was not written to its end
    assert "resuming from" in finished(tmp_path, words)
    assert losses(tmp_path / "run", 40) == pytest.approx(losses(tmp_path / "killed", 40), abs=1e-5)
    assert verify(tmp_path / "killed" / "adapter", tiny_llama()).worst_leak < 1e-5


@pytest.mark.parametrize(
    ("sharding", "quantized"),
    [
        pytest.param(FSDP2, False, id="fsdp2"),
        pytest.param(FSDP2, True, id="fsdp2-4bit"),
        pytest.param([*FSDP2, "--fsdp_offload_params", "true"], False, id="fsdp2-offload"),
        *(pytest.param(["--use_deepspeed", "--zero_stage", stage], False, id=f"zero{stage}") for stage in "123"),
    ],
)
def test_shards_train_as_one_process_and_resume(tmp_path, sharding, quantized):
    if "--use_deepspeed" in sharding:
        pytest.importorskip("deepspeed", reason="`make nightly` installs DeepSpeed")
    if quantized:
        pytest.importorskip("bitsandbytes")
    steps = {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": True, "skip": ["report"]}
    one = job_on(tmp_path, **SAME, **steps, per_device_train_batch_size=4, load_in_4bit=quantized)
    run_job(Settings.of(**{**one, "skip": ["screen", "measure", "report"]}))
    out = tmp_path / "shards"
    two = {**one, "output_dir": str(out), "per_device_train_batch_size": 2, "use_cpu": False}
    words = command(tmp_path, two, sharding=sharding)
    assert "a sharded model is not measured" in finished(tmp_path, words)
    for left in ("adapter", "checkpoint-4"):
        assert (out / left).is_dir()
        shutil.rmtree(out / left)
    assert f"resuming from {out / 'checkpoint-2'}" in finished(tmp_path, words)
    assert losses(tmp_path / "run", 4) == pytest.approx(losses(out, 4), abs=1e-5)
    checked = verify(out / "adapter", subspace=out / "subspace.safetensors")
    assert checked.blindness_checked
    assert checked.worst_leak < 1e-5


def test_shards_on_cpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="shards no model on CPUs"):
        run_job(Settings.of(**job_on(tmp_path, use_cpu=True)))
    assert not (tmp_path / "run").exists()

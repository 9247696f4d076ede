"""The plan of a job, which `--dry_run` prints."""

from __future__ import annotations

import re

import datasets
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.recipes.job.plan import make_plan
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import job_on


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_plan_writes_nothing(tmp_path, capsys):
    job = job_on(tmp_path, num_train_epochs=2, max_steps=-1, safety_rank=0.25)
    plan = make_plan(Settings.of(**job))
    assert plan.facts["rows"] == "17 to train on, 3 held out"
    assert plan.facts["steps"].startswith("18 of 2 rows")
    trained = run_job(Settings.of(**{**job, "skip": ["screen", "measure"]})).facts["train"]
    assert trained["steps"] == 18
    assert plan.facts["trainable parameters"].startswith(f"{trained['trainable_parameters']:,} of")
    assert [row[0] for row in plan.ranks] == ["4", "8", "16", "32", "64"]
    assert [row[:2] for row in plan.subspaces][1] == ["0.25", "8 to 16"]
    flags = [part for key, value in job_on(tmp_path, screened=True).items() for part in (f"--{key}", str(value))]
    out = tmp_path / "none"
    capsys.readouterr()
    done = CliRunner().invoke(app, ["train", *flags, "--output_dir", str(out), "--dry_run"], catch_exceptions=False)
    assert "Plan of the job" in done.stdout
    assert not out.exists()


@pytest.mark.parametrize(("method", "measured"), [("lora", 13549.9), ("guardspace", 8589.0)])
def test_the_memory_of_a_plan_is_what_an_8b_model_took(tmp_path, method, measured):
    """`benchmarks/results/scale.jsonl`: peaks in MiB, one row of 1,024 tokens on an H200."""
    job = job_on(tmp_path, method=method, lora_r=16, load_in_4bit=True, dtype="bfloat16", packing=True)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=32, **shape)
    config.save_pretrained(job["model_name_or_path"])
    plan = make_plan(Settings.of(**job | {"max_length": 1024, "per_device_train_batch_size": 1}))
    planned = float(re.search(r"about ([\d.]+) GB a process", plan.facts["memory in all"])[1])
    assert 1e9 * planned == pytest.approx(measured * 2**20, rel=0.03)


def test_logits_count_where_the_loss_is_of_all_of_them(tmp_path):
    """4 rows of 1,024 tokens, and a vocabulary of 50,000, in fp32: 0.8 GB, checkpointed or not."""
    job = job_on(tmp_path, packing=True, max_length=1024, per_device_train_batch_size=4, gradient_checkpointing=True)
    LlamaConfig(vocab_size=50_000, num_hidden_layers=2, hidden_size=32).save_pretrained(job["model_name_or_path"])

    def activations(**options):
        said = make_plan(Settings.of(**job | options)).facts["memory of activations"]
        return float(re.search(r"about ([\d.]+) MB", said)[1])

    assert activations(label_smoothing_factor=0.1) - activations() == pytest.approx(4 * 4 * 1024 * 0.05, abs=2)

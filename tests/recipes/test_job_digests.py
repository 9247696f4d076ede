"""What a job's steps depend on: beside the settings, what stands behind the names in them."""

from __future__ import annotations

import json

import datasets
import pytest
from huggingface_hub import constants

from peft_safety import SafetySubspace
from peft_safety.recipes.job.digests import step_digests
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import job_on
from tests.tiny import tiny_llama, tiny_tokenizer

ALL = {"screen", "calibrate", "train", "measure"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return job_on(tmp_path)


def changed(job, change):
    """The steps that depend on what `change` does."""
    before = step_digests(Job(Settings.of(**job)))
    assert step_digests(Job(Settings.of(**job))) == before
    change()
    return {step for step, digest in step_digests(Job(Settings.of(**job))).items() if digest != before[step]}


def test_another_model_in_the_same_directory(job):
    assert changed(job, lambda: tiny_llama(seed=1).save_pretrained(job["model_name_or_path"])) == ALL


def test_another_model_in_a_folder_of_the_directory(job):
    given = {**job, "model_init_kwargs": {"subfolder": "part"}}

    def save(seed):
        tiny_llama(seed=seed).save_pretrained(f"{job['model_name_or_path']}/part")

    save(1)
    assert changed(given, lambda: save(2)) == ALL


def test_the_model_loaded_in_another_way(job):
    ways: dict = {"attn_implementation": "eager"}
    assert changed({**job, "model_init_kwargs": ways}, lambda: ways.update(attn_implementation="sdpa")) == ALL


def test_another_model_of_the_hub(tmp_path, job, monkeypatch):
    repository = tmp_path / "hub" / "models--me--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()

    def revise(commit):
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).symlink_to(job["model_name_or_path"])

    revise("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert changed({**job, "model_name_or_path": "me/model"}, lambda: revise("b" * 40)) == ALL


def test_another_chat_template_in_the_same_file(tmp_path, job):
    path = tmp_path / "template.jinja"
    template = tiny_tokenizer().chat_template
    path.write_text(template)
    job["chat_template_path"] = str(path)
    assert changed(job, lambda: path.write_text(f"The chat: {template}")) == ALL


def test_another_end_of_turn(job):
    assert changed(job, lambda: job.update(eos_token="<|endoftext|>")) == ALL


def test_another_subspace_in_the_same_file(tmp_path, job):
    def save(rank):
        path = tmp_path / "subspace.safetensors"
        SafetySubspace.from_weights(tiny_llama(), target_modules=["q_proj"], rank=rank).save(path)
        return str(path)

    job["subspace"] = save(4)
    assert changed(job, lambda: save(5)) == ALL - {"screen"}


def test_the_same_rows_written_otherwise(job):

    def rewrite():
        with open(job["dataset_name"], encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        with open(job["dataset_name"], "w", encoding="utf-8") as file:
            file.write("\n\n".join(json.dumps(dict(reversed(row.items()))) for row in rows))

    assert changed(job, rewrite) == set()

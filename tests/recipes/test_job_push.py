"""What `push_to_hub` uploads, by a hub's API that keeps a copy of every folder that it is given."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from fnmatch import fnmatch
from types import SimpleNamespace

import datasets
import pytest
import transformers.trainer
from peft import PeftModel

from peft_safety import assert_protected, verify
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import job_on
from tests.tiny import tiny_llama

pytestmark = pytest.mark.slow


class Hub:
    """Commits, as folders, in their order."""

    def __init__(self, folder):
        self.folder, self.commits = folder, []

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"me/{name}", url=f"https://hub/me/{name}")

    def upload_folder(self, *, folder_path, run_as_future=False, ignore_patterns=(), **_):
        def ignored(_, names):
            return [name for name in names if any(fnmatch(name, pattern) for pattern in ignore_patterns or ())]

        self.commits.append(shutil.copytree(folder_path, self.folder / str(len(self.commits)), ignore=ignored))
        done = Future()
        done.set_result(None)
        return done if run_as_future else None


PUSHED = {
    "push_to_hub": True, "hub_model_id": "adapter", "save_steps": 1, "safety_rank": 4, "skip": ["measure", "report"]
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def test_a_commit_has_nothing_of_an_earlier_run_by_another_method(tmp_path, hub):
    for method, others in (("guardspace", "safety_subspace.safetensors"), ("salora", "safety_certificate.json")):
        run_job(Settings.of(**job_on(tmp_path, method=method, **PUSHED)))
        assert not [commit for commit in hub.commits[-3:] if (commit / others).exists()]


@pytest.mark.parametrize("method", ["guardspace", "salora"])
def test_every_commit_is_a_whole_protected_adapter(tmp_path, hub, method):
    run_job(Settings.of(**job_on(tmp_path, method=method, **PUSHED)))
    assert len(hub.commits) == 3, "two checkpoints and the end"
    for commit in hub.commits:
        assert verify(commit, tiny_llama()).worst_leak < 1e-5
        assert_protected(PeftModel.from_pretrained(tiny_llama(), str(commit)))
        for text in ("README.md", "job.json"):
            assert not (commit / text).exists() or str(tmp_path) not in (commit / text).read_text("utf-8")
    assert (hub.commits[-1] / "README.md").is_file()

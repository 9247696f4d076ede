"""What `push_to_hub` uploads, by a hub's API that keeps a copy of every folder that it is given."""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import Future
from fnmatch import fnmatch
from types import SimpleNamespace

import datasets
import pytest
import transformers.trainer
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel

from peft_safety import assert_protected, verify
from peft_safety.errors import ConfigError
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import job_on
from tests.tiny import tiny_llama

pytestmark = pytest.mark.slow


class Hub:
    """What a repository holds after each commit that adds files: a push removes none."""

    def __init__(self, folder):
        self.folder, self.commits = folder, []
        self.now = folder / "now"
        self.now.mkdir(parents=True)

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"me/{name}", url=f"https://hub/me/{name}")

    def upload_folder(self, *, folder_path, path_in_repo="", run_as_future=False, ignore_patterns=(), **_):
        def ignored(_, names):
            return [name for name in names if any(fnmatch(name, pattern) for pattern in ignore_patterns or ())]

        shutil.copytree(folder_path, self.now / path_in_repo, ignore=ignored, dirs_exist_ok=True)
        self.commits.append(shutil.copytree(self.now, self.folder / str(len(self.commits))))
        done = Future()
        done.set_result(None)
        return done if run_as_future else None

    def list_repo_files(self, repo_id, **_):
        assert repo_id == "me/adapter"
        return [str(path.relative_to(self.now)) for path in self.now.rglob("*") if path.is_file()]

    def delete_files(self, repo_id, delete_patterns, **_):
        for name in delete_patterns:
            (self.now / name).unlink()


PUSHED = {
    "push_to_hub": True, "hub_model_id": "adapter", "save_steps": 1, "safety_rank": 4, "skip": ["measure", "report"]
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr("peft_safety.recipes.job.hub.HfApi", lambda: hub)
    return hub


@pytest.mark.parametrize(("method", "rank"), [("lora", None), ("salora", 4)])
def test_no_certificate_or_report_of_an_earlier_run_is_beside_an_adapter_that_was_pushed(tmp_path, hub, method, rank):
    more = {**PUSHED, "hub_strategy": "checkpoint"}
    run_job(Settings.of(**job_on(tmp_path, **more)))
    assert (hub.now / "safety_certificate.json").is_file()
    assert (hub.now / "last-checkpoint" / "safety_certificate.json").is_file()
    for folder in (tmp_path / "run", hub.now):
        (folder / "report.json").write_text("of the earlier adapter")
    own = ("mine", "checkpoint-1/mine")
    for folder in own:
        (hub.now / folder).mkdir(parents=True)
        (hub.now / folder / "safety_certificate.json").write_text("of an adapter in a folder of the user's own")
    before = len(hub.commits)
    run_job(Settings.of(**job_on(tmp_path, **{**more, "method": method, "safety_rank": rank})))
    for commit in hub.commits[before:]:
        found = [path for name in ("safety_certificate.json", "report.json") for path in commit.rglob(name)]
        assert set(found) == {commit / folder / "safety_certificate.json" for folder in own}
        PeftModel.from_pretrained(tiny_llama(), str(commit))


def test_a_commit_has_no_bases_of_an_earlier_run_by_another_method(tmp_path, hub):
    run_job(Settings.of(**job_on(tmp_path, method="salora", **PUSHED)))
    run_job(Settings.of(**job_on(tmp_path, **PUSHED)))
    for folder in (tmp_path / "run", hub.now):
        assert not (folder / "safety_subspace.safetensors").exists()


def offline(*_, **__):
    raise OfflineModeIsEnabled("offline mode is enabled.")


def refused(*_, **__):
    """What the hub's own client raises where nothing listens."""
    with pytest.MonkeyPatch.context() as online:
        online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        HfApi(endpoint="http://127.0.0.1:9").model_info("me/adapter")


@pytest.mark.parametrize("call", ["create_repo", "list_repo_files"])
@pytest.mark.parametrize(("lost", "why"), [(offline, "offline mode is enabled"), (refused, ".*efused.*")])
def test_a_hub_out_of_reach_is_told_before_training(tmp_path, hub, monkeypatch, call, lost, why):
    monkeypatch.setattr(hub, call, lost)
    with pytest.raises(ConfigError, match=rf"push_to_hub: .* {why}\. Log in"):
        run_job(Settings.of(**job_on(tmp_path, **PUSHED)))
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_a_hub_that_is_lost_at_the_end_costs_no_second_training(tmp_path, hub, monkeypatch, capsys):
    job = job_on(tmp_path, **PUSHED, resume_from_checkpoint=True, hub_strategy="end")
    with monkeypatch.context() as lost:
        lost.setattr(hub, "upload_folder", offline)
        with pytest.raises(ConfigError, match="with resume_from_checkpoint goes on"):
            run_job(Settings.of(**job))
    run_job(Settings.of(**job))
    assert "resuming from" in capsys.readouterr().out
    assert (hub.now / "safety_certificate.json").is_file()


def test_a_full_disk_is_not_told_as_a_hub_out_of_reach(tmp_path, hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trl.SFTTrainer.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        run_job(Settings.of(**job_on(tmp_path, **PUSHED | {"save_steps": 5})))


def test_a_report_goes_with_its_adapter(tmp_path):
    run_job(Settings.of(**job_on(tmp_path, safety_rank=4)))
    assert (tmp_path / "run" / "report.json").is_file()
    run_job(Settings.of(**job_on(tmp_path, method="lora", skip=["measure", "report"])))
    assert not [*(tmp_path / "run").glob("report.*")]


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


@pytest.mark.parametrize("method", ["guardspace", "salora"])
def test_nothing_of_a_protected_adapter_is_left_beside_a_plain_one(tmp_path, method):
    skip = ["measure", "report"]
    run_job(Settings.of(**job_on(tmp_path, method=method, safety_rank=4, skip=skip)))
    run_job(Settings.of(**job_on(tmp_path, method="lora", skip=skip)))
    assert not [*(tmp_path / "run" / "adapter").glob("safety_*")]

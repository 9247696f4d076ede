"""Before and around a push: it adds files to a repository and replaces them, and removes none, so that what an earlier
run said of its adapter would stand beside a new one. And the hub may be out of reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from peft_safety.core import certificate, files, subspace_file
from peft_safety.errors import ConfigError
from peft_safety.recipes.job.job import Job

REPORT = ("report.json", "report.png")
FOLDERS = ("", "adapter/", "last-checkpoint/", "checkpoint-*/")
"""Of a repository, into which a job pushes adapters. Others are of the user's own."""
UNREACHED: tuple[type[Any], ...] = (OSError, HfHubHTTPError.__bases__[0])
"""What the hub and its HTTP library raise, which is httpx or requests: a refused connection is no OSError in httpx."""


def forget(job: Job, trainer: Any) -> None:
    """Remove the report of an earlier run. Before a push, remove it from the repository, too, and the certificate or
    the bases that the new adapter does not have.
    """
    for name in REPORT:
        files.drop(job.out / name)
    if not trainer.args.push_to_hub:
        return
    others = stale_names(job)
    for folder in (job.out, job.adapter_dir):
        for name in others:
            files.drop(folder / name)
    api, where = HfApi(), {"repo_id": trainer.hub_model_id, "revision": trainer.args.hub_revision}
    paths = api.list_repo_files(**where)
    stale = [*REPORT, *(folder + name for folder in FOLDERS for name in others)]
    if stale := [path for path in paths if any(_is(path, pattern) for pattern in stale)]:
        api.delete_files(delete_patterns=stale, commit_message="Remove what is of an earlier adapter", **where)


def stale_names(job: Job) -> list[str]:
    """Files that an earlier adapter can have left in a folder, and that this job's adapter does not have."""
    bases, seal = subspace_file.FILE_NAME, certificate.FILE_NAME
    if not job.protected:
        return [bases, seal]
    return [bases if job.config.freezes else seal]


def _is(path: str, pattern: str) -> bool:
    return fnmatch(path, pattern) and path.count("/") == pattern.count("/")


@contextmanager
def reaching_hub(job: Job, remedy: str) -> Iterator[None]:
    """A ConfigError with this remedy where a job that pushes does not reach the hub."""
    try:
        yield
    except UNREACHED as error:
        if not job.training.push_to_hub or getattr(error, "errno", None) is not None:  # that of a file
            raise
        problem = str(error).rstrip(". \n")
        raise ConfigError(f"push_to_hub: the repository is out of reach: {problem}. {remedy}") from error

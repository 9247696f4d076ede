"""Where `peft-safety evaluate` keeps what was answered and judged, so that a run that was stopped goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from peft_safety.errors import ArtifactError
from peft_safety.evaluation.kept import Kept

UNFINISHED = ".unfinished"
"""The folder beside a report that goes when the report is there. Uploads of a CI server leave hidden folders out."""
ANSWERS, VERDICTS = "answers.jsonl", "verdicts.jsonl"


class Resume:
    """A folder of the user's for answers and verdicts; or one beside the report, which `finish` removes; or none.

    Args:
        cache: a folder that stays, and that other runs may use.
        out: of the report; without `cache` the run keeps its state there.

    Raises:
        ArtifactError: the folder is none, or others can write into it or read the answers.
    """

    def __init__(self, cache: Path | None, out: Path | None) -> None:
        self.temporary = cache is None
        self.folder = cache if cache is not None else None if out is None else out / UNFINISHED
        if self.folder is not None:
            _check_private(self.folder)
            if cache is not None:
                _make(self.folder)
        self.verdicts = None if self.folder is None else self.folder / VERDICTS
        self.answers = None if self.folder is None else Kept(self.folder / ANSWERS)

    def said(self) -> str:
        """A line about what an earlier run left; empty if that is nothing."""
        return (
            f"what fits is taken from {self.folder}, not asked again"
            if self.answers is not None and len(self.answers)
            else ""
        )

    def finish(self) -> None:
        """Remove a folder that was of this run alone."""
        if self.folder is None or not self.temporary or not self.folder.exists():
            return
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY):  # of another run in the same place
                return
            what = f"{self.folder} holds the models' answers and cannot be removed: {error}"
            raise ArtifactError(f"{what}. Remove it.") from error


def _make(folder: Path) -> None:
    """Before a model is loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be made: {error.strerror}. Give --cache another place.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"{folder} cannot be written. Give --cache another place.")


def _check_private(folder: Path) -> None:
    """Who can write into it could decide what a gate says."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ArtifactError(f"{folder} is no directory. Give --cache another place.")
    if not folder.exists() or os.name != "posix":
        return
    places = {folder: 0o022, **{folder / name: 0o077 for name in (ANSWERS, VERDICTS)}}
    for path, bits in places.items():
        if path.exists() and (path.stat().st_mode & bits or path.stat().st_uid != os.geteuid()):
            rights = "go-w" if path == folder else "go-rwx"
            raise ArtifactError(
                f"{path} is open to other users. Run chmod {rights} on it, or give a --cache of yours."
            )

"""Publishing small files, killed at every call: what readers get, and what `recover`, killed itself, makes of it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest

from peft_safety.core.publish import publishing, recover, require_whole
from peft_safety.errors import ArtifactError
from tests.crash.steps import at_step, steps_of

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

NAMES = ("a", "b", "manifest", "sub/a", "sub/manifest")
OLD, NEW = dict.fromkeys(NAMES, "old"), dict.fromkeys(NAMES, "new")


def publish(target: Path, text: str) -> None:
    with publishing(target, "manifest") as staging:
        for name in NAMES:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)


def files(target: Path) -> dict[str, str]:
    paths = [path for path in target.rglob("*") if path.is_file()]
    return {str(p.relative_to(target)): p.read_text() for p in paths if not str(p.relative_to(target)).startswith(".")}


def listing(target: Path) -> list[tuple]:
    return sorted((str(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in target.rglob("*"))


def read(target: Path, sub: str = "") -> str:
    """What a reader gets: `old` (with or without a warning), `new`, or `interrupted`."""
    before = listing(target)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            require_whole(target / sub)
    except ArtifactError as error:
        if f"interrupted publish, finish it with `peft-safety recover {target}`" not in str(error):
            raise
        return "interrupted"
    finally:
        assert listing(target) == before, "a reader wrote"
    found = files(target)
    assert found in (OLD, NEW), "a mixture"
    assert len(caught) == (found == OLD and (target / ".commit").exists())
    return found["a"]


def reset(target: Path, text: str = "old") -> None:
    shutil.rmtree(target, ignore_errors=True)
    publish(target, text)


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_step_leaves_the_old_files_or_new_ones_that_can_be_had(every: int, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    reset(target)
    total = len(steps_of(target, lambda: publish(target, "new")))
    before, after = [], []
    for at in range(1, total + 1, every):
        reset(target)
        assert at_step(target, at, lambda: publish(target, "new")) == -signal.SIGKILL
        before.append(read(target))
        assert read(target, "sub") == before[-1], "further adapters go together"
        recover(target)
        assert not (target / ".commit").exists()
        after.append(read(target))
        publish(target, "old")
        assert [path.name for path in target.iterdir() if path.name.startswith(".")] == [], f"litter after step {at}"
    assert [state for state, _ in itertools.groupby(before)] == ["old", "interrupted", "new"]
    assert [state for state, _ in itertools.groupby(after)] == ["old", "new"]
    assert after.index("new") < before.index("interrupted"), "before the first move, the old files are read"


def half_moved(target: Path) -> None:
    """A publish of `new` over `old`, killed after its first move."""
    reset(target)
    renames = [
        at
        for at, event in enumerate(steps_of(target, lambda: publish(target, "new")), start=1)
        if event == "os.rename"
    ]
    reset(target)
    assert at_step(target, renames[2], lambda: publish(target, "new")) == -signal.SIGKILL
    assert read(target) == "interrupted"


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_recovery_that_is_killed_can_be_repeated(every: int, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    half_moved(target)
    total = len(steps_of(target, lambda: recover(target)))
    half_moved(target)
    for at in range(1, total + 1, every):
        if not (target / ".commit").exists():
            half_moved(target)
        assert at_step(target, at, lambda: recover(target)) in (-signal.SIGKILL, 0)
        assert read(target) in ("interrupted", "new")
    recover(target)
    assert files(target) == NEW


def test_an_interrupted_directory_may_be_renamed_and_not_copied(tmp_path: Path) -> None:
    half_moved(tmp_path / "adapter")
    moved = (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    with pytest.raises(ArtifactError, match="belongs to another directory"):
        recover(copy)
    with pytest.raises(ArtifactError, match="interrupted publish"):
        require_whole(copy)
    assert recover(moved) == ["b", "sub/a", "sub/manifest", "manifest"]
    assert files(moved) == NEW


def test_further_adapters_are_finished_from_the_directory_of_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    half_moved(target)
    before = listing(target)
    for act in (recover, require_whole, lambda d: publish(d, "x")):
        with pytest.raises(ArtifactError, match=f"interrupted publish, finish it with `peft-safety recover {target}`"):
            act(target / "sub")
    assert listing(target) == before


def test_a_publish_into_an_interrupted_directory_finishes_it_first(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    half_moved(target)
    with publishing(target, "manifest") as staging:
        assert files(target) == NEW
        (staging / "c").write_text("c")
    assert files(target) == NEW | {"c": "c"}

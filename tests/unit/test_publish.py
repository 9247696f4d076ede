"""Publishing a set of files: what a save that nothing disturbs does, and what is litter."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from peft_safety.core.publish import publishing, require_whole
from peft_safety.errors import ArtifactError


def publish(target: Path, **contents: str) -> None:
    with publishing(target, "manifest") as staging:
        for name, text in contents.items():
            path = staging / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def read(target: Path) -> dict[str, str]:
    return {str(p.relative_to(target)): p.read_text() for p in sorted(target.rglob("*")) if p.is_file()}


def test_published_files_replace_and_others_stay(tmp_path: Path) -> None:
    publish(tmp_path / "new" / "deep", manifest="1", a="1", sub__manifest="1")
    publish(tmp_path / "new" / "deep", manifest="2", b="2", sub__manifest="2", sub__c="2")
    assert read(tmp_path / "new" / "deep") == {"a": "1", "b": "2", "manifest": "2", "sub/c": "2", "sub/manifest": "2"}
    assert sorted(p.name for p in (tmp_path / "new" / "deep").iterdir()) == ["a", "b", "manifest", "sub"]


def test_an_exception_inside_publishes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, manifest="1")

    def stop(error: Exception) -> None:
        with publishing(tmp_path, "manifest") as staging:
            (staging / "manifest").write_text("2")
            raise error

    with pytest.raises(KeyError):
        stop(KeyError("x"))
    with pytest.raises(ArtifactError, match=r"could not be written.*free space"):
        stop(OSError(28, "No space left on device"))
    with pytest.raises(ArtifactError, match=r"could not be written.*I/O error"):
        stop(SafetensorError("I/O error"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest"]
    assert read(tmp_path) == {"manifest": "1"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_name_that_is_in_the_way_is_found_before_anything_changes(kind: str, tmp_path: Path) -> None:
    publish(tmp_path, manifest="1", a="1")
    if kind == "file":
        (tmp_path / "sub").write_text("not a directory")
    else:
        (tmp_path / "b").mkdir()
    before = read(tmp_path)
    with pytest.raises(ArtifactError, match="in the way"):
        publish(tmp_path, manifest="2", a="2", **({"sub__x": "2"} if kind == "file" else {"b": "2"}))
    assert read(tmp_path) == before
    publish(tmp_path, manifest="3")
    assert read(tmp_path)["manifest"] == "3"


def test_the_manifest_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    real = os.rename
    monkeypatch.setattr(
        os, "rename", lambda source, *rest, **where: (moved.append(Path(source).name), real(source, *rest, **where))
    )
    publish(tmp_path, manifest="1", a="1", z="1", sub__manifest="1", sub__b="1")
    assert moved[1:-1] == ["a", "b", "z", "manifest", "manifest"]
    assert moved[-1] == ".commit"


def test_an_empty_publish_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, manifest="1")
    publish(tmp_path)
    assert read(tmp_path) == {"manifest": "1"}


def test_published_files_have_the_usual_permissions(tmp_path: Path) -> None:
    """safetensors creates its files for the owner alone; a directory others may read must stay readable."""
    before = os.umask(0o027)
    try:
        with publishing(tmp_path, "manifest") as staging:
            save_file({"a": torch.ones(1)}, staging / "x.safetensors")
            (staging / "manifest").write_text("1")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@settings(max_examples=12, deadline=None)
@given(
    old=st.dictionaries(st.sampled_from("abcm"), st.text(max_size=3)),
    new=st.dictionaries(st.sampled_from("abcm"), st.text(max_size=3)),
)
def test_publishing_is_an_update(
    old: dict[str, str], new: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("update")
    for contents in (old, new):
        with publishing(target, "m") as staging:
            for name, text in contents.items():
                (staging / name).write_bytes(text.encode("utf-8", "replace"))
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        name: text.encode("utf-8", "replace") for name, text in (old | new).items()
    }


# --- links in the directory that is saved into


def test_a_linked_file_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "manifest").symlink_to(outside)
    os.link(outside, target / "a")
    publish(target, manifest="1", a="1")
    assert outside.read_text() == "precious"
    assert read(target) == {"a": "1", "manifest": "1"}
    assert not (target / "manifest").is_symlink()


def test_a_linked_directory_is_in_the_way(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "adapter"
    outside.mkdir()
    publish(target, manifest="1")
    (target / "second").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"second is a symbolic link and is in the way.*unchanged"):
        publish(target, manifest="2", second__manifest="2")
    assert not list(outside.iterdir())
    assert read(target) == {"manifest": "1"}


@pytest.mark.parametrize("name", [".commit", ".staging-x", ".Commit", "a\nb"])
def test_names_that_a_publish_needs_itself_cannot_be_published(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="name"), publishing(tmp_path, "manifest") as staging:
        (staging / name).write_text("x")
    assert not list(tmp_path.iterdir())


def test_a_link_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    with (
        pytest.raises(ArtifactError, match="no regular file"),
        publishing(tmp_path / "adapter", "manifest") as staging,
    ):
        (staging / "manifest").symlink_to(tmp_path / "private")
    assert not list((tmp_path / "adapter").iterdir())


# --- litter


def litter(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir() if path.name.startswith(".staging-"))


def aged(path: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    for inner in (*path.iterdir(), path):
        os.utime(inner, (then, then))


WRITER = """
import sys, time
from pathlib import Path
from peft_safety.core.publish import publishing
with publishing(Path(sys.argv[1]), "manifest") as staging:
    (staging / "manifest").write_text("theirs")
    print("staged", flush=True)
    sys.stdin.read()
"""


def test_a_live_writer_is_left_alone_and_a_dead_one_swept_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "staged\n"
        theirs = litter(tmp_path)
        aged(tmp_path / theirs[0], hours=100)  # a writer may be slow
        publish(tmp_path, manifest="ours")
        assert litter(tmp_path) == theirs
        writer.kill()
    publish(tmp_path, manifest="ours again")
    assert litter(tmp_path) == []
    assert read(tmp_path) == {"manifest": "ours again"}


@pytest.mark.parametrize("pid", [1, os.getpid(), 999_999_999], ids=["the first", "our own", "nobody's"])
def test_another_machines_staging_goes_by_its_age_whatever_number_it_carries(pid: int, tmp_path: Path) -> None:
    young, old, busy = (tmp_path / f".staging-{host}-{pid}-x" for host in ("a", "b", "c"))
    for path in (young, old, busy):
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"half of it")
    aged(young, hours=23)
    aged(old, hours=25)
    aged(busy, hours=1000)
    (busy / "adapter_model.safetensors").write_bytes(b"more of it")
    publish(tmp_path, manifest="1")
    assert litter(tmp_path) == [young.name, busy.name]


def test_a_link_that_looks_like_litter_is_not_followed(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "adapter"
    outside.mkdir()
    target.mkdir()
    (outside / "file").write_text("precious")
    aged(outside, hours=1000)
    (target / ".staging-x").symlink_to(outside)
    (target / ".staging-y").mkdir()
    (target / ".staging-y" / "z").symlink_to(outside)
    os.utime(target / ".staging-y" / "z", (0, 0), follow_symlinks=False)
    os.utime(target / ".staging-y", (0, 0))
    publish(target, manifest="1")
    assert (outside / "file").read_text() == "precious"
    assert litter(target) == [".staging-x"]


def test_threads_that_save_into_one_directory_take_turns(tmp_path: Path) -> None:
    problems: list[Exception] = []

    def work(name: str) -> None:
        try:
            for i in range(15):
                publish(tmp_path, manifest=name, **{name: str(i)})
        except ArtifactError as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    require_whole(tmp_path)
    assert read(tmp_path) == {"a": "14", "b": "14", "c": "14", "manifest": read(tmp_path)["manifest"]}

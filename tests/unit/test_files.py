"""Files of strangers are read within limits, and nothing they name leaves its directory."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_safety.core import files
from peft_safety.errors import ArtifactError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    raw=st.binary(max_size=200)
    | st.text(alphabet='{}[]",:0123456789.eE+-nulltrueNaInfity\\ \x00', max_size=80).map(str.encode)
)
def test_any_bytes_are_an_object_or_an_artifact_error(raw: bytes) -> None:
    with suppress(ArtifactError):
        assert isinstance(files.parse_json(raw, "here"), dict)


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_every_shallow_object_survives(value: dict) -> None:
    assert files.parse_json(json.dumps(value), "here") == value


@given(value=JSON.filter(lambda v: not isinstance(v, dict)))
def test_only_objects_are_accepted(value: object) -> None:
    with pytest.raises(ArtifactError, match="one JSON object"):
        files.parse_json(json.dumps(value), "here")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"a": 1, "a": 1}', "'a' is a duplicate key"),
        ('{"x": {"a": 1, "b": 2, "b": 3}}', "'b' is a duplicate key"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("{" + ",".join(f'"{i}":1' for i in range(110_000)) + ',"7":2}', "larger than"),
        ("{" + ",".join(f'"{i}":1' for i in range(90_000)) + ',"7":2}', "'7' is a duplicate key"),
        ('{"a":' * 200_000, "not valid JSON"),
        ('{"a":' * 16 + "1" + "}" * 16, None),
        ('{"a":' * 17 + "1" + "}" * 17, "16 levels"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"\xef\xbb\xbf{}", None),
    ],
    ids=lambda value: str(value)[:25],
)
def test_json_has_limits(raw: str | bytes, says: str | None) -> None:
    if says is None:
        assert files.parse_json(raw, "here") is not None
        return
    with pytest.raises(ArtifactError, match=says) as caught:
        files.parse_json(raw, "here")
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(20)
def test_json_is_read_from_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(ArtifactError, match=str(tmp_path)):
            files.read_json(tmp_path / name)


@given(
    name=st.text(max_size=12)
    | st.sampled_from(["..", ".", "", "a/b", "/etc/passwd", "..\\x", "a\0", "a\nb", "\ud800", "x" * 256, "é" * 128])
)
def test_only_plain_names_are_children(name: str) -> None:
    directory = Path("/nowhere/adapter")
    try:
        path = files.child(directory, name)
    except ArtifactError:
        return
    assert path.parent == directory
    assert path.name == name
    assert os.path.normpath(path) == str(path)
    os.fsencode(path)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "a/b", "/etc/passwd", "..\\x", "a\0b", "a\nb", "\ud800", "x" * 256, "é" * 128, None, 5, b"x"],
)
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ArtifactError, match="plain file name"):
        files.child(Path("/nowhere"), name)


def test_the_files_of_an_adapter_are_plain_names() -> None:
    for name in (
        "adapter_model.safetensors",
        "safety_subspace.safetensors",
        "adapter_config.json",
        "x" * 255,
        "ü.json",
    ):
        assert files.child(Path("/nowhere"), name) == Path("/nowhere") / name


def test_a_link_may_stay_inside_and_may_not_leave(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "file").write_text("x")
    (inside / "near").symlink_to(inside / "file")
    (inside / "far").symlink_to(outside / "file")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "file.json").symlink_to(inside / "loop")
    assert files.child(inside, "near").read_text() == "x"
    with pytest.raises(ArtifactError, match="leaves its directory"):
        files.child(inside, "far")
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.read_json(files.child(inside, "file.json"))


def test_a_link_may_only_go_to_the_blobs_of_its_own_snapshot(tmp_path: Path) -> None:
    for repository in ("mine", "other"):
        (tmp_path / repository / "snapshots" / "1").mkdir(parents=True)
        (tmp_path / repository / "blobs").mkdir()
        (tmp_path / repository / "blobs" / "b").write_text(repository)
    snapshot = tmp_path / "mine" / "snapshots" / "1"
    (snapshot / "good").symlink_to(tmp_path / "mine" / "blobs" / "b")
    (snapshot / "bad").symlink_to(tmp_path / "other" / "blobs" / "b")
    assert files.child(snapshot, "good").read_text() == "mine"
    with pytest.raises(ArtifactError, match="leaves its directory"):
        files.child(snapshot, "bad")


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 20) + 1])
def test_the_digest_is_that_of_hashlib(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.sha256(tmp_path / "missing")


def test_what_is_no_safetensors_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a": torch.ones(3)}, tmp_path / "good.safetensors")
    for name, says in (
        ("text.safetensors", "complete"),
        ("missing.safetensors", "missing"),
        ("weights.bin", "pickle"),
        ("x.pt", "pickle"),
    ):
        with pytest.raises(ArtifactError, match=says), files.open_tensors(tmp_path / name):
            pass
    with files.open_tensors(tmp_path / "good.safetensors") as handle:
        assert list(handle.keys()) == ["a"]


def test_an_absurd_number_of_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TENSORS", 2)
    save_file({name: torch.ones(1) for name in "abc"}, tmp_path / "many.safetensors")
    with (
        pytest.raises(ArtifactError, match="3 tensors, more than 2"),
        files.open_tensors(tmp_path / "many.safetensors"),
    ):
        pass

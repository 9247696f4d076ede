"""Results whose place cannot be written, and input that is missing, are refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.core.files import check_place
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.recipes.patch import PatchOptions, make_patch
from tests.peft import cells
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return path


def refused(*command):
    """The error of a command on a model that is not there: of the model, where nothing is refused before."""
    return CliRunner().invoke(app, [*map(str, command), "--model", "nowhere"]).exception


def test_the_directory_of_a_patch(file):
    for place in (file, file / "patch"):
        found = refused("patch", "--out", place)
        assert isinstance(found, ArtifactError)
        assert f"{file} is not a directory" in str(found)
    assert "no model" in str(refused("patch", "--out", file.parent / "new"))
    assert [path.name for path in file.parent.iterdir()] == ["file"], "a refused patch leaves nothing behind"


def test_a_place_that_is_no_name_is_a_typed_error(tmp_path):
    with pytest.raises(ArtifactError, match="it is a directory"):
        check_place(Path("/"))
    check_place(tmp_path / ("a" * 300))  # only writing it tells


def test_the_file_of_a_subspace(file):
    (file.parent / "folder.safetensors").mkdir()
    for place in (file / "space", file / "space.safetensors", file.parent / "folder.safetensors"):
        found = refused("calibrate", "--out", place)
        assert isinstance(found, ArtifactError)
        assert "cannot be written" in str(found)
    assert "no model" in str(refused("calibrate", "--out", file.parent / "new" / "space"))


@pytest.mark.parametrize("method", [["--method", "salora"], ["--method", "weight"], ["--side", "out"]], ids=str)
def test_a_picture_of_what_is_not_measured(method, tmp_path):
    places = ["--out", tmp_path / "space", "--png", tmp_path / "cover.png"]
    assert "does not measure the energy" in str(refused("calibrate", *method, *places))
    assert "no model" in str(refused("calibrate", *method, *places[:2]))


def test_a_picture_that_cannot_be_written(file):
    found = refused("calibrate", "--out", file.parent / "space", "--png", file.parent / "cover")
    assert isinstance(found, ConfigError)
    assert "ends in .png" in str(found)


def test_an_earlier_patch_that_is_missing_or_of_another_model(tmp_path):
    found = refused("patch", "--out", tmp_path / "out", "--prior", tmp_path / "missing")
    assert isinstance(found, ArtifactError)
    assert "missing" in str(found)
    cells.plain(target_modules=["q_proj"]).save_pretrained(tmp_path / "prior")
    options = PatchOptions(prior_patches=(str(tmp_path / "prior"),))
    with pytest.raises(ArtifactError, match="does not fit this model"):
        make_patch(tiny_llama(hidden=64), tmp_path / "out", options, tokenizer=tiny_tokenizer())
    (tmp_path / "prior" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="prior"):
        make_patch(tiny_llama(), tmp_path / "out", options, tokenizer=tiny_tokenizer())

"""What a cache keeps, and the versions of models by which it keeps it."""

from __future__ import annotations

import stat
from datetime import datetime

import pytest
from huggingface_hub import constants

from peft_safety.errors import ArtifactError
from peft_safety.evaluation.kept import Kept, key_of
from peft_safety.evaluation.versions import own_version, version_of
from tests.tiny import tiny_llama


def text(value):
    return isinstance(value, str)


def test_values_outlive_the_process_and_lines_that_were_cut_off_do_not(tmp_path):
    path = tmp_path / "new" / "kept.jsonl"
    Kept(path).add("a", "one\n\ud800 ü")
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    again = Kept(path)
    assert (len(again), again.get("a", text), again.get("b", text)) == (1, "one\n\ud800 ü", None)
    again.add("b", 2)
    assert Kept(path).get("b", text) is None, "of another form"
    assert Kept(path).get("b", lambda value: value == 2) == 2
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_a_file_that_cannot_be_written_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        Kept(tmp_path / "file" / "kept.jsonl").add("a", 1)
    with pytest.raises(ArtifactError, match="cannot be written"):
        Kept("/dev/full").add("a", 1)


def test_keys_depend_on_every_part():
    keys = {key_of(*parts) for parts in (("a", "b"), ("ab",), ("a", ["b"]), ("b", "a"), (1,), ("1",), ())}
    assert len(keys) == 7
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    days = [datetime(2026, 1, day) for day in (1, 2)]
    assert key_of({"at": days[0]}) == key_of({"at": days[0]}) != key_of({"at": days[1]}), "as a parquet file has them"


def test_a_version_changes_with_every_file_that_is_loaded(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    seen = [version_of(str(tmp_path / "model"))]
    (tmp_path / "model" / "picture.png").touch()
    assert version_of(str(tmp_path / "model")) == seen[0]
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    seen.append(version_of(str(tmp_path / "model")))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(version_of(str(tmp_path / "model")))
    (tmp_path / "model" / "modeling.py").write_text("# code of the model's own")
    seen.append(version_of(str(tmp_path / "model")))
    assert len(set(seen)) == 4


def test_a_version_changes_with_shards_in_folders_of_their_own(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "shards").mkdir()
    for shard in tmp_path.glob("*.safetensors"):
        shard.rename(tmp_path / "shards" / shard.name)
    index.write_text(index.read_text().replace('"model-', '"shards/model-'))
    type(tiny_llama()).from_pretrained(tmp_path)
    before = version_of(str(tmp_path))
    last = max((tmp_path / "shards").iterdir())
    last.write_bytes(last.read_bytes()[:-1] + b"\x7f")
    assert version_of(str(tmp_path)) != before


def test_the_version_of_an_adapter_has_that_of_its_base(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path / "base"}"}}')
    own, folder = own_version(str(tmp_path / "adapter"))
    before = version_of(str(tmp_path / "adapter"))
    assert folder == tmp_path / "adapter"
    assert before.startswith(f"{own} on sha256:")
    (tmp_path / "base" / "config.json").write_text("{}")
    assert version_of(str(tmp_path / "adapter")) != before


def test_the_version_of_a_hub_id_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--model"
    for folder in ("refs", f"snapshots/{'a' * 40}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    assert version_of("me/model") == f"commit:{'a' * 40}"

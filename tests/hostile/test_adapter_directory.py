"""An adapter directory that is damaged, hostile or of another model never loads: a typed error, at once, and the base
model is as it was.
"""

from __future__ import annotations

import pickle
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from peft_safety import SafetySubspace, verify
from peft_safety.core.subspace_file import FORMAT
from peft_safety.errors import ArtifactError, PeftSafetyError, SubspaceError
from tests.hostile import tools
from tests.hostile.cases import CASES, Case
from tests.hostile.damages import Bomb, leak
from tests.hostile.tools import ADAPTER, MANIFEST, REMEDIES, SUBSPACE, fields, tensors
from tests.tiny import tiny_llama

pytestmark = pytest.mark.timeout(60)
SECONDS = 2.0


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "lora": tools.save_good(root / "lora"),
        "task": tools.save_good(root / "task", init="task"),
        "other_base": tools.save_good(root / "other_base", base_seed=1),
        "wider_base": tools.save_good(root / "wider_base", hidden=64),
    }


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path):
    return lambda name="lora": Path(shutil.copytree(good[name], tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused(case: Case, call) -> None:
    start = time.thread_time()
    with pytest.raises(PeftSafetyError) as caught:
        call()
    seconds = time.thread_time() - start
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert len(message) < 2000, "an error message is not a dump of the input"
    for part in case.says:
        assert part in message, message
    assert any(remedy in message for remedy in REMEDIES), f"no remedy in: {message}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w.-]", "_", case.name)[:60])
def test_a_damaged_directory_is_refused_and_the_base_untouched(
    case: Case, base: nn.Module, copy, tmp_path: Path
) -> None:
    directory = copy(case.good)
    case.damage(directory)
    with tools.unchanged(base):
        refused(case, lambda: PeftModel.from_pretrained(base, str(directory)))
    refused(case, lambda: verify(directory, model=base if case.knows_base else None))
    assert not (directory / "ran").exists(), "a pickle was opened"


def test_the_undamaged_directories_load_and_verify(copy, good: dict[str, Path]) -> None:
    for name in ("lora", "task"):
        report = verify(good[name], model=tiny_llama())
        assert (report.modules, report.ranks, report.protected, report.base_checked) == (14, (4,), (8,), True)
        model = PeftModel.from_pretrained(tiny_llama(), str(good[name]))
        assert not torch.equal(model(tools.tokens()).logits, tiny_llama()(tools.tokens()).logits)


def test_fields_that_change_nothing_may_be_edited(base: nn.Module, copy) -> None:
    directory = copy()
    config = tools.manifest(directory) | {
        "base_model_name_or_path": "somebody/model",
        "inference_mode": False,
        "revision": "main",
    }
    (directory / MANIFEST).write_text(tools.json.dumps(config))
    assert verify(directory, model=base).modules == 14


def test_without_a_manifest_nothing_loads(base: nn.Module, copy) -> None:
    directory = copy()
    (directory / MANIFEST).unlink()
    with tools.unchanged(base), pytest.raises(ValueError, match=MANIFEST):
        PeftModel.from_pretrained(base, str(directory))
    with pytest.raises(ArtifactError, match=MANIFEST):
        verify(directory)
    with pytest.raises(ArtifactError, match="not a directory"):
        verify(directory / "nowhere")


@pytest.mark.parametrize("name", [ADAPTER, SUBSPACE])
def test_a_flipped_bit_is_found_wherever_it_is(name: str, base: nn.Module, copy) -> None:
    directory = copy()
    intact = (directory / name).read_bytes()
    chooser = random.Random(0)
    for position in [0, 9, len(intact) - 1, *(chooser.randrange(len(intact)) for _ in range(12))]:
        flipped = bytearray(intact)
        flipped[position] ^= 1 << chooser.randrange(8)
        (directory / name).write_bytes(flipped)
        with pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
            verify(directory)
    with tools.unchanged(base), pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
        PeftModel.from_pretrained(base, str(directory))


def test_a_flipped_bit_of_the_config_changes_nothing_or_is_found(base: nn.Module, copy) -> None:
    directory = copy()
    expected = verify(directory)
    intact = (directory / MANIFEST).read_bytes()
    chooser = random.Random(0)
    found = 0
    for _ in range(60):
        flipped = bytearray(intact)
        flipped[chooser.randrange(len(intact))] ^= 1 << chooser.randrange(8)
        (directory / MANIFEST).write_bytes(flipped)
        try:
            facts = verify(directory)
            assert facts.worst_leak == pytest.approx(expected.worst_leak, rel=1e-3)  # read anew, to other addresses
            assert facts.worst_orthonormality == pytest.approx(expected.worst_orthonormality, rel=1e-3, abs=1e-12)
            assert replace(facts, worst_leak=0.0, worst_orthonormality=0.0) == replace(
                expected, worst_leak=0.0, worst_orthonormality=0.0
            )
        except PeftSafetyError:
            found += 1
    assert found > 30, "most flips hit a name, a value or a hash"


def test_a_broken_sub_adapter_is_refused_like_any_other(base: nn.Module, copy, tmp_path: Path) -> None:
    directory = copy()
    nested = Path(shutil.copytree(directory, tmp_path / "run" / "second"))
    tensors(leak)(nested)
    with tools.unchanged(base), pytest.raises(ArtifactError, match="protected subspace"):
        PeftModel.from_pretrained(base, str(tmp_path / "run"), subfolder="second")


def test_a_link_for_an_unfinished_save_moves_nothing(base: nn.Module, copy, tmp_path: Path) -> None:
    directory = copy()
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    (directory / ".commit").symlink_to(private)
    with tools.unchanged(base), pytest.raises(ArtifactError, match="symbolic link"):
        PeftModel.from_pretrained(base, str(directory))
    with pytest.raises(ArtifactError, match="symbolic link"):
        verify(directory)
    assert (private / "key").read_text() == "secret"


def test_links_of_the_hub_cache_are_followed(base: nn.Module, good: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (ADAPTER, SUBSPACE, MANIFEST):
        shutil.copy(good["lora"] / file, blobs / f"blob-{file}")
        (snapshot / file).symlink_to(blobs / f"blob-{file}")
    assert verify(snapshot, model=base).modules == 14


def test_only_libraries_of_transformers_are_named_for_import(copy) -> None:
    directory = copy()
    fields(auto_mapping={"base_model_class": "gravity", "parent_library": "antigravity"})(directory)
    config = PeftConfig.from_pretrained(str(directory))
    assert config.auto_mapping is None
    assert "antigravity" not in sys.modules


def test_a_config_saved_before_injection_round_trips(tmp_path: Path) -> None:
    from peft_safety import SaLoRAConfig

    SaLoRAConfig(r=8, target_modules=r".*\.(q|v)_proj").save_pretrained(str(tmp_path))
    again = SaLoRAConfig.from_pretrained(str(tmp_path))
    assert (again.r, again.target_modules, again.subspace) == (8, r".*\.(q|v)_proj", "auto")


def test_a_subspace_from_the_pickle_of_a_stranger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "subspace.pt"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ArtifactError, match="pickle"):
        SafetySubspace.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_subspace_of_zero_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SUBSPACE
    save_file({}, path, metadata={FORMAT: "{}"})
    assert load_file(path) == {}
    with pytest.raises(SubspaceError, match="no basis"):
        SafetySubspace.load(tmp_path)

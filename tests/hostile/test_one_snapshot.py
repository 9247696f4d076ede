"""What was checked is what is loaded: a directory that changes meanwhile gives one adapter or the other, or an error
that says so, and a file that could not be read to its end is refused from its header.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file

from peft_safety import verify
from peft_safety.errors import ArtifactError, PeftSafetyError
from tests.hostile import tools
from tests.hostile.saver import WIDTH, Small, adapter, saving
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("quiet")]
SECONDS = 2.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("loads", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_loads_beside_a_saving_process_are_never_a_mixture(loads: int, tmp_path: Path) -> None:
    x, target = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)), tmp_path / "target"
    models = [adapter(seed) for seed in (0, 1)]
    models[0].save_pretrained(str(target))
    seen: Counter[str] = Counter()
    with torch.no_grad(), saving(target, models):
        results = [model(x) for model in models]
        assert not torch.allclose(*results, atol=0.1)
        for _ in range(loads):
            try:
                loaded = PeftModel.from_pretrained(Small(), str(target)).eval()(x)
                verify(target)
            except PeftSafetyError as error:
                seen[f"refused: {str(error)[-80:]}"] += 1
                continue
            which = [torch.allclose(loaded, result, atol=1e-4) for result in results]
            assert sum(which) == 1
            seen[f"adapter {which.index(True)}"] += 1
    print(dict(seen))
    refused = [reason for reason in seen if reason.startswith("refused")]
    assert all("Try again" in reason or "when that is done" in reason for reason in refused), refused
    assert sum(seen[reason] for reason in refused) <= loads // 5, seen
    assert loads < 100 or min(seen["adapter 0"], seen["adapter 1"]) > loads // 20, seen
    assert not [name for name in os.listdir(target) if name.startswith(".")]


def test_a_file_replaced_between_the_check_and_the_load_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tools.save_good(tmp_path / "good")
    expected = PeftModel.from_pretrained(tiny_llama(), str(good))(tools.tokens()).logits
    original = peft.peft_model.load_peft_weights

    def replaced(*args: object, **options: object) -> object:
        tools.tensors(tools.put(tools.B, tools.poke(float("nan"))))(good)
        return original(*args, **options)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", replaced)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(good))
    assert torch.allclose(loaded(tools.tokens()).logits, expected, atol=1e-5)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"sha256|NaN"):
        PeftModel.from_pretrained(tiny_llama(), str(good))


def test_a_config_that_was_read_brings_the_adapter_that_was_there_then(tmp_path: Path) -> None:
    good = tools.save_good(tmp_path / "good")
    expected = PeftModel.from_pretrained(tiny_llama(), str(good))(tools.tokens()).logits
    config = PeftConfig.from_pretrained(str(good))
    other = tools.save_good(tmp_path / "other", seed=3, base_seed=0, init="task")
    for file in other.iterdir():
        shutil.copy(file, good)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(good), config=config)
    assert torch.allclose(loaded(tools.tokens()).logits, expected, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_copy_goes_with_its_config_and_not_with_a_forked_process(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(tools.save_good(tmp_path / "good")))
    copy = config._snapshot.path
    child = os.fork()
    if child == 0:  # such as the worker of a data loader
        config._snapshot = None
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert (copy / tools.ADAPTER).is_file()
    config._snapshot = None
    gc.collect()
    assert not copy.exists()


# --- bounds before work
# ---


def refused_soon(directory: Path, says: str) -> None:
    base = tiny_llama()
    for call in (lambda: verify(directory), lambda: PeftModel.from_pretrained(base, str(directory))):
        start = time.thread_time()
        with tools.unchanged(base), pytest.raises(ArtifactError, match=says):
            call()
        assert time.thread_time() - start < SECONDS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", [tools.ADAPTER, tools.SUBSPACE, tools.MANIFEST])
def test_a_named_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    directory = tools.save_good(tmp_path / "a")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(ArtifactError, match="not a regular file"):
        verify(directory)
    base = tiny_llama()
    with tools.unchanged(base), pytest.raises(ValueError, match=r"not a regular file|adapter_config"):
        PeftModel.from_pretrained(base, str(directory))


def test_a_sparse_file_is_refused_whatever_its_header_says(tmp_path: Path) -> None:
    directory = tools.save_good(tmp_path / "a")
    path = directory / tools.ADAPTER
    os.truncate(path, 64 << 30)
    refused_soon(directory, r"\d on the disk")
    header = b'{"x":{"dtype":"F32","shape":[17179869184],"data_offsets":[0,68719476736]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (64 << 30))
    refused_soon(directory, r"\d on the disk")


def test_twenty_thousand_tensors_are_refused_by_their_names(tmp_path: Path) -> None:
    directory = tools.save_good(tmp_path / "a")
    save_file({f"{tools.PREFIX}x{i}": torch.zeros(1) for i in range(20_000)}, directory / tools.ADAPTER)
    tools.forge(directory)
    refused_soon(directory, "unknown or missing tensors")


def test_one_basis_for_eight_thousand_names_is_refused_by_the_header(tmp_path: Path) -> None:
    directory = tools.save_good(tmp_path / "a")
    large = torch.linalg.qr(torch.randn(1024, 256)).Q.contiguous()
    tools.subspace_header(directory, {f"basis.out.x{i}": "basis.out.large" for i in range(8_000)}, large)
    refused_soon(directory, "8014|large has no fingerprint")


def test_a_config_alone_is_an_incomplete_adapter(tmp_path: Path) -> None:
    """Its patterns are not matched, and the subspace that it names is not looked for."""
    directory = tools.save_good(tmp_path / "a")
    for name in (tools.ADAPTER, tools.SUBSPACE):
        (directory / name).unlink()
    tools.forge(
        directory,
        tools.manifest(directory)
        | {"safety_artifact": None, "target_modules": "([a-z_.0-9]+)+!", "subspace": str(tmp_path / "nowhere")},
    )
    refused_soon(directory, r"config without its|safety_artifact|is missing")

"""Damaged directories of every method, and every field of every config: each is refused by a typed error, or what it
loads is protected. The counts are printed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_safety import assert_protected, verify
from peft_safety.core.projection import leak
from peft_safety.errors import PeftSafetyError
from peft_safety.layers.adapters import adapter_layers
from peft_safety.methods.base import ProtectedConfig
from tests.hostile.saver import Small, adapter
from tests.hostile.variants import CERTIFICATE, METHODS, bases, fields, mutate, outputs, save, variants

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("quiet")]
SECONDS = 2.0
LEAK = 1e-5


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("good")
    return lambda method: root / method if (root / method).is_dir() else save(method, root)


def leaks(model: nn.Module, method: str) -> float:
    """Of the updates that the layers compute, into the spans that were protected when the adapter was made."""
    space, worst = getattr(METHODS[method](), "subspace", None) or bases("in"), 0.0
    for name, layer in adapter_layers(model, "default").items():
        delta = layer.get_delta_weight("default")
        for side, basis in space.bases[name].items():
            worst = max(worst, leak(basis, delta, side))
    return worst


def judged(directory: Path, method: str, load: bool) -> str:
    """What became of a variant. Anything but a typed error in time, or a protected adapter, fails."""
    start = time.thread_time()
    try:
        verify(directory)
        seen = "verified"
    except PeftSafetyError as error:
        seen = "refused" if len(str(error)) < 2000 else "refused at length"
    if load:
        base = Small()
        before = {key: value.clone() for key, value in base.state_dict().items()}
        model = None
        try:
            model = PeftModel.from_pretrained(base, str(directory))
        except ValueError as error:
            if not isinstance(error, PeftSafetyError) and "adapter_config" not in str(error):  # PEFT's: there is none
                raise
        if model is None:
            assert base.state_dict().keys() == before.keys()
            seen += ", not loaded"
        else:
            plain = not isinstance(model.peft_config["default"], ProtectedConfig)
            assert plain == (not (directory / CERTIFICATE).exists() and method in ("frozen", "repaired"))
            if not plain:
                assert_protected(model)
                assert leaks(model, method) < LEAK
                assert bool(torch.isfinite(outputs(model)).all())
            seen += ", loaded"
            base = model.unload()
        assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert time.thread_time() - start < SECONDS
    assert "at length" not in seen
    return seen


def run(cases: list[tuple[str, Any]], directory: Path, method: str, tmp_path: Path, every: int, loads: int) -> None:
    counts: Counter[str] = Counter()
    for index, (name, damage) in enumerate(cases[::every]):
        copy = Path(shutil.copytree(directory, tmp_path / f"{index}" / "adapter"))
        damage(copy)
        try:
            counts[judged(copy, method, load=index % loads == 0)] += 1
        except BaseException as error:
            raise AssertionError(f"{method}, {name}: {type(error).__name__}: {error}") from error
        shutil.rmtree(copy.parent)
    print(f"{method}: {sum(counts.values())} variants, {dict(counts)}")
    assert sum(counts.values()) == len(cases[::every])


@pytest.mark.parametrize("method", METHODS)
def test_the_undamaged_adapter_loads(method: str, good: Callable[[str], Path]) -> None:
    assert judged(good(method), method, load=True) == "verified, loaded"


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_directory_is_refused_or_protected(
    method: str, every: int, good: Callable[[str], Path], tmp_path: Path
) -> None:
    run(variants(good(method)), good(method), method, tmp_path, every, loads=1)


@pytest.mark.parametrize(("method", "every"), [("guardspace", 5), ("frozen", 11)])
def test_a_field_of_another_value_is_refused_or_protected(
    method: str, every: int, good: Callable[[str], Path], tmp_path: Path
) -> None:
    run(fields(good(method)), good(method), method, tmp_path, every, loads=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_every_method(method: str, good: Callable[[str], Path], tmp_path: Path) -> None:
    run(fields(good(method)), good(method), method, tmp_path, every=1, loads=1)


def test_there_are_enough_variants(good: Callable[[str], Path]) -> None:
    counts = {method: len(variants(good(method))) for method in METHODS}
    print(f"{sum(counts.values())} variants: {counts}")
    assert sum(counts.values()) >= 400


@pytest.mark.parametrize("mutants", [500, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_mutant_is_refused_or_protected(mutants: int, good: Callable[[str], Path], tmp_path: Path) -> None:
    """Without forged hashes it computes what was saved. What only a frozen or repaired adapter has, has no hash."""
    counts: Counter[str] = Counter()
    for seed in range(mutants):
        method = list(METHODS)[seed % len(METHODS)]
        copy = Path(shutil.copytree(good(method), tmp_path / f"{seed}" / "adapter"))
        what, signed = mutate(copy, seed)
        hashed = not signed and method not in ("frozen", "repaired")
        try:
            seen = judged(copy, method, load=seed % 4 == 0)
            if hashed and "verified" in seen:
                given, expected = (PeftModel.from_pretrained(Small(), str(d)).eval() for d in (copy, good(method)))
                assert torch.equal(outputs(given), outputs(expected))
        except BaseException as error:
            raise AssertionError(f"{method}, mutant {seed}, {what}: {type(error).__name__}: {error}") from error
        counts[f"{'signed' if signed else 'unsigned'}: {seen}"] += 1
        shutil.rmtree(copy.parent)
    print(f"{sum(counts.values())} mutants, {dict(sorted(counts.items()))}")
    assert sum(counts.values()) == mutants


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_leave_no_litter_after_the_next_save(kills: int, tmp_path: Path) -> None:
    target, model, chooser = tmp_path / "target", adapter(0), random.Random(0)
    model.save_pretrained(str(target))
    names = sorted(os.listdir(target))
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                model.save_pretrained(str(target))
        time.sleep(chooser.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    model.save_pretrained(str(target))
    assert sorted(os.listdir(target)) == names
    verify(target)

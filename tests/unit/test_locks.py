"""The two locks hold what the extras of setup.cfg need, no more and no less, so that pip has nothing to resolve."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TESTED = sys.version_info[:2] == (3, 11) and sys.platform == "linux"


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "requirements" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def other_releases(pins: dict[str, str]) -> list[str]:
    """What is not installed as it is locked."""
    found = {there.metadata["Name"].lower(): there.version.partition("+")[0] for there in metadata.distributions()}
    return [name for name, version in pins.items() if found.get(name.lower()) != version]


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_a_lock_is_the_whole_of_what_its_extra_needs(lock: ModuleType, extra: str) -> None:
    pins = lock.read(lock.LOCKS[extra])
    if not TESTED or other_releases(pins):
        pytest.skip("the locks are of the tested releases, and others are installed")
    assert lock.pins(extra) == pins, "make lock"


def test_the_demo_installs_a_part_of_what_the_tests_do(lock: ModuleType) -> None:
    demo, dev = (lock.read(lock.LOCKS[extra]) for extra in ("demo", "dev"))
    assert demo.items() <= dev.items()
    assert len(demo) < 0.6 * len(dev)
    assert not {"pytest", "trl", "lm_eval", "bitsandbytes", "datasets", "ruff"} & demo.keys()


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_the_ranges_of_setup_cfg_hold_what_is_locked(lock: ModuleType, extra: str) -> None:
    pins = {canonicalize_name(name): version for name, version in lock.read(lock.LOCKS[extra]).items()}
    wanted: list[Requirement] = [
        requirement for requirement in lock.wanted(extra) if not requirement.name.startswith("triton")
    ]
    assert {"torch", "peft", "transformers"} <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])

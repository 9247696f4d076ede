"""Which backend runs, and that nothing heavy is loaded to find out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peft_safety.errors import ConfigError
from peft_safety.ops import backend_for, dispatch


def test_a_cpu_gets_the_reference_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, reason = backend_for(torch.zeros(1))
    assert name == "reference"
    assert reason


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert backend_for(torch.zeros(1)) == ("reference", "PEFT_SAFETY_BACKEND=reference")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(ConfigError, match=r"TRITON_INTERPRET|not installed"):
        backend_for(torch.zeros(1))
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match="'cuda' is no backend"):
        backend_for(torch.zeros(1))


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_from_ampere_on(capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    obstacle = dispatch._gpu_obstacle(torch.device("cuda:0"))
    assert (obstacle is None) == served
    assert served or "7.5" in str(obstacle)


def test_a_backend_serves_the_device_that_it_is_registered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_BACKENDS", {kind: list(known) for kind, known in dispatch._BACKENDS.items()})
    hindrance: list[str] = []
    module = "peft_safety.ops.reference"
    own = dispatch.Backend("own", module, lambda device: next(iter(hindrance), None), "it is ours")
    dispatch.register("cpu", own)
    assert backend_for(torch.zeros(1)) == ("own", "it is ours")
    assert backend_for(torch.zeros(1, device="meta")) == ("reference", "no backend is registered for meta")
    hindrance.append("it is out of order")
    assert backend_for(torch.zeros(1))[0] == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "own")
    with pytest.raises(ConfigError, match=r"own.* but it is out of order"):
        backend_for(torch.zeros(1))


def test_importing_the_operations_loads_neither_triton_nor_bitsandbytes() -> None:
    code = (
        "import sys, peft_safety.ops; print([m for m in ('triton', 'bitsandbytes', 'transformers', "
        "'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

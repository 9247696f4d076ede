"""Every way into a directory refuses a damaged one by a typed error, and leaves its model as it was."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftMixedModel, PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_safety import verify
from peft_safety.cli import main
from peft_safety.convert.export import export_directory
from peft_safety.errors import PeftSafetyError
from tests.hostile import tools
from tests.hostile.damages import pickled, remove, truncate, write
from tests.hostile.tools import ADAPTER, MANIFEST, SUBSPACE, B, Damage
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("quiet")]

DAMAGES: dict[str, Damage] = {
    "NaN": tools.tensors(tools.put(B, tools.poke(float("nan")))),
    "a leak": tools.tensors(tools.put(B, lambda x: x + 0.1)),
    "a transposed factor": tools.tensors(tools.put(B, lambda x: x.T)),
    "no tensors": remove(ADAPTER),
    "half a file": truncate(ADAPTER, 0.5),
    "no bases": remove(SUBSPACE),
    "a pickle": pickled(instead=True),
    "no JSON": tools.text(lambda t: t[:-20]),
    "noise": write(MANIFEST, b"SALORA" + bytes(range(256))),
    "a list for alpha": tools.fields(lora_alpha=[1]),
    "a pattern": tools.fields(target_modules="([a-z_.0-9]+)+!"),
    "a negative rank": tools.fields(r=-1),
    "no record": tools.fields(safety_artifact=None),
}


class Entries:
    """One good model of each kind; what is read into it fails."""

    def __init__(self, good: Path) -> None:
        self.base, self.model = tiny_llama(), PeftModel.from_pretrained(tiny_llama(), str(good)).eval()
        self.mixed = PeftMixedModel.from_pretrained(tiny_llama(), str(good)).eval()

    def ways(self, d: str) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
        base, model, mixed = self.base, self.model, self.mixed
        return {
            "verify": (base, lambda: verify(d, model=base)),
            "export": (base, lambda: export_directory(d, f"{d}-out")),
            "a config": (base, lambda: _incomplete(PeftConfig.from_pretrained(d))),
            "PeftModel": (base, lambda: PeftModel.from_pretrained(base, d)),
            "AutoPeft": (base, lambda: AutoPeftModelForCausalLM.from_pretrained(d)),
            "a second adapter": (model, lambda: model.load_adapter(d, "second")),
            "onto the adapter": (model, lambda: model.load_adapter(d, "default")),
            "hotswap": (model, lambda: hotswap_adapter(model, d, "default")),
            "transformers": (base, lambda: base.load_adapter(d)),
            "PeftMixedModel": (base, lambda: PeftMixedModel.from_pretrained(base, d)),
            "a second mixed one": (mixed, lambda: mixed.load_adapter(d, "second")),
        }


def _incomplete(config: Any) -> None:
    """A config alone may be read, to make an adapter from it, where no tensors lie beside it."""
    if config._stored is None:
        raise PeftSafetyError("no adapter")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    tiny_llama().save_pretrained(root / "base")
    directory = tools.save_good(root / "adapter")
    tools.fields(base_model_name_or_path=str(root / "base"))(directory)
    return directory


@pytest.fixture(scope="module")
def entries(good: Path) -> Entries:
    return Entries(good)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_entry_refuses_by_a_typed_error(damage: str, good: Path, entries: Entries, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(good, tmp_path / "adapter"))
    DAMAGES[damage](directory)
    for way, (model, call) in entries.ways(str(directory)).items():
        try:
            with tools.unchanged(model):
                call_refused(call)
        except BaseException as error:
            raise AssertionError(f"{way}: {type(error).__name__}: {error}") from error


def call_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(PeftSafetyError) as caught:
        call()
    assert len(str(caught.value)) < 2000


def test_every_entry_reads_the_good_adapter(good: Path) -> None:
    for way, (_, call) in Entries(good).ways(str(good)).items():
        if way != "export":
            call()


def test_the_command_says_in_one_line_what_is_wrong(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints the text of a file as it is, where a terminal would act upon it."""
    damages = DAMAGES | {"an escape": tools.text(lambda t: t.replace('"SALORA"', '"\\u001b[2J[/x]"'))}
    for index, damage in enumerate(damages.values()):
        directory = Path(shutil.copytree(good, tmp_path / f"[/{index}]\x1b[2J"))
        damage(directory)
        for command in ("verify", "export"):
            out = ["--out", str(tmp_path / "out")] if command == "export" else []
            monkeypatch.setattr(sys, "argv", ["peft-safety", command, str(directory), *out])
            with pytest.raises(SystemExit) as ended:
                main()
            printed = capsys.readouterr()
            assert ended.value.code in (1, 2)
            assert printed.err.count("\n") == 1
            assert "\x1b" not in printed.err + printed.out

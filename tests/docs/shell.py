"""Lines of a shell: each is checked against the program that it calls, and the package's own commands are run."""

from __future__ import annotations

import argparse
import configparser
import functools
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

from peft_safety.cli import app
from peft_safety.recipes.job.fields import table
from peft_safety.recipes.job.options import SafetyOptions
from peft_safety.recipes.job.settings import Settings
from tests.docs.pages import ROOT

FEW = "few.jsonl"
"""A file with one row, for what would else read all that the package has."""
SHORTER: dict[str, str] = {
    "evaluate": "--limit 2 --max-new-tokens 2",
    "fuse": "--max-steps 1",
    "patch": f"--max-steps 1 --eval-limit 2 --general {FEW}",
    "train": "--max_steps 1 --eval_limit 2 --lora_r 4 --calibration_rows 8 --screen_prompts 24",
}
"""Options behind those of the page, so that a run is over soon."""
STATUS = {"evaluate": {0, 100}, "screen": {0, 1}}
"""What a command may end with, where that depends on the model: a gate that fails, rows that are flagged."""
OWN = "mine.safetensors"
"""A subspace that no adapter of the pages was made with: `verify` refuses it, and says how much lies in it."""
FOREIGN = {"lm_eval", "inspect", "garak", "npx", "vllm", "llama-server", "git", "cd", "axolotl", "swift", "torchrun"}
"""Programs of others, whose options nobody checks here."""


class Parsed(Exception):
    """The options of a module are good; it goes no further."""


@functools.cache
def tree() -> Any:
    return typer.main.get_command(app)


def check(line: str, run: bool = True) -> None:
    """Fail if the line is wrong, or with `run` if the command does. What asks a server is not run."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    program, *rest = words
    if program == "peft-safety":
        check_command(rest)
        if run and "--url" not in rest:
            run_command(rest)
    elif program in ("accelerate", "python") and "peft_safety" in rest:  # -m peft_safety, in one process or several
        check_command(rest[rest.index("peft_safety") + 1 :])
    elif program == "make":
        assert {word for word in rest if "=" not in word and not word.startswith("-")} <= make_targets(), line
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program == "python":
        assert (ROOT / rest[0]).exists(), line
    elif program == "pip":
        asked = ",".join(re.findall(r"(?:peft-safety|\.)\[([\w,]+)\]", line))
        assert not asked or {*asked.split(",")} <= extras(), line
    else:
        assert program in FOREIGN, f"an unknown program: {line}"


def check_command(words: Sequence[str]) -> None:
    """Parse the options of a command of the package as it does itself; those that it needs must be there."""
    command, *rest = words
    if command == "train":
        Settings.read(rest)
        return
    tree().commands[command].make_context(command, [*rest])


def check_options(line: str) -> None:
    """The options in a piece of a command, as the text between the blocks has it."""
    words = shlex.split(line)
    if len(words) < 2 or words[1] == "COMMAND":
        return
    pairs = [(*parameter.opts, *parameter.secondary_opts) for parameter in tree().commands[words[1]].params]
    options = {option for pair in pairs for option in pair} | {"--help"}
    if words[1] == "train":
        options = {"--config", "--help", *(f"--{name}" for name in (*table(), *vars(SafetyOptions())))}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line


def run_command(words: Sequence[str]) -> None:
    """Run a command of the package in this process."""
    try:
        status = tree().main([*words, *SHORTER.get(words[0], "").split()], standalone_mode=False)
    except SystemExit as end:
        status = end.code
    expected = {1} if words[0] == "verify" and OWN in words else STATUS.get(words[0], {0})
    assert (status or 0) in expected, f"exit status {status}: peft-safety {' '.join(words)}"


def check_module(module: str, options: Sequence[str]) -> None:
    """A module that exists and, where it has a parser, takes these options. It is run as far as that."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None
    if ".parse_args(" not in Path(spec.origin).read_text(encoding="utf-8"):
        return
    whole = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(whole(parser, args, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [module, *options])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)


@functools.cache
def make_targets() -> set[str]:
    return {*re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}


@functools.cache
def extras() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return {*config["options.extras_require"]}

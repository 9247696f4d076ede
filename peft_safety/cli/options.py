"""Options that several commands have, and how their values are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from peft_safety.core.checks import size_pattern, whole
from peft_safety.errors import ConfigError

Model = Annotated[str, Option("--model", "-m", help="Hub id or directory of the base model.")]
AdapterModel = Annotated[str | None, Option("--model", "-m", help="The base model, if not the one the adapter names.")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[bool, Option("--dry-run", help="Only report what would be done; write nothing.")]
EveryModule = Annotated[bool, Option("--all", help="One row a module instead of medians by kind of module.")]
Targets = Annotated[str, Option(help='"all-linear", names separated by commas, or one regular expression.')]
Rank = Annotated[int, Option("--rank", help="LoRA rank.")]
Alpha = Annotated[int, Option(help="LoRA alpha.")]
SafetyRank = Annotated[
    float | None,
    Option(help="Protected directions per layer, or below 1 a share of its features; 0.25 for guardspace, else 32."),
]
SafetyEnergy = Annotated[
    float | None,
    Option(help="As many directions as hold this share of the energy; at most --safety-rank, if that is given."),
]
SafetyRankPattern = Annotated[
    list[str] | None,
    Option(help="Another --safety-energy, if given, else --safety-rank, for a kind of module: down_proj=0.1."),
]
ReportDir = Annotated[Path, Option("--out", help="Directory for the adapter, report.json and report.png.")]
Positions = Annotated[str, Option(help="Tokens that count: response, prompt or all.")]
LearningRate = Annotated[float, Option(help="Peak learning rate.")]
Epochs = Annotated[float, Option(help="Passes over the data.")]
MaxSteps = Annotated[int, Option(help="Optimizer steps; overrides --epochs when positive.")]
BatchSize = Annotated[int, Option(help="Rows per step.")]
MaxLength = Annotated[int, Option(help="Tokens kept of each row.")]
Seed = Annotated[int, Option(help="Seed of initialization, data order and random numbers.")]
ReportTo = Annotated[str, Option(help="As in TrainingArguments: none, tensorboard, wandb, ...")]


def _read_defaults(context: Context, path: Path | None) -> Path | None:
    """The settings of a YAML file, as defaults of the command's options."""
    from peft_safety.core.config_file import read_config

    names = _names([parameter for parameter in context.command.params if parameter.name != "config"])
    defaults: dict[str, Any] = {}
    for key, value in ({} if path is None else read_config(path)).items():
        name, on = names.get(key.replace("-", "_"), (None, True))
        if name is None:
            raise ConfigError(f"{path} has {key!r}. Known: {', '.join(sorted(names))}.")
        if name in defaults:
            raise ConfigError(f"{path} has {key!r} twice, under two names. Keep one.")
        if not on and not isinstance(value, bool):
            raise ConfigError(f"{path}: {key} is {value!r}. Give true or false.")
        defaults[name] = value if on else not value
    context.default_map = defaults
    return path


def _names(parameters: Iterable[Any]) -> dict[str, tuple[str, bool]]:
    """How a file may call each parameter, by its option or by its name; False for an option that switches it off."""
    names: dict[str, tuple[str, bool]] = {}
    for parameter in parameters:
        for options, on in (([f"--{parameter.name}", *parameter.opts], True), (parameter.secondary_opts, False)):
            long = [option[2:].replace("-", "_") for option in options if option.startswith("--")]
            names |= {option: (str(parameter.name), on) for option in long}
    return names


Config = Annotated[
    Path | None,
    Option(
        "--config", is_eager=True, callback=_read_defaults, help="YAML file of options; those given here come first."
    ),
]
EvalLimit = Annotated[int | None, Option(help="Prompts of each kind at most.")]


def refuse(context: Context, names: Collection[str], why: str) -> None:
    """A ConfigError where one of these options was given, which would have no effect."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name != "DEFAULT":
            raise ConfigError(f"{parameter.opts[0]} has no effect {why}. Leave it out.")


def parsed(options: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """Options as the functions take them, without some: a list of target modules, a whole number of directions as an
    integer, and `--safety-rank-pattern` as a mapping.

    Raises:
        ConfigError: a pair that is no kind of module and a number.
    """
    targets = options["target_modules"]
    if targets != "all-linear" and not any(c in targets for c in "*+?()[]|\\^$"):
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    read = {"target_modules": targets, "safety_rank": whole(options["safety_rank"])}
    read["safety_rank_pattern"] = size_pattern(options["safety_rank_pattern"])
    return {name: value for name, value in {**options, **read}.items() if name not in without}


def split(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are fields of a dataclass, and the others."""
    names = {field.name for field in fields(kind)}
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: value for name, value in options.items() if name not in names}

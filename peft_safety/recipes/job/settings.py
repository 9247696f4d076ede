"""The settings of a job, from a YAML file, flags or both. Names are checked before TRL is imported."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from peft_safety.core.config_file import read_config
from peft_safety.errors import ConfigError, extra
from peft_safety.recipes.job.fields import table, type_name
from peft_safety.recipes.job.options import OTHER_NAMES, OUR_DEFAULTS, WITHOUT_ACCELERATOR, SafetyOptions


@dataclass(frozen=True)
class Settings:
    """TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`, the package's own options, and the names given."""

    script: Any
    training: Any
    model: Any
    own: SafetyOptions
    given: tuple[str, ...]

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Settings by name, as in a YAML file."""
        return cls.read((), values)

    @classmethod
    def read(cls, flags: Sequence[str], config: Mapping[str, Any] | None = None) -> Settings:
        """Settings from flags (`--name value`, `--name=value`, `--config FILE.yaml`), which override those of the
        file and of `config`. A list's flag that is given several times adds up.

        Raises:
            ConfigError: an unknown name (the nearest is given), or a value of the wrong kind; before any model or
                data are read.
        """
        file, flags = _config_file(flags)
        config = {**(config or {}), **({} if file is None else read_config(Path(file)))}
        flagged = [_name(flag) for flag in flags if flag.startswith("--")]
        given = [*config, *flagged]
        known = {*table(), *(field.name for field in fields(SafetyOptions))}
        for name in given:
            check_name(name, known)
        if "model_name_or_path" not in given or "dataset_name" not in given:
            raise ConfigError("a job needs model_name_or_path and dataset_name. Give both, here or in --config.")
        kept = {name: value for name, value in config.items() if name not in flagged}
        script, training, model, own = _parsed(flags, kept, given)
        return cls(script, training, model, own, tuple(sorted(set(given))))

    def digest(self, names: Iterable[str], **more: Any) -> str:
        """Of the values of those of `names` that were given."""
        parts = {name: value for part in self.parts for name, value in vars(part).items()}
        chosen = {name: str(parts[name]) for name in sorted(names) if name in self.given}
        return hashlib.sha256(json.dumps([chosen, more], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.script, self.training, self.model, self.own


def check_name(name: str, known: set[str]) -> None:
    if name not in known:
        near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, sorted(known), 1)), None)
        remedy = f"Did you mean {near!r}?" if near else "See peft-safety train --help."
        raise ConfigError(f"there is no setting {name!r}. {remedy}")


def help_text(width: int = 80) -> str:
    """All settings with their types, defaults and meaning, from the table."""
    hints = get_type_hints(SafetyOptions)
    own = {
        field.name: {"type": type_name(hints[field.name]), "default": field.default, **field.metadata}
        for field in fields(SafetyOptions)
    }
    groups = {"Settings of this package": own}
    for name, entry in table().items():
        groups.setdefault(f"TRL's {entry['of']}", {})[name] = entry
    lines = ["Usage: peft-safety train [--config FILE.yaml] [--NAME VALUE] ...", "", *textwrap.wrap(ABOUT, width)]
    for title, entries in groups.items():
        lines += ["", title]
        for name, entry in entries.items():
            default = OUR_DEFAULTS.get(name, entry["default"])
            about = f" (default {default})" if default not in (None, [], {}) else ""
            about += f" (TRL's: {entry['default']})" if name in OUR_DEFAULTS else ""
            about += f" ({WITHOUT_ACCELERATOR[name]} without an accelerator)" if name in WITHOUT_ACCELERATOR else ""
            lines.append(f"  --{name}  {entry['type']}")
            lines += textwrap.wrap(entry["help"] + about, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


ABOUT = (
    "Fine-tune by TRL's SFTTrainer with safety kept: screen the rows, calibrate, train, measure safety before and "
    "after, verify the adapter, report. Writes adapter/, report.json and report.png into output_dir. Finished steps "
    "are not run again unless settings, rows, model or subspace change. Every setting is a flag and a key of the YAML "
    "file; a flag overrides the file. A list takes several values, or its flag several times: --skip screen measure. "
    "Several processes: accelerate launch -m peft_safety train ..."
)


CONTAINERS: dict[type, str] = {list: "list", dict: "mapping"}
"""Types of a YAML value that no flag has, and the type of the fields that take them."""


def _config_file(flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, rest = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}: give a YAML file.") from error
    return known.config, rest


def _name(flag: str) -> str:
    """The setting of a flag; `--no_name` switches one off."""
    name = flag[2:].partition("=")[0].replace("-", "_")
    positive = name.removeprefix("no_")
    return positive if name != positive and table().get(positive, {}).get("default") is True else name


class _Added(argparse.Action):
    """Of a list: its flag, given again, adds to what it was given before."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        parts = [values] if before is self.default else [before, values]
        added = [item for part in parts for item in (part if isinstance(part, list) else [part])]
        setattr(namespace, self.dest, added if isinstance(values, list) or len(added) > 1 else values)


def _parsed(flags: Sequence[str], config: Mapping[str, Any], given: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the four dataclasses. What the file says becomes flags too, so that both mean the same."""
    import torch

    with extra("trl", "a job needs TRL"):
        from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    lists = {name for name, entry in table().items() if entry["type"] == "list"}

    class Parser(TrlParser):  # type: ignore[misc]
        def add_argument(self, *names: str, **options: Any) -> Any:
            if options.get("nargs") == "+" or names[0].removeprefix("--") in lists:
                options["action"] = _Added
            return super().add_argument(*names, **options)

        def error(self, message: str) -> Any:
            raise ConfigError(f"{message}. See peft-safety train --help.")

    parser = Parser((ScriptArguments, SFTConfig, ModelConfig, SafetyOptions), allow_abbrev=False, add_help=False)
    several = {action.dest for action in parser._actions if action.nargs == "+"}
    alone = not torch.accelerator.is_available()
    defaults: dict[str, Any] = OUR_DEFAULTS | ({"use_cpu": True} if alone else {})
    first = []
    for name, value in config.items():
        if isinstance(value, (str, int, float)):  # a truth value among them
            first.append(f"--{name}={value}")
        elif name in several and value and isinstance(value, (list, dict)):
            pairs = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else map(str, value)
            first += [f"--{name}", *pairs]
        elif value is None or table().get(name, {}).get("type") == CONTAINERS.get(type(value)):
            defaults[name] = value
        else:
            raise ConfigError(f"{name}={value!r} is a {type(value).__name__}. See peft-safety train --help.")
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in config or name not in given})
    args = [*first, *flags]
    if "bf16" not in given and (alone or parser.parse_known_args(args)[0].use_cpu):
        parser.set_defaults(bf16=False)
    try:
        return tuple(parser.parse_args_into_dataclasses(args=args, look_for_args_file=False))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{error} See peft-safety train --help.") from error

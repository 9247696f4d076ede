"""A fusion as a job: from a YAML file, from flags, or from both; models and rows are loaded only where a mask is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.core.plain_lora import MANIFEST
from peft_safety.data import read_jsonl
from peft_safety.errors import ConfigError
from peft_safety.methods.somf import FuseOptions, FuseReport, MaskTraining, fuse, plan_fusion
from peft_safety.recipes.load import load_model

PLACES = ("safe", "tasks", "model", "mask", "data", "out")
OPTIONS = tuple(f.name for f in fields(FuseOptions))
TRAINING = tuple(f.name for f in fields(MaskTraining))


@dataclass(frozen=True)
class FuseJob:
    """Everything that `fuse` needs, by path.

    Attributes:
        safe, tasks: directories of adapters or checkpoints.
        model: Hub id or directory to train the mask on; default the adapters' base model.
        mask: a file of masks, instead of training.
        data: JSON lines to train on.
        out: directory of the result.
        options: of `FuseOptions`. training: of `MaskTraining`.
    """

    tasks: tuple[str, ...]
    safe: str | None = None
    model: str | None = None
    mask: str | None = None
    data: str | None = None
    out: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    training: MaskTraining = field(default_factory=MaskTraining)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        flags: Mapping[str, Any] | None = None,
        training_flags: Mapping[str, Any] | None = None,
    ) -> FuseJob:
        """A job from a config whose values flags override; a flag that is None says nothing.

        Args:
            config: `PLACES`, fields of `FuseOptions`, and under `train` fields of `MaskTraining`.

        Raises:
            ConfigError: an unknown key, no tasks, or a value of the wrong type.
        """
        found = {**config, **{k: v for k, v in (flags or {}).items() if v is not None}}
        train = found.pop("train", None) or {}
        if not isinstance(train, Mapping):
            raise ConfigError(f"train is {train!r}. Give a mapping of {', '.join(TRAINING)}.")
        train = {**train, **{k: v for k, v in (training_flags or {}).items() if v is not None}}
        for name, keys, known in (("the config", found, (*PLACES, *OPTIONS)), ("train", train, TRAINING)):
            odd = sorted(str(key) for key in keys if key not in known)
            if odd:
                raise ConfigError(f"{name} has {odd[0]!r}. Known: {', '.join(known)}.")
        tasks = found.get("tasks")
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise ConfigError(f"tasks={tasks!r}. Give at least one directory of an adapter or checkpoint.")
        places = {name: found.get(name) for name in PLACES if name != "tasks"}
        for name, value in places.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r}. Give a path.")
        options = {name: value for name, value in found.items() if name in OPTIONS}
        FuseOptions(**options)
        return cls(tasks=tuple(tasks), options=options, training=MaskTraining(**train), **places)

    def plan(self) -> FuseReport:
        """What `run` would do; nothing is written."""
        return plan_fusion(self.safe, self.tasks, **self.options)

    def run(self, progress: bool = True) -> FuseReport:
        """Train the mask if there is one to train, fuse, and write.

        Raises:
            ConfigError: no `out`, or no model to train on. PeftSafetyError: see `fuse`.
        """
        if self.out is None:
            raise ConfigError("fuse writes nothing without an output directory. Give out.")
        given: dict[str, Any] = {"mask": self.mask, "data": None if self.data is None else read_jsonl(self.data)}
        if self.options.get("method", "somf") == "somf" and self.mask is None and self._adapters():
            self.plan()  # refuse what can be refused before a model is loaded
            given["model"], given["tokenizer"] = load_model(self.model or self._base_model())
        given["training"] = replace(self.training, progress=progress and self.training.progress)
        return fuse(self.safe, self.tasks, out=self.out, **given, **self.options)

    def _adapters(self) -> list[Path]:
        """Their config files; none for full checkpoints, which fuse loads itself."""
        paths = [Path(place, MANIFEST) for place in (self.safe, *self.tasks) if place is not None]
        return [path for path in paths if path.is_file()]

    def _base_model(self) -> str:
        for path in self._adapters():
            name = files.read_json(path).get("base_model_name_or_path")
            if isinstance(name, str) and name:
                return name
        raise ConfigError("the adapters do not say which base model they are for. Give model.")


def read_config(path: Path) -> dict[str, Any]:
    """A YAML mapping; nothing in it can run code.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or is no mapping.
    """
    import yaml

    try:
        text = path.read_bytes()
        found = yaml.safe_load(text) if len(text) <= files.MAX_JSON_BYTES else None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read as YAML: {str(error)[:300]}. Give a file of key: value lines."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(
            f"{path} is not a mapping of at most {files.MAX_JSON_BYTES} bytes. Give key: value lines such as 'safe: "
            "DIR' and 'tasks: [DIR]'."
        )
    return found

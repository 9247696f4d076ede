"""A fusion as a job: from a YAML file, from flags, or from both. A model is loaded only where a mask is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.core.plain_lora import MANIFEST, check_no_adapter, check_no_model
from peft_safety.data import read_jsonl
from peft_safety.errors import ConfigError
from peft_safety.methods.somf import FuseOptions, FuseReport, MaskTraining, fuse, plan_fusion
from peft_safety.recipes.load import load_model

PLACES = ("safe", "tasks", "model", "mask", "data", "out")
OPTIONS = tuple(f.name for f in fields(FuseOptions))
TRAINING = tuple(f.name for f in fields(MaskTraining))


@dataclass(frozen=True)
class FuseJob:
    """Everything that `fuse` needs, by path: adapters or checkpoints, the model to train a mask on (default the
    adapters' base model) or a file of masks, JSON lines to train on, and a directory for the result.
    """

    options: dict[str, Any]
    training: MaskTraining
    tasks: list[str]
    safe: str | None = None
    model: str | None = None
    mask: str | None = None
    data: str | None = None
    out: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> FuseJob:
        """A job from a config: `PLACES`, fields of `FuseOptions`, and under `train` fields of `MaskTraining`. Flags of
        these names override it, if they are not None. Unknown keys and values of the wrong type are refused.
        """
        given, train = {name: value for name, value in config.items() if name != "train"}, config.get("train") or {}
        if not isinstance(train, dict):
            raise ConfigError(f"train is {train!r}. Give a mapping of {', '.join(TRAINING)}.")
        train, flags = dict(train), {name: value for name, value in (flags or {}).items() if value is not None}
        for where, values, known in (("the config", given, (*PLACES, *OPTIONS)), ("train", train, TRAINING)):
            if unknown := sorted(str(name) for name in values if name not in known):
                raise ConfigError(f"{where} has {unknown[0]!r}. Known: {', '.join(known)}.")
            values |= {name: flags[name] for name in known if name in flags}
        tasks = given.pop("tasks", None)
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise ConfigError(f"tasks={tasks!r}. Give at least one directory of an adapter or checkpoint.")
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        for name, value in given.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r}. Give a path.")
        FuseOptions(**options)
        return cls(options, MaskTraining(**train), tasks, **given)

    def plan(self) -> FuseReport:
        """What `run` would do; nothing is written."""
        return plan_fusion(self.safe, self.tasks, **self.options)

    def run(self, progress: bool = True) -> FuseReport:
        """Train the mask if there is one to train, fuse, and write; errors are those of `fuse`."""
        if self.out is None:
            raise ConfigError("fuse writes nothing without an output directory. Give out.")
        given: dict[str, Any] = {"mask": self.mask, "data": None if self.data is None else read_jsonl(self.data)}
        adapters = [path for d in (self.safe, *self.tasks) if d is not None and (path := Path(d, MANIFEST)).is_file()]
        (check_no_model if adapters else check_no_adapter)(Path(self.out))
        files.check_place(Path(self.out, MANIFEST))
        if self.options.get("method", "somf") == "somf" and self.mask is None and adapters:
            self.plan()  # refuse what can be refused before a model is loaded
            manifests = [files.read_json(path, files.MAX_LISTING_BYTES) for path in adapters]
            names = [self.model, *(manifest.get("base_model_name_or_path") for manifest in manifests)]
            model = next((name for name in names if isinstance(name, str) and name), None)
            if model is None:
                raise ConfigError("the adapters do not say which base model they are for. Give model.")
            given["model"], given["tokenizer"] = load_model(model)
        training = replace(self.training, progress=progress and self.training.progress)
        return fuse(self.safe, self.tasks, out=self.out, training=training, **given, **self.options)

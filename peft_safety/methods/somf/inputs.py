"""What is fused: adapters on one base (names on a PeftModel, or directories), or full checkpoints, read by name; and
the refusal of what cannot be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.artifact import MANIFEST
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.estimate.checkpoints import FLOATS, INDEX, SINGLE, FileWeights
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.safe_lora.apply import check_form, layer_factors
from peft_safety.methods.safe_lora.directory import read_factors, read_plain
from peft_safety.methods.safe_lora.repair import Factors, factor_digest
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.naming import public_name
from peft_safety.publish import require_whole

Source = str | os.PathLike[str]
CONTINUED_COSINE = 0.2
"""Least cosine between the `lora_A` of a task and of the safe adapter that it was trained on from. Two random ones are
at 1 / sqrt(number of entries), below 0.01 for any real adapter; ordinary fine-tuning leaves it above 0.5."""


@dataclass(frozen=True)
class AdapterInput:
    """A plain LoRA adapter.

    Attributes:
        label: what the user called it.
        factors: by module, in the order of the file or the model.
        base: name of its base model, if it says so; None for an adapter of the model at hand.
        fields: its config.
    """

    label: str
    factors: dict[str, Factors]
    base: str | None
    fields: dict[str, Any]

    def provenance(self) -> dict[str, Any]:
        """Name and fingerprint."""
        digest = factor_digest({name: (factor.a, factor.b) for name, factor in self.factors.items()})
        return {"name": public_name(self.label), "fingerprint": digest}


@dataclass(frozen=True)
class Adapters:
    """The adapters of one fusion, checked against each other. `safe` is None where the base model itself is the
    aligned one.
    """

    safe: AdapterInput | None
    tasks: tuple[AdapterInput, ...]
    continued: bool

    @property
    def modules(self) -> list[str]:
        """Names, in the order of the first task."""
        return list(self.tasks[0].factors)

    @property
    def first(self) -> AdapterInput:
        """The one that says what the base model and the task type are."""
        return self.safe or self.tasks[0]


@dataclass(frozen=True)
class Checkpoints:
    """Full checkpoints with the same tensors.

    Attributes:
        fused: keys of floating point, with their shapes; everything else is copied from the safe one.
    """

    safe: FileWeights
    tasks: tuple[FileWeights, ...]
    fused: dict[str, tuple[int, ...]]

    def vectors(self, key: str) -> tuple[Tensor, list[Tensor]]:
        """The safe tensor and the task vectors of one key, fp32 (fp64 where it is stored so).

        Raises:
            CheckpointError: not finite.
        """
        tensors = [source.tensor(key) for source in (self.safe, *self.tasks)]
        for source, tensor in zip((self.safe, *self.tasks), tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{source.label}: {key} {tuple(tensor.shape)} holds NaN or Inf. Use an intact checkpoint."
                )
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        safe = tensors[0].to(dtype)
        return safe, [tensor.to(dtype) - safe for tensor in tensors[1:]]


def read_inputs(
    safe: Source | None, tasks: Sequence[Source], model: nn.Module | None, options: FuseOptions
) -> Adapters | Checkpoints:
    """Read and check everything that is fused; of checkpoints only the headers.

    Args:
        safe: None where the base model is the aligned one and the tasks are adapters on it.

    Raises:
        ConfigError: names that repeat, adapters and checkpoints mixed, different bases, ranks that do not match,
            updates that are zero or equal.
        ArtifactError, CheckpointError: something is missing, not finite, or has other keys.
    """
    if isinstance(tasks, (str, os.PathLike)) or not tasks:
        raise ConfigError(f"tasks={tasks!r}. Give a list of at least one adapter or checkpoint.")
    given = [*([] if safe is None else [safe]), *tasks]
    names = [os.path.realpath(source) if os.path.isdir(source) else os.fspath(source) for source in given]
    if len(set(names)) < len(names):
        repeated = next(os.fspath(source) for source, name in zip(given, names, strict=True) if names.count(name) > 1)
        raise ConfigError(
            f"{repeated} is given more than once. Name every adapter or checkpoint once; use weights to count one "
            "more."
        )
    kinds = [_kind(source, model) for source in given]
    if "checkpoint" not in kinds:
        loaded = [_adapter(source, model, kind) for source, kind in zip(given, kinds, strict=True)]
        return _check_adapters(
            loaded[0] if safe is not None else None, tuple(loaded[len(given) - len(tasks) :]), options
        )
    if set(kinds) != {"checkpoint"} or safe is None:
        odd = next((os.fspath(s) for s, kind in zip(given, kinds, strict=True) if kind != "checkpoint"), "safe=None")
        raise ConfigError(
            f"{odd} is no full checkpoint, but others are. Give adapters only, or the full checkpoints of the safe "
            "model and of every task."
        )
    sources = [FileWeights(os.fspath(source)) for source in given]
    return _check_checkpoints(sources[0], tuple(sources[1:]))


def _kind(source: Source, model: nn.Module | None) -> str:
    table = config_table(model) if model is not None else {}
    if os.fspath(source) in table:
        return "name"
    path = Path(source)
    require_whole(path, ours=False, warn=False)
    if (path / MANIFEST).is_file():
        return "directory"
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return "checkpoint"
    known = (
        f"an adapter of the model (it has {sorted(table)})"
        if model is not None
        else "an adapter of a model (none was given)"
    )
    raise ConfigError(
        f"{os.fspath(source)!r} is neither {known}, nor a directory with {MANIFEST}, {SINGLE} or {INDEX}. Give one of "
        "these."
    )


def _adapter(source: Source, model: nn.Module | None, kind: str) -> AdapterInput:
    label = os.fspath(source)
    if kind == "name" and model is not None:
        config = config_table(model)[label]
        check_form(config, f"adapter {label!r}")
        if config.modules_to_save or config.trainable_token_indices:
            raise ConfigError(
                f"adapter {label!r} also trained modules_to_save or token rows, which are not fused. Train without "
                "them."
            )
        factors = {name: layer_factors(name, layer, label) for name, layer in adapter_layers(model, label).items()}
        return AdapterInput(label, factors, None, config.to_dict())
    fields, _ = read_plain(Path(source))
    tensors, factors = read_factors(Path(source), fields)
    extra = [key for key in tensors if ".lora_" not in key]
    if extra:
        raise ConfigError(
            f"{label} also holds {extra[0]}: modules_to_save and token rows are not fused. Train without them."
        )
    return AdapterInput(label, factors, fields.get("base_model_name_or_path") or None, fields)


def _check_adapters(safe: AdapterInput | None, tasks: tuple[AdapterInput, ...], options: FuseOptions) -> Adapters:
    everyone = [*([safe] if safe else []), *tasks]
    first = everyone[0]
    _check_bases(everyone, options)
    for other in everyone[1:]:
        if set(other.factors) != set(first.factors):
            odd = sorted(set(other.factors) ^ set(first.factors))
            raise ConfigError(
                f"{other.label} has {len(other.factors)} modules and {first.label} {len(first.factors)}; they differ "
                f"at {odd[:3]}. "
                "Fuse adapters of the same modules."
            )
        for name, factor in other.factors.items():
            shapes = [(f.b.shape[0], f.a.shape[1]) for f in (factor, first.factors[name])]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"{name}: {other.label} updates a weight {shapes[0]}, {first.label} one {shapes[1]}. Fuse "
                    "adapters of the same base model."
                )
    for adapter in everyone:
        _check_values(adapter)
    digests = {adapter.label: adapter.provenance()["fingerprint"] for adapter in everyone}
    for task in tasks:
        if safe is not None and digests[task.label] == digests[safe.label]:
            raise ConfigError(
                f"{task.label} equals the safe adapter {safe.label}: there is no task vector. Give the adapter after "
                "its fine-tuning."
            )
        twin = next(
            (label for label, digest in digests.items() if label != task.label and digest == digests[task.label]), None
        )
        if twin is not None:
            raise ConfigError(
                f"{task.label} and {twin} hold the same weights. Give each adapter once; use weights to count one "
                "more."
            )
    return Adapters(safe, tasks, _continued(safe, tasks, options))


def _check_bases(adapters: Sequence[AdapterInput], options: FuseOptions) -> None:
    bases = {os.path.realpath(a.base) if os.path.isdir(a.base) else a.base: a for a in adapters if a.base is not None}
    if len(bases) > 1 and not options.ignore_base_names:
        (one, a), (two, b) = list(bases.items())[:2]
        raise ConfigError(
            f"{a.label} was trained on {public_name(one)!r}, {b.label} on {public_name(two)!r}. Fuse adapters of one "
            "base model; if these are the same, "
            "set ignore_base_names."
        )


def _check_values(adapter: AdapterInput) -> None:
    for name, factor in adapter.factors.items():
        if not math.isfinite(factor.scaling):
            raise ConfigError(
                f"{name}: {adapter.label} says by a pattern which lora_alpha it has, and patterns are not run. Save "
                "it with full module names."
            )
    if all(not bool(factor.a.any() and factor.b.any()) for factor in adapter.factors.values()):
        raise ConfigError(
            f"{adapter.label}: its update is zero in all {len(adapter.factors)} modules. Give a trained adapter."
        )


def _continued(safe: AdapterInput | None, tasks: tuple[AdapterInput, ...], options: FuseOptions) -> bool:
    """Whether A and B of the tasks have task vectors against those of the safe adapter."""
    if options.layout == "independent":
        return False
    demanded = options.layout == "continued" or options.granularity == "element"
    if safe is None:
        if demanded:
            raise ConfigError(
                "element masks and layout='continued' need a safe adapter that the tasks were trained on from. Use "
                "granularity='rank'."
            )
        return False
    for task in tasks:
        for name, factor in task.factors.items():
            aligned = safe.factors[name]
            if factor.a.shape != aligned.a.shape or not math.isclose(factor.scaling, aligned.scaling, rel_tol=1e-6):
                if not demanded:
                    return False
                what = [f"rank {f.a.shape[0]} and scaling {f.scaling:g}" for f in (factor, aligned)]
                raise ConfigError(
                    f"{name}: {task.label} has {what[0]}, the safe adapter {safe.label} {what[1]}: element masks need "
                    "equal ones. Use granularity='rank', which gates the rank components of independent adapters."
                )
        if _cosine(safe.factors, task.factors) < CONTINUED_COSINE:
            if demanded:
                raise ConfigError(
                    f"{task.label} was not trained on from {safe.label} (cosine of their lora_A "
                    f"{_cosine(safe.factors, task.factors):.2f}), so a difference of "
                    "factors means nothing. Use granularity='rank'."
                )
            return False
    return True


def _cosine(safe: Mapping[str, Factors], task: Mapping[str, Factors]) -> float:
    pairs = [
        (safe[name].a.double().flatten().cpu(), factor.a.double().flatten().cpu()) for name, factor in task.items()
    ]
    dots, ones, twos = (
        sum(float(x @ y) for x, y in found)
        for found in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    return dots / math.sqrt(ones * twos) if ones * twos > 0 else 0.0


def _check_checkpoints(safe: FileWeights, tasks: tuple[FileWeights, ...]) -> Checkpoints:
    headers = {key: safe.header(key) for key in safe.place}
    for task in tasks:
        odd = sorted(set(task.place) ^ set(safe.place))
        if odd:
            raise CheckpointError(
                f"{task.label} and {safe.label} hold different tensors; they differ at {odd[:3]}. Fuse checkpoints of "
                "one architecture."
            )
        for key, (shape, dtype) in headers.items():
            found = task.header(key)
            if found[0] != shape or (found[1] in FLOATS) != (dtype in FLOATS):
                raise CheckpointError(
                    f"{key}: {task.label} has {found}, {safe.label} {(shape, dtype)}. Fuse 16-bit checkpoints of one "
                    "architecture."
                )
    fused = {key: shape for key, (shape, dtype) in headers.items() if dtype in FLOATS}
    packed = next(
        (key for key, (_, dtype) in headers.items() if dtype in ("U8", "I8") and key.endswith("weight")), None
    )
    if packed is not None:
        raise CheckpointError(
            f"{safe.label}: {packed} is quantized. Fuse the 16-bit checkpoints, and quantize the result."
        )
    return Checkpoints(safe, tasks, fused)

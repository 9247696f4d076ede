"""Safe LoRA on a saved adapter: from directory to directory, no model is built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from peft_safety import files, publish
from peft_safety.artifact import ADAPTER_FILE, CARD, MANIFEST, PREFIX, check_numbers
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError
from peft_safety.estimate.checkpoints import FileWeights, open_weights
from peft_safety.methods.safe_lora.apply import Model, check_different, check_form, check_plain
from peft_safety.methods.safe_lora.options import RepairOptions
from peft_safety.methods.safe_lora.repair import Factors, RepairReport, repair
from peft_safety.names import pattern_value

RECORD = "peft_safety.safe_lora"
"""Key of the record in the header of the adapter's safetensors file, where a plain LoRA has no other place for it."""
STORED_TYPE = "SAFELORA"


def safe_lora_dir(
    adapter_dir: str | os.PathLike[str],
    unaligned: Model,
    aligned: Model | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> RepairReport:
    """`apply_safe_lora` for a saved LoRA adapter. The result is a plain LoRA directory, written atomically; the source
    is not touched.

    Args:
        aligned: default, the adapter's `base_model_name_or_path`.
        out_dir: None only reports.
        **options: see `RepairOptions`.

    Raises:
        ArtifactError: the directory is not a whole, finite LoRA adapter, or `out_dir` cannot be written.
        ConfigError, CheckpointError: see `apply_safe_lora`.
    """
    chosen = RepairOptions(**options)
    source = Path(adapter_dir)
    if out_dir is not None and os.path.realpath(out_dir) == os.path.realpath(source):
        raise ConfigError(f"{source} is also the output directory. Write somewhere else; the original adapter stays.")
    fields = read_config(source)
    name: str | None = fields.get("base_model_name_or_path") or None
    if aligned is None and name is None:
        raise ConfigError(f"{source}: the adapter does not say which base model it is for. Give aligned=.")
    check_different(unaligned, name if aligned is None else aligned)
    tensors, factors = read_factors(source, fields)
    base = FileWeights(name) if aligned is not None and name is not None and os.path.isdir(name) else None
    new, report = repair(
        factors, open_weights(unaligned), open_weights(aligned if aligned is not None else str(name)), chosen, base
    )
    if out_dir is not None:
        _publish(
            Path(out_dir),
            source,
            fields,
            tensors | {f"{PREFIX}{module}.lora_B.weight": b for module, b in new.items()},
            report,
        )
    return report


def read_config(directory: Path) -> dict[str, Any]:
    """The bounded JSON of a plain LoRA adapter that has not been repaired.

    Raises:
        ArtifactError: not a directory, no config, or one of another kind. ConfigError: see `check_plain`.
    """
    fields, config = read_plain(directory)
    config.safe_lora = stored_record(directory) or fields.get("safe_lora")
    check_plain(config, str(directory))
    return fields


def read_plain(directory: Path) -> tuple[dict[str, Any], LoraConfig]:
    """The bounded JSON of a plain LoRA adapter, repaired or not, and the config that PEFT makes of it.

    Raises:
        ArtifactError: not a directory, no config. ConfigError: an adapter of another kind; see `check_form`.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory. Give the directory that save_pretrained wrote.")
    publish.require_whole(directory)
    fields = files.read_json(directory / MANIFEST)
    kind = fields.get("peft_type")
    if kind not in ("LORA", STORED_TYPE):
        protected = (
            " It is protected by construction; peft-safety export makes a plain LoRA of it."
            if fields.get("safety_artifact")
            else ""
        )
        raise ConfigError(f"{directory} holds a {kind!r} adapter. Give a plain LoRA adapter.{protected}")
    check_numbers(
        fields.get("r"), fields.get("lora_alpha"), fields.get("lora_dropout", 0.0), str(directory / MANIFEST)
    )
    try:
        config = LoraConfig(
            **{
                k: v
                for k, v in fields.items()
                if k in LoraConfig.__dataclass_fields__ and k not in ("peft_type", "runtime_config")
            }
        )
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PeftSafetyError):
            raise
        raise ArtifactError(
            f"{directory / MANIFEST} is not a config of this PEFT: {error}. Save the adapter again."
        ) from error
    check_form(config, str(directory))
    return fields, config


def read_factors(directory: Path, fields: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """All tensors by key, and the factors by module, layer by layer.

    Raises:
        ArtifactError: a factor is missing, not finite, or of a wrong shape; a tensor that no plain LoRA has.
    """
    path = files.child(directory, ADAPTER_FILE)
    with files.open_tensors(path) as handle:
        keys = list(handle.keys())
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            module, _, kind = key.removeprefix(PREFIX).partition(".lora_")
            if not kind:
                continue  # modules_to_save: comes along as it is
            if kind not in ("A.weight", "B.weight") or not key.startswith(PREFIX):
                raise ArtifactError(
                    f"{path}: {key} is no factor of a plain linear LoRA (DoRA, embeddings and biases are not "
                    "supported). Train without it."
                )
            found.setdefault(module, {})[kind[0]] = key
        for module, pair in found.items():
            shapes = {kind: tuple(handle.get_slice(key).get_shape()) for kind, key in pair.items()}
            a, b = shapes.get("A", ()), shapes.get("B", ())
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 1 <= a[0] <= min(a[1], b[0]):
                raise ArtifactError(
                    f"{path}: {module} has lora_A {a or 'missing'} and lora_B {b or 'missing'}. Copy or save the "
                    "adapter again."
                )
        if not found:
            raise ArtifactError(f"{path} holds no LoRA factors. Give an adapter directory.")
        tensors = {key: handle.get_tensor(key) for key in keys}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"{path}: {key} {tuple(tensor.shape)} holds NaN or Inf. Save the adapter again from the last good "
                "checkpoint."
            )
    flipped = bool(fields.get("fan_in_fan_out"))
    factors = {}
    for module, pair in sorted(found.items(), key=lambda item: _natural(item[0])):
        a, b = tensors[pair["A"]], tensors[pair["B"]]
        factors[module] = Factors(a, b, _scaling(module, a.shape[0], fields), flipped)
    return tensors, factors


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _scaling(module: str, rank: int, fields: Mapping[str, Any]) -> float:
    """`alpha / r`; NaN where a regular expression says which alpha: none of a stranger's is ever run."""
    alpha = pattern_value(fields.get("alpha_pattern"), module, fields["lora_alpha"])
    return float(math.nan if alpha is None else alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _publish(
    target: Path, source: Path, fields: dict[str, Any], tensors: dict[str, Tensor], report: RepairReport
) -> None:
    fields = fields | ({"safe_lora": report.record} if fields["peft_type"] == STORED_TYPE else {})
    with publish.publishing(target, MANIFEST) as staging:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            staging / ADAPTER_FILE,
            metadata={"format": "pt", RECORD: json.dumps(report.record)},
        )
        card = files.child(source, CARD)
        before = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\n---\n"
        (staging / CARD).write_text(before.rstrip() + "\n\n" + _card(report), encoding="utf-8")
        (staging / MANIFEST).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _card(report: RepairReport) -> str:
    record = report.record
    return f"""## Safe LoRA

Repaired after training by peft-safety (Safe LoRA, arXiv 2405.16833): {record["repaired"]} of
{record["modules"]} modules were projected (`{record["projection"]}`, selection `{record["select"]}`) onto the
difference between `{record["aligned"]["name"]}` and
`{record["unaligned"]["name"]}`. Do not apply it again. What this does to a
model's behavior has to be measured.
"""


def stamp(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a repair into the header of an adapter that PEFT has just saved."""
    path = directory / ADAPTER_FILE
    with files.open_tensors(path) as handle:
        metadata = handle.metadata() or {"format": "pt"}
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    del tensors
    save_file(copies, path, metadata={**metadata, RECORD: json.dumps(dict(record))})


def stored_record(directory: Path) -> dict[str, Any] | None:
    """The record of a repair in an adapter directory, or None."""
    path = directory / ADAPTER_FILE
    if not path.is_file():
        return None
    with files.open_tensors(path) as handle:
        text = (handle.metadata() or {}).get(RECORD)
    return None if text is None else files.parse_json(text, str(path))

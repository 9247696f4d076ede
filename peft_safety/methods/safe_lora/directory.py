"""Safe LoRA on a saved adapter: from directory to directory, no model is built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.core.checkpoints import FileWeights, open_weights
from peft_safety.core.plain_lora import CARD, RECORD, REPAIRED_TYPE, factor_tensors, read_plain, write_plain
from peft_safety.errors import ConfigError
from peft_safety.methods.safe_lora.apply import Model, check_different, check_unrepaired
from peft_safety.methods.safe_lora.options import RepairOptions
from peft_safety.methods.safe_lora.repair import RepairReport, repair


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
    plain = read_plain(source)
    check_unrepaired(plain.config, str(source))
    name: str | None = plain.fields.get("base_model_name_or_path") or None
    if aligned is None and name is None:
        raise ConfigError(f"{source}: the adapter does not say which base model it is for. Give aligned=.")
    check_different(unaligned, name if aligned is None else aligned)
    base = FileWeights(name) if aligned is not None and name is not None and os.path.isdir(name) else None
    new, report = repair(
        plain.factors,
        open_weights(unaligned),
        open_weights(aligned if aligned is not None else str(name)),
        chosen,
        base,
    )
    if out_dir is not None:
        fields = plain.fields | ({"safe_lora": report.record} if plain.fields["peft_type"] == REPAIRED_TYPE else {})
        factors = factor_tensors({module: (f.a, new.get(module, f.b)) for module, f in plain.factors.items()})
        old = files.child(source, CARD)
        card = old.read_text(encoding="utf-8") if old.is_file() else "---\nlibrary_name: peft\n---\n"
        card = card.rstrip() + "\n\n" + _card(report)
        write_plain(Path(out_dir), plain.extra | factors, fields, card, {RECORD: report.record})
    return report


def _card(report: RepairReport) -> str:
    record = report.record
    return f"""## Safe LoRA

Repaired after training by peft-safety (Safe LoRA, arXiv 2405.16833): {record["repaired"]} of
{record["modules"]} modules were projected (`{record["projection"]}`, selection `{record["select"]}`) onto the
difference between `{record["aligned"]["name"]}` and
`{record["unaligned"]["name"]}`. Do not apply it again. What this does to a
model's behavior has to be measured.
"""

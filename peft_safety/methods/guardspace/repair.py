"""Make a trained LoRA blind afterwards: `A <- A - (A Q) Q^T`, exact, without training, from directory to directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_safety.core.certificate import Certificate, certified_factor
from peft_safety.core.names import listed
from peft_safety.core.plain_lora import card_with, check_elsewhere, factor_tensors, read_plain, write_plain
from peft_safety.core.projection import delta_leak, fits, fold_
from peft_safety.core.snapshot import reading
from peft_safety.core.subspace import SafetySubspace
from peft_safety.errors import SubspaceError
from peft_safety.methods.guardspace.config import GuardSpaceConfig


@dataclass(frozen=True)
class BlindedModule:
    """Its directions of the null space, `||dW Q|| / ||dW||`, which was removed, and `||A Q|| / ||A||` afterwards."""

    name: str
    k: int
    removed: float
    leak: float


@dataclass(frozen=True)
class BlindReport:
    """Every module in order, the digest of the null space, and trained tensors that the repair does not cover."""

    modules: tuple[BlindedModule, ...]
    subspace: str
    unconstrained: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def repair_adapter(
    adapter_dir: str | os.PathLike[str],
    subspace: SafetySubspace | str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None = None,
) -> BlindReport:
    """Make a trained plain LoRA blind to a null space, whatever trained it: a plain LoRA directory with a certificate,
    as `GuardSpaceConfig(train="B")` saves it, written atomically; without `out_dir` there is only the report.

    Args:
        adapter_dir: directory of the plain LoRA; it is not touched.
        subspace: of the adapter's base model, with an input basis of every module: `SafetySubspace`, file, directory
            or Hub id.
        out_dir: new directory for the repaired adapter.

    Returns:
        A `BlindReport`: what each module lost, and its leak before and after.

    Raises:
        ArtifactError: the directory is not a whole, finite LoRA adapter, or `out_dir` cannot be written.
        ConfigError: another kind of adapter, or `out_dir` is the source.
        SubspaceError: a module has no input basis, or one of another size.

    Reference: the null space is that of GuardSpace, arXiv 2510.14301; removing it after training is ours.
    """
    source = Path(adapter_dir)
    check_elsewhere(source, out_dir)
    with reading(source, warn=True) as path:
        plain = read_plain(path, linear=False)
    space = SafetySubspace.of(subspace, plain.factors)
    _check_fits(source, {name: factor.a for name, factor in plain.factors.items()}, space)
    pairs, rows, certified = {}, [], {}
    for name, factor in plain.factors.items():
        basis = space.bases[name]["in"]
        a = blinded(factor.a, basis)
        pairs[name], certified[name] = (a, factor.b), certified_factor(a, basis)
        removed = delta_leak(basis, factor.a, factor.b, "in")
        rows.append(BlindedModule(name, int(basis.shape[-1]), removed, certified[name].leak))
    plain.modules(source)  # refuses an alpha that could not be read again
    certificate = Certificate(GuardSpaceConfig.PEFT_KEY, space.digest, {"made_by": "repair"}, certified)
    fields = GuardSpaceConfig.from_certificate(plain.config, certificate).to_dict()  # refuses what could not be loaded
    report = BlindReport(tuple(rows), space.digest, tuple(sorted(plain.extra)))
    if out_dir is not None:
        tensors, card = plain.extra | factor_tensors(pairs, plain.factors), card_with(source, _card(report))
        write_plain(Path(out_dir), tensors, fields, card, more=certificate.write)
    return report


@torch.no_grad()
def blinded(a: Tensor, basis: Tensor) -> Tensor:
    """`A - (A Q) Q^T` of a factor `(r, n)`, in fp32: rounded to 16 bits it would see 1e-3 of the span again."""
    result = a.detach().float().clone()
    fold_(basis, result, "in")
    return result


def _check_fits(source: Path, factors: Mapping[str, Tensor], space: SafetySubspace) -> None:
    lacking = space.lacking(factors, ("in",))
    if lacking:
        problem = f"the subspace has no input basis for {len(lacking)} of {len(factors)} modules ({listed(lacking)})"
        remedy = "Calibrate with method='guardspace' and the adapter's target_modules."
        raise SubspaceError(f"{source}: {problem}, which would stay as they are. {remedy}")
    for name, a in factors.items():
        basis = space.bases[name]["in"]
        if not fits(basis, a.shape[1]):
            shapes = f"lora_A is {tuple(a.shape)}, the basis is of other ones, {tuple(basis.shape)}"
            raise SubspaceError(f"{name}: {shapes}. Calibrate on the adapter's base.")


def _card(report: BlindReport) -> str:
    shares = sorted(row.removed for row in report.modules)
    return f"""## GuardSpace repair

Made blind after training by peft-safety: `A <- A - (A Q) Q^T` in {len(shares)} modules, which took out
{shares[len(shares) // 2]:.0%} of the update (median). `safety_certificate.json` names the null space. What this does
to a model's behavior has to be measured.
"""

"""SafetySubspace: the frozen low-rank bases of a model's layers, and where they came from.

One subspace serves many adapters. Modules with the same input (q/k/v, gate/up) may share a basis: it is then one
tensor in memory and on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import subspace_file
from peft_safety.core.names import exclusion_pattern, listed
from peft_safety.core.projection import ORTHONORMAL_TOLERANCE, SIDES, Side, orthonormality_error, orthonormalize, union
from peft_safety.errors import SubspaceError

UNREACHED, NARROW = "unreached", "narrow"
"""Why a layer has no basis: no token of the calibration data reached it, or a single feature leaves nothing free."""
Bases = Mapping[str, Mapping[Side, Tensor]]


class SafetySubspace:
    """Bases of the protected directions, by module name.

    Args:
        bases: `{module: {"out": (out_features, k), "in": (in_features, k)}}`, either side or both, orthonormal
            columns. Kept as fp32 on the CPU; one tensor given to several modules stays one. `{"window": (in_features,
            m)}` instead are directions in which `lora_A` may train, see `guardspace.directions.windows`.
        spectra: singular values behind each basis, `(k,)`, descending; optional.
        fingerprints: sampled base weights by module (`weights.fingerprint`); `bind` adds them.
        provenance: JSON-able facts: method, data hash, rank, tokens, seed.

    Raises:
        SubspaceError: no basis, or one that is not finite, has k < 1 or k >= d, or is not orthonormal; spectra or
            fingerprints of another shape, or not finite. Names the module and the shape.
    """

    def __init__(
        self,
        bases: Bases,
        spectra: Bases | None = None,
        fingerprints: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        copies: dict[int, Tensor] = {}
        self.bases, self.spectra = (
            {name: {side: _frozen(x, name, copies) for side, x in sides.items()} for name, sides in table.items()}
            for table in (bases, spectra or {})
        )
        self.fingerprints = {name: _frozen(values, name, {}) for name, values in (fingerprints or {}).items()}
        self.provenance = dict(provenance or {})
        if not self.bases or not all(self.bases.values()):
            raise SubspaceError("the subspace, or one of its modules, has no basis. Calibrate it again.")
        for name, sides in self.bases.items():
            for side, u in sides.items():
                _check_basis(u, name, side)
                values = self.spectra.get(name, {}).get(side, u[0])
                _check_values(values, (u.shape[1],), f"{name}: the {side} spectrum")
        for name, values in self.fingerprints.items():
            _check_values(values, (weights.SAMPLES,), f"{name}: the fingerprint")

    @classmethod
    def from_activations(cls, model: nn.Module, data: Any, **options: Any) -> SafetySubspace:
        """Estimate a subspace in one streaming pass over a model. Layers that no token reaches, or that have a single
        feature, are left out, with one warning; see `left_out`.

        Args:
            model: a language model, dense or quantized.
            data: rows `{prompt, response}`, `{messages}` or `{text, label}` (needs `tokenizer=`), or tokenized batches
                (`input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`).
            **options: `tokenizer`, `rank`, `target_modules`, ...; see `calibration.activations.estimate`.
        """
        from peft_safety.calibration.activations import estimate
        from peft_safety.calibration.leaving_out import announced

        return announced(estimate(model, data, **options))

    @classmethod
    def from_weights(cls, model: nn.Module, **options: Any) -> SafetySubspace:
        """The top singular directions of every target weight, dense or quantized. For the options (`rank`, `sides`,
        `target_modules`, ...), see `peft_safety.calibration.weights.estimate_from_weights`.
        """
        from peft_safety.calibration.leaving_out import announced
        from peft_safety.calibration.weights import estimate_from_weights

        return announced(estimate_from_weights(model, **options))

    @classmethod
    def load(cls, source: str | os.PathLike[str], **hub: Any) -> SafetySubspace:
        """From a file, a directory that holds `safety_subspace.safetensors`, or a Hub repository id.

        Args:
            hub: `revision`, `token`, `cache_dir` for `huggingface_hub.hf_hub_download`.

        Raises:
            SubspaceError: nothing there, or its content is malformed.
            ArtifactError: not a readable safetensors file.
        """
        path = subspace_file.locate(source, **hub)
        content = subspace_file.read(path)
        try:
            return SafetySubspace(*content)
        except SubspaceError as error:
            raise SubspaceError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file (into `path/safety_subspace.safetensors` when `path` is a directory). Atomic and
        deterministic: equal subspaces give equal bytes.

        Raises:
            ArtifactError: it cannot be written; what was there is unchanged.
            SubspaceError: provenance that is no JSON.
        """
        kinds = {"basis": self.bases, "spectrum": self.spectra}
        tensors = {
            f"{kind}.{side}.{name}": x
            for kind, table in kinds.items()
            for name, sides in table.items()
            for side, x in sides.items()
        }
        tensors |= {f"fingerprint.{name}": values for name, values in self.fingerprints.items()}
        return subspace_file.write(Path(path), tensors, self.provenance)

    @property
    def module_names(self) -> list[str]:
        """Modules with a basis, sorted."""
        return sorted(self.bases)

    @property
    def left_out(self) -> dict[str, str]:
        """Targeted layers without a basis, with the reason: `UNREACHED` or `NARROW`. Adapters leave them out too."""
        stored = self.provenance.get("left_out")
        lists = {reason: stored.get(reason) for reason in (UNREACHED, NARROW)} if isinstance(stored, dict) else {}
        pairs = ((name, why) for why, names in lists.items() if isinstance(names, list) for name in names)
        return {name: why for name, why in pairs if isinstance(name, str) and name not in self.bases}

    @property
    def digest(self) -> str:
        """Hash of the bases (not of where they came from): equal for subspaces that constrain equally."""
        digest = hashlib.sha256()
        for name in self.module_names:
            for side in sorted(self.bases[name]):
                u = self.bases[name][side]
                digest.update(f"{name}|{side}|{tuple(u.shape)}|".encode())
                digest.update(u.numpy().tobytes())
        return digest.hexdigest()

    def rank(self, name: str, side: Side = "out") -> int:
        """Number of protected directions of one module."""
        return int(self.bases[name][side].shape[1])

    @classmethod
    def joined(cls, own: SafetySubspace | None, spans: Bases) -> SafetySubspace:
        """A subspace with further directions protected. Spectra of the modules that grow are dropped.

        Args:
            own: None protects the further directions alone.
            spans: `{module: {side: (d, l)}}`, any columns; modules and sides without a basis here get one.

        Raises:
            SubspaceError: nothing would be left to train in a module.
        """
        bases = {name: dict(sides) for name, sides in own.bases.items()} if own else {}
        spectra = {name: dict(sides) for name, sides in own.spectra.items()} if own else {}
        unions: dict[tuple[int, int], Tensor] = {}
        for name, sides in spans.items():
            for side, span in sides.items():
                old = bases.get(name, {}).get(side)
                key = (id(old), id(span))  # modules that share both share the result
                new = unions[key] = unions[key] if key in unions else union(old, span)
                d, k = new.shape
                if k >= d:
                    raise SubspaceError(
                        f"{name}: no capacity is left on side {side!r}: {k} of {d} directions are taken, up to "
                        f"{span.shape[1]} of them by earlier patches. Use a smaller k or r, or merge those patches."
                    )
                if k:
                    bases.setdefault(name, {})[side] = new
                    spectra.get(name, {}).pop(side, None)
        if own is None:
            return SafetySubspace(bases, provenance={"method": "prior patches"})
        return SafetySubspace(bases, spectra, own.fingerprints, own.provenance)

    def beside(self, other: SafetySubspace) -> SafetySubspace:
        """This subspace with the bases of another one on the other side of the same modules. What either of them
        leaves out (see `left_out`) is left out; `other`'s provenance is kept under its side.

        Raises:
            SubspaceError: other modules, or both have a basis for one side of a module.
        """
        left_out = other.left_out | self.left_out
        both = [name for name in self.bases if name in other.bases]
        mismatched = (set(self.bases) ^ set(other.bases)) - set(left_out)
        mismatched |= {name for name in both if set(self.bases[name]) & set(other.bases[name])}
        if mismatched:
            raise SubspaceError(
                f"{listed(mismatched)}: one of the subspaces lacks them, or both have a basis on the same side. "
                "Calibrate both with the same target_modules, one on side 'in' and one on side 'out'."
            )
        bases = {name: {**self.bases[name], **other.bases[name]} for name in both}
        spectra = {name: {**self.spectra.get(name, {}), **other.spectra.get(name, {})} for name in both}
        side = min(side for sides in other.bases.values() for side in sides)
        provenance = {**self.provenance, "sides": "in+out", side: dict(other.provenance)}
        if left_out:
            reasons = sorted(set(left_out.values()))
            provenance["left_out"] = {why: sorted(n for n in left_out if left_out[n] == why) for why in reasons}
        prints = {name: value for name, value in {**other.fingerprints, **self.fingerprints}.items() if name in bases}
        return SafetySubspace(bases, {name: s for name, s in spectra.items() if s}, prints, provenance)

    def restricted(self, names: Iterable[str]) -> SafetySubspace:
        """The same subspace for some of its modules only."""
        kept = set(names)
        tables: tuple[Mapping[str, Any], ...] = (self.bases, self.spectra, self.fingerprints)
        bases, spectra, prints = ({name: x for name, x in table.items() if name in kept} for table in tables)
        return SafetySubspace(bases, spectra, prints, self.provenance)

    def randomized(self, seed: int = 0) -> SafetySubspace:
        """The control: a random subspace of equal ranks. A method's effect is its distance from this one."""
        generator = torch.Generator().manual_seed(seed)
        bases = {
            n: {s: orthonormalize(torch.randn(u.shape, generator=generator)) for s, u in self.bases[n].items()}
            for n in self.module_names
        }
        return SafetySubspace(bases, None, self.fingerprints, {**self.provenance, "method": "random", "seed": seed})

    def check_fits(
        self, layers: Mapping[str, nn.Module], sides: Sequence[Side] = ("out",), *, bind: bool = True
    ) -> None:
        """Check this subspace against the base layers it is to protect; then `bind` it to them.

        Raises:
            SubspaceError: a layer without a basis, one of another shape, or other base weights; nothing has changed.
        """
        lacking = self.lacking(layers, sides)
        if lacking:
            side = next(side for side in sides if side not in self.bases.get(lacking[0], {}))
            raise SubspaceError(
                f"{listed(lacking)}: no {side!r} basis for {len(lacking)} of {len(layers)} layers (the subspace has "
                f"{listed(self.bases)}). Calibrate with the same target_modules, or leave them out: "
                f'exclude_modules=r"{exclusion_pattern(lacking, layers)}".'
            )
        for name, layer in layers.items():
            for side in sides:
                kind, d = _features(side), weights.shape(layer)[0 if side == "out" else 1]
                if (shape := tuple(self.bases[name][side].shape))[0] != d:
                    raise SubspaceError(f"{name}: the basis is {shape}, the layer has {d} {kind}. Calibrate again.")
        quantized = self.provenance.get("precision", "dense") != "dense"
        weights.check_fingerprints(self.fingerprints, layers, quantized=quantized)
        if bind:
            self.bind(layers)

    def lacking(self, names: Iterable[str], sides: Sequence[Side]) -> list[str]:
        """The given modules that have no basis on one of the sides, in the given order."""
        return [name for name in names if not self.bases.get(name, {}).keys() >= set(sides)]

    def bind(self, layers: Mapping[str, nn.Module]) -> None:
        """Record fingerprints of the base layers that have none yet."""
        new = {name: layer for name, layer in layers.items() if name not in self.fingerprints}
        self.fingerprints |= {name: _frozen(weights.fingerprint(layer, name), name, {}) for name, layer in new.items()}
        kinds = {weights.quantization(layer) for layer in layers.values()} - {None}
        self.provenance.setdefault("precision", min(kinds, default="dense"))  # type: ignore[type-var]

    def __repr__(self) -> str:
        ranks = sorted({u.shape[1] for sides in self.bases.values() for u in sides.values()})
        sides = sorted({side for entry in self.bases.values() for side in entry})
        method = self.provenance.get("method", "unknown")
        return f"SafetySubspace({len(self.bases)} modules, {sides=}, k={ranks}, {method=})"


def _check_basis(u: Tensor, name: str, side: Side) -> None:
    """Refuse what would not protect, or would protect everything. The orthonormality catches zeros and copies too."""
    if side not in SIDES:
        raise SubspaceError(f"{name}: side {side!r}; use 'out', 'in' or 'window'.")
    what = f"{name}: the {side} basis {tuple(u.shape)}"
    if u.ndim != 2 or u.shape[1] < 1:
        raise SubspaceError(f"{what} is not (features, k) with k >= 1. Calibrate again.")
    d, k = u.shape
    if k >= d:
        raise SubspaceError(
            f"{name}: k = {k} directions of {d} {_features(side)} leave nothing to train. Use a rank below {d}, a "
            "smaller energy, or leave it out."
        )
    if not bool(torch.isfinite(u).all()):
        raise SubspaceError(f"{what} holds NaN or Inf. Calibrate again.")
    error = orthonormality_error(u)
    if not error <= ORTHONORMAL_TOLERANCE:
        limit = f"limit {ORTHONORMAL_TOLERANCE:g}"
        raise SubspaceError(f"{what} is not orthonormal (max|U^T U - I| = {error:.2g}, {limit}). Calibrate again.")


def _features(side: Side) -> str:
    return "output features" if side == "out" else "input features"


def _check_values(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape) != shape or not bool(torch.isfinite(x).all()):
        raise SubspaceError(f"{what} {tuple(x.shape)} does not hold {shape[0]} finite values. Calibrate again.")


def _frozen(x: Tensor, name: str, copies: dict[int, Tensor]) -> Tensor:
    """A frozen fp32 copy on the CPU. The same tensor always gives the same entry of `copies`, by its id."""
    if not isinstance(x, Tensor):
        raise SubspaceError(f"{name}: a {type(x).__name__} instead of a tensor. Use SafetySubspace.from_activations.")
    if id(x) not in copies:
        copies[id(x)] = x.detach().to(device="cpu", dtype=torch.float32).contiguous().clone()
    return copies[id(x)]

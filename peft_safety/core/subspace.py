"""SafetySubspace: the frozen low-rank bases of a model's layers, and where they came from."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import kinds, subspace_file
from peft_safety.core.names import exclusion_pattern, listed
from peft_safety.core.projection import (
    ORTHONORMAL_TOLERANCE,
    SIDES,
    Side,
    all_finite,
    fits,
    is_tokens,
    orthonormality_error,
    orthonormalize,
    union,
)
from peft_safety.errors import ConfigError, SubspaceError

UNREACHED, NARROW = "unreached", "narrow"
"""Why a layer has no basis: no token of the calibration data reached it, or a single feature leaves nothing free."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULT_DTYPE = "float16"
"""Of a calibrated subspace. The entries of an orthonormal basis are at most 1, where fp16 is eight times finer than
bf16 at the same size. On SmolLM2-135M the span turns by 3e-4 (bf16: 2e-3), and covers the same energy to three digits.
"""
Bases = Mapping[str, Mapping[Side, Tensor]]
ESTIMATORS: dict[str, Callable[..., SafetySubspace]] = {}
"""How a subspace is made, from "activations" or "weights". `calibration.estimators` enters both."""


class SafetySubspace:
    """Bases of the protected directions, by module name.

    Args:
        bases: `{module: {"out": (out_features, k), "in": (in_features, k)}}`, either side or both, orthonormal
            columns. One tensor given to several modules stays one. In fp16 or bf16, what is protected is the span of
            the rounded columns (see `rounded`). `{"window": (in_features, m)}` instead are directions in which
            `lora_A` may train. "in" of an embedding is a set of tokens, int64 `(k,)`, as from a calibration.
        spectra: singular values behind each basis, `(k,)`, descending; optional.
        fingerprints: sampled base weights by module (`weights.fingerprint`); `bind` adds them.
        provenance: JSON-able facts: method, data hash, rank, tokens, seed.

    Attributes:
        stored: the bases as given, on the CPU: what a file holds and `digest` hashes.
        bases: orthonormal fp32 bases of the same spans; the same tensors where they were given in fp32.

    Raises:
        SubspaceError: no basis, or one that is not finite or orthonormal, or has k < 1 or k >= d; spectra or
            fingerprints of another shape, or not finite.
    """

    def __init__(
        self,
        bases: Bases,
        spectra: Bases | None = None,
        fingerprints: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        copies: dict[int, Tensor] = {}
        self.stored, self.spectra = (
            {name: {side: _frozen(x, name, copies) for side, x in sides.items()} for name, sides in table.items()}
            for table in (bases, spectra or {})
        )
        self.fingerprints = {name: _frozen(values, name, {}) for name, values in (fingerprints or {}).items()}
        self.provenance = dict(provenance or {})
        if not self.stored or not all(self.stored.values()):
            raise SubspaceError("the subspace, or one of its modules, has no basis. Calibrate it again.")
        spans: dict[int, Tensor] = {}
        checked = set()  # many modules may share one basis
        for name, sides in self.stored.items():
            for side, u in sides.items():
                if (id(u), side) not in checked:
                    _check_basis(u, name, side)
                    checked.add((id(u), side))
                values = self.spectra.get(name, {}).get(side, torch.zeros(u.shape[-1:]))
                _check_values(values, u.shape[-1:], f"{name}: the {side} spectrum")
                if id(u) not in spans:
                    given = u.dtype == torch.float32 or is_tokens(u)
                    spans[id(u)] = u if given else orthonormalize(u.double()).float()
        self.bases = {name: {s: spans[id(u)] for s, u in sides.items()} for name, sides in self.stored.items()}
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
        return ESTIMATORS["activations"](model, data, **options)

    @classmethod
    def from_weights(cls, model: nn.Module, **options: Any) -> SafetySubspace:
        """The top singular directions of every target weight, dense or quantized. For the options (`rank`, `sides`,
        `target_modules`, ...), see `peft_safety.calibration.weights.estimate_from_weights`.
        """
        return ESTIMATORS["weights"](model, **options)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        modules: Collection[str] | None = None,
        rank: int | None = None,
        **hub: Any,
    ) -> SafetySubspace:
        """From a file, a directory that holds `safety_subspace.safetensors`, or a Hub repository id.

        Args:
            modules: read the bases of these modules only; None reads all.
            rank: read at most this many directions of each basis, the first ones.
            hub: `revision`, `token`, `cache_dir` for `huggingface_hub.hf_hub_download`.

        Raises:
            SubspaceError: nothing there, or its content is malformed.
            ArtifactError: not a readable safetensors file.
        """
        path = subspace_file.locate(source, **hub)
        content = subspace_file.read(path, modules, rank)
        try:
            return SafetySubspace(*content)
        except SubspaceError as error:
            raise SubspaceError(f"{path}: {error}") from error

    @classmethod
    def of(cls, source: SafetySubspace | str | os.PathLike[str], modules: Collection[str]) -> SafetySubspace:
        """A given subspace restricted to some modules, or what a file (see `load`) holds of them."""
        return source.restricted(modules) if isinstance(source, SafetySubspace) else cls.load(source, modules=modules)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file (into `path/safety_subspace.safetensors` when `path` is a directory). Atomic and
        deterministic: equal subspaces give equal bytes. The bases are written as they are, see `rounded`.

        Raises:
            ArtifactError: it cannot be written; what was there is unchanged.
            SubspaceError: provenance that is no JSON.
        """
        tensors = {f"fingerprint.{name}": values for name, values in self.fingerprints.items()}
        for kind, table in (("basis", self.stored), ("spectrum", self.spectra)):
            tensors |= {f"{kind}.{side}.{name}": x for name, sides in table.items() for side, x in sides.items()}
        return subspace_file.write(Path(path), tensors, self.provenance)

    @property
    def module_names(self) -> list[str]:
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
                u = self.stored[name][side]
                precision = "" if u.dtype == torch.float32 else f"{u.dtype}|"
                digest.update(f"{name}|{side}|{precision}{tuple(u.shape)}|".encode())
                digest.update(u.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def rank(self, name: str, side: Side = "out") -> int:
        """Number of protected directions of one module."""
        return int(self.bases[name][side].shape[-1])

    @classmethod
    def joined(cls, own: SafetySubspace | None, spans: Bases) -> SafetySubspace:
        """A subspace with further directions protected. Spectra of the modules that grow are dropped.

        Args:
            own: None protects the further directions alone.
            spans: `{module: {side: (d, l)}}`, any columns; modules and sides without a basis here get one.

        Raises:
            SubspaceError: nothing would be left to train in a module.
        """
        bases = {name: dict(sides) for name, sides in own.stored.items()} if own else {}
        spectra = {name: dict(sides) for name, sides in own.spectra.items()} if own else {}
        unions: dict[tuple[int, int], Tensor] = {}
        for name, sides in spans.items():
            for side, span in sides.items():
                old = own.bases.get(name, {}).get(side) if own else None
                key = (id(old), id(span))  # modules that share both share the result
                new = unions[key] = unions[key] if key in unions else union(old, span)
                d, k = new.shape
                if k >= d:
                    raise SubspaceError(
                        f"{name}: no capacity is left on side {side!r}: {k} of {d} directions are taken, up to "
                        f"{span.shape[1]} of them by earlier patches. Use a smaller k or r, or merge those patches."
                    )
                if k > (0 if old is None else old.shape[1]):
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
        bases = {name: {**self.stored[name], **other.stored[name]} for name in both}
        spectra = {name: {**self.spectra.get(name, {}), **other.spectra.get(name, {})} for name in both}
        side = min(side for sides in other.bases.values() for side in sides)
        provenance = {**self.provenance, "sides": "in+out", side: dict(other.provenance)}
        if left_out:
            reasons = sorted(set(left_out.values()))
            provenance["left_out"] = {why: sorted(n for n in left_out if left_out[n] == why) for why in reasons}
        prints = {name: value for name, value in {**other.fingerprints, **self.fingerprints}.items() if name in bases}
        return SafetySubspace(bases, {name: s for name, s in spectra.items() if s}, prints, provenance)

    def restricted(self, names: Iterable[str]) -> SafetySubspace:
        kept = set(names)
        if not kept & set(self.bases):
            raise SubspaceError(f"{listed(kept)}: no basis for any of them (it has {listed(self.bases)}).")
        part = copy.copy(self)
        for table in ("stored", "bases", "spectra", "fingerprints"):
            setattr(part, table, {name: x for name, x in getattr(self, table).items() if name in kept})
        part.provenance = dict(self.provenance)
        return part

    def rounded(self, dtype: str = DEFAULT_DTYPE) -> SafetySubspace:
        """The subspace that the bases of this one span once they are rounded, as a file of half the size holds it.
        Round before use: the spans differ by an angle of 3e-4 ("float16") or 2e-3 ("bfloat16"), and so do the digests.

        Args:
            dtype: "float16", "bfloat16", or "float32", which changes nothing.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}. Use one of {', '.join(DTYPES)}.")
        spans = [u for sides in self.bases.values() for u in sides.values()]
        made = {id(u): u if is_tokens(u) else u.to(DTYPES[dtype]) for u in spans}
        bases = {name: {side: made[id(u)] for side, u in sides.items()} for name, sides in self.bases.items()}
        return self if dtype == "float32" else SafetySubspace(bases, self.spectra, self.fingerprints, self.provenance)

    def randomized(self, seed: int = 0) -> SafetySubspace:
        """The control: a random subspace of equal ranks. A method's effect is its distance from this one."""
        generator = torch.Generator().manual_seed(seed)
        if tokens := [n for n, sides in self.bases.items() if any(map(is_tokens, sides.values()))]:
            what = f"{listed(tokens)}: a set of tokens has no random directions"
            raise SubspaceError(f"{what}. Leave the embedding out of target_modules, or use restricted().")
        bases = {
            n: {s: orthonormalize(torch.randn(u.shape, generator=generator)) for s, u in self.bases[n].items()}
            for n in self.module_names
        }
        return SafetySubspace(bases, None, self.fingerprints, {**self.provenance, "method": "random", "seed": seed})

    def check_fits(
        self, layers: Mapping[str, nn.Module], sides: Sequence[Side] = ("out",), *, bind: bool = True
    ) -> None:
        """Check this subspace against the layers it is to protect; then `bind` it to them. A SubspaceError names a
        layer without a basis, of another shape, or of other weights; nothing has changed then.
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
                self._check_side(name, layer, side)
        quantized = self.provenance.get("precision", "dense") != "dense"
        weights.check_fingerprints(self.fingerprints, layers, quantized=quantized)
        if bind:
            self.bind(layers)

    def _check_side(self, name: str, layer: nn.Module, side: Side) -> None:
        u, d = self.bases[name][side], weights.shape(layer)[0 if side == "out" else 1]
        if is_tokens(u):
            problem = f"tokens up to {int(u.max())}, the layer has {d} input features"
            wrong = not kinds.is_embedding(layer) or len(u) >= d
        else:
            problem = f"{tuple(u.shape)}, the layer has {d} {'output' if side == 'out' else 'input'} features"
            wrong = False
        if wrong or not fits(u, d):
            raise SubspaceError(f"{name}: the basis is {problem}. Calibrate again.")
        groups = kinds.groups(layer)
        if side == "out" and groups > 1 and not kinds.in_groups(u, groups):
            raise SubspaceError(
                f"{name}: directions {tuple(u.shape)} that mix the {groups} groups of this convolution, whose lora_B "
                "cannot. Calibrate again."
            )

    def lacking(self, names: Iterable[str], sides: Sequence[Side]) -> list[str]:
        """The given modules that have no basis on one of the sides, in the given order."""
        return [name for name in names if not self.bases.get(name, {}).keys() >= set(sides)]

    def bind(self, layers: Mapping[str, nn.Module]) -> None:
        """Record fingerprints of the base layers that have none yet."""
        new = {name: layer for name, layer in layers.items() if name not in self.fingerprints}
        self.fingerprints |= {name: _frozen(weights.fingerprint(layer, name), name, {}) for name, layer in new.items()}
        self.provenance.setdefault("precision", weights.precision(layers))

    def __repr__(self) -> str:
        ranks = sorted({u.shape[-1] for sides in self.bases.values() for u in sides.values()})
        sides = sorted({side for entry in self.bases.values() for side in entry})
        method = self.provenance.get("method", "unknown")
        return f"SafetySubspace({len(self.bases)} modules, {sides=}, k={ranks}, {method=})"


def _check_basis(u: Tensor, name: str, side: Side) -> None:
    """Refuse what would not protect, or would protect everything. The orthonormality catches zeros and copies too."""
    if side not in SIDES:
        raise SubspaceError(f"{name}: side {side!r}; use 'out', 'in' or 'window'.")
    what = f"{name}: the {side} basis {tuple(u.shape)}"
    if is_tokens(u):
        distinct = u.dtype == torch.int64 and 0 < len(u) == len(u.unique()) and int(u.min()) >= 0
        if side != "in" or not distinct:
            raise SubspaceError(f"{what} is no set of tokens (int64, distinct, side 'in'). Calibrate again.")
        return
    if u.ndim != 2 or u.shape[1] < 1:
        raise SubspaceError(f"{what} is not (features, k) with k >= 1. Calibrate again.")
    d, k = u.shape
    if k >= d:
        kind = "output" if side == "out" else "input"
        raise SubspaceError(
            f"{name}: k = {k} directions of {d} {kind} features leave nothing to train. Use a rank below {d}, a "
            "smaller energy, or leave it out."
        )
    if not all_finite(u):
        raise SubspaceError(f"{what} holds NaN or Inf. Calibrate again.")
    error = orthonormality_error(u)
    # rounding the columns moves their products by up to twice the unit roundoff, which is half of epsilon
    limit = ORTHONORMAL_TOLERANCE if u.dtype == torch.float32 else 2 * torch.finfo(u.dtype).eps
    if not error <= limit:
        raise SubspaceError(
            f"{what} is not orthonormal (max|U^T U - I| = {error:.2g}, limit {limit:.2g}). Calibrate again."
        )


def _check_values(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape) != shape or not all_finite(x):
        raise SubspaceError(f"{what} {tuple(x.shape)} does not hold {shape[0]} finite values. Calibrate again.")


def _frozen(x: Tensor, name: str, copies: dict[int, Tensor]) -> Tensor:
    """A frozen copy on the CPU, in fp32 or 16 bits. The same tensor always gives the same entry of `copies`."""
    if not isinstance(x, Tensor):
        raise SubspaceError(f"{name}: a {type(x).__name__} instead of a tensor. Use SafetySubspace.from_activations.")
    if id(x) not in copies:
        kept = x.dtype in DTYPES.values() or (x.dtype == torch.int64 and x.ndim == 1)
        dtype = x.dtype if kept else torch.float32
        copies[id(x)] = x.detach().to(device="cpu", dtype=dtype).contiguous().clone()
    return copies[id(x)]

"""A subspace is orthonormal, bound to its base, and the same after a round trip."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_safety import SafetySubspace
from peft_safety.core import base_weights as weights
from peft_safety.core import files, subspace_file
from peft_safety.core.projection import orthonormality_error, project_out
from peft_safety.core.subspace_file import FILE_NAME
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError, SubspaceError


def basis(d: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed))).Q


def example(seed: int = 0) -> SafetySubspace:
    bases = {"a": {"out": basis(12, 3, seed)}, "b": {"out": basis(8, 2, seed), "in": basis(6, 1, seed)}}
    spectra = {"a": {"out": torch.tensor([3.0, 2.0, 1.0])}}
    return SafetySubspace(
        bases,
        spectra,
        {"a": torch.arange(weights.SAMPLES).float()},
        {"method": "salora", "seed": seed, "note": "ü\u2028"},
    )


def layers(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"a": nn.Linear(5, 12), "b": nn.Linear(6, 8)}


@settings(max_examples=40, deadline=None)
@given(d=st.integers(2, 40), k=st.integers(1, 39), seed=st.integers(0, 9))
def test_a_round_trip_keeps_every_bit(d: int, k: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if k >= d:
        with pytest.raises(SubspaceError, match="leave nothing to train"):
            SafetySubspace({"m.x": {"out": torch.eye(d, k)}})
        return
    subspace = SafetySubspace({"m.x": {"out": basis(d, k, seed)}}, provenance={"seed": seed})
    directory = tmp_path_factory.mktemp("subspace")
    loaded = SafetySubspace.load(subspace.save(directory))
    assert torch.equal(loaded.bases["m.x"]["out"], subspace.bases["m.x"]["out"])
    assert (loaded.digest, loaded.provenance, loaded.rank("m.x")) == (subspace.digest, {"seed": seed}, k)


def test_everything_is_saved_and_equal_subspaces_give_equal_bytes(tmp_path: Path) -> None:
    first, second = example().save(tmp_path / "one"), example().save(tmp_path / "two" / "named.safetensors")
    assert first == tmp_path / "one" / FILE_NAME
    assert first.read_bytes() == second.read_bytes()
    loaded = SafetySubspace.load(tmp_path / "one")
    assert torch.equal(loaded.spectra["a"]["out"], torch.tensor([3.0, 2.0, 1.0]))
    assert torch.equal(loaded.fingerprints["a"], torch.arange(weights.SAMPLES).float())
    assert loaded.provenance == example().provenance
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FILE_NAME]


def shared(d: int = 40, k: int = 6) -> SafetySubspace:
    u, s = basis(d, k), torch.arange(k, 0, -1).float()
    space = {name: {"in": u} for name in ("q", "k")} | {"down": {"in": basis(2 * d, k, 1)}}
    return SafetySubspace(space, {name: {"in": s} for name in space}, provenance={"covered": {"q": 0.9}})


@pytest.mark.parametrize(("dtype", "angle"), [("float16", 1e-3), ("bfloat16", 5e-3)])
def test_a_rounded_subspace_is_the_span_of_what_is_stored(dtype: str, angle: float, tmp_path: Path) -> None:
    exact = shared()
    rounded = exact.rounded(dtype)
    assert rounded.digest not in (exact.digest, exact.rounded("bfloat16" if dtype == "float16" else "float16").digest)
    path = rounded.save(tmp_path / "one.safetensors")
    loaded = SafetySubspace.load(path)
    assert loaded.digest == rounded.digest
    assert loaded.save(tmp_path / "two.safetensors").read_bytes() == path.read_bytes()
    for name, sides in loaded.bases.items():
        u = sides["in"]
        assert u.dtype == torch.float32
        assert orthonormality_error(u) < 1e-6
        assert float(project_out(u.double(), rounded.stored[name]["in"].double()).norm()) < 1e-6
        assert float(project_out(u.double(), exact.bases[name]["in"].double()).norm(dim=0).max()) < angle
    assert loaded.bases["q"]["in"] is loaded.bases["k"]["in"]
    tensors = ({id(u): u for sides in x.stored.values() for u in sides.values()} for x in (exact, loaded))
    sizes = [sum(u.nbytes for u in unique.values()) for unique in tensors]
    assert sizes[0] == 2 * sizes[1] == 4 * 6 * (40 + 80)
    assert path.stat().st_size < exact.save(tmp_path / "exact.safetensors").stat().st_size
    assert exact.rounded("float32") is exact
    with pytest.raises(ConfigError, match="int8"):
        exact.rounded("int8")


def test_what_derives_from_a_rounded_subspace_keeps_its_digest(tmp_path: Path) -> None:
    space = shared().rounded()
    assert space.restricted(["q", "k", "down"]).digest == space.digest
    assert SafetySubspace.joined(space, {}).digest == space.digest
    inside = space.bases["q"]["in"][:, :2]
    assert SafetySubspace.joined(space, {"q": {"in": inside}}).digest == space.digest
    grown = SafetySubspace.joined(space, {"q": {"in": basis(40, 2, 5)}})
    assert grown.stored["q"]["in"] is grown.bases["q"]["in"]
    assert grown.rank("q", "in") == 8
    assert orthonormality_error(grown.bases["q"]["in"]) < 1e-5


def test_columns_that_rounding_cannot_explain_are_refused() -> None:
    for bad in (1.01 * basis(12, 3), basis(12, 3)[:, [0, 0, 1]], torch.full((12, 3), float("nan"))):
        with pytest.raises(SubspaceError, match=r"a: the out basis \(12, 3\)"):
            SafetySubspace({"a": {"out": bad.half()}})


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = shared().rounded()
    path = space.save(tmp_path)
    seen: dict[str, tuple[int, ...]] = {}
    leading = subspace_file._leading

    def spy(handle: Any, key: str, rank: int | None) -> Tensor:
        result = leading(handle, key, rank)
        seen[key] = tuple(result.shape)
        return result

    monkeypatch.setattr(subspace_file, "_leading", spy)
    part = SafetySubspace.load(path, modules=["k", "elsewhere"], rank=2)
    assert sorted(seen.values()) == [(2,), (40, 2)]
    assert {key.rpartition(".")[2] for key in seen} <= {"q", "k"}
    assert part.module_names == ["k"]
    assert float(project_out(part.bases["k"]["in"], space.bases["k"]["in"][:, :2]).norm()) < 1e-6
    assert "covered" not in part.provenance
    assert SafetySubspace.load(path, modules=["k"], rank=99).digest == space.restricted(["k"]).digest
    assert SafetySubspace.of(path, ["k"]).digest == SafetySubspace.of(space, ["k"]).digest
    with pytest.raises(SubspaceError, match=r"no basis for elsewhere.*down"):
        SafetySubspace.load(path, modules=["elsewhere"])


def test_saving_where_that_is_impossible_is_a_typed_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="could not be written"):
        example().save(tmp_path / "file" / "deeper")
    example(0).save(tmp_path)
    before = files.sha256(tmp_path / FILE_NAME)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match=r"could not be written.*No space"):
        example(1).save(tmp_path)
    assert files.sha256(tmp_path / FILE_NAME) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", FILE_NAME]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}], ids=lambda value: type(value).__name__)
def test_provenance_that_could_not_be_read_back_is_not_written(value: object, tmp_path: Path) -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}}, provenance={"x": value})
    with pytest.raises(SubspaceError, match="provenance"):
        subspace.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_digest_is_of_what_is_constrained(tmp_path: Path) -> None:
    subspace = example()
    same = SafetySubspace(subspace.bases, provenance={"method": "another"})
    assert subspace.digest == same.digest
    assert subspace.digest != example(1).digest
    assert subspace.digest != subspace.restricted(["a"]).digest


def test_bases_are_copies_in_fp32() -> None:
    u = basis(12, 3).double().requires_grad_()
    subspace = SafetySubspace({"a": {"out": u}})
    kept = subspace.bases["a"]["out"]
    assert (kept.dtype, kept.requires_grad, kept.is_contiguous()) == (torch.float32, False, True)
    with torch.no_grad():
        u.zero_()
    assert orthonormality_error(kept) < 1e-6


def test_a_restriction_keeps_what_belongs_to_its_modules() -> None:
    part = example().restricted(["a", "unknown"])
    assert part.module_names == ["a"]
    assert set(part.fingerprints) == {"a"}
    with pytest.raises(SubspaceError, match="no basis"):
        example().restricted(["unknown"])


def test_the_random_control_has_equal_ranks_and_other_directions() -> None:
    control = example().randomized(seed=3)
    for name in ("a", "b"):
        for side, u in example().bases[name].items():
            assert control.bases[name][side].shape == u.shape
            assert orthonormality_error(control.bases[name][side]) < 1e-5
            assert not torch.allclose(control.bases[name][side], u)
    assert control.digest == example().randomized(seed=3).digest


def test_a_subspace_binds_to_the_base_it_first_fits_and_to_no_other() -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}, "b": {"out": basis(8, 2)}})
    subspace.check_fits(layers(0), bind=False)
    assert not subspace.fingerprints
    subspace.check_fits(layers(0))
    assert set(subspace.fingerprints) == {"a", "b"}
    subspace.check_fits(layers(0))
    with pytest.raises(SubspaceError, match=r"(a|b): this subspace belongs to other base weights"):
        subspace.check_fits(layers(1))


def test_one_layer_of_another_base_is_enough_and_is_named() -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}, "b": {"out": basis(8, 2)}})
    subspace.check_fits(layers(0))
    mixed = layers(0) | {"b": layers(1)["b"]}
    with pytest.raises(SubspaceError, match=r"b: this subspace belongs to other base weights than this \(8, 6\)"):
        subspace.check_fits(mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_is_recognized(dtype: torch.dtype) -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}, "b": {"out": basis(8, 2)}})
    subspace.check_fits(layers(0))
    subspace.check_fits({name: layer.to(dtype) for name, layer in layers(0).items()})


def test_a_weight_that_is_not_finite_never_passes_for_the_base() -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}, "b": {"out": basis(8, 2)}})
    subspace.check_fits(layers(0))
    for name in ("a", "b"):
        broken = layers(0)
        broken[name].weight.data.view(-1)[0] = float("nan")
        with pytest.raises(SubspaceError, match=rf"{name}: .*NaN"):
            subspace.check_fits(broken)
    subspace.fingerprints["a"][3] = float("nan")  # a recorded one must not hide the others' distance either
    with pytest.raises(SubspaceError, match="a: this subspace belongs to other base weights"):
        subspace.check_fits(layers(0))


def test_a_layer_that_does_not_fit_changes_nothing() -> None:
    subspace = SafetySubspace({"a": {"out": basis(12, 3)}, "b": {"out": basis(7, 2)}})
    with pytest.raises(SubspaceError, match=r"b: the basis is \(7, 2\), the layer has 8 output features"):
        subspace.check_fits(layers(0))
    assert not subspace.fingerprints


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return example().save(tmp_path_factory.mktemp("stored")).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_corrupt_file_is_a_typed_error_or_still_orthonormal(
    data: st.DataObject, stored: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Alone, the file has no hash; whatever gets through is at least a valid subspace. Beside an adapter, its sha256
    decides.
    """
    content = bytearray(stored)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for position in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)):
        if content:
            content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("corrupt") / FILE_NAME
    path.write_bytes(bytes(content))
    with suppress(PeftSafetyError):
        loaded = SafetySubspace.load(path)
        assert all(orthonormality_error(u) <= 1e-5 for sides in loaded.bases.values() for u in sides.values())

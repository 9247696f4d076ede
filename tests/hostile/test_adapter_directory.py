"""An adapter directory that is damaged, hostile or of another model never loads: a typed error, at once, and the base model is as it was."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_safety import SafetySubspace, verify
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError, SubspaceError
from peft_safety.subspace import FORMAT
from tests.hostile import tools
from tests.hostile.tools import ADAPTER, DOWN, MANIFEST, PREFIX, Q0, Q1, REMEDIES, SUBSPACE, A, B, Damage, Tensors, U, bases, fields, put, record, tensors, text
from tests.tiny import tiny_llama

pytestmark = pytest.mark.timeout(60)
SECONDS = 2.0
EVIL = r"([a-z_.0-9]+)+!"


@dataclass(frozen=True)
class Case:
    """A damage and what the error must be.

    Attributes:
        says: what the message must mention.
        good: which good adapter is damaged.
        knows_base: only a check that sees the base model can tell.
    """

    name: str
    damage: Damage
    error: type[PeftSafetyError]
    says: tuple[str, ...]
    good: str = "lora"
    knows_base: bool = field(default=False)


def write(name: str, content: bytes) -> Damage:
    return lambda directory: void((directory / name).write_bytes(content))


def void(_: object) -> None:
    return None


def truncate(name: str, keep: float) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def header(json_text: str, length: int | None = None) -> Damage:
    """A safetensors file that is only a header, its hash forged."""

    def damage(directory: Path) -> None:
        raw = json_text.encode()
        (directory / ADAPTER).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)
        tools.forge(directory)

    return damage


def link(name: str) -> Damage:
    """The file moves out of the directory, a link stays."""

    def damage(directory: Path) -> None:
        outside = directory.with_name("outside")
        outside.mkdir()
        (directory / name).rename(outside / name)
        (directory / name).symlink_to(outside / name)

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages] and None


def drop(*keys: str):
    return lambda content: [content.pop(key) for key in keys]


def leak(content: Tensors) -> None:
    content[B] += 0.1 * torch.randn(content[B].shape, generator=torch.Generator().manual_seed(0))


def renamed(old: str, new: str):
    def change(content: Tensors) -> None:
        content[new] = content.pop(old)

    return change


def smuggled(name: str):
    """A tensor that `load_state_dict` would put over a base weight."""
    key = f"{PREFIX}{name}"
    return tensors(lambda content: content.update({key: torch.ones(32, 64) if "down" in name else torch.full((32,), 7.0)}), listed=(key,))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(instead: bool, name: str = "adapter_model.bin") -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(pickle.dumps(Bomb(directory / "ran")))
        if instead:
            (directory / ADAPTER).unlink()

    return damage


ART, CONF, SUB = ArtifactError, ConfigError, SubspaceError
CASES = [
    # factors
    Case("nan_in_b", tensors(put(B, tools.poke(float("nan")))), ART, (ADAPTER, Q0, "lora_B", "(32, 4)", "NaN")),
    Case("inf_in_a", tensors(put(A, tools.poke(float("inf")))), ART, (ADAPTER, Q0, "lora_A", "(4, 32)", "Inf")),
    Case("nan_in_initial", tensors(put(A.replace("weight", "initial"), tools.poke(float("nan")))), ART, (Q0, "lora_A.initial", "NaN"), "task"),
    Case("factor_missing", tensors(drop(B)), ART, (ADAPTER, Q0, "lora_B.weight")),
    Case("module_missing", tensors(drop(A, B)), ART, (ADAPTER, Q0, "13 modules", "14")),
    Case("initial_missing", tensors(drop(A.replace("weight", "initial"))), ART, (ADAPTER, Q0, "lora_A.initial"), "task"),
    Case("initial_too_many", tensors(lambda t: t.update({A.replace("weight", "initial"): t[A].clone()})), ART, (ADAPTER, Q0, "lora_A.initial")),
    Case("init_relabelled", fields(init="lora"), ART, (ADAPTER, "lora_A.initial"), "task"),
    Case("unknown_tensor", tensors(lambda t: t.update({"base_model.model.foo.weight": torch.ones(2)})), ART, (ADAPTER, "foo.weight")),
    Case("unknown_factor_listed", tensors(renamed(B, B.replace("lora_B", "lora_C")), listed=(B.replace("lora_B", "lora_C"),)), ART, (ADAPTER, Q0)),
    Case("adapter_name_in_key", tensors(renamed(B, f"{PREFIX}{Q0}.lora_B.default.weight")), ART, (ADAPTER, "lora_B.default.weight")),
    Case("key_without_prefix", tensors(renamed(B, B.removeprefix(PREFIX))), ART, (ADAPTER, Q0)),
    Case("base_weight_smuggled_under_a_target", smuggled(f"{DOWN}.base_layer.weight"), ART, (DOWN, "(32, 64)")),
    Case("base_weight_smuggled_beside_targets", smuggled("model.norm.weight"), ART, ("model.norm.weight", "(32,)"), knows_base=True),
    Case("no_tensors_at_all", tensors(lambda t: t.clear()), ART, (ADAPTER, "0 modules")),
    Case("empty_file", all_of(write(ADAPTER, b""), tools.forge), ART, (ADAPTER,)),
    Case("too_wide_factor", tensors(put(A, lambda x: torch.cat([x, x], 1))), ART, (Q0, "32 x 64", "(32, 32)"), knows_base=True),
    Case("too_long_factor", tensors(put(B, lambda x: torch.cat([x, x]))), ART, (ADAPTER, Q0, "(64, 4)", "(32, 8)")),
    Case("transposed_factor", tensors(put(B, lambda x: x.T)), ART, (ADAPTER, Q0, "(4, 32)")),
    Case("flat_factor", tensors(put(B, lambda x: x.flatten())), ART, (ADAPTER, Q0, "(128,)")),
    Case("scalar_factors", tensors(lambda t: t.update({A: torch.ones(()), B: torch.ones(())})), ART, (ADAPTER, Q0, "()")),
    Case("zero_size_factors", tensors(lambda t: t.update({A: torch.ones(0, 32), B: torch.ones(32, 0)})), ART, (ADAPTER, Q0, "(0, 32)")),
    Case("integer_factor", tensors(put(B, lambda x: x.to(torch.int32))), ART, (ADAPTER, Q0, "I32")),
    Case("double_factor", tensors(put(B, lambda x: x.double())), ART, (ADAPTER, Q0, "F64")),
    Case("another_rank", fields(r=8), ART, (ADAPTER, Q0.rpartition("layers")[0], "rank 8")),
    Case("leaking_b", tensors(leak), ART, (ADAPTER, Q0, "lora_B.weight", "protected subspace")),
    Case("leaking_initial", tensors(put(B.replace("weight", "initial"), lambda x: x + 0.1)), ART, (Q0, "lora_B.initial"), "task"),
    # numbers
    *(Case(f"alpha_{value!r}", fields(lora_alpha=value), CONF, (MANIFEST, f"lora_alpha={value!r}")) for value in (-16, 0, 1e30, "16", True, None, [1])),
    *(Case(f"rank_{value!r}", fields(r=value), CONF, (MANIFEST, f"r={value!r}")) for value in (-4, 0, 2_000_000, "4", True, 4.0, None)),
    *(Case(f"dropout_{value!r}", fields(lora_dropout=value), CONF, (MANIFEST, "lora_dropout")) for value in (-0.1, 1.0, "0.1")),
    Case("alpha_is_a_nan_literal", text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": NaN')), ART, (MANIFEST, "NaN")),
    Case("alpha_overflows", text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": 1e999')), ART, (MANIFEST, "1e999")),
    Case("alpha_pattern_nan", text(lambda t: t.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"{Q0}": NaN}}')), ART, (MANIFEST, "NaN")),
    Case("alpha_pattern_negative", fields(alpha_pattern={Q0: -1}), CONF, (MANIFEST, "alpha_pattern", Q0, "-1")),
    Case("alpha_pattern_of_an_unknown_module", fields(alpha_pattern={"lm_head": 4}), ART, (MANIFEST, "alpha_pattern")),
    Case("rank_pattern_huge", fields(rank_pattern={Q0: 2_000_000}), CONF, (MANIFEST, "rank_pattern", Q0, "2000000")),
    Case("rank_pattern_is_a_list", fields(rank_pattern=[4]), ART, (MANIFEST, "rank_pattern")),
    Case("safety_rank_zero", fields(safety_rank=0), CONF, ("safety_rank=0",)),
    # patterns that take forever
    Case("evil_rank_pattern", fields(rank_pattern={EVIL: 4}), ART, (MANIFEST, "rank_pattern")),
    Case("evil_alpha_pattern", fields(alpha_pattern={EVIL: 4}), ART, (MANIFEST, "alpha_pattern")),
    Case("evil_target_modules", fields(target_modules=EVIL), ART, (MANIFEST, "target_modules")),
    Case("evil_exclude_modules", fields(exclude_modules=EVIL), ART, (MANIFEST, "exclude_modules")),
    Case("evil_layers_pattern", fields(layers_pattern=[EVIL], layers_to_transform=[0]), ART, (MANIFEST, "layers_")),
    Case("a_hundred_thousand_patterns", fields(alpha_pattern={f"m{i}": 1 for i in range(60_000)}), ART, (MANIFEST, "alpha_pattern")),
    # features that would bypass the projection
    Case("dora", fields(use_dora=True), CONF, ("use_dora",)),
    Case("bias_of_b", fields(lora_bias=True), CONF, ("lora_bias",)),
    Case("base_biases", fields(bias="all"), CONF, ("bias='all'",)),
    Case("rewriting_init", fields(init_lora_weights="pissa"), CONF, ("init_lora_weights='pissa'",)),
    Case("replicated_layers", fields(layer_replication=[[0, 2], [0, 2]]), CONF, ("layer_replication",)),
    Case("modules_to_save_without_tensors", fields(modules_to_save=["lm_head"]), ART, ("lm_head.weight", "missing"), knows_base=True),
    Case("modules_to_save_is_a_number", fields(modules_to_save=[5]), ART, (MANIFEST, "modules_to_save")),
    Case("task_type_unknown", fields(task_type="EVIL"), ART, (MANIFEST, "EVIL")),
    # relabelled
    Case("peft_type_lora", fields(peft_type="LORA"), ART, (MANIFEST, "'LORA'")),
    Case("peft_type_lora_task", fields(peft_type="LORA"), ART, (MANIFEST, "'LORA'"), "task"),
    Case("peft_type_unknown", fields(peft_type="NOPE"), ART, (MANIFEST, "'NOPE'")),
    Case("peft_type_number", fields(peft_type=5), ART, (MANIFEST, "5")),
    Case("peft_type_list", fields(peft_type=["SALORA"]), ART, (MANIFEST, "['SALORA']")),
    Case("peft_type_missing", text(lambda t: t.replace('"peft_type": "SALORA",', "")), ART, (MANIFEST, "peft_type None")),
    # pickles
    Case("pickle_instead", pickled(instead=True), ART, ("adapter_model.bin", "pickle")),
    Case("pickle_beside", pickled(instead=False), ART, ("adapter_model.bin", "pickle")),
    Case("pickle_pt", pickled(instead=False, name="adapter_model.pt"), ART, ("adapter_model.pt", "pickle")),
    Case("pickle_under_the_safe_name", all_of(pickled(instead=False, name=ADAPTER), tools.forge), ART, (ADAPTER,)),
    # the side file
    Case("subspace_missing", remove(SUBSPACE), ART, (SUBSPACE, "missing")),
    Case("subspace_truncated", truncate(SUBSPACE, 0.5), ART, (SUBSPACE, "sha256")),
    Case("subspace_truncated_and_signed", all_of(truncate(SUBSPACE, 0.5), tools.forge), ART, (SUBSPACE,)),
    Case("subspace_of_another_data_set", bases(lambda t: t.update(other(t, seed=5))), ART, (Q0.rpartition("layers")[0], "protected subspace")),
    Case("subspace_of_another_width", bases(put(U, lambda u: torch.linalg.qr(torch.randn(64, 8)).Q)), ART, (ADAPTER, Q0, "(64, 8)")),
    Case("u_not_orthonormal", bases(put(U, lambda u: u * 1.01)), SUB, (SUBSPACE, Q0, "(32, 8)", "orthonormal")),
    Case("u_all_zero", bases(put(U, torch.zeros_like)), SUB, (SUBSPACE, Q0, "(32, 8)", "orthonormal")),
    Case("u_with_equal_columns", bases(put(U, lambda u: u[:, :1].expand(-1, 8))), SUB, (SUBSPACE, Q0, "orthonormal")),
    Case("u_nan", bases(put(U, tools.poke(float("nan")))), SUB, (SUBSPACE, Q0, "NaN")),
    Case("u_of_rank_zero", bases(put(U, lambda u: u[:, :0])), SUB, (SUBSPACE, Q0, "(32, 0)")),
    Case("u_of_full_rank", bases(put(U, lambda u: torch.eye(32))), SUB, (SUBSPACE, Q0, "k = 32 directions of 32")),
    Case("u_wider_than_tall", bases(put(U, lambda u: torch.eye(32, 40))), SUB, (SUBSPACE, Q0, "k = 40")),
    Case("u_flat", bases(put(U, lambda u: u.flatten())), SUB, (SUBSPACE, Q0, "(256,)")),
    Case("u_in_half_precision", bases(put(U, lambda u: u.bfloat16())), SUB, (SUBSPACE, Q0, "BF16")),
    Case("layers_permuted", bases(tools.swap(U, f"basis.out.{Q1}")), ART, (ADAPTER, "q_proj", "protected subspace")),
    Case("basis_removed_for_one_module", bases(drop(U, f"spectrum.out.{Q0}", f"fingerprint.{Q0}")), ART, (ADAPTER, Q0, "13")),
    Case("basis_moved_to_the_other_side", bases(renamed(U, f"basis.in.{Q0}")), ART, (SUBSPACE, Q0, "'out'")),
    Case("fingerprint_removed", bases(drop(f"fingerprint.{Q0}")), ART, (SUBSPACE, Q0, "fingerprint")),
    Case("fingerprint_nan", bases(put(f"fingerprint.{Q0}", tools.poke(float("nan")))), SUB, (SUBSPACE, Q0, "fingerprint")),
    Case("fingerprint_of_one_value", bases(put(f"fingerprint.{Q0}", lambda f: f[:1])), SUB, (SUBSPACE, Q0, "(1,)")),
    Case("fingerprints_permuted", bases(tools.swap(f"fingerprint.{Q0}", f"fingerprint.{Q1}")), SUB, ("q_proj", "other base weights"), knows_base=True),
    Case("spectrum_of_another_rank", bases(put(f"spectrum.out.{Q0}", lambda s: s[:3])), SUB, (SUBSPACE, Q0, "(3,)")),
    Case("unknown_tensor_in_subspace", bases(lambda t: t.update({"basis.up.x": torch.ones(2)})), SUB, (SUBSPACE, "basis.up.x")),
    Case("not_a_subspace", bases(lambda t: None, something="else"), SUB, (SUBSPACE, "something")),
    Case("provenance_not_json", bases(lambda t: None, **{FORMAT: "{"}), ART, (SUBSPACE, "header")),
    Case("provenance_too_deep", bases(lambda t: None, **{FORMAT: '{"a":' * 40 + "1" + "}" * 40}), ART, (SUBSPACE, "header", "deep")),
    # the config's text
    Case("json_too_long", text(lambda t: t.replace('"task_data": null', f'"task_data": "{"x" * (1 << 20)}"')), ART, (MANIFEST, "1048576")),
    Case("json_too_deep", text(lambda t: t.replace('"task_data": null', '"task_data": ' + "[" * 50 + "]" * 50)), ART, (MANIFEST, "deep")),
    Case("json_far_too_deep", text(lambda t: t.replace('"task_data": null', '"task_data": ' + "[" * 90_000 + "]" * 90_000)), ART, (MANIFEST,)),
    Case("json_duplicate_key", text(lambda t: t.replace('"r": 4', '"r": 4, "r": 8')), ART, (MANIFEST, "'r'", "duplicate")),
    Case("json_truncated", truncate(MANIFEST, 0.5), ART, (MANIFEST, "JSON")),
    Case("json_almost_empty", truncate(MANIFEST, 0.002), ART, (MANIFEST, "JSON")),
    Case("json_array", write(MANIFEST, b'["SALORA"]'), ART, (MANIFEST, "object")),
    Case("json_not_utf8", write(MANIFEST, b'{"peft_type": "SALORA\xff"}'), ART, (MANIFEST, "JSON")),
    Case("json_escaped_type", text(lambda t: t.replace('"SALORA"', '"SAL\\u004fRA"').replace('"r": 4', '"r": 4, "r": 8')), ART, (MANIFEST, "duplicate")),
    Case("field_edited", text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": 17')), ART, (MANIFEST, "sha256")),
    # the record of files
    Case("no_record", fields(safety_artifact=None), ART, (MANIFEST, "safety_artifact")),
    Case("record_key_missing", text(lambda t: t.replace('"safety_artifact"', '"safety_artefact"')), ART, (MANIFEST, "safety_artifact")),
    Case("record_is_a_list", fields(safety_artifact=[1]), ART, (MANIFEST, "safety_artifact")),
    *(
        Case(f"file_name_{name!r}", record(files={name: "0" * 64}), ART, (MANIFEST, SUBSPACE))
        for name in ("../x", "/etc/passwd", "a\0b", f"../{SUBSPACE}", "x" * 5000)
    ),
    Case("subspace_named_outside", record(subspace=f"../{SUBSPACE}"), ART, (MANIFEST, SUBSPACE)),
    Case("hash_is_a_number", text(lambda t: re.sub(r'("safety_subspace.safetensors"): "[0-9a-f]{64}"', r"\1: 5", t)), ART, (MANIFEST, SUBSPACE)),
    Case("extra_tensors_is_a_string", record(extra_tensors="abc"), ART, (MANIFEST, "extra_tensors")),
    # files that are no files
    Case("adapter_missing", remove(ADAPTER), ART, (ADAPTER, "missing")),
    Case("adapter_truncated", truncate(ADAPTER, 0.9), ART, (ADAPTER, "sha256")),
    Case("adapter_truncated_and_signed", all_of(truncate(ADAPTER, 0.9), tools.forge), ART, (ADAPTER,)),
    Case("adapter_is_a_directory", all_of(remove(ADAPTER), lambda d: (d / ADAPTER).mkdir()), ART, (ADAPTER,)),
    Case("adapter_is_a_pipe", all_of(remove(ADAPTER), lambda d: os.mkfifo(d / ADAPTER)), ART, (ADAPTER,)),
    Case("header_claims_a_terabyte", header(f'{{"{B}":{{"dtype":"F32","shape":[268435456,1024],"data_offsets":[0,1099511627776]}}}}'), ART, (ADAPTER,)),
    Case("header_shape_overflows", header(f'{{"{B}":{{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}}}'), ART, (ADAPTER,)),
    Case("header_longer_than_the_file", header("{}", length=1 << 40), ART, (ADAPTER,)),
    *(Case(f"link_leaves_{name}", link(name), ART, (name, "symbolic link")) for name in (ADAPTER, SUBSPACE, MANIFEST)),
    # a good adapter, of something else
    Case("another_base_of_equal_shape", lambda d: None, SUB, ("other base weights", "limit"), "other_base", knows_base=True),
    Case("another_base_of_another_shape", lambda d: None, ART, ("64", "32", "the model has"), "wider_base", knows_base=True),
]


def other(content: Tensors, seed: int) -> Tensors:
    """Another set of bases for the same modules, everything else kept."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.linalg.qr(torch.randn(u.shape, generator=generator)).Q for key, u in content.items() if key.startswith("basis.")}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "lora": tools.save_good(root / "lora"),
        "task": tools.save_good(root / "task", init="task"),
        "other_base": tools.save_good(root / "other_base", base_seed=1),
        "wider_base": tools.save_good(root / "wider_base", hidden=64),
    }


@pytest.fixture
def copy(good: dict[str, Path], tmp_path: Path):
    return lambda name="lora": Path(shutil.copytree(good[name], tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refused(case: Case, call) -> None:
    start = time.thread_time()
    with pytest.raises(PeftSafetyError) as caught:
        call()
    seconds = time.thread_time() - start
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert len(message) < 2000, "an error message is not a dump of the input"
    for part in case.says:
        assert part in message, message
    assert any(remedy in message for remedy in REMEDIES), f"no remedy in: {message}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w.-]", "_", case.name)[:60])
def test_a_damaged_directory_is_refused_and_the_base_untouched(case: Case, base: nn.Module, copy, tmp_path: Path) -> None:
    directory = copy(case.good)
    case.damage(directory)
    with tools.unchanged(base):
        refused(case, lambda: PeftModel.from_pretrained(base, str(directory)))
    refused(case, lambda: verify(directory, model=base if case.knows_base else None))
    assert not (directory / "ran").exists(), "a pickle was opened"


def test_the_undamaged_directories_load_and_verify(copy, good: dict[str, Path]) -> None:
    for name in ("lora", "task"):
        report = verify(good[name], model=tiny_llama())
        assert (report.modules, report.ranks, report.protected, report.base_checked) == (14, (4,), (8,), True)
        model = PeftModel.from_pretrained(tiny_llama(), str(good[name]))
        assert not torch.equal(model(tools.tokens()).logits, tiny_llama()(tools.tokens()).logits)


def test_fields_that_change_nothing_may_be_edited(base: nn.Module, copy) -> None:
    directory = copy()
    config = tools.manifest(directory) | {"base_model_name_or_path": "somebody/model", "inference_mode": False, "revision": "main"}
    (directory / MANIFEST).write_text(tools.json.dumps(config))
    assert verify(directory, model=base).modules == 14


def test_without_a_manifest_nothing_loads(base: nn.Module, copy) -> None:
    directory = copy()
    (directory / MANIFEST).unlink()
    with tools.unchanged(base), pytest.raises(ValueError, match=MANIFEST):
        PeftModel.from_pretrained(base, str(directory))
    with pytest.raises(ArtifactError, match=MANIFEST):
        verify(directory)
    with pytest.raises(ArtifactError, match="not a directory"):
        verify(directory / "nowhere")


@pytest.mark.parametrize("name", [ADAPTER, SUBSPACE])
def test_a_flipped_bit_is_found_wherever_it_is(name: str, base: nn.Module, copy) -> None:
    directory = copy()
    intact = (directory / name).read_bytes()
    chooser = random.Random(0)
    for position in [0, 9, len(intact) - 1, *(chooser.randrange(len(intact)) for _ in range(12))]:
        flipped = bytearray(intact)
        flipped[position] ^= 1 << chooser.randrange(8)
        (directory / name).write_bytes(flipped)
        with pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
            verify(directory)
    with tools.unchanged(base), pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
        PeftModel.from_pretrained(base, str(directory))


def test_a_flipped_bit_of_the_config_changes_nothing_or_is_found(base: nn.Module, copy) -> None:
    directory = copy()
    expected = verify(directory)
    intact = (directory / MANIFEST).read_bytes()
    chooser = random.Random(0)
    found = 0
    for _ in range(60):
        flipped = bytearray(intact)
        flipped[chooser.randrange(len(intact))] ^= 1 << chooser.randrange(8)
        (directory / MANIFEST).write_bytes(flipped)
        try:
            assert verify(directory) == expected
        except PeftSafetyError:
            found += 1
    assert found > 30, "most flips hit a name, a value or a hash"


def test_a_broken_sub_adapter_is_refused_like_any_other(base: nn.Module, copy, tmp_path: Path) -> None:
    directory = copy()
    nested = Path(shutil.copytree(directory, tmp_path / "run" / "second"))
    tensors(leak)(nested)
    with tools.unchanged(base), pytest.raises(ArtifactError, match="protected subspace"):
        PeftModel.from_pretrained(base, str(tmp_path / "run"), subfolder="second")


def test_a_link_for_an_unfinished_save_moves_nothing(base: nn.Module, copy, tmp_path: Path) -> None:
    directory = copy()
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    (directory / ".commit").symlink_to(private)
    with tools.unchanged(base), pytest.raises(ArtifactError, match="symbolic link"):
        PeftModel.from_pretrained(base, str(directory))
    with pytest.raises(ArtifactError, match="symbolic link"):
        verify(directory)
    assert (private / "key").read_text() == "secret"


def test_links_of_the_hub_cache_are_followed(base: nn.Module, good: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (ADAPTER, SUBSPACE, MANIFEST):
        shutil.copy(good["lora"] / file, blobs / f"blob-{file}")
        (snapshot / file).symlink_to(blobs / f"blob-{file}")
    assert verify(snapshot, model=base).modules == 14


def test_only_libraries_of_transformers_are_named_for_import(copy) -> None:
    directory = copy()
    fields(auto_mapping={"base_model_class": "gravity", "parent_library": "antigravity"})(directory)
    config = PeftConfig.from_pretrained(str(directory))
    assert config.auto_mapping is None
    assert "antigravity" not in sys.modules


def test_a_config_saved_before_injection_round_trips(tmp_path: Path) -> None:
    from peft_safety import SaLoRAConfig

    SaLoRAConfig(r=8, target_modules=r".*\.(q|v)_proj").save_pretrained(str(tmp_path))
    again = SaLoRAConfig.from_pretrained(str(tmp_path))
    assert (again.r, again.target_modules, again.subspace) == (8, r".*\.(q|v)_proj", "auto")


WITHOUT_THE_PACKAGE = """
import sys, torch
from peft import PeftModel
from tests.tiny import tiny_llama
ids = torch.load(sys.argv[1], weights_only=True)
try:
    PeftModel.from_pretrained(tiny_llama(), sys.argv[2])
    print("loaded")
except KeyError as error:
    print("KeyError", error)
model = PeftModel.from_pretrained(tiny_llama(), sys.argv[3])
torch.save(model(ids).logits.detach(), sys.argv[4])
assert "peft_safety" not in sys.modules
"""


def test_without_the_package_it_fails_loudly_and_relabelled_it_is_still_constrained(copy, tmp_path: Path, good: dict[str, Path]) -> None:
    relabelled = copy()
    text(lambda t: t.replace('"SALORA"', '"LORA"'))(relabelled)
    ids, out = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(tools.tokens(), ids)
    arguments = [str(p) for p in (ids, good["lora"], relabelled, out)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_THE_PACKAGE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "KeyError 'SALORA'" in done.stdout
    with torch.no_grad():
        expected: Tensor = PeftModel.from_pretrained(tiny_llama(), str(good["lora"]))(tools.tokens()).logits
    assert torch.allclose(torch.load(out, weights_only=True), expected, atol=1e-6, rtol=0)


def test_a_subspace_from_the_pickle_of_a_stranger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "subspace.pt"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ArtifactError, match="pickle"):
        SafetySubspace.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_subspace_of_zero_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SUBSPACE
    save_file({}, path, metadata={FORMAT: "{}"})
    assert load_file(path) == {}
    with pytest.raises(SubspaceError, match="no basis"):
        SafetySubspace.load(tmp_path)

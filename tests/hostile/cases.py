"""What can be wrong with an adapter directory: the table behind `test_adapter_directory.py`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import torch

from peft_safety.core.subspace_file import FORMAT
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError, SubspaceError
from tests.hostile import tools
from tests.hostile.damages import (
    all_of,
    drop,
    header,
    leak,
    link,
    other,
    pickled,
    remove,
    renamed,
    smuggled,
    truncate,
    write,
)
from tests.hostile.tools import (
    ADAPTER,
    DOWN,
    MANIFEST,
    PREFIX,
    Q0,
    Q1,
    SUBSPACE,
    A,
    B,
    Damage,
    U,
    bases,
    fields,
    put,
    record,
    tensors,
    text,
)

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


ART, CONF, SUB = ArtifactError, ConfigError, SubspaceError
CASES = [
    # factors
    Case("nan_in_b", tensors(put(B, tools.poke(float("nan")))), ART, (ADAPTER, Q0, "lora_B", "(32, 4)", "NaN")),
    Case("inf_in_a", tensors(put(A, tools.poke(float("inf")))), ART, (ADAPTER, Q0, "lora_A", "(4, 32)", "Inf")),
    Case(
        "nan_in_initial",
        tensors(put(A.replace("weight", "initial"), tools.poke(float("nan")))),
        ART,
        (Q0, "lora_A.initial", "NaN"),
        "task",
    ),
    Case("factor_missing", tensors(drop(B)), ART, (ADAPTER, Q0, "lora_B.weight")),
    Case("module_missing", tensors(drop(A, B)), ART, (ADAPTER, Q0, "13 modules", "14")),
    Case(
        "initial_missing", tensors(drop(A.replace("weight", "initial"))), ART, (ADAPTER, Q0, "lora_A.initial"), "task"
    ),
    Case(
        "initial_too_many",
        tensors(lambda t: t.update({A.replace("weight", "initial"): t[A].clone()})),
        ART,
        (ADAPTER, Q0, "lora_A.initial"),
    ),
    Case("init_relabeled", fields(init="lora"), ART, (ADAPTER, "lora_A.initial"), "task"),
    Case(
        "unknown_tensor",
        tensors(lambda t: t.update({"base_model.model.foo.weight": torch.ones(2)})),
        ART,
        (ADAPTER, "foo.weight"),
    ),
    Case(
        "unknown_factor_listed",
        tensors(renamed(B, B.replace("lora_B", "lora_C")), listed=(B.replace("lora_B", "lora_C"),)),
        ART,
        (ADAPTER, Q0),
    ),
    Case(
        "adapter_name_in_key",
        tensors(renamed(B, f"{PREFIX}{Q0}.lora_B.default.weight")),
        ART,
        (ADAPTER, "lora_B.default.weight"),
    ),
    Case("key_without_prefix", tensors(renamed(B, B.removeprefix(PREFIX))), ART, (ADAPTER, Q0)),
    Case("base_weight_smuggled_under_a_target", smuggled(f"{DOWN}.base_layer.weight"), ART, (DOWN, "(32, 64)")),
    Case("base_weight_smuggled_as_a_target", smuggled(f"{DOWN}.weight"), ART, (f"{DOWN}.weight", "unknown tensor")),
    Case(
        "base_weight_smuggled_beside_targets",
        smuggled("model.norm.weight"),
        ART,
        ("model.norm.weight", "(32,)"),
        knows_base=True,
    ),
    Case("no_tensors_at_all", tensors(lambda t: t.clear()), ART, (ADAPTER, "0 modules")),
    Case("empty_file", all_of(write(ADAPTER, b""), tools.forge), ART, (ADAPTER,)),
    Case(
        "too_wide_factor",
        tensors(put(A, lambda x: torch.cat([x, x], 1))),
        ART,
        (Q0, "32 x 64", "(32, 32)"),
        knows_base=True,
    ),
    Case("too_long_factor", tensors(put(B, lambda x: torch.cat([x, x]))), ART, (ADAPTER, Q0, "(64, 4)", "(32, 8)")),
    Case("transposed_factor", tensors(put(B, lambda x: x.T)), ART, (ADAPTER, Q0, "(4, 32)")),
    Case("flat_factor", tensors(put(B, lambda x: x.flatten())), ART, (ADAPTER, Q0, "(128,)")),
    Case(
        "scalar_factors", tensors(lambda t: t.update({A: torch.ones(()), B: torch.ones(())})), ART, (ADAPTER, Q0, "()")
    ),
    Case(
        "zero_size_factors",
        tensors(lambda t: t.update({A: torch.ones(0, 32), B: torch.ones(32, 0)})),
        ART,
        (ADAPTER, Q0, "(0, 32)"),
    ),
    Case("integer_factor", tensors(put(B, lambda x: x.to(torch.int32))), ART, (ADAPTER, Q0, "I32")),
    Case("double_factor", tensors(put(B, lambda x: x.double())), ART, (ADAPTER, Q0, "F64")),
    Case("another_rank", fields(r=8), ART, (ADAPTER, Q0.rpartition("layers")[0], "rank 8")),
    Case("leaking_b", tensors(leak), ART, (ADAPTER, Q0, "lora_B.weight", "protected subspace")),
    Case(
        "leaking_initial",
        tensors(put(B.replace("weight", "initial"), lambda x: x + 0.1)),
        ART,
        (Q0, "lora_B.initial"),
        "task",
    ),
    # numbers
    *(
        Case(f"alpha_{value!r}", fields(lora_alpha=value), CONF, (MANIFEST, f"lora_alpha={value!r}"))
        for value in (-16, 0, 1e30, "16", True, None, [1])
    ),
    *(
        Case(f"rank_{value!r}", fields(r=value), CONF, (MANIFEST, f"r={value!r}"))
        for value in (-4, 0, 2_000_000, "4", True, 4.0, None)
    ),
    *(
        Case(f"dropout_{value!r}", fields(lora_dropout=value), CONF, (MANIFEST, "lora_dropout"))
        for value in (-0.1, 1.0, "0.1")
    ),
    Case(
        "alpha_is_a_nan_literal",
        text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": NaN')),
        ART,
        (MANIFEST, "NaN"),
    ),
    Case(
        "alpha_overflows",
        text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": 1e999')),
        ART,
        (MANIFEST, "1e999"),
    ),
    Case(
        "alpha_pattern_nan",
        text(lambda t: t.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"{Q0}": NaN}}')),
        ART,
        (MANIFEST, "NaN"),
    ),
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
    Case(
        "a_hundred_thousand_patterns",
        fields(alpha_pattern={f"m{i}": 1 for i in range(60_000)}),
        ART,
        (MANIFEST, "alpha_pattern"),
    ),
    # features that would bypass the projection
    Case("dora", fields(use_dora=True), CONF, ("use_dora",)),
    Case("bias_of_b", fields(lora_bias=True), CONF, ("lora_bias",)),
    Case("base_biases", fields(bias="all"), CONF, ("bias='all'",)),
    Case("rewriting_init", fields(init_lora_weights="pissa"), CONF, ("init_lora_weights='pissa'",)),
    Case("replicated_layers", fields(layer_replication=[[0, 2], [0, 2]]), CONF, ("layer_replication",)),
    Case(
        "modules_to_save_without_tensors",
        fields(modules_to_save=["lm_head"]),
        ART,
        ("lm_head.weight", "missing"),
        knows_base=True,
    ),
    Case("modules_to_save_is_a_number", fields(modules_to_save=[5]), ART, (MANIFEST, "modules_to_save")),
    Case("task_type_unknown", fields(task_type="EVIL"), ART, (MANIFEST, "EVIL")),
    # relabeled
    Case("peft_type_lora", fields(peft_type="LORA"), ART, (MANIFEST, "'LORA'")),
    Case("peft_type_lora_task", fields(peft_type="LORA"), ART, (MANIFEST, "'LORA'"), "task"),
    Case("peft_type_unknown", fields(peft_type="NOPE"), ART, (MANIFEST, "'NOPE'")),
    Case("peft_type_number", fields(peft_type=5), ART, (MANIFEST, "5")),
    Case("peft_type_list", fields(peft_type=["SALORA"]), ART, (MANIFEST, "['SALORA']")),
    Case(
        "peft_type_missing", text(lambda t: t.replace('"peft_type": "SALORA",', "")), ART, (MANIFEST, "peft_type None")
    ),
    # pickles
    Case("pickle_instead", pickled(instead=True), ART, ("adapter_model.bin", "pickle")),
    Case("pickle_beside", pickled(instead=False), ART, ("adapter_model.bin", "pickle")),
    Case("pickle_pt", pickled(instead=False, name="adapter_model.pt"), ART, ("adapter_model.pt", "pickle")),
    Case("pickle_under_the_safe_name", all_of(pickled(instead=False, name=ADAPTER), tools.forge), ART, (ADAPTER,)),
    # the side file
    Case("subspace_missing", remove(SUBSPACE), ART, (SUBSPACE, "missing")),
    Case("subspace_truncated", truncate(SUBSPACE, 0.5), ART, (SUBSPACE, "sha256")),
    Case("subspace_truncated_and_signed", all_of(truncate(SUBSPACE, 0.5), tools.forge), ART, (SUBSPACE,)),
    Case(
        "subspace_of_another_data_set",
        bases(lambda t: t.update(other(t, seed=5))),
        ART,
        (Q0.rpartition("layers")[0], "protected subspace"),
    ),
    Case(
        "subspace_of_another_width",
        bases(put(U, lambda u: torch.linalg.qr(torch.randn(64, 8)).Q)),
        ART,
        (ADAPTER, Q0, "(64, 8)"),
    ),
    Case("u_not_orthonormal", bases(put(U, lambda u: u * 1.01)), SUB, (SUBSPACE, Q0, "(32, 8)", "orthonormal")),
    Case("u_all_zero", bases(put(U, torch.zeros_like)), SUB, (SUBSPACE, Q0, "(32, 8)", "orthonormal")),
    Case("u_with_equal_columns", bases(put(U, lambda u: u[:, :1].expand(-1, 8))), SUB, (SUBSPACE, Q0, "orthonormal")),
    Case("u_nan", bases(put(U, tools.poke(float("nan")))), SUB, (SUBSPACE, Q0, "NaN")),
    Case("u_of_rank_zero", bases(put(U, lambda u: u[:, :0])), SUB, (SUBSPACE, Q0, "(32, 0)")),
    Case("u_of_full_rank", bases(put(U, lambda u: torch.eye(32))), SUB, (SUBSPACE, Q0, "k = 32 directions of 32")),
    Case("u_wider_than_tall", bases(put(U, lambda u: torch.eye(32, 40))), SUB, (SUBSPACE, Q0, "k = 40")),
    Case("u_flat", bases(put(U, lambda u: u.flatten())), SUB, (SUBSPACE, Q0, "(256,)")),
    Case("u_in_fp64", bases(put(U, lambda u: u.double())), SUB, (SUBSPACE, Q0, "F64")),
    Case("u_rounded_afterwards", bases(put(U, lambda u: u.bfloat16())), ART, (ADAPTER, Q0, "protected subspace")),
    Case("layers_permuted", bases(tools.swap(U, f"basis.out.{Q1}")), ART, (ADAPTER, "q_proj", "protected subspace")),
    Case(
        "basis_removed_for_one_module",
        bases(drop(U, f"spectrum.out.{Q0}", f"fingerprint.{Q0}")),
        ART,
        (ADAPTER, Q0, "13"),
    ),
    Case("basis_moved_to_the_other_side", bases(renamed(U, f"basis.in.{Q0}")), ART, (SUBSPACE, Q0, "'out'")),
    Case("fingerprint_removed", bases(drop(f"fingerprint.{Q0}")), ART, (SUBSPACE, Q0, "fingerprint")),
    Case(
        "fingerprint_nan",
        bases(put(f"fingerprint.{Q0}", tools.poke(float("nan")))),
        SUB,
        (SUBSPACE, Q0, "fingerprint"),
    ),
    Case("fingerprint_of_one_value", bases(put(f"fingerprint.{Q0}", lambda f: f[:1])), SUB, (SUBSPACE, Q0, "(1,)")),
    Case(
        "fingerprints_permuted",
        bases(tools.swap(f"fingerprint.{Q0}", f"fingerprint.{Q1}")),
        SUB,
        ("q_proj", "other base weights"),
        knows_base=True,
    ),
    Case("spectrum_of_another_rank", bases(put(f"spectrum.out.{Q0}", lambda s: s[:3])), SUB, (SUBSPACE, Q0, "(3,)")),
    Case(
        "unknown_tensor_in_subspace",
        bases(lambda t: t.update({"basis.up.x": torch.ones(2)})),
        SUB,
        (SUBSPACE, "basis.up.x"),
    ),
    Case("not_a_subspace", bases(lambda t: None, something="else"), SUB, (SUBSPACE, "something")),
    Case("provenance_not_json", bases(lambda t: None, **{FORMAT: "{"}), ART, (SUBSPACE, "header")),
    Case(
        "provenance_too_deep",
        bases(lambda t: None, **{FORMAT: '{"a":' * 40 + "1" + "}" * 40}),
        ART,
        (SUBSPACE, "header", "deep"),
    ),
    # the config's text
    Case(
        "json_too_long",
        text(lambda t: t.replace('"task_data": null', f'"task_data": "{"x" * (1 << 24)}"')),
        ART,
        (MANIFEST, "16777216"),
    ),
    Case(
        "json_too_deep",
        text(lambda t: t.replace('"task_data": null', '"task_data": ' + "[" * 50 + "]" * 50)),
        ART,
        (MANIFEST, "deep"),
    ),
    Case(
        "json_far_too_deep",
        text(lambda t: t.replace('"task_data": null', '"task_data": ' + "[" * 90_000 + "]" * 90_000)),
        ART,
        (MANIFEST,),
    ),
    Case(
        "json_duplicate_key",
        text(lambda t: t.replace('"r": 4', '"r": 4, "r": 8')),
        ART,
        (MANIFEST, "'r'", "duplicate"),
    ),
    Case("json_truncated", truncate(MANIFEST, 0.5), ART, (MANIFEST, "JSON")),
    Case("json_almost_empty", truncate(MANIFEST, 0.002), ART, (MANIFEST, "JSON")),
    Case("json_array", write(MANIFEST, b'["SALORA"]'), ART, (MANIFEST, "object")),
    Case("json_not_utf8", write(MANIFEST, b'{"peft_type": "SALORA\xff"}'), ART, (MANIFEST, "JSON")),
    Case(
        "json_escaped_type",
        text(lambda t: t.replace('"SALORA"', '"SAL\\u004fRA"').replace('"r": 4', '"r": 4, "r": 8')),
        ART,
        (MANIFEST, "duplicate"),
    ),
    Case("field_edited", text(lambda t: t.replace('"lora_alpha": 16', '"lora_alpha": 17')), ART, (MANIFEST, "sha256")),
    # the record of files
    Case("no_record", fields(safety_artifact=None), ART, (MANIFEST, "safety_artifact")),
    Case(
        "record_key_missing",
        text(lambda t: t.replace('"safety_artifact"', '"safety_artefact"')),
        ART,
        (MANIFEST, "safety_artifact"),
    ),
    Case("record_is_a_list", fields(safety_artifact=[1]), ART, (MANIFEST, "safety_artifact")),
    *(
        Case(f"file_name_{name!r}", record(files={name: "0" * 64}), ART, (MANIFEST, SUBSPACE))
        for name in ("../x", "/etc/passwd", "a\0b", f"../{SUBSPACE}", "x" * 5000)
    ),
    Case("subspace_named_outside", record(subspace=f"../{SUBSPACE}"), ART, (MANIFEST, SUBSPACE)),
    Case(
        "hash_is_a_number",
        text(lambda t: re.sub(r'("safety_subspace.safetensors"): "[0-9a-f]{64}"', r"\1: 5", t)),
        ART,
        (MANIFEST, SUBSPACE),
    ),
    Case("extra_tensors_is_a_string", record(extra_tensors="abc"), ART, (MANIFEST, "extra_tensors")),
    # files that are no files
    Case("adapter_missing", remove(ADAPTER), ART, (ADAPTER, "missing")),
    Case("adapter_truncated", truncate(ADAPTER, 0.9), ART, (ADAPTER, "sha256")),
    Case("adapter_truncated_and_signed", all_of(truncate(ADAPTER, 0.9), tools.forge), ART, (ADAPTER,)),
    Case("adapter_is_a_directory", all_of(remove(ADAPTER), lambda d: (d / ADAPTER).mkdir()), ART, (ADAPTER,)),
    Case("adapter_is_a_pipe", all_of(remove(ADAPTER), lambda d: os.mkfifo(d / ADAPTER)), ART, (ADAPTER,)),
    Case(
        "header_claims_a_terabyte",
        header(f'{{"{B}":{{"dtype":"F32","shape":[268435456,1024],"data_offsets":[0,1099511627776]}}}}'),
        ART,
        (ADAPTER,),
    ),
    Case(
        "header_shape_overflows",
        header(f'{{"{B}":{{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}}}'),
        ART,
        (ADAPTER,),
    ),
    Case("header_longer_than_the_file", header("{}", length=1 << 40), ART, (ADAPTER,)),
    *(Case(f"link_leaves_{name}", link(name), ART, (name, "symbolic link")) for name in (ADAPTER, SUBSPACE, MANIFEST)),
    # a good adapter, of something else
    Case(
        "another_base_of_equal_shape",
        lambda d: None,
        SUB,
        ("other base weights", "limit"),
        "other_base",
        knows_base=True,
    ),
    Case(
        "another_base_of_another_shape",
        lambda d: None,
        ART,
        ("64", "32", "the model has"),
        "wider_base",
        knows_base=True,
    ),
]

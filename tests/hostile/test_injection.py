"""What cannot be protected or calibrated is refused when the adapter is made: a typed error, and the model is as it
was.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_safety import SafetySubspace, SaLoRAConfig, export_lora
from peft_safety.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    DataError,
    SubspaceError,
)
from tests.hostile import tools
from tests.hostile.injecting import inject, refused
from tests.hostile.tools import Q0
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("quiet")]
NAN = float("nan")


def batch(ids: Tensor, labels: Tensor | None = None) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids if labels is None else labels}]


def with_nan(name: str, everywhere: bool = False) -> nn.Module:
    model = tiny_llama()
    weight = model.get_submodule(name).weight.data
    weight.view(-1)[slice(None) if everywhere else slice(1)] = NAN
    return model


# --- calibration
# ---

IDS = tools.tokens(batch=4)
CALIBRATIONS = {
    "rank_of_a_whole_layer": (dict(rank=32), ConfigError, ("32 output features", Q0)),
    "rank_of_the_narrowest_layer": (dict(rank=16), ConfigError, ("rank=16", "k_proj", "16 x 32")),
    "rank_zero": (dict(rank=0), ConfigError, ("rank=0", Q0)),
    "rank_negative": (dict(rank=-1), ConfigError, ("rank=-1",)),
    "rank_text": (dict(rank="8"), ConfigError, ("rank='8'",)),
    "rank_float": (dict(rank=8.0), ConfigError, ("rank=8.0",)),
    "rank_bool": (dict(rank=True), ConfigError, ("rank=True",)),
    "method_unknown": (dict(method="magic"), ConfigError, ("magic", "salora")),
    "no_module_matched": (dict(target_modules=["nope"]), ConfigError, ("nope", "q_proj")),
    "target_is_no_expression": (dict(target_modules="(("), ConfigError, ("'(('",)),
    "fewer_tokens_than_rank": (dict(data=batch(IDS[:1, :7])), CalibrationError, ("7 labeled tokens", "rank=8")),
    "no_position_labeled": (
        dict(data=batch(IDS, torch.full_like(IDS, -100))),
        CalibrationError,
        ("0 labeled tokens",),
    ),
    "no_position_attended": (
        dict(data=[{**batch(IDS)[0], "attention_mask": torch.zeros_like(IDS)}]),
        CalibrationError,
        ("0 labeled tokens",),
    ),
    "one_token_repeated": (
        dict(data=batch(torch.full((4, 12), 7)), rank=4),
        CalibrationError,
        ("directions only", "rank=4"),
    ),
    "two_tokens_repeated": (
        dict(data=batch(torch.tensor([[7, 9] * 6] * 4)), rank=4, target_modules=[Q0]),
        CalibrationError,
        ("span 2",),
    ),
    "no_data": (dict(data=[]), CalibrationError, ("no calibration data",)),
    "data_is_none": (dict(data=None), CalibrationError, ("NoneType",)),
    "data_is_text": (dict(data="abc"), CalibrationError, ("str",)),
    "data_is_one_batch": (dict(data=batch(IDS)[0]), CalibrationError, ("dict",)),
    "data_is_a_generator": (dict(data=iter(batch(IDS))), CalibrationError, ("iterator",)),
    "data_is_numbers": (dict(data=[1, 2]), CalibrationError, ("rows",)),
    "batch_without_rows": (dict(data=batch(IDS[:0])), CalibrationError, ("batch 0",)),
    "batch_without_tokens": (dict(data=batch(IDS[:, :0])), CalibrationError, ("batch 0",)),
    "batch_without_labels": (dict(data=[{"input_ids": IDS}]), CalibrationError, ("0 labeled tokens", "rank=8")),
    "labels_of_another_shape": (dict(data=batch(IDS, IDS[:, 1:])), CalibrationError, ("batch 0", "one shape")),
    "text_without_tokenizer": (dict(data=[{"prompt": "a", "response": "b"}]), CalibrationError, ("tokenizer",)),
    "rows_of_unknown_fields": (dict(data=[{"foo": "a"}], tokenizer=tiny_tokenizer()), DataError, ("foo",)),
    "row_without_response": (
        dict(data=[{"prompt": "a", "response": ""}], tokenizer=tiny_tokenizer()),
        DataError,
        ("row 0",),
    ),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_that_cannot_work_is_refused(name: str, base: nn.Module) -> None:
    options, error, says = CALIBRATIONS[name]
    options = {"data": batch(IDS), "rank": 8, "target_modules": "all-linear", "progress": False} | options
    refused(base, lambda: SafetySubspace.from_activations(base, **options), error, *says)


def test_a_model_with_nan_activations_is_refused() -> None:
    model = with_nan("model.embed_tokens", everywhere=True)
    with pytest.raises(CalibrationError, match=r"q_proj: its inputs hold NaN or Inf\. Load"):
        tools.subspace(model)


def test_a_layer_that_gives_fewer_directions_than_asked_is_refused() -> None:
    model = tiny_llama()
    model.get_submodule(tools.DOWN).weight.data[3:] = 0
    refused(model, lambda: tools.subspace(model), CalibrationError, tools.DOWN, "span 3 directions", "rank=8")


def test_calibrating_leaves_a_partly_training_model_as_it_is(base: nn.Module) -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    with tools.unchanged(model):
        tools.subspace(model)


# --- configs
# ---

CONFIGS = {
    "dora": (dict(use_dora=True), "use_dora"),
    "bias_of_b": (dict(lora_bias=True), "lora_bias"),
    "base_biases": (dict(bias="all"), "bias='all'"),
    "lora_biases": (dict(bias="lora_only"), "bias='lora_only'"),
    **{
        f"init_{init}": (dict(init_lora_weights=init), init)
        for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", "lora_ga")
    },
    "moe_parameters": (dict(target_parameters=["experts.gate_up_proj"]), "target_parameters"),
    "layer_replication": (dict(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "megatron": (dict(megatron_config={"tensor_model_parallel_size": 2}), "megatron_config"),
    "init_unknown": (dict(init="magic"), "init='magic'"),
    "task_without_data": (dict(init="task"), "task_data"),
    "task_data_is_a_number": (dict(init="task", task_data=5), "task_data"),
    "task_rank_zero": (dict(task_rank=0), "task_rank=0"),
    "safety_rank_zero": (dict(safety_rank=0), "safety_rank=0"),
    "safety_rank_text": (dict(safety_rank="8"), "safety_rank='8'"),
    **{f"r_{r!r}": (dict(r=r), f"r={r!r}") for r in (0, -1, "4", 2.5, True, None, 2_000_000)},
    **{
        f"alpha_{alpha!r}": (dict(lora_alpha=alpha), f"lora_alpha={alpha!r}")
        for alpha in (0, -1, NAN, float("inf"), 1e30, "16", True)
    },
    **{f"dropout_{p!r}": (dict(lora_dropout=p), f"lora_dropout={p!r}") for p in (-0.1, 1.0, NAN, "0.1")},
    "rank_pattern_zero": (dict(rank_pattern={"q_proj": 0}), "q_proj"),
    "alpha_pattern_nan": (dict(alpha_pattern={"q_proj": NAN}), "q_proj"),
    "no_module_matched": (dict(target_modules=["nope"]), "nope"),
    "no_expression_matched": (dict(target_modules=r"nope\..*"), "nope"),
    "auto_without_a_tokenizer": (dict(subspace="auto"), "tokenizer"),
    **{f"subspace_{type(s).__name__}": (dict(subspace=s), type(s).__name__) for s in (5, None, b"x", {"a": 1}, ["x"])},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_protected_is_refused(name: str, base: nn.Module, space: SafetySubspace) -> None:
    options, says = CONFIGS[name]
    options = {"r": 4, "subspace": space, "target_modules": "all-linear"} | options
    refused(base, lambda: get_peft_model(base, SaLoRAConfig(**options)), ConfigError, says)


@pytest.mark.parametrize(
    ("field", "cls"), [("kasa_config", "KasaConfig"), ("use_bdlora", "BdLoraConfig"), ("arrow_config", "ArrowConfig")]
)
def test_a_variant_of_lora_is_refused(field: str, cls: str, base: nn.Module, space: SafetySubspace) -> None:
    module = importlib.import_module("peft.tuners.lora.config")
    if not hasattr(module, cls) or field not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"this PEFT has no {cls}")
    options = {field: getattr(module, cls)()}
    refused(
        base,
        lambda: get_peft_model(base, SaLoRAConfig(subspace=space, target_modules="all-linear", **options)),
        ConfigError,
        field,
    )


def test_a_subspace_of_another_model_is_refused(base: nn.Module) -> None:
    refused(
        base,
        lambda: inject(base, tools.subspace(tiny_llama(1))),
        SubspaceError,
        "_proj",
        "other base weights",
        "limit 0.01",
    )


def test_a_subspace_of_another_width_is_refused(base: nn.Module) -> None:
    refused(
        base,
        lambda: inject(base, tools.subspace(tiny_llama(hidden=64))),
        SubspaceError,
        Q0,
        "(64, 8)",
        "32 output features",
    )


def test_a_subspace_of_fewer_modules_is_refused(base: nn.Module, space: SafetySubspace) -> None:
    refused(base, lambda: inject(base, space.restricted([Q0])), SubspaceError, "k_proj", "no 'out' basis", Q0)
    refused(
        base,
        lambda: inject(base, space, target_modules=["q_proj", "lm_head"]),
        SubspaceError,
        "lm_head",
        "no 'out' basis",
    )


def test_a_subspace_of_the_other_side_is_refused(base: nn.Module, space: SafetySubspace) -> None:
    square = {name: {"in": sides["out"]} for name, sides in space.bases.items() if "q_proj" in name}
    refused(
        base,
        lambda: inject(base, SafetySubspace(square), target_modules=["q_proj"]),
        SubspaceError,
        "q_proj",
        "no 'out' basis",
    )


def test_a_base_with_nan_weights_is_refused(space: SafetySubspace) -> None:
    model = with_nan(Q0)
    with pytest.raises(SubspaceError, match=r"q_proj: .*NaN"):
        inject(model, space)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "path", ["/no/such/directory", "./nowhere", "nowhere.safetensors", "a/b/c", "~/nothing", "\0"]
)
def test_a_subspace_that_is_not_there_is_refused(path: str, base: nn.Module) -> None:
    refused(base, lambda: inject(base, path), SubspaceError, repr(path))


def test_a_directory_without_a_subspace_is_refused(base: nn.Module, tmp_path: Path) -> None:
    refused(base, lambda: inject(base, tmp_path), ArtifactError, "safety_subspace.safetensors", "missing")


def test_a_task_subspace_of_other_modules_is_refused(base: nn.Module, space: SafetySubspace) -> None:
    refused(
        base,
        lambda: inject(base, space, init="task", task_data=space.restricted([Q0])),
        SubspaceError,
        "no 'out' basis",
    )


def bad_bases() -> dict[str, tuple[Any, str]]:
    u = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))).Q
    return {
        "none": ({}, "no basis"),
        "of_a_module": ({"a": {"out": u}, "b": {}}, "no basis"),
        "list": ({"a": {"out": u.tolist()}}, "a: a list"),
        "side": ({"a": {"up": u}}, "side 'up'"),
        "scaled": ({"a": {"out": 2 * u}}, "not orthonormal"),
        "zero": ({"a": {"out": 0 * u}}, "not orthonormal"),
        "nan": ({"a": {"out": u * NAN}}, "NaN"),
        "square": ({"a": {"out": torch.eye(4)}}, "k = 4 directions of 4"),
        "one_feature": ({"a": {"out": torch.ones(1, 1)}}, "k = 1 directions of 1"),
        "empty": ({"a": {"out": u[:, :0]}}, "(16, 0)"),
        "vector": ({"a": {"out": u[:, 0]}}, "(16,)"),
    }


@pytest.mark.parametrize("name", bad_bases())
def test_a_basis_that_protects_nothing_or_everything_is_refused(name: str) -> None:
    bases, says = bad_bases()[name]
    with pytest.raises(SubspaceError) as caught:
        SafetySubspace(bases)
    assert says in str(caught.value)


def test_a_subspace_with_more_sides_than_the_method_needs_serves_it(space: SafetySubspace, tmp_path: Path) -> None:
    """One subspace serves several methods: what constrains the inputs is of no concern to SaLoRA, at save, load and
    export.
    """
    inputs = {name: torch.linalg.qr(torch.randn(64 if "down" in name else 32, 4)).Q for name in space.module_names}
    both = SafetySubspace(
        {name: {**space.bases[name], "in": inputs[name]} for name in space.module_names}, None, space.fingerprints
    )
    model = tools.trained(tiny_llama(), both)
    model.save_pretrained(str(tmp_path / "native"))
    export_lora(model, tmp_path / "plain")
    expected = model(tools.tokens()).logits
    assert torch.equal(
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "native"))(tools.tokens()).logits, expected
    )
    assert torch.allclose(
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain"))(tools.tokens()).logits, expected, atol=1e-5
    )

"""The fused path of a frozen `lora_A`: the numbers of PEFT's path, nothing kept of x, and one product for layers with
one input.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from peft_safety import SaLoRAConfig, explain_dispatch, ops
from peft_safety.errors import ConfigError
from peft_safety.registry import fused
from peft_safety.registry.one_input import SKINNY_ROWS
from tests.peft import cells
from tests.peft.frozen_cells import frozen
from tests.peft.fused_cells import protected, quantized

ROWS = 16
"""Of the batches: so many tokens that layers with one input share a product."""


def run(model: Any, **options: Any) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = cells.tokens(rows=ROWS)
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert abs(found[0] - wanted[0]) <= 1e-5
    assert found[1].keys() == wanted[1].keys()
    assert all("lora_B" in name for name in found[1])
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def model_of(**options: Any) -> Any:
    """Trained a little, so that B is not zero."""
    return cells.perturb(frozen(cells.WIDE, **options)).train()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of A in the calls of `lora_z`."""
    found: list[tuple[int, ...]] = []
    original = ops.lora_z

    def recorded(x: Tensor, a: Tensor) -> Tensor:
        found.append(tuple(a.shape))
        return original(x, a)

    monkeypatch.setattr(ops, "lora_z", recorded)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_gradients_are_those_of_pefts_path(
    dropout: float, taken: list[bool], products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(lora_dropout=dropout)
    taken.clear()  # of the calibration, without adapters
    found = run(model)
    assert taken
    assert all(taken)
    together = [shape for shape in products if shape[0] > min(shape[0] for shape in products)]
    assert bool(together) == (not dropout), "each layer has a mask of its own"
    monkeypatch.setenv(fused.SWITCH, "0")
    compare(found, run(model_of(lora_dropout=dropout)))


def test_one_product_for_layers_with_one_input(reference: None, products: list[Any]) -> None:
    model = model_of()
    layers = [name for name, _ in cells.layers_of(model)]
    groups = {name.rpartition(".")[0] for name in layers if name.endswith(("q_proj", "k_proj", "v_proj"))}
    members = [name for name in layers if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len(members) > len(groups) > 0
    run(model)
    assert len(products) == len(layers) - len(members) + len(groups)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_one_product_for_them_too(copied: Any, reference: None, products: list[Any]) -> None:
    model = model_of()
    run(model)
    of_model = list(products)
    products.clear()
    other = copied(model)
    del model
    gc.collect()
    run(other)
    assert products == of_model


def test_each_layer_makes_one_plan(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, planned, original = model_of(), [], fused.plan
    monkeypatch.setattr(fused, "plan", lambda layer: planned.append(layer) or original(layer))
    run(model)
    layers = [layer for _, layer in cells.layers_of(model)]
    assert len(planned) == len(layers)
    assert set(planned) == set(layers)


@pytest.mark.parametrize("what", ["disabled", "another adapter", "merged", "hooked"])
def test_a_layer_that_takes_another_path_has_no_part(what: str, reference: None, products: list[Any]) -> None:
    """Or nobody takes it: its numbers are those of PEFT's path, and the others' too."""
    model = model_of()
    table = dict(cells.layers_of(model))
    first = next(name for name in table if name.endswith("q_proj"))
    q, v = table[first], table[first.replace("q_proj", "v_proj")]
    if what == "disabled":
        v.enable_adapters(False)
    elif what == "another adapter":
        model.add_adapter("other", LoraConfig(r=4, target_modules=["v_proj"]))
        v.set_adapter("other")
    elif what == "merged":
        v.merged_adapters.append("default")
    else:
        v.lora_A["default"].register_forward_hook(lambda *given: None)
    x = torch.randn(100, q.in_features)
    found = [layer(x) for layer in (q, v)]
    rank = len(q.lora_A["default"].weight)
    assert products == [(rank * (2 if what == "hooked" else 1), q.in_features)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, "0")
        for layer, y in zip((q, v), found, strict=True):
            torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [SKINNY_ROWS, SKINNY_ROWS + 1])
def test_no_part_is_left_for_a_layer_on_pefts_path(rows: int, taken: list[bool], products: list[Any]) -> None:
    """Of two layers with one input, one learns and one does not."""
    model = model_of()
    table = dict(cells.layers_of(model))
    first = next(name for name in table if name.endswith("q_proj"))
    q, v = table[first], table[first.replace("q_proj", "v_proj")]
    v.lora_B["default"].requires_grad_(False)
    x = torch.randn(rows, q.in_features)
    taken.clear()
    found = [layer(x) for layer in (q, v)]
    few, rank = rows <= SKINNY_ROWS, len(q.lora_A["default"].weight)
    assert taken == [True, not few]
    assert products == [(rank if few else 2 * rank, q.in_features)]
    assert not vars(x).get("_peft_safety_z"), "taken, or never left"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, "0")
        for layer, y in zip((q, v), found, strict=True):
            torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


def test_layers_that_compute_in_other_dtypes_do_not_share(reference: None, products: list[Any]) -> None:
    """A sum of bf16 inputs is another one."""
    model = model_of()
    table = dict(cells.layers_of(model))
    first = next(name for name in table if name.endswith("q_proj"))
    q, v = table[first], table[first.replace("q_proj", "v_proj")]
    v.get_base_layer().compute_dtype = torch.bfloat16
    x = torch.randn(100, q.in_features)
    for layer in (q, v):
        layer(x)
    assert products == [(len(q.lora_A["default"].weight), q.in_features)] * 2


@pytest.mark.parametrize(
    "what", ["another tensor", "written in place", "without gradients", "its A was written", "its A has other data"]
)
def test_a_part_of_another_input_is_not_taken(what: str, reference: None, products: list[Any]) -> None:
    model = model_of()
    table = dict(cells.layers_of(model))
    first = next(name for name in table if name.endswith("q_proj"))
    q, v = table[first], table[first.replace("q_proj", "v_proj")]
    x = torch.randn(100, q.in_features)
    other = x
    q(x)
    if what == "another tensor":
        other = x.clone() * 2
    elif what == "written in place":
        x.mul_(2)
    elif what == "its A was written":
        with torch.no_grad():
            v.lora_A["default"].weight.mul_(2)
    elif what == "its A has other data":
        v.lora_A["default"].weight.data = v.lora_A["default"].weight.data * 2
    with torch.set_grad_enabled(what != "without gradients"):
        y = v(other)
    assert products[0][0] > v.lora_A["default"].weight.shape[0]
    assert len(products) == 2, "computed again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, "0")
        torch.testing.assert_close(y, v(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, taken: list[bool]) -> None:
    wanted = run(model_of())
    model = model_of()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    taken.clear()
    compare(run(model), wanted)
    assert taken
    assert all(taken)


def test_it_compiles_in_one_graph(reference: None) -> None:
    torch._dynamo.reset()
    wanted = run(model_of())
    model = model_of()
    ids = cells.tokens(rows=ROWS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    compare((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), wanted)
    torch._dynamo.reset()


def test_nothing_is_kept_of_the_inputs(reference: None) -> None:
    """Of a layer's tensors that live until the backward pass, none is as large as its input."""
    model = model_of()
    for name, layer in cells.layers_of(model):
        x, kept = torch.randn(100, layer.in_features, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(x)
        assert kept
        assert all(t.data_ptr() != x.data_ptr() for t in kept), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_protected_inputs_change_nothing_in_sixteen_bits(dtype: torch.dtype, reference: None) -> None:
    """A is fp32, and so is its product, whatever the base computes in. Autocast changes nothing."""
    model = model_of().eval()
    for _, layer in cells.layers_of(model):
        base, a = layer.get_base_layer(), layer.lora_A["default"].weight
        base.compute_dtype = dtype
        blind = torch.linalg.svd(a.double()).Vh[len(a) :]
        x = torch.eye(layer.in_features, dtype=dtype)
        many = torch.cat([x, x])  # few rows, where nothing learns, take PEFT's path
        z = ops.lora_z(x, a.detach()).double()
        assert float((blind @ z).norm() / z.norm()) <= 1e-6
        with torch.no_grad():
            y = layer(many)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(layer(many), y)
            assert float((y - base(many)).norm()) > 0


def test_the_config_decides_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PEFT_SAFETY_BACKEND", "reference")
    for wanted, switch, path in ((True, "0", "fused:reference"), (False, "1", "peft"), (None, "1", "fused:reference")):
        monkeypatch.setenv(fused.SWITCH, switch)
        model = quantized(protected(fused=wanted))
        assert {row.path for row in explain_dispatch(model)} == {path}
        assert "fused" not in model.peft_config["default"].to_dict()
    with pytest.raises(ConfigError, match="fused='yes'"):
        SaLoRAConfig(r=4, target_modules=["0"], fused="yes")  # type: ignore[arg-type]


def test_plans_of_a_frozen_adapter(reference: None) -> None:
    model = model_of()
    assert {row.path for row in explain_dispatch(model)} == {"fused:reference"}
    with model.disable_adapter():
        assert {row.reason for row in explain_dispatch(model)} == {"adapters are disabled"}

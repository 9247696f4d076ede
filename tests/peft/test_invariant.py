"""The promise itself: `U^T dW = 0` under every optimizer, for every reader, and the same training as without
folding.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from peft_safety import assert_protected, export_lora
from peft_safety.layers import protected_leaves
from tests.peft import cells

LEAK = 1e-6
CELLS = [(base, init) for base in cells.BASES for init in cells.INITS]


OPTIMIZERS = {
    "adamw": cells.adamw,
    "adamw8bit": cells.adamw8bit,
    "sgd": lambda p: torch.optim.SGD(p, lr=2.0),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01),
    "adam-coupled-decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize(("base", "init"), CELLS)
def test_a_fresh_adapter_changes_no_bit_of_the_function(base: str, init: str) -> None:
    ids = [cells.tokens(2, 12), cells.tokens(1, 1), cells.tokens(3, 7)]
    before = [cells.logits(cells.base_model(base), x) for x in ids]
    model = cells.protected(base, init, r=3, lora_dropout=0.5)
    assert all(torch.equal(cells.logits(model, x), y) for x, y in zip(ids, before, strict=True))
    leaves = list(protected_leaves(model))
    assert leaves
    if init == "task":
        assert all(float(leaf.raw().detach().norm()) > 0.1 for _, leaf in leaves)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_cancels_to_the_last_bit_in_every_shape_and_dtype(rank: int, dtype: torch.dtype) -> None:
    model = cells.protected("linear", "task", r=rank, lora_alpha=32)
    for _, layer in cells.layers_of(model):
        a, b = layer.lora_A["default"].to(dtype), layer.lora_B["default"].to(dtype)
        for rows in (1, 2, 3, 17):
            assert not b(a(torch.randn(rows, layer.in_features).to(dtype))).any()
            assert not b(a(torch.randn(2, rows, layer.in_features).to(dtype))).any()


@pytest.mark.parametrize("keep_bf16", [True, False])
@pytest.mark.parametrize("init", cells.INITS)
def test_a_bf16_base_starts_unchanged_and_stays_protected(init: str, keep_bf16: bool) -> None:
    from peft import get_peft_model

    base = cells.base_model().to(torch.bfloat16)
    before = cells.logits(base)
    model = get_peft_model(base, cells.config("linear", init), autocast_adapter_dtype=not keep_bf16).eval()
    assert torch.equal(cells.logits(model), before)
    cells.train(model, cells.adamw, 10)
    assert_protected(model)
    if not keep_bf16:
        assert all(leaf.weight.dtype == torch.float32 for _, leaf in protected_leaves(model))
        assert cells.leak(model) <= LEAK


@pytest.mark.parametrize(("base", "init"), CELLS)
def test_gradients_are_those_of_the_dense_formula(base: str, init: str) -> None:
    """`dL/dB = C^T dL/d(CB)` and `dL/dA = (CB)^T dL/d(..)`, against a dense C of full size."""
    model = cells.protected(base, init, trained=True)
    name, layer = next(iter(cells.layers_of(model)))
    u = model.peft_config["default"].subspace.bases[name]["out"]
    leaf_a, leaf_b = layer.lora_A["default"], layer.lora_B["default"]
    raw = leaf_b.raw()
    with torch.no_grad():
        raw += 0.1 * torch.randn(raw.shape)  # not folded: the formula must hold for any raw weight
    x, target = torch.randn(6, leaf_a.in_features), torch.randn(6, leaf_b.out_features)
    ((layer.lora_B["default"](layer.lora_A["default"](x)) - target) ** 2).sum().backward()

    c = torch.eye(len(u)) - u @ u.T
    a, b = leaf_a.weight.detach().clone().requires_grad_(), raw.detach().clone().requires_grad_()
    y = x @ a.T @ (c @ b).T
    if init == "task":
        y = y - x @ leaf_a.initial.T @ (c @ leaf_b.initial).T
    ((y - target) ** 2).sum().backward()
    for found, expected in ((leaf_a.weight.grad, a.grad), (raw.grad, b.grad)):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


HUNDRED = [(base, "lora", optimizer) for base in ("linear", "nf4") for optimizer in OPTIMIZERS]
HUNDRED += [("linear", "task", optimizer) for optimizer in ("adamw", "adamw8bit", "sgd")] + [
    ("conv1d", "lora", "adamw"),
    ("int8", "task", "adamw"),
]


@pytest.mark.parametrize(
    ("base", "init", "optimizer"),
    cells.covering(
        HUNDRED,
        fast=(
            ("linear", "lora", "adamw"),
            ("linear", "lora", "adam-coupled-decay"),
            ("linear", "lora", "sgd-momentum"),
            ("linear", "task", "sgd"),
            ("nf4", "lora", "adamw8bit"),
            ("nf4", "lora", "adafactor"),
            ("conv1d", "lora", "adamw"),
            ("int8", "task", "adamw"),
        ),
    ),
)
def test_a_hundred_steps_leak_nothing_at_save_load_fold_and_export(
    base: str, init: str, optimizer: str, tmp_path: Path
) -> None:
    model = cells.protected(base, init)
    cells.train(model, OPTIMIZERS[optimizer], 100)
    subspace = model.peft_config["default"].subspace
    for _, leaf in protected_leaves(model):  # before anything reads `.weight`: what the next forward computes with
        if leaf.basis is not None:
            counted = leaf.projected().detach()
            assert float((leaf.basis.T @ counted).norm() / counted.norm()) <= LEAK
    assert cells.leak(model) <= LEAK
    model.save_pretrained(tmp_path / "native")
    loaded = PeftModel.from_pretrained(cells.base_model(base), tmp_path / "native")
    assert cells.leak(loaded) <= LEAK
    export_lora(model, tmp_path / "plain")
    exported = PeftModel.from_pretrained(cells.base_model(base), tmp_path / "plain")
    assert cells.leak(exported, subspace=subspace) <= LEAK


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_folding_does_not_change_the_trajectory(optimizer: str, init: str) -> None:
    """The same loop on the raw weights, never folded, with a dense C in the forward."""
    torch.manual_seed(0)
    model = cells.protected("linear", init)
    layer = next(layer for _, layer in cells.layers_of(model))
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    u = b.basis
    with torch.no_grad():
        b.raw().add_(0.1 * torch.randn(b.raw().shape))
        b.fold()
    frozen = [p.initial.clone().double() for p in (a, b)] if init == "task" else None
    raw_a, raw_b = a.weight.detach().double().requires_grad_(), b.raw().detach().double().requires_grad_()
    c = (torch.eye(len(u)) - u @ u.T).double()
    folded, dense = OPTIMIZERS[optimizer]([a.weight, b.weight]), OPTIMIZERS[optimizer]([raw_a, raw_b])
    for _ in range(30):
        x, y = torch.randn(16, a.in_features), torch.randn(16, b.out_features)
        (b(a(x)) - y).square().mean().backward()
        out = x.double() @ raw_a.T @ (c @ raw_b).T
        if frozen:
            out = out - x.double() @ frozen[0].T @ (c @ frozen[1]).T
        (out - y).square().mean().backward()
        for chosen in (folded, dense):
            chosen.step()
            chosen.zero_grad()
    reference = c @ raw_b.detach()
    assert float((b.projected().double() - reference).abs().max()) <= 2e-5 * float(reference.abs().max())
    assert float((raw_b.detach() - reference).norm() / reference.norm()) > 1e-3 or optimizer == "sgd", (
        "the dense loop must not have been folded"
    )


READERS = {
    "weight": lambda model, name: model.get_submodule(name).weight,
    "state_dict": lambda model, name: model.state_dict()[f"{name}.weight"],
    "pickle": lambda model, name: pickle.loads(pickle.dumps(model)).get_submodule(name).weight,
    "deepcopy": lambda model, name: copy.deepcopy(model).get_submodule(name).weight,
    "get_peft_model_state_dict": lambda model, name: get_peft_model_state_dict(model)[
        f"{name.removesuffix('.default')}.weight"
    ],
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_the_weight_after_a_raw_write_finds_it_projected(reader: str) -> None:
    model = cells.protected()
    for name, leaf in list(protected_leaves(model)):
        leaf.weight.data.copy_(torch.randn(leaf.weight.shape))
        found = READERS[reader](model, name)
        assert float(found.norm()) > 1
        assert float((leaf.basis.T @ found).norm() / found.norm()) <= LEAK


def test_the_forward_is_protected_whatever_the_raw_weight_is() -> None:
    model = cells.protected(trained=True)
    for _, leaf in protected_leaves(model):
        leaf.raw().data.copy_(torch.randn(leaf.raw().shape))
        y = leaf(torch.randn(5, leaf.in_features))
        assert float((y @ leaf.basis).norm() / y.norm()) <= LEAK


def test_folding_twice_changes_no_bit() -> None:
    model = cells.protected("linear", "task", trained=True)
    first = {name: leaf.weight.clone() for name, leaf in protected_leaves(model)}
    assert not any(leaf.fold() for _, leaf in protected_leaves(model))
    assert all(torch.equal(first[name], leaf.weight) for name, leaf in protected_leaves(model))


def test_a_replica_of_data_parallel_computes_the_same() -> None:
    """`nn.DataParallel` keeps parameters of replicas as plain attributes."""
    leaf = next(leaf for _, leaf in protected_leaves(cells.protected(trained=True)))
    replica = leaf._replicate_for_data_parallel()
    replica.weight = leaf.weight * 1
    x = torch.randn(3, leaf.in_features)
    assert torch.equal(replica(x), leaf(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_basis_in_fp32_and_come_back_protected(dtype: torch.dtype) -> None:
    model = cells.protected("linear", "task", trained=True)
    model.to(dtype)
    assert all(leaf.basis is None or leaf.basis.dtype == torch.float32 for _, leaf in protected_leaves(model))
    assert all(leaf.raw().dtype == dtype for _, leaf in protected_leaves(model))
    assert_protected(model)
    assert torch.isfinite(cells.logits(model)).all()
    model.float()
    assert cells.leak(model) <= LEAK

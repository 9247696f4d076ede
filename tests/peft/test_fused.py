"""The fused path on 4-bit weights: the same training as PEFT's own, taken where it may be, and explained where it is
not.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_safety import SaLoRAConfig, explain_dispatch
from peft_safety.core.projection import leak
from peft_safety.layers import protected_leaves
from peft_safety.registry import fused
from peft_safety.registry.one_input import SKINNY_ROWS
from tests.peft import cells, fused_runs
from tests.peft.fused_cells import layer_of, plain, protected, quantized
from tests.peft.patch_cells import patched

ROOT = Path(__file__).resolve().parents[2]
OFF = "the fused path is off; fused=True in the config, or PEFT_SAFETY_FUSED=1, turns it on"
LEAK = 1e-6
EQUAL = 1e-5
"""Largest difference between two losses of one run on two paths."""


@pytest.mark.parametrize("arm", fused_runs.ARMS)
def test_twenty_steps_have_the_losses_of_pefts_own_path(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fused_runs.losses(arm, 20)
    monkeypatch.setenv("PEFT_SAFETY_BACKEND", "reference")
    monkeypatch.setenv(fused.SWITCH, "1")
    assert {row.path for row in explain_dispatch(fused_runs.build(arm))} == {"fused:reference"}
    found = fused_runs.losses(arm, 20)
    assert max(abs(a - b) for a, b in zip(own, found, strict=True)) <= EQUAL
    assert len(set(own)) == 20


@pytest.mark.slow
def test_twenty_steps_in_tritons_interpreter_have_the_same_losses() -> None:
    environment = os.environ | {"PEFT_SAFETY_BACKEND": "triton", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment[fused.SWITCH] = "1"
    command = [sys.executable, "-m", "tests.peft.fused_runs", "20"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["paths"] == ["fused:triton"]
    for arm in fused_runs.ARMS:
        own = fused_runs.losses(arm, 20)
        assert max(abs(a - b) for a, b in zip(own, found[arm], strict=True)) <= EQUAL, arm


def two_adapters(model: Any) -> None:
    model.add_adapter("other", protected())
    model.base_model.set_adapter(["default", "other"])


def hooked(model: Any) -> None:
    model.get_base_model()[0].get_base_layer().register_forward_hook(lambda *args: None)


def offloaded(model: Any) -> None:
    base = model.get_base_model()[0].get_base_layer()
    base.forward = base.forward


def foreign_factor(model: Any) -> None:
    model.get_base_model()[0].lora_B["default"] = nn.Sequential(model.get_base_model()[0].lora_B["default"])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any] | None, str]] = {
    "plain": ({}, {}, None, "fused"),
    "double quantization": ({}, {"compress_statistics": True}, None, "fused"),
    "bias": ({}, {"bias": True}, None, "fused"),
    "dropout": ({"lora_dropout": 0.5}, {}, None, "fused"),
    "rslora": ({"use_rslora": True}, {}, None, "fused"),
    "eval": ({"lora_dropout": 0.5}, {}, lambda m: m.eval(), "fused"),
    "FP4": ({}, {"quant_type": "fp4"}, None, "not NF4"),
    "lora_bias": ({}, {}, lambda m: m.get_base_model()[0].lora_bias.update(default=True), "lora_bias"),
    "merged": ({}, {}, lambda m: m.get_base_model()[0].merged_adapters.append("default"), "merged"),
    "disabled": ({}, {}, lambda m: m.disable_adapter_layers(), "disabled"),
    "two adapters": ({}, {}, two_adapters, "2 active adapters"),
    "quant_storage": ({}, {"quant_storage": torch.float32}, None, "quant_storage"),
    "hooks": ({}, {}, hooked, "hooks on its Linear4bit"),
    "offloading": ({}, {}, offloaded, "hooks on its Linear4bit"),
    "compiled hot-swap": (
        {},
        {},
        lambda m: m.get_base_model()[0].scaling.update(default=torch.tensor(2.0)),
        "scaling held in a tensor",
    ),
    "another module": ({}, {}, foreign_factor, "Sequential in place of a factor"),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_eligible_and_why_not(case: str, taken: list[bool]) -> None:
    config, weight, change, expected = CASES[case]
    model = quantized(protected(**config), **weight).train()
    if change is not None:
        change(model)
    x = torch.randn(3, 5, 64)
    (row,) = explain_dispatch(model)
    assert (row.path == "fused:reference") == (expected == "fused")
    assert row.module == "0"
    assert expected == "fused" or expected in row.reason, row
    torch.manual_seed(0)
    y = model(x)
    assert taken == [expected == "fused"]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, "0")
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert taken[-1] is False


@pytest.mark.parametrize(
    ("learns", "rows", "path"),
    [
        ("nothing, no_grad", SKINNY_ROWS, "peft"),
        ("nothing, no_grad", SKINNY_ROWS + 1, "fused"),
        ("nothing, inference_mode", 1, "peft"),
        ("nothing, frozen factors", SKINNY_ROWS, "peft"),
        ("nothing, frozen factors", SKINNY_ROWS + 1, "fused"),
        ("the input", 1, "fused"),
        ("a factor", 1, "fused"),
    ],
)
def test_few_rows_take_pefts_path_where_nothing_learns(
    learns: str, rows: int, path: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes reads packed weights there."""
    model = quantized(protected(), bias=True)
    if learns != "a factor":
        model.requires_grad_(False)
    (row,) = explain_dispatch(model)
    assert row.path == "fused:reference", "it says what more rows take"
    off = {"nothing, no_grad": torch.no_grad, "nothing, inference_mode": torch.inference_mode}
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(fused.SWITCH, switch)
        with off.get(learns, torch.enable_grad)():
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
            found.append(model(x.requires_grad_(learns == "the input")))
    assert taken == [path == "fused", False]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_plain_lora_is_never_fused(taken: list[bool]) -> None:
    model = quantized(plain()).train()
    (row,) = explain_dispatch(model)
    assert row.path == "peft"
    model(torch.randn(3, 64))
    model.add_adapter("safe", protected())
    (row,) = explain_dispatch(model)
    assert (row.path, row.reason) == ("peft", "a plain LoRA adapter: the fused path is for protected ones")
    model(torch.randn(3, 64))
    model.set_adapter("safe")
    model(torch.randn(3, 64))
    assert taken == [False, True], "a layer without a protected adapter is PEFT's own and asks nothing"


def test_eight_bit_and_dense_layers_say_so(reference: None) -> None:
    assert {row.reason for row in explain_dispatch(cells.protected("int8"))} == {"an 8-bit base weight"}
    assert {row.reason for row in explain_dispatch(cells.protected())} == {
        "a dense base weight: there is nothing to dequantize"
    }
    assert explain_dispatch(cells.base_model(cells.WIDE)) == []


def test_on_a_cpu_nothing_is_fused_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_SAFETY_BACKEND", raising=False)
    monkeypatch.setenv(fused.SWITCH, "1")
    rows = explain_dispatch(cells.protected(cells.WIDE))
    assert len(rows) == 6
    assert {row.path for row in rows} == {"peft"}
    assert all("CPU" in row.reason or "triton is not installed" in row.reason for row in rows)
    assert {row["kind"] for row in fused.summary(rows)} == set(cells.targets(cells.WIDE))
    assert sum(row["modules"] for row in fused.summary(rows)) == 6
    monkeypatch.setenv("PEFT_SAFETY_BACKEND", "reference")
    for value in (None, "0", "true"):
        monkeypatch.delenv(fused.SWITCH)
        if value is not None:
            monkeypatch.setenv(fused.SWITCH, value)
        assert {(row.path, row.reason) for row in explain_dispatch(cells.protected(cells.WIDE))} == {("peft", OFF)}
        monkeypatch.setenv(fused.SWITCH, "1")


def test_a_mixed_batch_takes_pefts_path(taken: list[bool]) -> None:
    model = cells.protected(cells.WIDE, trained=True)
    model.add_adapter("other", cells.config(cells.WIDE, seed=2))
    cells.perturb(model)
    ids, names = cells.tokens(8), ("default", "other")
    mixed = cells.logits(model, ids, adapter_names=list(names) * 4)
    assert not taken
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row::2], cells.logits(model, ids)[row::2], rtol=1e-5, atol=1e-5)
    assert taken
    assert all(taken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_and_compute_types(dtype: torch.dtype, taken: list[bool]) -> None:
    model = quantized(protected(), bias=True).eval()
    layer = model.get_base_model()[0]
    exact = model(torch.randn(70, 64, generator=torch.Generator().manual_seed(0))).detach()
    layer.get_base_layer().compute_dtype = dtype
    for training in (False, True):
        model.train(training)
        x = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        y = model(x).detach()
        assert y.dtype == dtype
        assert float((y.float() - exact).norm() / exact.norm()) <= 2 * torch.finfo(dtype).eps
        assert model(x.float()).dtype == torch.float32, "the dtype of the input comes back, as with PEFT"
    assert all(taken)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(3, 64)).sum().backward()
    assert torch.isfinite(layer.lora_B["default"].weight.grad).all()


@pytest.mark.parametrize("init", cells.INITS)
def test_gradients_are_those_of_pefts_path(init: str, reference: None) -> None:
    x = torch.randn(70, 64)
    found = []
    for switch in ("0", "1"):
        layer = layer_of(cells.protected(cells.WIDE, init, trained=True).train())
        inputs = x.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(fused.SWITCH, switch)
            layer(inputs).square().sum().backward()
        leaf = layer.lora_B["default"]
        assert float((leaf.basis.T @ leaf.raw().grad).norm() / leaf.raw().grad.norm()) <= LEAK, (
            "whoever clips or reads it finds it projected"
        )
        found.append(
            [
                inputs.grad,
                layer.lora_A["default"].raw().grad if init == "task" else layer.lora_A["default"].weight.grad,
                leaf.raw().grad,
            ]
        )
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("init", cells.INITS)
def test_gradient_checkpointing_gives_the_same_gradients(init: str, reentrant: bool, taken: list[bool]) -> None:
    ids = cells.tokens(rows=8)
    found = []
    for checkpointing in (False, True):
        model = cells.protected(cells.WIDE, init, trained=True).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(taken)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_long_runs_stay_protected(side: str, taken: list[bool]) -> None:
    model = patched(cells.WIDE, side=side).train()
    cells.train(model, cells.adamw, 40)
    assert all(taken)
    leaves = [leaf for _, leaf in protected_leaves(model) if leaf.basis is not None]
    assert leaves
    assert max(leak(leaf.basis, leaf.projected(), leaf.side) for leaf in leaves) <= LEAK
    subspace = model.peft_config["default"].subspace
    for name, layer in cells.layers_of(model):  # the outputs, not the factors
        x = torch.randn(5, layer.in_features)
        with model.disable_adapter(), torch.no_grad():
            base = layer(x)
        y = (layer.eval()(x) - base).detach()
        for constrained in model.peft_config["default"].sides:
            u = subspace.bases[name][constrained]
            if constrained == "out":
                assert float((y @ u).norm() / y.norm()) <= 1e-4
            else:
                with torch.no_grad():
                    inside = layer(u.T)
                    with model.disable_adapter():
                        assert float((inside - layer(u.T)).norm()) <= 1e-4 * float(y.norm())


def test_inputs_of_any_shape(taken: list[bool]) -> None:
    model = quantized(protected(), bias=True).eval()
    base = torch.randn(4, 6, 128)
    for x in (
        base[..., ::2],
        base[..., :64].transpose(0, 1),
        torch.randn(64),
        torch.randn(0, 64),
        torch.randn(2, 0, 64),
    ):
        y = model(x)
        assert y.shape == (*x.shape[:-1], 48)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(fused.SWITCH, "0")
            if x.numel() and x.dim() > 1:
                torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert any(taken)


def test_copies_and_switches_of_adapters(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = cells.protected(cells.WIDE, "task", trained=True), cells.tokens(8)
    twin = copy.deepcopy(model)
    found = cells.logits(model, ids)
    assert torch.equal(cells.logits(twin, ids), found)
    monkeypatch.setenv(fused.SWITCH, "0")
    torch.testing.assert_close(found, cells.logits(model, ids), rtol=1e-5, atol=1e-5)
    monkeypatch.delenv(fused.SWITCH)
    with model.disable_adapter():
        off = cells.logits(model, ids)
    torch.testing.assert_close(off, cells.logits(cells.base_model(cells.WIDE), ids), rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing(reference: None) -> None:
    """Without a residual to the last bit of the fused base product; with one to rounding, since its two halves are one
    product here.
    """
    for init, tolerance in (("lora", 0.0), ("task", 1e-5)):
        layer = layer_of(cells.protected(cells.WIDE, init).eval())
        x = torch.randn(70, 64)
        leaf, zeroed = layer.lora_B["default"], copy.deepcopy(layer)
        for factor in (zeroed.lora_A["default"], zeroed.lora_B["default"]):
            factor._parameters["weight"].data.zero_()
            if getattr(factor, "initial", None) is not None:
                factor.initial.zero_()
        assert leaf.basis is not None
        torch.testing.assert_close(layer(x), zeroed(x), rtol=0, atol=tolerance)


def test_the_command_tells_which_path_runs(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peft_safety.cli import app
    from tests.tiny import tiny_llama, tiny_tokenizer

    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = tiny_llama(hidden=64)
    targets = ["q_proj", "v_proj"]
    space = cells.random_subspace(base, targets)
    model = get_peft_model(base, SaLoRAConfig(r=2, target_modules=targets, init_lora_weights=False, subspace=space))
    model.save_pretrained(tmp_path / "adapter")
    for flags, environment, path, reason in (
        ([], {}, "peft", OFF),
        (
            ["--load-in-4bit"],
            {"PEFT_SAFETY_BACKEND": "reference", fused.SWITCH: "1"},
            "fused:reference",
            "PEFT_SAFETY_BACKEND=reference",
        ),
    ):
        arguments = ["info", "--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), *flags]
        shown = CliRunner(env=environment).invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
        rows = json.loads(shown[shown.index("{") :])["paths"]
        assert len(rows) == 4
        assert {(row["path"], row["reason"]) for row in rows} == {(path, reason)}
        table = CliRunner(env=environment).invoke(app, arguments, catch_exceptions=False).stdout
        assert "q_proj" in table
        assert path in table

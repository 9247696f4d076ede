"""Parity of SOMF with the outputs of the unmodified reference code (`methods.md`: 1e-6)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from peft_safety.core.plain_lora import Factors
from peft_safety.methods.somf.masks import Masks, concrete, export, rescaled
from peft_safety.methods.somf.updates import Continued, task_arithmetic

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "somf.safetensors"
pytestmark = pytest.mark.skipif(not ORACLE.is_file(), reason="the oracles are not beside this checkout")
BOUND = {"rtol": 0, "atol": 1e-6}
TASKS = 3


@pytest.fixture(scope="module")
def oracle():
    with safe_open(ORACLE, "pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def settings():
    return json.loads(ORACLE.with_suffix(".json").read_text())["hparams"]


def names(oracle):
    return sorted(key.removeprefix("logits/") for key in oracle if key.startswith("logits/"))


def dotted(name):
    return name.replace("--", ".")


def soft(oracle, name, settings):
    return concrete(oracle[f"logits/{name}"], oracle[f"u/{name}"], settings["temperature"])


def masked(oracle, name, mask):
    return [rescaled(oracle[f"delta{i}/{name}"], mask, "mean") for i in range(TASKS)]


def weighted(vectors, weight):
    return task_arithmetic([(weight, vector) for vector in vectors])


def fused(oracle, name, how):
    return oracle[f"fuse/{how}/{dotted(name)}"] - oracle[f"in/safe/{dotted(name)}"]


def test_task_vectors_masks_and_masked_vectors(oracle, settings):
    for name in names(oracle):
        soft_mask = soft(oracle, name, settings)
        margin = oracle[f"logits/{name}"] + torch.logit(oracle[f"u/{name}"])
        clear = margin.abs() > 1e-5  # a logarithm's last bit is the machine's
        torch.testing.assert_close(soft_mask, oracle[f"soft_mask/{name}"], **BOUND)
        assert float(clear.float().mean()) > 0.99
        assert torch.equal((margin > 0).float()[clear], oracle[f"hard_mask/{name}"][clear])
        for i in range(TASKS):
            vector = oracle[f"in/task{i}/{dotted(name)}"] - oracle[f"in/safe/{dotted(name)}"]
            torch.testing.assert_close(vector, oracle[f"delta{i}/{name}"], **BOUND)
        for i, (a, b) in enumerate(
            zip(masked(oracle, name, soft_mask), masked(oracle, name, oracle[f"hard_mask/{name}"]), strict=True)
        ):
            torch.testing.assert_close(a, oracle[f"masked_soft{i}/{name}"], **BOUND)
            torch.testing.assert_close(b, oracle[f"masked_hard{i}/{name}"], **BOUND)


def test_the_linear_fusions(oracle, settings):
    for name in names(oracle):
        vectors = masked(oracle, name, oracle[f"soft_mask/{name}"])
        hard = masked(oracle, name, oracle[f"hard_mask/{name}"])
        bare = [oracle[f"delta{i}/{name}"] for i in range(TASKS)]
        weight = settings["lam_ta"]
        for found, how in (
            (weighted(vectors[:1], 1.0), "single_soft"),
            (weighted(hard[:1], 1.0), "single_hard"),
            (weighted(vectors, weight), "task_arithmetic"),
            (weighted(bare, weight), "task_arithmetic_unmasked"),
            (weighted(vectors, 1 / TASKS), "weight_averaging"),
        ):
            torch.testing.assert_close(
                found, fused(oracle, name, how), **BOUND, msg=lambda text, how=how: f"{how}: {text}"
            )


@pytest.mark.parametrize("how", ["single", "task_arithmetic"])
def test_gradients_of_the_logits(oracle, settings, how):
    keys = names(oracle)
    logits = {name: oracle[f"logits/{name}"].clone().requires_grad_() for name in keys}
    vectors = [
        masked(oracle, name, concrete(logits[name], oracle[f"u/{name}"], settings["temperature"])) for name in keys
    ]
    if how == "single":
        found = torch.cat([weighted(v[:1], 1.0).flatten() for v in vectors])
    else:
        found = torch.cat([weighted(v, settings["lam_ta"]).flatten() for v in vectors])
    (found * torch.cat([oracle[f"upstream/{name}"].flatten() for name in keys])).sum().backward()
    for name in keys:
        torch.testing.assert_close(logits[name].grad, oracle[f"grad/{how}/{name}"], **BOUND)


def test_a_whole_module_through_continued(oracle):
    """The update of q_proj: the safe adapter's, a task's, and the fused one."""
    module, key = "layers.0.q_proj", "base_model--model--layers--0--q_proj--lora_{}--weight"

    def factors(source):
        return Factors(*(oracle[f"in/{source}/{dotted(key.format(k))}"] for k in "AB"), 1.0)

    update = Continued(module, factors("safe"), [(1.0, factors("task0"))], "element", "mean")
    scaling = torch.linalg.lstsq(
        (factors("safe").b @ factors("safe").a).flatten()[:, None], oracle["dW/safe"].flatten()[:, None]
    ).solution.item()
    for found, how in ((update.aligned(), "safe"), (update.factors(None), "task0")):
        torch.testing.assert_close(scaling * found[1] @ found[0], oracle[f"dW/{how}"], **BOUND)
    hard = Masks({f"{module}.lora_{k}": oracle[f"hard_mask/{key.format(k)}"].to(torch.uint8) for k in "AB"})
    softly = {f"{module}.lora_{k}": oracle[f"soft_mask/{key.format(k)}"] for k in "AB"}
    errors = []
    for mask_of in (hard.of, softly.__getitem__):
        a, b = update.factors(mask_of)
        errors.append(float((scaling * b @ a - oracle["dW/fused"]).abs().max()))
    assert min(errors) <= 1e-6


def test_the_reference_export_is_a_sample_ours_is_not(oracle):
    logits = {name: oracle[f"logits/{name}"] for name in names(oracle)}
    first, second = export(logits, "threshold"), export(logits, "threshold")
    assert all(torch.equal(first.values[name], second.values[name]) for name in logits)
    differ = [float((oracle[f"hard_mask/{name}"] != first.of(name)).float().mean()) for name in logits]
    assert max(differ) > 0.1

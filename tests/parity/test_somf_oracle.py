"""Parity of SOMF with the outputs of the unmodified reference code (`methods.md`: 1e-6)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from peft_safety.methods.somf import fusions
from peft_safety.methods.somf.compose import Continued
from peft_safety.methods.somf.masks import Masks, concrete, export, rescaled
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.plain_lora import Factors

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
        weights = [settings["lam_ta"]] * TASKS
        for found, how in (
            (fusions.single(vectors[:1]), "single_soft"),
            (fusions.single(hard[:1]), "single_hard"),
            (fusions.task_arithmetic(vectors, weights), "task_arithmetic"),
            (fusions.task_arithmetic(bare, weights), "task_arithmetic_unmasked"),
            (fusions.average(vectors), "weight_averaging"),
        ):
            torch.testing.assert_close(
                found, fused(oracle, name, how), **BOUND, msg=lambda text, how=how: f"{how}: {text}"
            )


def test_dare_with_the_reference_drops(oracle, settings):
    """The drops of one task can be read off its result; those of three only as far as one combination explains it."""
    drop, weight = settings["dare_p"], settings["lam_dare"]
    for name in names(oracle):
        vectors = masked(oracle, name, oracle[f"soft_mask/{name}"])
        expected = fused(oracle, name, "dare_single")
        keeps = [(expected != 0).float()]
        assert 0.5 < float(keeps[0].mean()) < 1
        torch.testing.assert_close(fusions.dare(vectors[:1], keeps, drop, [weight]), expected, **BOUND)
        combinations = torch.stack([torch.tensor([float(bit) for bit in f"{index:03b}"]) for index in range(8)])
        candidates = torch.stack(
            [weight / (1 - drop) * sum(k * v for k, v in zip(row, vectors, strict=True)) for row in combinations]
        )
        expected = fused(oracle, name, "dare")
        chosen = (candidates - expected).abs().argmin(dim=0)
        keeps = [combinations[chosen][..., i] for i in range(TASKS)]
        torch.testing.assert_close(fusions.dare(vectors, keeps, drop, [weight] * TASKS), expected, **BOUND)
        assert 0.5 < float(torch.stack(keeps).mean()) < 1


def flat_ties(vectors_by_name, settings):
    """TIES over the whole model. The reference keeps one entry more than its share."""
    flat = [torch.cat([vectors[i].flatten() for vectors in vectors_by_name]) for i in range(TASKS)]
    density = settings["ties_topk"] / 100 + 1 / flat[0].numel()
    thresholds = [fusions.trim_threshold(v, density) for v in flat]
    return fusions.ties(flat, thresholds, [settings["lam_ties"]] * TASKS)


def test_ties_over_the_whole_model(oracle, settings):
    vectors = [masked(oracle, name, oracle[f"soft_mask/{name}"]) for name in names(oracle)]
    expected = torch.cat([fused(oracle, name, "ties").flatten() for name in names(oracle)])
    torch.testing.assert_close(flat_ties(vectors, settings), expected, **BOUND)


@pytest.mark.parametrize("how", ["single", "task_arithmetic", "ties_true", "ties_official"])
def test_gradients_of_the_logits(oracle, settings, how):
    keys = names(oracle)
    logits = {name: oracle[f"logits/{name}"].clone().requires_grad_() for name in keys}
    vectors = [
        masked(oracle, name, concrete(logits[name], oracle[f"u/{name}"], settings["temperature"])) for name in keys
    ]
    if how == "single":
        found = torch.cat([fusions.single(v[:1]).flatten() for v in vectors])
    elif how == "task_arithmetic":
        found = torch.cat([fusions.task_arithmetic(v, [settings["lam_ta"]] * TASKS).flatten() for v in vectors])
    else:
        found = flat_ties(vectors, settings)
        if (
            how == "ties_official"
        ):  # its code overwrites values in place, so that only the first vector has a gradient, untrimmed
            first = torch.cat([v[0].flatten() for v in vectors])
            found = found.detach() + settings["lam_ties"] * (first - first.detach())
    (found * torch.cat([oracle[f"upstream/{name}"].flatten() for name in keys])).sum().backward()
    for name in keys:
        torch.testing.assert_close(logits[name].grad, oracle[f"grad/{how}/{name}"], **BOUND)


def test_the_reference_gradient_of_ties_is_not_that_of_its_formula(oracle, settings):
    differs = max(
        float((oracle[f"grad/ties_true/{name}"] - oracle[f"grad/ties_official/{name}"]).abs().max())
        for name in names(oracle)
    )
    assert differs > 0.1


def test_a_whole_module_through_continued(oracle):
    """The update of q_proj: the safe adapter's, a task's, and the fused one."""
    module, key = "layers.0.q_proj", "base_model--model--layers--0--q_proj--lora_{}--weight"

    def factors(source):
        return Factors(*(oracle[f"in/{source}/{dotted(key.format(k))}"] for k in "AB"), 1.0)

    update = Continued(module, factors("safe"), [factors("task0")], "element", FuseOptions(fusion="single"))
    scaling = torch.linalg.lstsq(
        (factors("safe").b @ factors("safe").a).flatten()[:, None], oracle["dW/safe"].flatten()[:, None]
    ).solution.item()
    for found, how in ((update.aligned(), "safe"), (update.factors(None), "task0")):
        torch.testing.assert_close(scaling * found[1] @ found[0], oracle[f"dW/{how}"], **BOUND)
    hard = Masks({f"{module}.lora_{k}": oracle[f"hard_mask/{key.format(k)}"].to(torch.uint8) for k in "AB"})
    softly = {f"{module}.lora_{k}": oracle[f"soft_mask/{key.format(k)}"] for k in "AB"}
    errors = []
    for masks in (hard, softly):
        a, b = update.factors(masks)
        errors.append(float((scaling * b @ a - oracle["dW/fused"]).abs().max()))
    assert min(errors) <= 1e-6


def test_the_reference_export_is_a_sample_ours_is_not(oracle):
    logits = {name: oracle[f"logits/{name}"] for name in names(oracle)}
    first, second = export(logits, "threshold"), export(logits, "threshold")
    assert all(torch.equal(first.values[name], second.values[name]) for name in logits)
    differ = [float((oracle[f"hard_mask/{name}"] != first[name]).float().mean()) for name in logits]
    assert max(differ) > 0.1

"""Adapters on convolutions: their inputs are patches, as PEFT's own `lora_A` reads them."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    export_lora,
    merge_quantized,
    orthogonality_report,
    repair_adapter,
    verify,
)
from peft_safety.calibration.batches import Counted
from peft_safety.calibration.patches import Patches
from peft_safety.convert.export import export_directory
from peft_safety.core import kinds
from peft_safety.core.factor_forms import Form
from peft_safety.core.projection import leak
from peft_safety.errors import CalibrationError, ConfigError, LossyMergeError, SubspaceError, UnsupportedLayerError
from peft_safety.layers.adapters import adapter_layers, weights_of

LEAK = 1e-6
NAMES = ["sequence", "image", "strided", "volume", "grouped"]


class Convolving(nn.Module):
    """Convolutions of one, two and three dimensions on images, one of them in groups; tokens say what counts."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.sequence = nn.Conv1d(4, 6, 3, padding="same")
        self.image = nn.Conv2d(3, 6, 3, padding=1, **options)
        self.strided = nn.Conv2d(6, 6, (2, 3), stride=(2, 1), bias=False)
        self.volume = nn.Conv3d(1, 6, 2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.lone = nn.Conv2d(3, 6, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids, pixel_values, attention_mask=None):
        words = self.sequence(self.embed(input_ids).transpose(1, 2)).mean(-1)
        seen = self.grouped(torch.relu(self.strided(torch.relu(self.image(pixel_values)))))
        deep = self.volume(pixel_values[:, None]).mean((-1, -2, -3))
        return self.head(torch.tanh(seen.mean((-1, -2)) + nn.functional.pad(words + deep, (0, 2))))


def base_model(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Convolving(**options).eval()


def batch(seed, size=9):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 20, (4, 7), generator=generator),
        "pixel_values": torch.randn(4, 3, size, size, generator=generator),
    }


CONFIGS = {
    "B": lambda **o: GuardSpaceConfig(**o, train="B", a_init="random"),
    "B, task": lambda **o: GuardSpaceConfig(**o, train="B", task_data=[batch(7)]),
    "A": lambda **o: GuardSpaceConfig(**o, train="A"),
    "window": lambda **o: GuardSpaceConfig(**o, train="window", window=4, a_init="random"),
    "salora": SaLoRAConfig,
    "patch": OrthoSafetyPatchConfig,
}


def config(kind, targets=NAMES, **options):
    return CONFIGS[kind](**{"r": 2, "lora_alpha": 4, "target_modules": list(targets), "safety_rank": 2, **options})


def labeled(seed):
    rows = batch(seed)
    return {**rows, "labels": rows["input_ids"].clone()}


def protected(kind, targets=NAMES, **options):
    given = config(kind, targets)
    base = base_model(**options)
    subspace = given.subspace = calibrate(base, given, [labeled(0)], progress=False)
    return get_peft_model(base, given), subspace


def train(model, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()(**batch(step + 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def outputs(model, seed=99):
    with torch.no_grad():
        return model(**batch(seed))


def patches(layer, x):
    """What `nn.functional.unfold` gives, for two dimensions: `(positions, n)`."""
    return torch.cat(list(nn.functional.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).mT))


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_trains_and_lives(kind, tmp_path):
    model, subspace = protected(kind)
    torch.testing.assert_close(outputs(model), outputs(base_model()))
    train(model)
    assert_protected(model)
    got = outputs(model)
    assert float((got - outputs(base_model())).abs().max()) > 1e-3
    for name, layer in adapter_layers(model, "default").items():
        for side, basis in subspace.bases[name].items():
            factor = weights_of(layer, "default")[side == "out"].detach().flatten(1)
            if not (kind == "window" and side == "in"):
                assert leak(basis, factor, side) < LEAK, (name, side)
    model.save_pretrained(str(tmp_path / "native"))
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "native")).eval()
    assert_protected(loaded)
    torch.testing.assert_close(outputs(loaded), got, rtol=1e-6, atol=1e-6)
    assert verify(tmp_path / "native", base_model()).worst_leak < LEAK
    for name, path in (("model", export_lora(model, tmp_path / "a")), ("dir", tmp_path / "b")):
        if name == "dir":
            export_directory(tmp_path / "native", path)
        plain = PeftModel.from_pretrained(base_model(), str(path)).eval()
        torch.testing.assert_close(outputs(plain), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["B", "A", "salora"])
def test_merging_keeps_function_and_constraint(kind):
    targets = [name for name in NAMES if name != "grouped"]
    model, subspace = protected(kind, targets)
    got = outputs(train(model))
    before = base_model()
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), got, rtol=1e-5, atol=1e-5)
    for name in targets:
        update = (getattr(merged, name).weight - getattr(before, name).weight).detach().flatten(1).double()
        for side, basis in subspace.bases[name].items():
            part = basis.double().mT @ update if side == "out" else update @ basis.double()
            assert float(part.norm()) < 1e-5 * float(update.norm()), (name, side)


def test_kernels_of_single_numbers_are_merged_right():
    """PEFT takes a kernel (1, 1, 3) of three dimensions for one of a single position."""
    given = config("A", ["0"], subspace=SafetySubspace({"0": {"in": torch.eye(6)[:, :2]}}))
    model = get_peft_model(nn.Sequential(nn.Conv3d(2, 4, (1, 1, 3))), given).eval()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(2, 2, 3, 3, 9)
    got = model(x).detach()
    torch.testing.assert_close(model.merge_and_unload()(x).detach(), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["B", "A"])
def test_an_image_whose_patches_are_protected_is_not_changed(kind):
    """Nine patches of 27 numbers, up to the border."""
    image, other = torch.randn(1, 3, 3, 3), torch.randn(1, 3, 3, 3)
    layer = nn.Conv2d(3, 6, 3, padding=1)
    rows = torch.cat(list(Patches.of(layer).rows(image, Counted((torch.ones(1, 1) > 0,)))))
    given = config(kind, ["0"], subspace=SafetySubspace({"0": {"in": torch.linalg.qr(rows.mT).Q}}))
    before = layer(image).detach(), layer(other).detach()
    model = get_peft_model(nn.Sequential(layer), given)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    torch.testing.assert_close(model(image).detach(), before[0], rtol=0, atol=1e-5)
    assert float((model(other).detach() - before[1]).abs().max()) > 0.1


def test_calibration_sees_the_patches_of_torch():
    base = base_model()
    subspace = SafetySubspace.from_activations(
        base, [labeled(0)], method="guardspace", rank=5, target_modules=["image", "strided"], progress=False
    )
    x = batch(0)["pixel_values"]
    inner = torch.relu(base.image(x))
    for name, given in (("image", x), ("strided", inner)):
        rows = patches(getattr(base, name), given).detach().double()
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        top = vectors.flip(1)[:, :5]
        cosines = torch.linalg.svdvals(subspace.bases[name]["in"].double().mT @ top)
        assert float(cosines.min()) > 1 - 1e-5, name
        torch.testing.assert_close(subspace.spectra[name]["in"].double(), values.flip(0)[:5].sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 4, stride=2, padding=3), (3, 2, 11)),
        (nn.Conv1d(2, 3, 4, padding="same"), (3, 2, 11)),
        (nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 1)), (3, 2, 7, 8)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0)), (2, 2, 3, 4, 5)),
    ],
)
def test_patches_are_what_lora_a_multiplies(layer, shape, chunk, monkeypatch):
    """In whatever pieces they are laid out."""
    monkeypatch.setattr("peft_safety.calibration.patches.CHUNK", chunk)
    x = torch.randn(shape)
    plain = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    a = plain.lora_A["default"]
    rows = torch.cat(list(Patches.of(layer).rows(x, Counted((torch.ones(shape[0], 3, dtype=torch.bool),)))))
    assert rows.shape[1] == kinds.shape(layer)[1]
    expected = a(x).detach().flatten(2).mT.reshape(-1, 4)
    torch.testing.assert_close(rows @ a.weight.detach().flatten(1).mT, expected, rtol=1e-5, atol=1e-5)


def test_only_positions_that_count_are_seen():
    """The outputs of a sequence line up with tokens; an image counts with its row."""
    layer = nn.Conv1d(2, 3, 3, padding=1)
    x, mask = torch.randn(2, 2, 6), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 2:4] = True
    rows = torch.cat(list(Patches.of(layer).rows(x, Counted((mask,)))))
    torch.testing.assert_close(rows, torch.stack([x[1, :, 1:4].reshape(-1), x[1, :, 2:5].reshape(-1)]))
    image = nn.Conv2d(2, 3, 2)
    rows = torch.cat(list(Patches.of(image).rows(torch.randn(2, 2, 3, 3), Counted((mask,)))))
    assert rows.shape == (4, 8)
    assert not list(Patches.of(image).rows(torch.randn(2, 2, 3, 3), Counted((torch.zeros_like(mask),))))


def test_output_directions_of_a_grouped_convolution_lie_in_its_groups():
    given = config("salora", ["grouped"], safety_rank=4)
    subspace = calibrate(base_model(), given, [labeled(0)], progress=False)
    basis = subspace.bases["grouped"]["out"]
    assert kinds.in_groups(basis, 2)
    assert basis.shape == (8, 4)
    mixed = torch.linalg.qr(torch.randn(8, 4)).Q
    given.subspace = SafetySubspace({"grouped": {"out": mixed}})
    with pytest.raises(SubspaceError, match="mix the 2 groups"):
        get_peft_model(base_model(), given)


def test_from_weights():
    for side, kind in (("in", "B"), ("out", "salora")):
        subspace = SafetySubspace.from_weights(
            base_model(), sides=(side,), rank=2, target_modules=NAMES, progress=False
        )
        model = train(get_peft_model(base_model(), config(kind, subspace=subspace)))
        assert_protected(model)


def test_what_would_see_other_patches_is_refused():
    for layer, says in (
        (nn.Conv2d(3, 6, 3, padding=2, dilation=2), "no dilation"),
        (type("Causal", (nn.Conv2d,), {"forward": lambda self, x: x})(3, 6, 3), "forward is not that of Conv2d"),
    ):
        base = base_model()
        base.image = layer
        given = config("B", ["image"])
        given.subspace = SafetySubspace({"image": {"in": torch.eye(27)[:, :3]}})
        with pytest.raises(UnsupportedLayerError, match=says):
            get_peft_model(base, given)
        assert isinstance(base.image, type(layer))


def test_a_border_that_is_not_zero_is_not_merged():
    model, _ = protected("B", ["image"], padding_mode="circular")
    got = outputs(train(model))
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: merge_quantized(model, verbose=False)):
        with pytest.raises(LossyMergeError, match="padding"):
            merge()
    torch.testing.assert_close(outputs(model), got)


def test_what_only_linear_layers_have_is_refused(tmp_path):
    base = base_model()
    with pytest.raises(UnsupportedLayerError, match="no factors to start from"):
        get_peft_model(
            base,
            SaLoRAConfig(
                r=2,
                target_modules=["image"],
                init="task",
                task_data=[labeled(1)],
                subspace=SafetySubspace({"image": {"out": torch.eye(6)[:, :2]}}),
            ),
        )
    model, _ = protected("B", ["image"])
    with pytest.raises(UnsupportedLayerError, match="only linear layers"):
        orthogonality_report(model, progress=False)
    with pytest.raises(ConfigError, match="not known to read"):
        export_lora(model, tmp_path / "served", server="vllm")


def test_repair_makes_a_plain_adapter_blind(tmp_path):
    torch.manual_seed(0)
    plain = train(get_peft_model(base_model(), LoraConfig(r=2, target_modules=["image", "grouped"])))
    plain.save_pretrained(str(tmp_path / "plain"))
    space = calibrate(base_model(), config("B", ["image", "grouped"]), [labeled(0)], progress=False)
    report = repair_adapter(tmp_path / "plain", space, tmp_path / "blind")
    assert all(row.removed > 0.01 and row.leak < LEAK for row in report.modules)
    assert verify(tmp_path / "blind", base_model(), space).blindness_checked
    assert_protected(PeftModel.from_pretrained(base_model(), str(tmp_path / "blind")))


def test_a_convolution_that_the_data_never_reach_is_left_out():
    given = config("B", ["image", "lone"])
    subspace = given.subspace = calibrate(base_model(), given, [labeled(0)], progress=False)
    with pytest.warns(UserWarning, match="left out"):
        get_peft_model(base_model(), given)
    assert set(subspace.left_out) == {"lone"}
    with pytest.raises(CalibrationError, match="reaches"):
        calibrate(base_model(), config("B", ["lone"]), [labeled(0)], progress=False)


def test_memory_of_a_large_image_is_bounded():
    """Patches of a megapixel would take 108 MB; they come in pieces."""
    layer = nn.Conv2d(3, 4, 3, padding=1)
    sizes = [rows.numel() for rows in Patches.of(layer).rows(torch.zeros(1, 3, 1000, 1000), Counted((), others=True))]
    assert sum(sizes) == 27 * 1000 * 1000
    assert max(sizes) <= 1 << 22
    assert math.isclose(len(sizes), sum(sizes) / (1 << 22), rel_tol=0.1)


@pytest.mark.parametrize("kind", ["B", "A"])
def test_hot_swapping(kind, tmp_path):
    targets = ["image", "grouped"]
    model, subspace = protected(kind, targets)
    train(model).save_pretrained(str(tmp_path))
    got = outputs(model)
    other = get_peft_model(base_model(), config(kind, targets, subspace=subspace))
    hotswap_adapter(other, str(tmp_path), "default")
    torch.testing.assert_close(outputs(other.eval()), got, rtol=1e-6, atol=1e-6)
    assert_protected(other)
    prepare_model_for_compiled_hotswap(other, target_rank=4)
    assert_protected(other)
    torch.testing.assert_close(outputs(other.eval()), got, rtol=1e-6, atol=1e-6)
    assert other.get_base_model().grouped.lora_A["default"].weight.shape[0] == 4


@pytest.mark.parametrize("kind", ["B", "A", "salora"])
def test_padding_for_a_compiled_swap_keeps_the_leaves(kind):
    model, _ = protected(kind, ["image", "strided"])
    got = outputs(train(model))
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert model.get_base_model().image.lora_A["default"].weight.shape == (5, 3, 3, 3)
    assert_protected(model)
    torch.testing.assert_close(outputs(model), got, rtol=1e-6, atol=1e-6)


def test_a_model_of_images_alone():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()
    pixels = torch.randn(5, 3, 8, 8)
    given = config("B", ["projection", "query", "q_proj"], safety_rank=4)
    subspace = given.subspace = calibrate(base, given, [{"pixel_values": pixels}], progress=False)
    (name,) = (name for name in subspace.bases if name.endswith("projection"))
    rows = patches(base.get_submodule(name), pixels).double()
    top = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :4]
    assert float(torch.linalg.svdvals(top.mT @ subspace.bases[name]["in"].double()).min()) > 0.999
    assert_protected(get_peft_model(base, given))


def test_a_small_file_cannot_ask_for_a_huge_block_diagonal_factor():
    assert Form.stored_as((256, 1, 3), (256, 1, 1), False) == Form((1, 3), 256)
    assert Form.stored_as((2**16, 1, 1), (2**16, 1, 1), False) is None

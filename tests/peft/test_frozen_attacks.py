"""Roads on which a frozen adapter lost its blindness or its certificate once, or ordinary work failed."""

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.other import cast_mixed_precision_params
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from peft_safety import (
    GuardSpaceConfig,
    TaskDirectionsCallback,
    assert_protected,
    export_lora,
    merge_quantized,
    repair_adapter,
    verify,
)
from peft_safety.convert.export import export_directory
from peft_safety.core import certificate
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST, PREFIX
from peft_safety.core.subspace_file import FILE_NAME as SUBSPACE
from peft_safety.errors import ArtifactError, ConfigError, LossyMergeError, PeftSafetyError, ProtectionError
from peft_safety.registry import configs
from tests.peft import cells
from tests.peft.frozen_cells import copies, frozen, lora_a
from tests.peft.guard_cells import TASK, batches, config, subspace


def saved(path, **options):
    model = frozen(a_init="random", **options)
    cells.train(model, cells.adamw, 5)
    model.eval().save_pretrained(path)
    return model


def edit(path, change):
    tensors = load_file(path / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})


def scramble(tensors):
    for key in tensors:
        if "lora_A" in key:
            tensors[key] = torch.randn_like(tensors[key])


def test_transformers_own_save_writes_the_certificate(tmp_path):
    model = cells.base_model()
    model.add_adapter(config(subspace(model), train="B", a_init="random"))
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).modules == 6
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path, is_trainable=True)
    assert isinstance(loaded.peft_config["default"], GuardSpaceConfig)
    assert not any(weight.requires_grad for weight in lora_a(loaded).values())


def test_a_directory_that_changes_after_its_config_was_read(tmp_path):
    expected = {name: weight.clone() for name, weight in lora_a(saved(tmp_path)).items()}
    read = PeftConfig.from_pretrained(tmp_path)
    edit(tmp_path, scramble)
    made = lora_a(get_peft_model(cells.base_model(), read))
    assert all(torch.equal(weight, expected[name]) for name, weight in made.items())
    with pytest.raises(ArtifactError, match="changed elsewhere"):
        PeftConfig.from_pretrained(tmp_path)


class Response:
    """Of a server that has trouble."""

    headers, status_code, request = {}, 503, None


def test_a_hub_that_does_not_answer_is_no_absent_certificate(tmp_path, monkeypatch):
    saved(tmp_path)
    errors = [EntryNotFoundError("none"), HfHubHTTPError("no answer", response=Response())]

    def fetch(source, name, **_):
        if name == FILE_NAME:
            raise errors.pop(0)
        return str(tmp_path / name)

    monkeypatch.setattr(configs, "hf_hub_download", fetch)
    assert configs._certified_folder("somebody/adapter", None, {}) is None
    with pytest.raises(ArtifactError, match="is unknown"):
        configs._certified_folder("somebody/adapter", None, {})


def add_base_weight(tensors):
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight"] = torch.zeros(32, 32)


def add_norm(tensors):
    tensors[f"{PREFIX}model.norm.weight"] = torch.zeros(32)


def spoil_b(tensors):
    tensors[next(key for key in tensors if "lora_B" in key)].fill_(torch.nan)


def drop_b(tensors):
    del tensors[next(key for key in tensors if "lora_B" in key)]


@pytest.mark.parametrize("change", [add_base_weight, add_norm, spoil_b, drop_b])
def test_nothing_but_whole_factors_is_loaded(change, tmp_path):
    saved(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(PeftSafetyError):
        PeftModel.from_pretrained(cells.base_model(), tmp_path)


def test_a_plain_adapter_does_not_take_its_place():
    model = frozen(a_init="random")
    before = copies(model)
    with pytest.raises(ConfigError, match="is protected"):
        inject_adapter_in_model(LoraConfig(r=4, target_modules=cells.LINEAR_TARGETS), model)
    assert all(torch.equal(weight, before[name]) for name, weight in lora_a(model).items())


def test_transformers_hot_swap_of_another_factor_is_noticed(tmp_path):
    """It writes past every hook of PEFT."""
    plain = cells.plain(target_modules=cells.LINEAR_TARGETS)
    plain.save_pretrained(tmp_path / "plain")
    saved(tmp_path / "other", seed=1, space=subspace(cells.base_model(), TASK))
    saved(tmp_path / "own")
    for name in ("plain", "other"):
        model = cells.base_model()
        model.load_adapter(str(tmp_path / "own"), adapter_name="default")
        assert_protected(model)
        model.load_adapter(str(tmp_path / name), adapter_name="default", hotswap=True)
        with pytest.raises(ProtectionError, match="has changed"):
            assert_protected(model)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload", "merge_quantized"])
def test_a_changed_factor_is_not_merged(merge):
    model = frozen(a_init="random")
    next(iter(lora_a(model).values())).data.normal_()
    with pytest.raises(ProtectionError, match="has changed"):
        merge_quantized(model, verbose=False) if merge == "merge_quantized" else getattr(model, merge)()


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_trained_factors_in_another_dtype_are_merged(kind):
    model = frozen(kind, a_init="random")
    cells.train(model, cells.adamw, 5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = cells.logits(model.eval())
    if kind == "nf4":
        with pytest.raises(LossyMergeError):
            model.merge_adapter()
        merged = merge_quantized(model, dtype=torch.float32, verbose=False).model
    else:
        merged = model.merge_and_unload()
    torch.testing.assert_close(cells.logits(merged), before, atol=1e-2, rtol=1e-2)


def test_mixed_precision_casts_are_the_same_factor(tmp_path):
    model = frozen(a_init="random")
    cast_mixed_precision_params(model, torch.bfloat16)
    assert_protected(model)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).worst_leak > 1e-4, "rounding to 16 bits is said"


def test_factors_that_nobody_gathered_are_not_saved(tmp_path):
    model = frozen(a_init="random")
    state = {name: value.to("meta") if "lora_A" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(ProtectionError, match=r"lora_A\.default\.weight \(4, 32\) is a shard or on the meta device"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not any(tmp_path.iterdir())


def test_adapters_of_one_config_do_not_share_what_is_known_of_them(tmp_path):
    given = config(subspace(cells.base_model()), train="B", a_init="random")
    first = get_peft_model(cells.base_model(), given)
    given.r = 2
    second = get_peft_model(cells.base_model(), given)
    event = {"model": second, "train_dataloader": torch.utils.data.DataLoader(list(range(8)), collate_fn=_rows)}
    TaskDirectionsCallback(rows=8).on_train_begin(None, TrainerState(), None, **event)
    for index, model in enumerate((first, second)):
        assert_protected(model)
        model.save_pretrained(tmp_path / str(index))
        assert verify(tmp_path / str(index)).modules == 6


def _rows(indices):
    ids = torch.stack([torch.arange(4, 24) + index for index in indices])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # without labels, as for preferences


def test_saving_over_another_form_leaves_nothing_of_it(tmp_path):
    forms = {
        "frozen": saved,
        "native": lambda path: cells.protected().save_pretrained(path),
        "plain": lambda path: cells.plain(target_modules=cells.LINEAR_TARGETS).save_pretrained(path),
        "export": lambda path: export_lora(cells.protected(), path),
    }
    for old, write_old in forms.items():
        for new, write_new in forms.items():
            path = tmp_path / f"{old}-{new}"
            write_old(path)
            if new == "export" and old in ("frozen", "native"):
                continue
            write_new(path)
            assert (path / FILE_NAME).exists() == (new == "frozen")
            assert new != "frozen" or not (path / SUBSPACE).exists()
            PeftModel.from_pretrained(cells.base_model(), path)
            if new in ("frozen", "native"):
                verify(path)


def test_an_export_replaces_an_export_and_no_protected_adapter(tmp_path):
    native, blind = cells.protected(trained=True), saved(tmp_path / "frozen")
    native.save_pretrained(tmp_path / "native")
    for folder, other in (("frozen", "native"), ("native", "frozen")):
        folder, other = tmp_path / folder, tmp_path / other
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for model in (native, blind):
            with pytest.raises(ConfigError, match="holds a protected adapter"):
                export_lora(model, folder)
        with pytest.raises(ConfigError, match="holds a protected adapter"):
            export_directory(other, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for model in (blind, blind, native, blind):  # those of a frozen A have a certificate, too
        export_lora(model, tmp_path / "plain")
    assert verify(tmp_path / "plain").modules == verify(tmp_path / "frozen").modules


def test_a_round_trip_through_16_bits_is_said(tmp_path):
    model = frozen(a_init="random").bfloat16()
    space = model.peft_config["default"].subspace
    model.save_pretrained(tmp_path / "half")
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "half")
    loaded.save_pretrained(tmp_path / "again")
    for found in (verify(tmp_path / "again"), verify(tmp_path / "again", subspace=space)):
        assert 1e-4 < found.worst_leak < 0.05
    back = frozen(a_init="random").half().float()
    assert_protected(back)
    assert_protected(frozen(a_init="random").double())


@pytest.mark.parametrize(
    "feature", [{"use_dora": True}, {"bias": "lora_only"}, {"layer_replication": [[0, 1], [0, 1]]}]
)
def test_a_repair_that_could_not_be_loaded_is_refused(feature, tmp_path):
    cells.plain(target_modules=cells.LINEAR_TARGETS).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | feature))
    with pytest.raises(ConfigError):
        repair_adapter(tmp_path / "adapter", subspace(cells.base_model()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_rows_than_a_layer_is_wide(tmp_path):
    saved(tmp_path / "adapter", r=20, target_modules=["k_proj", "down_proj"], space=_wide())
    assert verify(tmp_path / "adapter").modules == 4
    (tmp_path / "adapter" / FILE_NAME).unlink()
    repair_adapter(tmp_path / "adapter", _wide(), tmp_path / "repaired")
    assert verify(tmp_path / "repaired", subspace=_wide()).worst_leak <= 1e-6


def _wide():
    return subspace(cells.base_model(), target_modules=["k_proj", "down_proj"])


def test_a_certificate_of_many_modules_is_read_again(tmp_path):
    entry = certificate.FrozenFactor.of(torch.randn(2, 8), 3, 1e-8)
    modules = {f"model.layers.{index}.mlp.experts.{index}.down_proj": entry for index in range(7000)}
    written = certificate.Certificate("GUARDSPACE", "0" * 64, {}, modules)
    written.write(tmp_path)
    assert certificate.read_certificate(tmp_path).modules == modules


def forge(path, **changes):
    content = json.loads((path / FILE_NAME).read_text())
    (path / FILE_NAME).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("method", ["LORA", "__class__", "SALORA", ""])
def test_a_certificate_of_a_method_that_freezes_nothing(method, tmp_path):
    saved(tmp_path)
    forge(tmp_path, method=method)
    for read in (verify, PeftConfig.from_pretrained):
        with pytest.raises(ArtifactError, match="freezes no factor"):
            read(tmp_path)


@pytest.mark.parametrize("leak", [-5, 10**400, "0", None])
def test_a_certificate_with_a_leak_that_is_none(leak, tmp_path):
    saved(tmp_path)
    modules = json.loads((tmp_path / FILE_NAME).read_text())["modules"]
    forge(tmp_path, modules={name: {**entry, "leak": leak} for name, entry in modules.items()})
    with pytest.raises(ArtifactError):
        verify(tmp_path)


def test_a_certificate_that_is_a_dangling_link(tmp_path):
    saved(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError):
        PeftConfig.from_pretrained(tmp_path)


def test_the_model_is_compared_without_the_subspace_too(tmp_path):
    saved(tmp_path)
    assert verify(tmp_path, cells.base_model()).base_checked is False
    with pytest.raises(ArtifactError, match="Give the base"):
        verify(tmp_path, cells.base_model(cells.WIDE))


def test_a_loaded_adapter_outlives_its_directory(tmp_path):
    saved(tmp_path / "adapter")
    model = PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    model.add_adapter("copy", model.peft_config["default"])
    assert_protected(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again" / "copy").modules == 6


def test_task_data_given_twice_makes_the_same_rows():
    one, two = (frozen(task_data=batches(TASK)) for _ in range(2))
    assert all(torch.allclose(weight, lora_a(two)[name]) for name, weight in lora_a(one).items())

"""Safe LoRA on models and directories: loaded, saved, sharded, quantized, trained with a Trainer, and from the command
line.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_safety import SaLoRAConfig, apply_safe_lora, safe_lora_dir, verify
from peft_safety.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    PeftSafetyError,
    UnsupportedLayerError,
)
from peft_safety.methods.safe_lora import apply as applying
from peft_safety.reporting.repair import show
from tests.peft.repair_cells import IDS, aligned_llama, dense_expectation, four_bit, logits, trained
from tests.tiny import tiny_llama


def test_in_memory_in_place_and_under_a_new_name(pair):
    model = trained(aligned_llama())
    before, old = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    report = apply_safe_lora(model, pair / "base", select="all", new_adapter_name="safe", progress=False)
    assert len(report.selected) == 14
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, old[n]) and p.requires_grad == flags[n] for n, p in model.named_parameters() if n in old)
    model.set_adapter("safe")
    assert not torch.allclose(logits(model), before)
    model.set_adapter("default")
    again = apply_safe_lora(model, tiny_llama(), pair / "chat", select="all", progress=False)
    assert again.selected == report.selected
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            expected = dense_expectation(name, old[f"base_model.model.{name}.lora_B.default.weight"])
            torch.testing.assert_close(
                module.lora_B["default"].weight.detach().double(), expected, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(module.lora_B["default"].weight, module.lora_B["safe"].weight)


def test_a_directory_gives_the_same_and_loads_as_plain_lora(pair, tmp_path):
    report = safe_lora_dir(pair / "adapter", pair / "base", out_dir=tmp_path / "out", threshold=0.9, progress=False)
    model = trained(aligned_llama())
    apply_safe_lora(model, pair / "base", threshold=0.9, progress=False)
    loaded = PeftModel.from_pretrained(aligned_llama(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert "safe_lora" not in fields
    assert verify(tmp_path / "out").repaired == len(report.selected)
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("where", ["directory", "loaded", "saved again"])
def test_a_second_application_is_refused(pair, tmp_path, where):
    safe_lora_dir(pair / "adapter", pair / "base", out_dir=tmp_path / "out", select="all", progress=False)
    model = PeftModel.from_pretrained(aligned_llama(), str(tmp_path / "out"))
    model.save_pretrained(str(tmp_path / "again"))

    def again():
        if where == "loaded":
            apply_safe_lora(model, pair / "base", progress=False)
        source = tmp_path / ("out" if where == "directory" else "again")
        safe_lora_dir(source, pair / "base", pair / "chat", tmp_path / "twice", progress=False)

    with pytest.raises(ConfigError, match="repaired already"):
        again()
    assert not (tmp_path / "twice").exists()


def test_sharded_checkpoints(pair, tmp_path):
    for name, model in (("base", tiny_llama()), ("chat", aligned_llama())):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    whole = safe_lora_dir(pair / "adapter", pair / "base", pair / "chat", progress=False)
    sharded = safe_lora_dir(pair / "adapter", tmp_path / "base", tmp_path / "chat", progress=False)
    assert [m.name for m in whole.modules] == [m.name for m in sharded.modules]
    for one, other in zip(whole.modules, sharded.modules, strict=True):
        assert (one.cos, one.kept_norm) == pytest.approx((other.cos, other.kept_norm), rel=1e-5)
    next((tmp_path / "base").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"shard .* is missing"):
        safe_lora_dir(pair / "adapter", tmp_path / "base", tmp_path / "chat", progress=False)


def test_patterns_rslora_and_some_layers_only(pair, tmp_path):
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    model = trained(aligned_llama(), target_modules=r".*\.1\..*(q|up)_proj", **options)
    model.save_pretrained(str(tmp_path / "adapter"))
    live = apply_safe_lora(
        model, pair / "base", select="number", num_modules=1, new_adapter_name="safe", progress=False
    )
    stored = safe_lora_dir(
        tmp_path / "adapter", pair / "base", pair / "chat", select="number", num_modules=1, progress=False
    )
    assert [m.name for m in live.modules] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert len(live.selected) == 1
    for one in live.modules:
        other = next(m for m in stored.modules if m.name == one.name)
        assert (one.cos, one.kept_norm, one.selected) == pytest.approx((other.cos, other.kept_norm, other.selected))


def test_conv1d_in_both_orientations(tmp_path):
    def gpt2(shift):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16))
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "c_attn.weight" in name or "c_proj.weight" in name:
                p.data += shift * torch.randn(p.shape, generator=g)
        return model

    gpt2(0).save_pretrained(tmp_path / "base")
    gpt2(0.1).save_pretrained(tmp_path / "chat")
    model = trained(gpt2(0.1), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model.save_pretrained(str(tmp_path / "adapter"))
    b = model.get_base_model().transformer.h[0].attn.c_proj.lora_B["default"].weight.detach().clone()
    live = apply_safe_lora(model, tmp_path / "base", select="all", progress=False)
    safe_lora_dir(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "chat", tmp_path / "out", select="all", progress=False
    )
    assert len(live.selected) > 0
    stored = PeftModel.from_pretrained(gpt2(0.1), str(tmp_path / "out"))
    for one, other in zip(
        get_peft_model_state_dict(model).values(), get_peft_model_state_dict(stored).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    v = (gpt2(0.1).transformer.h[0].attn.c_proj.weight - gpt2(0).transformer.h[0].attn.c_proj.weight).T.detach()
    found = model.get_base_model().transformer.h[0].attn.c_proj.lora_B["default"].weight
    torch.testing.assert_close(found.detach(), v @ v.T @ b / v.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("new_name", "after"), [(None, 5), ("safe", 20)]
)  # of 14 modules; with a new name lora_A is copied first
def test_an_interrupt_leaves_the_adapter_as_it_was(pair, monkeypatch, new_name, after):
    model = trained(aligned_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls = []
    real = torch.Tensor.copy_

    def copy(self, *args):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(self, *args)

    write = applying._write

    def interrupted(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", copy)
            write(*args)

    monkeypatch.setattr(applying, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_safe_lora(model, pair / "base", select="all", new_adapter_name=new_name, progress=False)
    assert len(calls) > after
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert getattr(model.peft_config["default"], "safe_lora", None) is None


def test_what_else_the_adapter_trains_is_named(pair, tmp_path, capsys):
    model = trained(aligned_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    report = safe_lora_dir(tmp_path / "adapter", pair / "base", pair / "chat", tmp_path / "out", progress=False)
    assert report.to_json()["unconstrained"] == ["lm_head.weight"]
    assert "lm_head.weight" in (tmp_path / "out/README.md").read_text()
    show(report)
    assert "lm_head.weight" in capsys.readouterr().out
    again = apply_safe_lora(model, pair / "base", pair / "chat", progress=False)
    assert again.record["unconstrained"] == model.peft_config["default"].safe_lora["unconstrained"] == ["lm_head"]
    plain = apply_safe_lora(trained(aligned_llama()), pair / "base", pair / "chat", progress=False)
    assert "unconstrained" not in plain.record


def bad(pair, tmp_path, kind):
    """Arguments of `safe_lora_dir` that must be refused."""
    adapter, base, chat = tmp_path / "a", pair / "base", pair / "chat"
    shutil.copytree(pair / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(k for k in tensors if "lora_B" in k)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    if kind == "same path":
        base = chat / "."
    elif kind == "equal weights":
        shutil.copytree(chat, tmp_path / "copy")
        base = tmp_path / "copy"
    elif kind == "other architecture":
        tiny_llama(hidden=16).save_pretrained(tmp_path / "small")
        base = tmp_path / "small"
    elif kind == "fewer layers":
        tiny_llama(layers=1).save_pretrained(tmp_path / "short")
        base = tmp_path / "short"
    elif kind == "other base":
        tiny_llama(seed=9).save_pretrained(tmp_path / "other")
        chat = tmp_path / "other"
    elif kind == "nan":
        broken = tiny_llama()
        broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        broken.save_pretrained(tmp_path / "nan")
        base = tmp_path / "nan"
    elif kind == "no checkpoint":
        base = tmp_path
    elif kind == "nowhere":
        base = "nobody/nothing"
    elif kind == "pickle":
        (tmp_path / "p").mkdir()
        (tmp_path / "p/pytorch_model.bin").write_bytes(b"x")
        base = tmp_path / "p"
    elif kind == "truncated":
        shutil.copytree(base, tmp_path / "t")
        file = tmp_path / "t/model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        base = tmp_path / "t"
    elif kind in ("missing factor", "nan factor", "dora", "wrong shape"):
        value = tensors.pop(key)
        if kind == "nan factor":
            tensors[key] = value * float("inf")
        if kind == "wrong shape":
            tensors[key] = value[:, :2].contiguous()
        if kind == "dora":
            tensors |= {key: value, key.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(value.shape[0])}
        save_file(tensors, adapter / "adapter_model.safetensors")
    elif kind == "use_dora":
        fields["use_dora"] = True
    elif kind == "pissa":
        fields["init_lora_weights"] = "pissa"
    elif kind == "ia3":
        fields["peft_type"] = "IA3"
    elif kind == "unreadable":
        shutil.rmtree(adapter)
    elif kind == "in place":
        return adapter, base, chat, adapter
    if adapter.exists():
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return adapter, base, chat, tmp_path / "out"


REFUSALS = {
    "same path": (ConfigError, "both"), "equal weights": (CheckpointError, "equal"),
    "other architecture": (CheckpointError, "_proj is"),
    "fewer layers": (CheckpointError, "layers.1"), "other base": (CheckpointError, "not the model"),
    "nan": (CheckpointError, "up_proj: the unaligned"),
    "no checkpoint": (CheckpointError, "no safetensors"), "nowhere": (CheckpointError, "nobody/nothing"),
    "pickle": (CheckpointError, "never opened"),
    "truncated": (ArtifactError, "not a complete"), "missing factor": (ArtifactError, "missing"),
    "nan factor": (ArtifactError, "NaN or Inf"),
    "dora": (ArtifactError, "no factor"), "wrong shape": (ArtifactError, r"lora_B \(32, 2\)"),
    "use_dora": (ConfigError, "use_dora"),
    "pissa": (ConfigError, "pissa"),
    "ia3": (ConfigError, "IA3"), "unreadable": (ArtifactError, "not a directory"),
    "in place": (ConfigError, "also the output"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_input_is_refused_and_nothing_is_written(pair, tmp_path, kind):
    adapter, base, chat, out = bad(pair, tmp_path, kind)
    error, said = REFUSALS[kind]
    with pytest.raises(error, match=said) as caught:
        safe_lora_dir(adapter, base, chat, out, progress=False)
    assert isinstance(caught.value, PeftSafetyError)
    assert out == adapter or not out.exists()


def test_what_a_model_cannot_have_repaired(pair):
    with pytest.raises(UnsupportedLayerError, match="embed_tokens"):
        apply_safe_lora(
            trained(aligned_llama(), target_modules=["embed_tokens", "q_proj"]), pair / "base", progress=False
        )
    with pytest.raises(ConfigError, match="use_dora"):
        apply_safe_lora(trained(aligned_llama(), use_dora=True), pair / "base", progress=False)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        apply_safe_lora(trained(aligned_llama()), pair / "base", adapter_name="other", progress=False)
    model = trained(aligned_llama())
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        apply_safe_lora(model, pair / "base", progress=False)
    data = [{"input_ids": IDS, "labels": IDS}]
    from peft_safety import SafetySubspace

    subspace = SafetySubspace.from_activations(
        aligned_llama(), data, rank=4, target_modules=["q_proj"], progress=False
    )
    protected = get_peft_model(aligned_llama(), SaLoRAConfig(r=4, target_modules=["q_proj"], subspace=subspace))
    with pytest.raises(ConfigError, match="is protected"):
        apply_safe_lora(protected, pair / "base", progress=False)


def test_a_quantized_difference_is_refused_unless_insisted_on(pair, tmp_path):
    model = trained(four_bit(pair / "chat"), target_modules=["q_proj", "up_proj"])
    with pytest.raises(CheckpointError, match=r"4bit.*allow_quantized_delta"):
        apply_safe_lora(model, pair / "base", progress=False)
    with pytest.warns(UserWarning, match=r"rounding noise is expected at .* times"):
        apply_safe_lora(model, pair / "base", allow_quantized_delta=True, new_adapter_name="noisy", progress=False)
    four_bit(pair / "chat").save_pretrained(tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="4bit"):
        safe_lora_dir(pair / "adapter", pair / "base", tmp_path / "nf4", progress=False)

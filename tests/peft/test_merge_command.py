"""`peft-safety export --merge-to 16bit`: the base is loaded in the precision that the adapter was trained on."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, repair_adapter
from peft_safety.cli import app
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.targets import target_layers
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.recipes import merging
from peft_safety.recipes.load import load_model
from peft_safety.recipes.merging import trained_on
from tests.peft import cells
from tests.tiny import tiny_llama, tiny_tokenizer

TARGETS = ["q_proj", "down_proj"]
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging") / "base"
    for part in (tiny_llama(hidden=64), tiny_tokenizer()):
        part.save_pretrained(folder)
    return folder


def blind(model):
    """Random input bases."""
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(model, TARGETS)
    draw = {name: torch.randn(layer.in_features, 4, generator=generator) for name, layer in layers.items()}
    return SafetySubspace({name: {"in": torch.linalg.qr(q).Q} for name, q in draw.items()})


def save(base, folder, kind, four=False):
    """An adapter of this kind, trained on a base in 4 bits or in fp32."""
    model = load_model(base, load_in_4bit=four)[0]
    common = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if kind == "plain":
        config = LoraConfig(**common)
    elif kind == "salora":
        config = SaLoRAConfig(**common, subspace=cells.random_subspace(model, TARGETS))
    else:
        config = GuardSpaceConfig(**common, subspace=blind(model), train="B", a_init="random")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02
    cells.perturb(adapted) if kind == "salora" else None
    adapted.save_pretrained(folder)
    return folder


def export(folder, out, *options, to="16bit", code=0):
    done = CliRunner().invoke(app, ["export", str(folder), "--out", str(out), "--merge-to", to, *options])
    if isinstance(done.exception, Exception):
        raise done.exception
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("kind", ["plain", "salora", "guardspace"])
def test_an_adapter_of_a_dense_base_is_merged_into_its_very_weights(base, kind, tmp_path):
    adapter = save(base, tmp_path / "adapter", kind)
    assert trained_on(adapter) == (None if kind == "plain" else "dense")
    said = export(adapter, tmp_path / "out")
    assert "base loaded unquantized, in float32" in said
    assert ("give --load-in-4bit" in said) is (kind == "plain")
    expected = PeftModel.from_pretrained(load_model(base)[0], adapter).merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in (WEIGHT, "model.layers.1.self_attn.k_proj.weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    merge = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert merge["base"] in said
    assert all(row["kept"] == pytest.approx(1, abs=1e-3) for row in merge["modules"])


@pytest.mark.parametrize("kind", ["salora", "guardspace"])
def test_an_adapter_of_a_4_bit_base_is_merged_into_that_one(base, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = save(base, tmp_path / "adapter", kind, four=True)
    assert trained_on(adapter) == "4bit"
    assert "base loaded in 4 bits: as the adapter was trained" in export(adapter, tmp_path / "out")
    assert "unquantized, in float32: as asked for" in export(adapter, tmp_path / "dense", "--no-load-in-4bit")
    four, dense = (load_file(tmp_path / name / "model.safetensors")[WEIGHT].float() for name in ("out", "dense"))
    assert 0.03 < float((four - dense).norm() / dense.norm()) < 0.2, "the rounding of NF4"


def test_what_is_not_known_is_said_and_can_be_given(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = save(base, tmp_path / "adapter", "plain")
    assert "in 4 bits: as asked for" in export(adapter, tmp_path / "four", "--load-in-4bit")
    assert "in 4 bits: for nf4+residual" in export(adapter, tmp_path / "residual", to="nf4+residual")
    packed = tmp_path / "packed"
    load_model(base, load_in_4bit=True)[0].save_pretrained(packed)
    tiny_tokenizer().save_pretrained(packed)
    assert "its checkpoint is quantized" in export(adapter, tmp_path / "stored", "--model", str(packed))
    stored, four = (load_file(tmp_path / name / "model.safetensors")[WEIGHT] for name in ("stored", "four"))
    torch.testing.assert_close(stored.float(), four.float(), rtol=1e-2, atol=1e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    blinded = tmp_path / "blinded"
    repair_adapter(adapter, blind(tiny_llama(hidden=64)), blinded)
    assert trained_on(blinded) is None


@pytest.mark.parametrize("to", ["16bit", "nf4", "nf4+residual"])
def test_nothing_is_merged_into_the_directory_of_an_adapter_or_of_the_base(base, to, tmp_path, monkeypatch):
    """The update would count twice, or a protected adapter would be lost."""
    monkeypatch.setattr(merging, "load_adapter", None)  # nothing is loaded
    adapter = save(base, tmp_path / "adapter", "salora")
    other = save(base, tmp_path / "other", "plain")
    for place in (adapter, other):
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        with pytest.raises(ConfigError, match="holds an adapter, which would be loaded on top"):
            export(adapter, place, to=to)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    weights = (base / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the base model itself"):
        export(adapter, base, "--model", str(base), to=to)
    assert (base / "model.safetensors").read_bytes() == weights
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a directory"):
        export(adapter, tmp_path / "file", to=to)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_residual_adapter_is_not_written_among_the_files_of_a_model(base, name, tmp_path):
    adapter = save(base, tmp_path / "adapter", "plain")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds a model .{name}"):
        export(adapter, tmp_path / "out", to="nf4+residual")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_merged_model_takes_the_place_of_an_earlier_one(base, tmp_path):
    adapter = save(base, tmp_path / "adapter", "plain")
    for _ in range(2):
        assert "written to" in export(adapter, tmp_path / "out")
    expected = PeftModel.from_pretrained(load_model(base)[0], adapter).merge_and_unload().state_dict()[WEIGHT]
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[WEIGHT], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--force"], "--force has no effect without --merge-to nf4"),
        (["--force", "--merge-to", "16bit"], "--force has no effect without --merge-to nf4"),
        (["--model", "m"], "--model has no effect without --merge-to"),
        (["--load-in-4bit"], "--load-in-4bit has no effect"),
        (["--no-load-in-4bit"], "--load-in-4bit has no effect"),
        (["--for", "vllm", "-m", "m"], "--model has no effect"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options, said, tmp_path):
    command = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), *options]
    found = CliRunner().invoke(app, command).exception
    assert isinstance(found, ConfigError)
    assert said in str(found)


def test_a_base_is_for_an_adapter():
    for options in (["--model", "m"], ["--load-in-4bit"]):
        found = CliRunner().invoke(app, ["info", *options]).exception
        assert isinstance(found, ConfigError)
        assert f"{options[0]} has no effect without --adapter" in str(found)


def test_another_quantization_is_refused_without_its_checkpoint(base, tmp_path):
    adapter = save(base, tmp_path / "adapter", "guardspace")
    content = json.loads((adapter / FILE_NAME).read_text())
    content["settings"]["precision"] = "8bit"
    (adapter / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="trained on a base of kind '8bit'"):
        export(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "as asked for" in export(adapter, tmp_path / "out", "--no-load-in-4bit")
    with pytest.raises(ConfigError, match="no model at"):
        export(adapter, tmp_path / "other", "--model", str(tmp_path / "nowhere"))

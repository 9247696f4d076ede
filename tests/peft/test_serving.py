"""Adapters for servers: what a server does not take is refused before anything is written, and the commands say what
was written.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_safety import SaLoRAConfig, export_lora, verify
from peft_safety.cli import app
from peft_safety.convert.export import export_directory
from peft_safety.convert.serving import SERVERS, VLLM_RANKS, _commands, check_server, serving_commands
from peft_safety.errors import ArtifactError, ConfigError
from tests.peft import cells, frozen_cells, guard_cells
from tests.peft.test_classifiers import classifier

PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True}


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def frozen(folder: Path, kind: str = "linear", **options) -> Path:
    model = frozen_cells.frozen(kind, **options)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return saved(model, folder)


def edited(folder: Path, **fields) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize("server", SERVERS)
def test_a_frozen_adapter_is_served_as_it_was_saved(tmp_path: Path, server: str) -> None:
    adapter = edited(frozen(tmp_path / "adapter"), base_model_name_or_path="some/base")
    before = {path.name for path in tmp_path.iterdir()}
    first = shlex.split(serving_commands(adapter, server)[0])
    if server == "llama.cpp":
        assert first == ["python", "convert_lora_to_gguf.py", str(adapter), "--outfile", f"{adapter}.gguf"]
    else:
        assert first[-1] == f"adapter={adapter}"
        assert "some/base" in first
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("server", SERVERS)
def test_an_export_has_one_rank_and_no_patterns_and_keeps_the_certificate(tmp_path: Path, server: str) -> None:
    adapter = frozen(tmp_path / "adapter", **PATTERNS)
    with pytest.raises(ConfigError, match=rf"rank_pattern.*--for {server} --out"):
        serving_commands(adapter, server)
    out = export_directory(adapter, tmp_path / "out", server)
    assert serving_commands(out, server)
    fields = json.loads((out / "adapter_config.json").read_text())
    assert not any(fields[name] for name in PATTERNS)
    assert {t.shape[0] for k, t in load_file(out / "adapter_model.safetensors").items() if "lora_A" in k} == {6}
    before, after = (PeftModel.from_pretrained(cells.base_model(), path) for path in (adapter, out))
    torch.testing.assert_close(cells.logits(after), cells.logits(before), rtol=1e-5, atol=1e-5)
    assert verify(out).method == verify(adapter).method == "GUARDSPACE, frozen A"
    assert verify(out).subspace == verify(adapter).subspace


def test_the_export_of_a_model_with_a_frozen_factor_is_verified_as_blind(tmp_path: Path) -> None:
    space = guard_cells.subspace(cells.base_model())
    export_lora(frozen_cells.frozen(space=space, **PATTERNS), tmp_path, server="vllm")
    found = verify(tmp_path, subspace=space)
    assert found.blindness_checked
    assert found.worst_leak <= 1e-6


def test_max_lora_rank_is_on_the_list_of_vllm(tmp_path: Path) -> None:
    for rank, size in {4: 8, 8: 8, 9: 16, 20: 32}.items():
        export_lora(cells.protected(trained=True, r=rank), tmp_path, server="vllm")
        words = shlex.split(serving_commands(tmp_path, "vllm")[0])
        assert int(words[words.index("--max-lora-rank") + 1]) == size
        assert size in VLLM_RANKS
    export_lora(cells.protected("linear", "task", trained=True, r=8), tmp_path, server="vllm")
    assert "--max-lora-rank 16" in serving_commands(tmp_path, "vllm")[0], "a residual doubles the rank"
    with pytest.raises(ConfigError, match="ranks up to 512, not 600"):
        check_server("vllm", ["model.layers.0.mlp.up_proj"], 600, (), False)


@pytest.mark.filterwarnings("ignore:.*no projection constrains")
@pytest.mark.parametrize(
    ("options", "refusing", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, set(SERVERS), "does not read lm_head.weight"),
        ({"target_modules": ["q_proj", "up_proj"]}, {"sglang"}, r"needs factors of .*\.0\.self_attn\.v_proj"),
    ],
)
def test_what_a_server_does_not_take_is_refused_and_nothing_is_written(
    tmp_path: Path, options: dict[str, Any], refusing: set[str], message: str
) -> None:
    model = cells.protected(**options)
    for server in SERVERS:
        if server not in refusing:
            export_lora(model, tmp_path / server, server=server)
            continue
        with pytest.raises(ConfigError, match=message):
            export_lora(model, tmp_path / server, server=server)
        assert not (tmp_path / server).exists()


def test_what_servers_would_misread_without_a_word_is_refused(tmp_path: Path) -> None:
    gpt2 = cells.protected("conv1d", trained=True)
    for server, message in {"sglang": "in no numbered layer", "llama.cpp": "Conv1D", "other": "no server"}.items():
        with pytest.raises(ConfigError, match=message):
            export_lora(gpt2, tmp_path / "out", server=server)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*no projection constrains")
def test_the_head_of_a_classifier_is_served_by_vllm_alone(tmp_path: Path) -> None:
    base = classifier("llama")
    space = cells.random_subspace(base, ["q_proj", "v_proj"])
    model = get_peft_model(
        base, SaLoRAConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], subspace=space)
    )
    export_lora(model, tmp_path / "out", server="vllm")
    assert serving_commands(tmp_path / "out", "vllm")
    for server in ("sglang", "llama.cpp"):
        with pytest.raises(ConfigError, match=r"does not read score\.weight"):
            serving_commands(tmp_path / "out", server)


def test_a_protected_adapter_is_to_be_exported_first(tmp_path: Path) -> None:
    adapter = saved(cells.protected(trained=True), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="protected adapter; peft-safety export makes a plain LoRA"):
        serving_commands(adapter, "vllm")
    with pytest.raises(ConfigError, match="also the output directory"):
        export_directory(adapter, adapter, "vllm")


def test_a_frozen_factor_that_was_changed_is_not_served(tmp_path: Path) -> None:
    adapter = frozen(tmp_path / "adapter")
    shutil.copytree(adapter, tmp_path / "other")
    other = frozen(tmp_path / "new", seed=1, a_init="random")
    shutil.copy(other / "adapter_model.safetensors", tmp_path / "other")
    with pytest.raises(ArtifactError, match="is not the one in"):
        serving_commands(tmp_path / "other", "vllm")
    with pytest.raises(ArtifactError, match="is not the one in"):
        export_directory(tmp_path / "other", tmp_path / "out", "vllm")


def test_the_command(tmp_path: Path) -> None:
    adapter, out = saved(cells.protected(trained=True), tmp_path / "adapter"), tmp_path / "out"
    run = CliRunner().invoke(app, ["export", str(adapter), "--for", "vllm", "--out", str(out)], catch_exceptions=False)
    assert f"vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules out={out}" in run.stdout.replace("\n", " ")
    facts = json.loads(CliRunner().invoke(app, ["export", str(out), "--for", "llama.cpp", "--json"]).stdout)
    assert facts == {"out": str(out), "commands": serving_commands(out, "llama.cpp")}
    assert type(PeftModel.from_pretrained(cells.base_model(), out).peft_config["default"]) is LoraConfig
    for wrong in ([], ["--for", "vllm", "--merge-to", "16bit", "--out", str(out)]):
        assert isinstance(CliRunner().invoke(app, ["export", str(adapter), *wrong]).exception, ConfigError)


def test_servers_split_name_and_path_at_the_first_equals_sign() -> None:
    words = shlex.split(_commands(Path("lr=1"), "sglang", 8, "some/base")[0])
    assert words[-1] == "lr-1=lr=1"

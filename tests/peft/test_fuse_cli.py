"""`peft-safety fuse`: flags, a YAML file, a dry run."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.core.config_file import read_config
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.methods.somf import load_masks, plan_fusion
from peft_safety.recipes import fusion
from peft_safety.recipes.fusion import FuseJob
from tests.peft.fusion_cells import PAIRS, family, saved
from tests.tiny import tiny_llama, tiny_tokenizer

TASKS = ["task0", "task1"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return saved(family(), tmp_path_factory.mktemp("adapters"))


def run(*arguments):
    return CliRunner().invoke(app, ["fuse", *map(str, arguments)])


def test_flags(stored, tmp_path):
    safe, one, two = (stored[name] for name in ("safe", *TASKS))
    common = ("--safe", safe, "--task", one, "--task", two)
    dry = run(*common, "--out", tmp_path / "out", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "continued" in dry.output
    assert not (tmp_path / "out").exists()
    assert "self_attn.q_proj.lora_A (2)" in dry.output
    assert "layers.1.self_attn.q_proj.lora_A" in run(*common, "--dry-run", "--all").output
    planned = run(*common, "--dry-run", "--json", "--granularity", "rank")
    assert json.loads(planned.stdout)["mask_entries"] == plan_fusion(safe, [one, two], granularity="rank").mask_entries
    done = run(*common, "--out", tmp_path / "out", "--method", "task_arithmetic", "--weight", 0.4, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["weights"] == [0.4, 0.4]
    table = run(*common, "--out", tmp_path / "out2", "--method", "task_arithmetic", "--weight", 0.3, "--weight", 0.6)
    assert "fused model written" in table.output
    assert PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")) is not None


def test_a_config_trains_and_flags_override_it(stored, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "job.yaml").write_text(
        f"safe: {stored['safe']}\ntasks: [{stored['task0']}, {stored['task1']}]\nmodel: {tmp_path / 'base'}\ndata: "
        f"{tmp_path / 'rows.jsonl'}\n"
        f"out: {tmp_path / 'out'}\ngranularity: rank\ntrain: {{max_steps: 3, batch_size: 4, max_length: 128, "
        f"progress: false, lr: 0.5}}\n"
    )
    done = run(tmp_path / "job.yaml", "--granularity", "row", "--max-steps", 2, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["granularity"] == "row"
    assert found["mask"]["steps"] == 2
    assert found["mask"]["lr"] == 0.5
    assert load_masks(tmp_path / "out").record["objective"] == "dpo"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "safe: [",
        "tasks: []",
        "tasks: [a]\nlamda: 3",
        "tasks: [a]\ntrain: 3",
        "tasks: [a]\ntrain: {beta: -1}",
        "tasks: [a]\nsafe: 3",
        "tasks: [a]\ndrop: 0.2",
        "tasks: !!python/object:os.system x",
    ],
)
def test_bad_configs(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError):
        FuseJob.of(read_config(tmp_path / "job.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_a_job_without_an_output_directory(stored):
    with pytest.raises(ConfigError, match="Give out"):
        FuseJob.of({"tasks": [stored["task0"]], "safe": stored["safe"], "method": "task_arithmetic"}).run()


def test_a_place_for_the_result_is_checked_before_the_work(stored, tmp_path, monkeypatch):
    """An adapter among a model's files, or a model beside an adapter, would be loaded with what is there."""
    monkeypatch.setattr(fusion, "fuse", None)
    adapters = ("--safe", stored["safe"], "--task", stored["task0"], "--method", "task_arithmetic", "--out")
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds a model"):
        raise run(*adapters, tmp_path / "model").exception
    with pytest.raises(ConfigError, match="holds an adapter"):
        raise run("--safe", tmp_path / "model", "--task", tmp_path / "model", "--out", stored["task1"]).exception
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a directory"):
        raise run(*adapters, tmp_path / "file" / "out").exception

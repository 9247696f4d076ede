"""The audit of directories: what `load_adapter` takes and refuses, and the command line."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_safety import SafeLoRAConfig, orthogonality_report
from peft_safety.cli import app
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.recipes.load import load_adapter
from tests.peft.cells import base_model, perturb, plain, protected
from tests.peft.frozen_cells import frozen
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = {
    "general": [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(5)],
    "harmful": [{"prompt": f"harm {i}", "response": "no"} for i in range(3)],
}


def audit(model, **options):
    return orthogonality_report(model, progress=False, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A base model with its tokenizer, and adapters of it: plain, protected, with patterns."""
    root = tmp_path_factory.mktemp("audit")
    tiny_llama().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    models = {
        "plain": plain(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True),
        "salora": protected(init="task", trained=True),
        "dora": plain(use_dora=True),
    }
    models["safe"] = perturb(
        get_peft_model(base_model(), SafeLoRAConfig(r=2, target_modules=["q_proj"], unaligned="elsewhere"))
    )
    for name, model in models.items():
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(str(root / name))
    return root, models


@pytest.mark.parametrize("name", ["plain", "salora", "safe"])
def test_a_directory_gives_the_figures_of_the_model(stored, name):
    root, models = stored
    loaded, tokenizer = load_adapter(root / name)
    assert isinstance(loaded, PeftModel)
    assert tokenizer.chat_template
    for found, expected in zip(audit(loaded).modules, audit(models[name]).modules, strict=True):
        assert found.norm == pytest.approx(expected.norm, rel=1e-6)
        assert found.right.energy == pytest.approx(expected.right.energy, rel=1e-4)


def test_a_frozen_adapter_is_read_without_a_warning_of_training(stored, tmp_path, recwarn):
    frozen(a_init="random").save_pretrained(str(tmp_path))
    load_adapter(tmp_path, stored[0] / "base")
    assert not [warning for warning in recwarn if "training it" in str(warning.message)]


def rewrite(source, target, **fields):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return target


@pytest.mark.timeout(60)
def test_no_pattern_of_a_directory_is_run(stored, tmp_path):
    evil = "([a-z_.0-9]+)+!"
    found, _ = load_adapter(
        rewrite(
            stored[0] / "plain",
            tmp_path / "targets",
            target_modules=evil,
            exclude_modules=evil,
            rank_pattern={evil: 2},
        )
    )
    assert len(audit(found).modules) == 6
    both = {evil: 2, "q_proj": 3, "v_proj": 8, "down_proj": 8}
    named, _ = load_adapter(rewrite(stored[0] / "plain", tmp_path / "named", alpha_pattern=both))
    assert [row.norm for row in audit(named).modules] == [row.norm for row in audit(found).modules]
    with pytest.raises(ConfigError, match="regular expression"):
        load_adapter(rewrite(stored[0] / "plain", tmp_path / "alphas", alpha_pattern={evil: 2}))


def test_directories_that_cannot_be_audited(stored, tmp_path):
    root, _ = stored
    with pytest.raises(ConfigError, match="use_dora"):
        load_adapter(root / "dora")
    with pytest.raises(ConfigError, match="base model"):
        load_adapter(rewrite(root / "plain", tmp_path / "nameless", base_model_name_or_path=None))
    with pytest.raises(ConfigError, match="'IA3'"):
        load_adapter(rewrite(root / "plain", tmp_path / "kind", peft_type="IA3"))
    with pytest.raises(ArtifactError, match="without its protection"):
        load_adapter(rewrite(root / "salora", tmp_path / "relabeled", peft_type="LORA"))
    pickled = rewrite(root / "plain", tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="missing"):
        load_adapter(pickled)
    with pytest.raises(ArtifactError, match="not a directory"):
        load_adapter(tmp_path / "nowhere")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    with pytest.raises(ArtifactError, match="does not fit"):
        load_adapter(root / "plain", tmp_path / "wide")


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def test_the_command(stored, tmp_path):
    root, _ = stored
    shown = run(root / "plain", "--png", tmp_path / "audit.png", "--k", 4)
    assert shown.exit_code == 0, shown.output
    assert "v_proj (2)" in shown.stdout
    assert "not measured" in shown.stdout
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    every = run(root / "plain", "--all")
    assert every.stdout.count("self_attn.v_proj") == 2 * 2, "two layers, in each of two tables"
    printed = run(root / "salora", "--json", "--calibration", "auto", "--model", root / "base")
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert len(found["modules"]) == 6
    assert found["summary"]["interference_ratio"] > 0
    assert found["environment"]["model"] == "base"
    assert str(root) not in printed.stdout


def test_a_picture_that_cannot_be_written_costs_no_work(stored, tmp_path):
    (tmp_path / "file").write_text("")
    for place, error in (("audit", ConfigError), ("audit.pdf", ConfigError), ("file/audit.png", ArtifactError)):
        done = run(tmp_path / "nowhere", "--png", tmp_path / place)
        assert type(done.exception) is error
        assert "nowhere" not in str(done.exception), "the adapter was not read yet"


def test_the_result_is_shown_before_it_is_drawn(stored, tmp_path):
    (tmp_path / "audit.png").symlink_to(tmp_path / "missing" / "audit.png")
    done = run(stored[0] / "plain", "--png", tmp_path / "audit.png", "--k", 4)
    assert isinstance(done.exception, ArtifactError)
    assert "cannot be written" in str(done.exception)
    assert "v_proj (2)" in done.stdout


def test_the_command_on_own_data(stored, tmp_path):
    root, models = stored
    files = {}
    for kind, rows in ROWS.items():
        files[kind] = tmp_path / f"{kind}.jsonl"
        files[kind].write_text("\n".join(map(json.dumps, rows)))
    printed = run(
        root / "plain", "--json", "--general", files["general"], "--harmful", files["harmful"], "--positions", "all"
    )
    assert printed.exit_code == 0, printed.output
    expected = audit(models["plain"], calibration=ROWS, tokenizer=tiny_tokenizer(), positions="all")
    assert json.loads(printed.stdout)["modules"][0]["harmful"]["update"] == pytest.approx(
        expected.modules[0].harmful.update, rel=1e-5
    )
    assert isinstance(run(root / "plain", "--general", files["general"]).exception, ConfigError)
    assert isinstance(run(root / "plain", "--calibration", "mine").exception, ConfigError)
    assert isinstance(run(root / "plain", "--positions", "last").exception, ConfigError)

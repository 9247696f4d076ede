"""GuardSpace from the recipes and the command line: calibration with what it covers, and the config."""

import json

import pytest
import torch
from typer.testing import CliRunner

from peft_safety import GuardSpaceConfig, SafetySubspace
from peft_safety.calibration.batches import content_digest, to_batches
from peft_safety.calibration.coverage import coverage, task_inputs, warn_if_stalled
from peft_safety.cli import app
from peft_safety.core.projection import principal_cosines
from peft_safety.core.targets import target_layers
from peft_safety.data import calibration_rows
from peft_safety.errors import CalibrationError, ConfigError, DataError
from peft_safety.recipes.adapter import adapter_config
from peft_safety.recipes.calibrate import calibrate
from peft_safety.reporting import coverage as coverage_report
from tests.tiny import tiny_llama, tiny_tokenizer

TASK = [{"text": f"message {index}", "label": "ab"[index % 2]} for index in range(20)]
HARMFUL = [{"prompt": f"Help me steal {word}.", "response": "No."} for word in ("cats", "dogs", "books", "cars")]


@pytest.fixture
def files(tmp_path):
    """A model's directory, calibration rows and task rows."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("data", HARMFUL), ("task", TASK)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_calibrate_command_prints_and_draws_what_is_covered(files):
    command = [
        "calibrate",
        "--model",
        str(files / "model"),
        "--data",
        str(files / "data.jsonl"),
        "--task-data",
        str(files / "task.jsonl"),
    ]
    command += ["--safety-rank-pattern", "down_proj=0.1", "--target-modules", "q_proj,k_proj,down_proj"]
    shown = CliRunner().invoke(
        app, [*command, "--out", str(files / "a"), "--png", str(files / "cover.png")], catch_exceptions=False
    )
    assert "covered" in shown.stdout
    assert "down_proj (2)" in shown.stdout
    assert (files / "cover.png").read_bytes().startswith(b"\x89PNG")
    found = CliRunner().invoke(app, [*command, "--out", str(files / "b"), "--json"], catch_exceptions=False)
    facts = json.loads(found.stdout)
    rows = {row["name"]: row for row in facts["coverage"]}
    assert rows["model.layers.0.mlp.down_proj"]["k"] == 6
    assert rows["model.layers.0.self_attn.q_proj"]["k"] == 8
    for row in rows.values():
        assert 0.3 < row["covered"] <= 1
        assert 0 < row["task_free"] < 1
        assert 1 <= row["task_rank_free"] <= row["features"] - row["k"]
    one, other = (SafetySubspace.load(files / name).bases for name in "ab")
    assert one.keys() == other.keys()
    for name in one:  # the model was read twice
        assert one[name]["in"].shape == other[name]["in"].shape
        assert float(principal_cosines(one[name]["in"], other[name]["in"]).min()) > 0.999


def test_coverage_is_the_energy_inside_and_survives_a_file(tmp_path):
    model, batches = tiny_llama(), to_batches(HARMFUL, tiny_tokenizer(), batch_size=4, max_length=64)[0]
    space = SafetySubspace.from_activations(
        model, batches, method="guardspace", rank=5, target_modules="all-linear", progress=False
    )
    loaded, same = (
        {row["name"]: row for row in coverage_report.to_json(coverage(s))}
        for s in (SafetySubspace.load(space.save(tmp_path)), space)
    )
    assert loaded == same
    inputs = {}
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.register_forward_pre_hook(lambda _, args: inputs.setdefault("x", args[0].detach()))
    batch = batches[0]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    x = inputs["x"][batch["attention_mask"] != 0].double()
    q = space.bases["model.layers.1.mlp.down_proj"]["in"].double()
    row = next(row for row in coverage(space) if row.name == "model.layers.1.mlp.down_proj")
    assert row.covered == pytest.approx(float((x @ q).square().sum() / x.square().sum()), abs=1e-5)
    assert float(row.curve[-1]) == pytest.approx(row.covered)
    assert float(row.curve[0]) == pytest.approx(float((x @ q[:, :1]).square().sum() / x.square().sum()), abs=1e-5)


def test_the_tasks_share_outside_is_what_a_dense_computation_gives():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    layers = target_layers(model, ["q_proj", "down_proj"])
    space = SafetySubspace.from_activations(
        model, HARMFUL, tokenizer=tokenizer, method="guardspace", rank=5, layers=layers, progress=False
    )
    batches = to_batches(TASK, tokenizer, batch_size=20, max_length=256)[0]
    shares = task_inputs(model, layers, space, batches, ranks=True, progress=False)[1]
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    model(input_ids=batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"])
    for hook in hooks:
        hook.remove()
    for name, share in shares.items():
        x = inputs[name][batches[0]["attention_mask"] != 0].double()
        q = space.bases[name]["in"].double()
        outside = x - x @ q @ q.T
        assert share.free == pytest.approx(float(outside.square().sum() / x.square().sum()), rel=1e-3)
        assert share.curve.shape == (5,)
        assert float(share.curve[-1]) == share.free
        two = x - x @ q[:, :2] @ q[:, :2].T
        assert float(share.curve[1]) == pytest.approx(float(two.square().sum() / x.square().sum()), rel=1e-3)
        for found, matrix in ((share.rank, x), (share.rank_free, outside)):
            energy = torch.linalg.svdvals(matrix).square().cumsum(0)
            assert abs(found - (int((energy < 0.99 * energy[-1]).sum()) + 1)) <= 1
    assert warn_if_stalled(shares) > 0


def test_identical_task_data_are_recognized_whatever_the_batches():
    tokenizer = tiny_tokenizer()
    one, other = (
        to_batches(HARMFUL, tokenizer, batch_size=1, max_length=64)[0],
        to_batches(HARMFUL[::-1], tokenizer, batch_size=3, max_length=64)[0],
    )
    assert content_digest(one) == content_digest(other) != content_digest(one[1:])
    model = tiny_llama()
    layers = target_layers(model, ["q_proj"])
    space = SafetySubspace.from_activations(model, one, method="guardspace", rank=4, layers=layers, progress=False)
    with pytest.raises(CalibrationError, match="that the subspace was calibrated on"):
        task_inputs(model, layers, space, HARMFUL[::-1], tokenizer=tokenizer, batch_size=2)


def test_rows_of_a_prompt_alone_may_stand_among_complete_ones():
    rows = calibration_rows("guardspace", "both")
    assert calibration_rows("guardspace") + calibration_rows("ortho_patch") == rows
    batches, _ = to_batches([*HARMFUL, {"prompt": "hello"}], tiny_tokenizer(), batch_size=5, max_length=64)
    assert int(((batches[0]["labels"] != -100).sum(1) == 0).sum()) == 1
    with pytest.raises(DataError, match="basis='evil'"):
        calibration_rows("guardspace", "evil")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "salora", "task_data": "task.jsonl"}, "has no input side here"),
        ({"method": "weight", "basis": "harmful"}, "reads weights only"),
        ({"data": "data.jsonl", "basis": "harmful"}, "Give either"),
        ({"safety_rank": 4, "safety_energy": 1.5}, "safety_energy=1.5"),
        ({"safety_rank": 0}, "safety_rank=0"),
        ({"method": "weight", "safety_rank_pattern": {"odd": 3}}, "no target module"),
        ({"side": "left"}, "side 'left'"),
        ({"data": "data.jsonl", "safety_rank_pattern": {"odd": 3}}, "no target module"),
    ],
    ids=str,
)
def test_calibrations_that_cannot_be_meant(options, said, files):
    paths = {name: files / value for name, value in options.items() if name in ("data", "task_data")}
    with pytest.raises(ConfigError, match=said):
        calibrate(files / "model", files / "out", **{**options, **paths}, max_length=64, progress=False)


@pytest.mark.parametrize("text", ["down_proj", "down_proj=big"])
def test_a_malformed_size_by_kind_is_refused(text, files):
    command = ["calibrate", "--model", "nowhere", "--out", str(files), "--safety-rank-pattern", text]
    assert "Write a kind of module and a number" in str(CliRunner().invoke(app, command).exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lora", "init": "guardspace"}, "'lora' has no option 'init'"),
        ({"method": "salora", "init": "guardspace"}, "one of lora, task"),
        ({"method": "guardspace", "init": "task"}, "one of lora, guardspace"),
        ({"method": "salora", "positions": "prompt"}, "'salora' has no option 'positions'"),
        ({"method": "lora", "safety_rank": 4}, "'lora' has no option 'safety_rank'"),
        ({"safety_rank": 4, "safety_energy": 1.5}, "safety_energy=1.5"),
        ({"method": "lora", "combine": "salora"}, "'lora' has no option 'combine'"),
    ],
    ids=str,
)
def test_options_of_another_method_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        adapter_config(**options)


def test_with_task_rows_a_is_frozen_unless_something_speaks_against_it():
    rows = [{"prompt": "a", "response": "b"}]
    assert GuardSpaceConfig().train == GuardSpaceConfig(task_data=rows, combine="salora").train == "A"
    assert GuardSpaceConfig(task_data=rows, init="guardspace").train == "A"
    assert GuardSpaceConfig(task_data=rows, a_init="random").train == "A"
    assert GuardSpaceConfig(task_data=rows).train == adapter_config("guardspace").train == "B"
    assert GuardSpaceConfig(task_data=rows, train="A").train == adapter_config("guardspace", train="A").train == "A"
    assert adapter_config("guardspace", combine="salora").train == "A"

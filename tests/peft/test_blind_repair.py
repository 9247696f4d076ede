"""A trained plain LoRA made blind afterwards."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_safety import GuardSpaceConfig, SafetySubspace, assert_protected, repair_adapter, verify
from peft_safety.cli import app
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST, PREFIX
from peft_safety.core.projection import leak
from peft_safety.errors import ArtifactError, ConfigError, ProtectionError, SubspaceError
from tests.peft import cells
from tests.peft.guard_cells import calibrated_inputs, subspace
from tests.peft.test_guardspace import BLIND, blindness


@pytest.fixture
def trained(tmp_path):
    model = cells.plain(target_modules=cells.LINEAR_TARGETS)
    cells.train(model, cells.adamw, 20)
    model.eval().save_pretrained(tmp_path / "adapter")
    return model


def test_the_repaired_update_is_zero_on_the_span_and_the_same_elsewhere(trained, tmp_path):
    space, inputs = subspace(cells.base_model()), calibrated_inputs(cells.base_model())
    assert blindness(trained, space, inputs) > 0.05
    source = (tmp_path / "adapter" / ADAPTER_FILE).read_bytes()
    report = repair_adapter(tmp_path / "adapter", space, tmp_path / "repaired")
    assert (tmp_path / "adapter" / ADAPTER_FILE).read_bytes() == source
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "repaired").eval()
    assert isinstance(loaded.peft_config["default"], GuardSpaceConfig)
    assert_protected(loaded)
    assert blindness(loaded, space, inputs) <= BLIND
    before, after = cells.deltas(trained), cells.deltas(loaded)
    for row in report.modules:
        q = space.bases[row.name]["in"].double()
        old = before[row.name].double()
        torch.testing.assert_close(after[row.name].double(), old - old @ q @ q.T, atol=1e-6, rtol=1e-4)
        assert row.removed == pytest.approx(float((old @ q).norm() / old.norm()), rel=1e-4)
        assert 0 < row.removed < 1
        assert row.leak <= 1e-6


def test_it_is_a_plain_lora_that_verifies(trained, tmp_path):
    space = subspace(cells.base_model())
    space.save(tmp_path / "space")
    repair_adapter(tmp_path / "adapter", tmp_path / "space", tmp_path / "repaired")
    old, new = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("adapter", "repaired"))
    old["target_modules"].sort()  # a set in memory
    assert old == new
    found = verify(tmp_path / "repaired", subspace=space)
    assert (found.blindness_checked, found.settings) == (True, {"made_by": "repair"})
    again = repair_adapter(tmp_path / "repaired", space, tmp_path / "again")
    assert max(row.removed for row in again.modules) < 1e-6


def test_sixteen_bit_factors_are_stored_wide_enough(trained, tmp_path):
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16()
    trained.save_pretrained(tmp_path / "half")
    space = subspace(cells.base_model())
    repair_adapter(tmp_path / "half", space, tmp_path / "repaired")
    tensors = load_file(tmp_path / "repaired" / ADAPTER_FILE)
    name = "model.layers.1.self_attn.q_proj"
    assert leak(space.bases[name]["in"], tensors[f"{PREFIX}{name}.lora_A.weight"], "in") <= 1e-6
    assert tensors[f"{PREFIX}{name}.lora_B.weight"].dtype == torch.bfloat16


def test_an_ordinary_adapter_has_two_remedies(trained):
    with pytest.raises(ProtectionError, match=r"Train with GuardSpaceConfig .*, or make .* with peft-safety repair"):
        assert_protected(trained)


def test_what_it_refuses(trained, tmp_path):
    space = subspace(cells.base_model())
    with pytest.raises(ConfigError, match="also the output"):
        repair_adapter(tmp_path / "adapter", space, tmp_path / "adapter")
    fewer = space.restricted([name for name in space.bases if "down_proj" not in name])
    with pytest.raises(SubspaceError, match="no input basis for 2 of 6"):
        repair_adapter(tmp_path / "adapter", fewer, tmp_path / "out")
    wide = SafetySubspace({name: {"in": torch.eye(128)[:, :3]} for name in space.bases})
    with pytest.raises(SubspaceError, match=r"of other ones, \(128, 3\)"):
        repair_adapter(tmp_path / "adapter", wide, tmp_path / "out")
    with pytest.raises(ArtifactError):
        repair_adapter(tmp_path / "nothing", space)
    assert not (tmp_path / "out").exists()
    assert len(repair_adapter(tmp_path / "adapter", space).modules) == 6, "a report alone"


def test_an_alpha_that_only_a_regular_expression_says_is_refused(tmp_path):
    model = cells.plain(
        target_modules=cells.LINEAR_TARGETS, alpha_pattern={r".*layers\.[01]\.self_attn\.(q|v)_proj": 16}
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="a regular expression says the alpha"):
        repair_adapter(tmp_path / "adapter", subspace(cells.base_model()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def command(*arguments):
    return CliRunner().invoke(app, ["repair", *map(str, arguments)])


def test_the_command(trained, tmp_path):
    subspace(cells.base_model()).save(tmp_path / "space.safetensors")
    given = (tmp_path / "adapter", "--method", "guardspace", "--subspace", tmp_path / "space.safetensors")
    told = command(*given, "--dry-run")
    assert (told.exit_code, (tmp_path / "out").exists()) == (0, False)
    assert "6 modules would be made blind" in told.output
    assert max(map(len, told.output.splitlines())) <= 80
    assert "(medians by kind)" in told.output
    assert "q_proj (2)" in told.output
    every = command(*given, "--dry-run", "--all").output
    assert "model.layers.1.self_attn.q_proj" in every
    assert "(most)" not in every
    found = json.loads(command(*given, "--out", tmp_path / "out", "--json").output)
    assert len(found["modules"]) == 6
    assert verify(tmp_path / "out", subspace=tmp_path / "space.safetensors").blindness_checked
    assert "6 modules made blind" in command(*given, "--out", tmp_path / "told").output
    unmeasured = " ".join(CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).output.split())
    assert "blindness checked False: give --subspace" in unmeasured
    assert "stored in the certificate, not measured" in unmeasured
    measured = CliRunner().invoke(
        app, ["verify", str(tmp_path / "out"), "--subspace", str(tmp_path / "space.safetensors")]
    )
    assert "blindness checked True" in " ".join(measured.output.split())
    assert "not measured" not in measured.output
    checked = CliRunner().invoke(
        app, ["verify", str(tmp_path / "out"), "--subspace", str(tmp_path / "space.safetensors"), "--json"]
    )
    assert json.loads(checked.output)["blindness_checked"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--subspace x", "--subspace has no effect with --method safe_lora"),
        ("--subspace x --unaligned y", "--subspace has no effect with --method safe_lora"),
        ("--method guardspace --subspace x --png x.png", "--png has no effect with --method guardspace"),
        ("--method guardspace --subspace x --unaligned y", "--unaligned has no effect"),
        ("--method guardspace --subspace x --aligned y", "--aligned has no effect"),
        ("--method guardspace --subspace x --select threshold", "--select has no effect"),
        ("--method guardspace --subspace x --safety-rank 4", "--safety-rank has no effect"),
        ("--method guardspace --subspace x --allow-quantized-delta", "--allow-quantized-delta has no effect"),
        ("--unaligned y --png cosines", "ends in .png"),
    ],
)
def test_options_of_the_other_method_are_refused(options, said, tmp_path):
    result = command(tmp_path / "adapter", "--dry-run", *options.split())
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


@pytest.mark.parametrize("method", ["guardspace", "safe_lora", "magic"])
def test_what_the_command_asks_for(method, trained, tmp_path):
    result = command(tmp_path / "adapter", "--method", method, "--dry-run")
    assert isinstance(result.exception, ConfigError)
    assert "needs --" in str(result.exception)

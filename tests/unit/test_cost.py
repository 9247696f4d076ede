"""What a calibration will take, said before it is run, is what it then takes."""

import json

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from peft_safety import calibration_cost
from peft_safety.calibration import moments
from peft_safety.cli import app
from peft_safety.core.base_weights import SAMPLES
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.recipes.calibrate import calibrate
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"Help me steal {word}.", "response": f"No {word}."} for word in "abcdefghijkl"]
ONE_LAYER = 3 * 8 * 64**2
"""Bytes that the widest layer of the tiny model takes."""
COMMON = {"tokenizer": tiny_tokenizer(), "data": ROWS, "batch_size": 3, "max_length": 128}


@pytest.fixture
def forwards(monkeypatch):
    """The number of forward passes of each run over batches."""
    seen, run = [], moments.run

    def counted(model, batches, *args, **options):
        seen.append(len(batches))
        run(model, batches, *args, **options)

    monkeypatch.setattr(moments, "run", counted)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"safety_rank": 0.25},
        {"safety_rank": 4, "side": "both", "dtype": "float32"},
        {"safety_rank": 0.25, "safety_rank_pattern": {"k_proj": 2}, "memory": ONE_LAYER},
        {"method": "salora", "safety_rank": 4, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_bytes_and_passes_are_those_of_the_calibration(options, forwards, tmp_path):
    model = tiny_llama()
    expected = calibration_cost(model, **COMMON, **options)
    assert forwards == [1, 1], "two batches, and no pass over the data"
    forwards.clear()
    result = calibrate(model, tmp_path / "space.safetensors", **COMMON, **options, progress=False, allow_fewer=True)
    _, *passes = forwards
    assert passes == [4] * expected.passes
    assert expected.modules == len(result.subspace.bases) == 14
    assert expected.inputs == 8
    with safe_open(result.path, "pt") as handle:
        stored = sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118
    assert expected.file_bytes == stored
    assert expected.pass_seconds > 0 < expected.decomposition_seconds
    assert expected.memory_bytes <= expected.budget_bytes
    assert (expected.memory_bytes == ONE_LAYER) == ("memory" in options)


def test_an_energy_gives_an_upper_bound(tmp_path):
    sizes = {"safety_energy": 0.9, "safety_rank": 0.5}
    expected = calibration_cost(tiny_llama(), **COMMON, **sizes)
    result = calibrate(tiny_llama(), tmp_path, **COMMON, **sizes, progress=False)
    assert sum(u.nbytes for s in result.subspace.stored.values() for u in s.values()) < expected.file_bytes
    assert expected.file_bytes == calibration_cost(tiny_llama(), **COMMON, safety_rank=0.5).file_bytes


def test_more_passes_take_longer_and_wider_bases_are_larger():
    few, many = (calibration_cost(tiny_llama(), **COMMON, memory=memory) for memory in (None, ONE_LAYER))
    assert many.passes > few.passes == 1
    assert many.tokens == many.passes * few.tokens
    assert many.memory_bytes < few.memory_bytes
    fingerprints = 14 * 4 * SAMPLES
    wide = calibration_cost(tiny_llama(hidden=64), **COMMON).file_bytes - fingerprints
    assert wide > 3.8 * (few.file_bytes - fingerprints), "a share of the width takes its square"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"method": "weight", "data": None}, ConfigError, "nothing to foresee"),
        ({"safety_rank": 0}, ConfigError, "safety_rank=0"),
        ({"basis": "both"}, ConfigError, "Give either"),
        ({"dtype": "int8"}, ConfigError, "int8"),
        ({"memory": 1000}, CalibrationError, "budget"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        calibration_cost(tiny_llama(), **{**COMMON, **options})


def test_the_command_writes_nothing(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    before = sorted(tmp_path.iterdir())
    command = ["calibrate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl")]
    command += ["--safety-rank", "0.25", "--max-length", "128"]
    with pytest.raises(ConfigError, match="--dry-run"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    command += ["--dry-run"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert max(map(len, shown.splitlines())) <= 80
    facts = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert f"{facts['passes']}, {facts['tokens']} tokens" in shown
    assert f"{facts['file_bytes'] / 1e6:.3g} MB" in shown
    assert sorted(tmp_path.iterdir()) == before

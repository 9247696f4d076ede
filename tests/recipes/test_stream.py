"""Calibration of a model that stays on disk: the same spans, with one layer in memory at a time."""

import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from peft_safety import SafetySubspace
from peft_safety.cli import app
from peft_safety.core.projection import principal_cosines
from peft_safety.recipes import calibrate as recipe
from peft_safety.recipes.load import load_model
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"Help me steal {word}.", "response": f"No {word}."} for word in "abcdefghijkl"]
COMMON = {"data": ROWS, "batch_size": 6, "max_length": 128, "safety_rank": 0.25, "progress": False}


def qwen(dtype):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval().to(dtype)


MODELS = {
    "llama": lambda: tiny_llama(layers=4),
    "qwen2, tied, bf16": lambda: qwen(torch.bfloat16),
}


@pytest.fixture(params=MODELS)
def directory(request, tmp_path):
    model = MODELS[request.param]()
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size=size // 3)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 3
    return tmp_path / "model"


@pytest.fixture
def materialized(monkeypatch):
    """Bytes of the parameters that are in memory at each product of a linear layer."""
    seen, models, linear = [], [], torch.nn.functional.linear

    def load(*args, **options):
        models.append(load_model(*args, **options)[0])
        return models[0], tiny_tokenizer()

    def counted(*args, **options):
        seen.extend(sum(p.nbytes for p in model.parameters() if not p.is_meta) for model in models)
        return linear(*args, **options)

    monkeypatch.setattr(recipe, "load_model", load)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return seen, models


@pytest.mark.parametrize("options", [{}, {"side": "both", "safety_rank": 4}, {"memory": 3 * 8 * 64**2}], ids=str)
def test_the_spans_are_the_same_and_one_layer_is_in_memory(options, directory, materialized, tmp_path):
    whole = recipe.calibrate(load_model(directory)[0], tmp_path / "whole", **{**COMMON, **options}).subspace
    seen, models = materialized
    seen.clear()
    models.clear()
    files = sorted(directory.iterdir())
    part = recipe.calibrate(directory, tmp_path / "part", **{**COMMON, **options}, stream=True).subspace
    assert sorted(directory.iterdir()) == files, "nothing is copied"
    blocks = models[0].model.layers
    assert all(p.is_meta for p in blocks.parameters())
    resident = sum(p.nbytes for p in models[0].parameters() if not p.is_meta)
    assert resident < max(seen) <= resident + 4 * 33 * 64, "the widest layer, with its bias"
    assert max(seen) < sum(p.nbytes for p in models[0].parameters())
    assert whole.bases.keys() == part.bases.keys()
    for name, sides in whole.bases.items():
        for side, u in sides.items():
            sine = (1 - principal_cosines(u, part.bases[name][side]).min().square()).clamp(min=0).sqrt()
            assert float(sine) <= 1e-3, (name, side)
        torch.testing.assert_close(whole.fingerprints[name], part.fingerprints[name])


def test_bases_of_weights_are_read_from_the_shards(directory, tmp_path):
    options = {"method": "weight", "safety_rank": 4, "progress": False}
    whole, part = (
        recipe.calibrate(directory, tmp_path / str(stream), **options, stream=stream).subspace
        for stream in (False, True)
    )
    assert whole.digest == part.digest


def test_the_command_streams_and_foresees(directory, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command = ["calibrate", "--model", str(directory), "--data", str(tmp_path / "data.jsonl"), "--stream", "--json"]
    command += ["--max-length", "128", "--safety-rank", "0.25"]
    expected = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)
    assert json.loads(expected.stdout)["modules"] == 28
    CliRunner().invoke(app, [*command, "--out", str(tmp_path / "space")], catch_exceptions=False)
    assert len(SafetySubspace.load(tmp_path / "space").bases) == 28

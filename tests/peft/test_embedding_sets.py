"""Where the tokens of an embedding's constraint come from, and what its files may hold."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import Shard

from peft_safety import (
    SafetySubspace,
    assert_protected,
    calibrate,
    repair_adapter,
    verify,
)
from peft_safety.calibration.cost import cost
from peft_safety.core import files
from peft_safety.core.adapter_dir import sign
from peft_safety.core.base_weights import check_inputs
from peft_safety.core.projection import leak
from peft_safety.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    SubspaceError,
    UnsupportedLayerError,
)
from peft_safety.registry.frozen import set_task_directions
from tests.peft.embedding_cells import (
    INPUTS,
    LEAK,
    NAME,
    VOCABULARY,
    base_model,
    batch,
    calibrated,
    config,
    embedding,
    protected,
    train,
)


def test_the_set_is_that_of_the_tokens_that_count():
    """Padding does not count; the most frequent are first, whatever the size that is asked for."""
    subspace = calibrate(base_model(), config("B"), [batch(0, padded=3)], progress=False)
    counted = batch(0)["input_ids"][:, :9].reshape(-1)
    tokens, counts = counted.unique(return_counts=True)
    basis, spectrum = subspace.bases[NAME]["in"], subspace.spectra[NAME]["in"]
    assert basis.dtype == torch.int64
    assert sorted(basis.tolist()) == tokens.tolist()
    expected = dict(zip(tokens.tolist(), counts.tolist(), strict=True))
    assert spectrum.square().round().int().tolist() == [expected[t] for t in basis.tolist()]
    assert spectrum.tolist() == sorted(spectrum.tolist(), reverse=True)
    assert subspace.rank("model.layers.0.self_attn.q_proj", "in") == 4


def test_the_file_holds_indices(tmp_path):
    path = calibrated("B").save(tmp_path)
    stored = load_file(path)[f"basis.in.{NAME}"]
    assert (stored.dtype, stored.ndim) == (torch.int64, 1)
    loaded = SafetySubspace.load(path)
    assert loaded.digest == calibrated("B").digest
    assert torch.equal(loaded.bases[NAME]["in"], calibrated("B").bases[NAME]["in"])
    assert len(SafetySubspace.load(path, rank=3).bases[NAME]["in"]) == 3


@pytest.mark.parametrize(
    "tokens", [torch.tensor([1, 1]), torch.tensor([-1, 2]), torch.tensor([], dtype=torch.int64)], ids=str
)
def test_what_is_no_set_of_tokens_is_refused(tokens):
    with pytest.raises(SubspaceError, match="no set of tokens"):
        SafetySubspace({NAME: {"in": tokens}})


def test_tokens_of_another_vocabulary_are_refused():
    for tokens, module in (([5, VOCABULARY], NAME), (list(range(VOCABULARY)), NAME), ([5], "lm_head")):
        subspace = SafetySubspace({module: {"in": torch.tensor(tokens)}})
        with pytest.raises(SubspaceError, match="tokens up to"):
            get_peft_model(base_model(), config("B", target_modules=[module], subspace=subspace))


def test_task_rows_train_the_other_tokens_of_the_task():
    layer = embedding(protected("B, task"))
    a = layer.lora_embedding_A["default"]
    seen, own = set(batch(0)["input_ids"].flatten().tolist()), set(batch(7)["input_ids"].flatten().tolist())
    trained = set(a.abs().sum(0).nonzero().flatten().tolist())
    assert trained == own - seen
    assert set(a[:, sorted(trained)].abs().flatten().tolist()) == {1.0}


def test_a_task_without_tokens_of_its_own_trains_all_others():
    model = protected("B", task_data=None)
    set_task_directions(model, [{key: value.flip(1) for key, value in batch(0).items()}])
    free = embedding(model).lora_embedding_A["default"].abs().sum(0) > 0
    assert int(free.sum()) == VOCABULARY - len(batch(0)["input_ids"].unique())


def test_the_cost_of_a_calibration_counts_tokens_not_a_vocabulary():
    options = {"method": "guardspace", "rank": 4}
    one, two = (
        cost(base_model(), [batch(0)], target_modules=targets, **options).file_bytes
        for targets in (["q_proj"], ["q_proj", "embed_tokens"])
    )
    assert 0 < two - one < 12 * VOCABULARY + 4 * 256 + 1


def test_an_output_basis_holds_the_embeddings_of_what_counts():
    subspace = calibrate(base_model(), config("salora"), [batch(0)], progress=False)
    rows = base_model().model.embed_tokens.weight.detach()[batch(0)["input_ids"].reshape(-1)]
    top = torch.linalg.svd(rows.double().mT).U[:, :4]
    assert float(torch.linalg.svdvals(top.mT @ subspace.bases[NAME]["out"].double()).min()) > 0.999


@pytest.mark.parametrize("kind", ["B", "A", "patch"])
def test_directions_of_the_weight_are_dense(kind, tmp_path):
    """A basis need not be a set of tokens."""
    options = {"rank": 4, "sides": ("in",), "target_modules": ["embed_tokens"], "progress": False}
    subspace = SafetySubspace.from_weights(base_model(), **options)
    assert subspace.bases[NAME]["in"].shape == (VOCABULARY, 4)
    model = train(get_peft_model(base_model(), config(kind, target_modules=["embed_tokens"], subspace=subspace)))
    assert_protected(model)
    assert leak(subspace.bases[NAME]["in"], embedding(model).lora_embedding_A["default"].detach(), "in") < LEAK
    model.save_pretrained(str(tmp_path))
    assert verify(tmp_path, base_model()).worst_leak < LEAK


def test_a_contrastive_set_leaves_the_tokens_of_the_other_data():
    options = {"method": "guardspace", "rank": 4, "target_modules": ["embed_tokens"], "progress": False}
    data, other = batch(0), batch(1)
    subspace = SafetySubspace.from_activations(base_model(), [data], against=[other], **options)
    wanted = set(data["input_ids"].flatten().tolist()) - set(other["input_ids"].flatten().tolist())
    assert set(subspace.bases[NAME]["in"].tolist()) == wanted
    with pytest.raises(CalibrationError, match="none that the other data lack"):
        SafetySubspace.from_activations(base_model(), [data], against=[data], **options)
    everything = {"input_ids": torch.arange(VOCABULARY)[None]}
    with pytest.raises(CalibrationError, match="nothing is left to train"):
        SafetySubspace.from_activations(base_model(), [everything], **options)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_patch_is_not_stacked_on_one_of_an_embedding(target, tmp_path):
    """On the model or in a directory; beside it is fine."""
    model = train(protected("patch"))
    model.save_pretrained(str(tmp_path))
    for prior in ("default", str(tmp_path)):
        given = config("patch", target_modules=["q_proj", target], prior_patches=[prior], safety_rank=4)
        given.subspace = SafetySubspace.from_weights(
            base_model(), rank=4, sides=("in",), target_modules=["q_proj", target], progress=False
        )
        host = (
            model
            if prior == "default"
            else get_peft_model(base_model(), config("patch", subspace=calibrated("patch")))
        )
        if target == "lm_head":
            host.add_adapter("next", given)
            continue
        with pytest.raises(ConfigError, match="no linear layers"):
            host.add_adapter("next", given)


def test_repair_makes_a_plain_adapter_blind(tmp_path):
    torch.manual_seed(0)
    given = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    train(get_peft_model(base_model(), given)).save_pretrained(str(tmp_path / "plain"))
    repair_adapter(tmp_path / "plain", calibrated("B"), tmp_path / "blind")
    assert verify(tmp_path / "blind", base_model(), calibrated("B")).worst_leak < LEAK
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "blind"))
    assert_protected(loaded)
    seen = batch(0)["input_ids"]
    assert torch.equal(embedding(loaded)(seen), base_model().model.embed_tokens(seen))


def test_two_forms_of_one_factor_are_refused(tmp_path):
    """The second one would be loaded or not, and nobody has checked it."""
    for kind in ("B", "A"):
        folder = tmp_path / kind
        train(protected(kind), 1).save_pretrained(str(folder))
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[f"base_model.model.{NAME}.lora_A.weight"] = torch.ones(2, VOCABULARY)
        save_file(tensors, file, {"format": "pt"})
        if kind == "A":
            manifest = folder / "adapter_config.json"
            content = json.loads(manifest.read_text())
            content["safety_artifact"]["files"][file.name] = files.sha256(file)
            sign(content)
            manifest.write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match="two factors"):
            PeftModel.from_pretrained(base_model(), str(folder))


def test_factors_of_an_embedding_do_not_load_onto_a_linear_layer(tmp_path):
    class Square(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    for kind, side in (("B", "in"), ("salora", "out")):
        space = SafetySubspace({"layer": {side: torch.eye(8)[:, :2]}})
        given = config(kind, target_modules=["layer"], subspace=space)
        get_peft_model(Square(nn.Embedding(8, 8)), given).save_pretrained(str(tmp_path / kind))
        with pytest.raises(ArtifactError, match="not those of"):
            PeftModel.from_pretrained(Square(nn.Linear(8, 8)), str(tmp_path / kind))


@pytest.mark.parametrize("kind", INPUTS)
def test_it_compiles_in_one_graph(kind):
    layer = embedding(train(protected(kind)))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    everything = torch.arange(VOCABULARY)[None]
    torch.testing.assert_close(compiled(everything), layer(everything))


def test_vocabularies_that_are_split_between_processes_are_refused():
    """The rows of an embedding are inputs, those of a linear layer outputs."""
    layer = nn.Embedding(VOCABULARY, 4)
    del layer.weight
    split = SimpleNamespace(device_mesh=SimpleNamespace(mesh_dim_names=("tp",)), placements=[Shard(0)])
    vars(layer)["weight"] = split
    with pytest.raises(UnsupportedLayerError, match="splits the inputs of this Embedding"):
        check_inputs(layer, "embed")
    split.placements = [Shard(1)]
    check_inputs(layer, "embed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peft_casts_the_frozen_factor_and_not_what_a_look_up_rounds(dtype):
    options = {"rank": 4, "sides": ("in",), "target_modules": ["embed_tokens"], "progress": False}
    subspace = SafetySubspace.from_weights(base_model(), **options)
    given = config("B", target_modules=["embed_tokens"], subspace=subspace)
    model = get_peft_model(base_model(dtype=dtype), given)
    a = dict(embedding(model).lora_embedding_A.items())["default"]
    assert (a.dtype, a.requires_grad) == (torch.float32, False)
    assert leak(subspace.bases[NAME]["in"], a.detach(), "in") < LEAK


def test_peft_freezes_the_factor_of_every_adapter():
    model = protected("B")
    model.add_adapter("two", config("B", subspace=calibrated("B")))
    for adapter in ("two", "default", "two"):
        model.set_adapter(adapter)
        model.set_requires_grad(adapter, True)
        trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert not any("_A" in name for name in trained)
        assert any("lora_embedding_B" in name for name in trained)


def test_a_constrained_factor_that_peft_casts_stays_the_parameter_that_trains():
    model = protected("A")
    table = embedding(model).lora_embedding_A
    before = dict(table.items())["default"]
    table["default"] = table["default"].to(torch.float64)
    after = dict(table.items())["default"]
    assert after is before
    assert (after.dtype, after.requires_grad) == (torch.float64, True)
    assert_protected(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_mask": torch.ones(3, 12)}, "no mask of"),
        ({"attention_mask": torch.ones(2, 13)}, "no mask of"),
        ({"input_ids": torch.rand(2, 12)}, "must be tensors of one shape"),
    ],
    ids=["rows", "tokens", "no integers"],
)
def test_batches_that_do_not_fit_are_refused_before_the_model_runs(change, says):
    with pytest.raises(CalibrationError, match=says):
        calibrate(base_model(), config("B"), [{**batch(0), **change}], progress=False)

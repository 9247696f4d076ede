"""Adapters on embeddings: their inputs are tokens, and what the update is blind to is a set of tokens."""

import copy
import json
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    export_lora,
    merge_quantized,
    orthogonality_report,
    repair_adapter,
    verify,
)
from peft_safety.calibration.cost import cost
from peft_safety.convert.export import export_directory
from peft_safety.core import files
from peft_safety.core.adapter_dir import sign
from peft_safety.core.projection import leak
from peft_safety.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    LossyMergeError,
    ProtectionError,
    SubspaceError,
    UnsupportedLayerError,
)
from peft_safety.layers.factor_table import FactorTable
from peft_safety.registry.frozen import set_task_directions

NAME = "model.embed_tokens"
VOCABULARY, WIDTH = 99, 32
LEAK = 1e-6


@cache
def built(tied):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)).eval()


def base_model(tied=False, dtype=torch.float32):
    return copy.deepcopy(built(tied)).to(dtype)


def batch(seed, low=0, high=VOCABULARY, padded=0):
    ids = torch.randint(low, high, (2, 12), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    attention[:, 12 - padded :] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": ids}


CONFIGS = {
    "B": lambda **o: GuardSpaceConfig(**o, train="B", a_init="random"),
    "B, task": lambda **o: GuardSpaceConfig(**o, train="B", task_data=[batch(7)]),
    "A": lambda **o: GuardSpaceConfig(**o, train="A"),
    "salora": SaLoRAConfig,
    "patch": OrthoSafetyPatchConfig,
}
INPUTS = ("B", "B, task", "A", "patch")


def config(kind, **options):
    common = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], "safety_rank": 4}
    return CONFIGS[kind](**{**common, **options})


@cache
def calibrated(kind):
    return calibrate(base_model(), config(kind), [batch(0)], progress=False)


def protected(kind, dtype=torch.float32, **options):
    return get_peft_model(base_model(dtype=dtype), config(kind, subspace=calibrated(kind), **options))


def train(model, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()(**batch(step + 20)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def outputs(model, seed=99):
    with torch.no_grad():
        return model(**batch(seed)).logits.float()


def embedding(model):
    return model.get_base_model().model.embed_tokens


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_trains_and_lives(kind, tmp_path):
    model = protected(kind)
    torch.testing.assert_close(outputs(model), outputs(base_model()))
    train(model)
    assert_protected(model)
    got, layer = outputs(model), embedding(model)
    assert float(layer.get_delta_weight("default").detach().norm()) > 0.1
    for side, basis in calibrated(kind).bases[NAME].items():
        table = layer.lora_embedding_B if side == "out" else layer.lora_embedding_A
        assert leak(basis, table["default"].detach(), side) < LEAK
    model.save_pretrained(str(tmp_path / "native"))
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "native")).eval()
    assert_protected(loaded)
    torch.testing.assert_close(outputs(loaded), got, rtol=1e-6, atol=1e-6)
    assert verify(tmp_path / "native", base_model()).worst_leak < LEAK
    export_lora(model, tmp_path / "model")
    export_directory(tmp_path / "native", tmp_path / "directory")
    for name in ("model", "directory"):
        plain = PeftModel.from_pretrained(base_model(), str(tmp_path / name)).eval()
        torch.testing.assert_close(outputs(plain), got, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tokens_of_the_calibration_keep_their_embedding_exactly(kind, dtype):
    """In any precision, while training, and after a merge; others are trained."""
    seen = batch(0)["input_ids"].unique()
    others = torch.tensor([t for t in range(VOCABULARY) if t not in set(seen.tolist())])
    before = base_model(dtype=dtype).model.embed_tokens
    model = train(protected(kind, dtype))
    for state in (model, model.train()):
        assert torch.equal(embedding(state)(seen), before(seen))
    assert not torch.equal(embedding(model)(others), before(others))
    merged = model.eval().merge_and_unload().model.embed_tokens
    assert torch.equal(merged(seen), before(seen))


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


def test_nothing_trains_a_frozen_factor():
    model = protected("B")
    layer = embedding(model)
    raw = layer.lora_embedding_A.default
    raw.requires_grad_(True)
    model(**batch(3)).loss.backward()
    assert raw.grad is None
    assert layer.lora_embedding_B.default.grad is not None
    assert not copy.deepcopy(model).get_base_model().model.embed_tokens.lora_embedding_A["default"].requires_grad
    raw.data[:, calibrated("B").bases[NAME]["in"][0]] = 1.0
    with pytest.raises(ProtectionError, match="has changed"):
        assert_protected(model)


@pytest.mark.parametrize("kind", ["A", "salora"])
def test_every_look_up_and_every_reader_gets_a_projected_factor(kind):
    model = protected(kind)
    side = "out" if kind == "salora" else "in"
    layer, basis = embedding(model), calibrated(kind).bases[NAME][side]
    table = layer.lora_embedding_B if side == "out" else layer.lora_embedding_A
    assert isinstance(table, FactorTable)
    nn.init.normal_(table.default)
    assert leak(basis, table["default"].detach(), side) < LEAK
    assert leak(basis, table.default.detach(), side) > 0.1
    state = model.state_dict()
    assert leak(basis, next(v for k, v in state.items() if table.default.data_ptr() == v.data_ptr()), side) < LEAK
    nn.init.normal_(table.default)
    model.eval()
    assert leak(basis, table.default.detach(), side) < LEAK


def test_a_factor_in_16_bits_is_saved_in_fp32(tmp_path):
    model = get_peft_model(
        base_model(dtype=torch.bfloat16),
        config("salora", subspace=calibrated("salora")),
        autocast_adapter_dtype=False,
    )
    train(model).save_pretrained(str(tmp_path))
    assert embedding(model).lora_embedding_B.default.dtype == torch.bfloat16
    assert verify(tmp_path).worst_leak < LEAK


@pytest.mark.parametrize("kind", ["B", "salora"])
@pytest.mark.parametrize("how", ["linear", "svd", "cat"])
def test_weighted_combinations_stay_protected(kind, how):
    model = protected(kind)
    model.add_adapter("other", model.peft_config["default"])
    train(model)
    nn.init.normal_(embedding(model).lora_embedding_B.other)
    model.eval()
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", combination_type=how)
    model.set_adapter("both")
    assert_protected(model)
    updates = [embedding(model).get_delta_weight(name).detach() for name in ("default", "other", "both")]
    side = "out" if kind == "salora" else "in"
    assert leak(calibrated(kind).bases[NAME][side], updates[2].mT, side) < 1e-5
    if how == "cat":
        torch.testing.assert_close(updates[2], 0.7 * updates[0] + 0.5 * updates[1], rtol=1e-3, atol=1e-4)


def test_tied_embeddings_are_not_merged_and_not_tied_by_peft():
    given = config("B", subspace=calibrated("B"))
    model = train(get_peft_model(base_model(tied=True), given))
    for merge in (model.merge_and_unload, lambda: merge_quantized(model, verbose=False)):
        with pytest.raises(LossyMergeError, match="tied to"):
            merge()
    tying = config("B", subspace=calibrated("B"), ensure_weight_tying=True)
    with pytest.raises(UnsupportedLayerError, match="ensure_weight_tying"):
        get_peft_model(base_model(tied=True), tying)


@pytest.mark.parametrize("to", ["16bit", "nf4+residual"])
@pytest.mark.parametrize("kind", ["B", "salora"])
def test_our_own_merge(kind, to):
    model = train(protected(kind))
    got = outputs(model)
    result = merge_quantized(model, to, verbose=False)
    torch.testing.assert_close(outputs(result.model), got, rtol=1e-5, atol=1e-5)
    row = next(row for row in result.modules if row.module == NAME)
    assert row.norm > 0
    assert row.leak is None or row.leak < 1e-5


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


def test_what_an_embedding_cannot_have_is_refused(tmp_path):
    window = GuardSpaceConfig(r=2, target_modules=["embed_tokens"], train="window", a_init="random")
    window.subspace = calibrated("B")
    with pytest.raises(UnsupportedLayerError, match="a window of few directions"):
        get_peft_model(base_model(), window)
    limited = base_model()
    limited.model.embed_tokens.max_norm = 1.0
    with pytest.raises(UnsupportedLayerError, match="max_norm"):
        get_peft_model(limited, config("B", subspace=calibrated("B")))
    model = protected("B")
    model.save_pretrained(str(tmp_path / "native"))
    with pytest.raises(ConfigError, match="cannot be hot-swapped"):
        hotswap_adapter(model, str(tmp_path / "native"), "default")
    with pytest.raises(UnsupportedLayerError, match="only linear layers"):
        orthogonality_report(model, progress=False)
    with pytest.raises(SubspaceError, match="no random directions"):
        calibrated("B").randomized()
    with pytest.raises(ConfigError, match="not known to read"):
        export_lora(model, tmp_path / "served", server="vllm")


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


def test_it_resumes(tmp_path):
    """Loading onto an existing adapter takes the stored factors, and leaves them constrained."""
    for kind in ("B", "A", "salora"):
        model = train(protected(kind))
        model.save_pretrained(str(tmp_path / kind))
        again = protected(kind)
        again.load_adapter(str(tmp_path / kind), "default", is_trainable=True)
        assert_protected(again)
        torch.testing.assert_close(outputs(again.eval()), outputs(model), rtol=1e-6, atol=1e-6)
        assert_protected(train(again))


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

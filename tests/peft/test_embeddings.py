"""Adapters on embeddings: their inputs are tokens, and what the update is blind to is a set of tokens."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_safety import (
    GuardSpaceConfig,
    assert_protected,
    export_lora,
    merge_quantized,
    orthogonality_report,
    verify,
)
from peft_safety.convert.export import export_directory
from peft_safety.core.projection import leak
from peft_safety.errors import (
    ConfigError,
    LossyMergeError,
    ProtectionError,
    SubspaceError,
    UnsupportedLayerError,
)
from peft_safety.layers.factor_table import FactorTable
from tests.peft.embedding_cells import (
    CONFIGS,
    INPUTS,
    LEAK,
    NAME,
    VOCABULARY,
    base_model,
    batch,
    calibrated,
    config,
    embedding,
    outputs,
    protected,
    train,
)


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

"""Layers that calibration does not reach, and narrow ones: left out by name, with one warning, or given what they can
hold.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_safety import (
    GuardSpaceConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
    verify,
)
from peft_safety.calibration.batches import Counted
from peft_safety.calibration.moments import InputMoments
from peft_safety.calibration.positions import positions_of
from peft_safety.errors import CalibrationError, SubspaceError
from tests.peft.left_out_cells import ALL, TOWER, adapted, batch, guard, ours, with_tower
from tests.tiny import tiny_tokenizer

# --- layers that no token reaches
# ---


def test_one_line_works_with_a_tower_that_text_does_not_reach(tmp_path):
    base = with_tower()
    before = [module for module in base.model.tower.modules()]
    with pytest.warns(
        UserWarning, match=r"2 of 16 target layers are left out of the subspace.*model\.tower\.0, model\.tower\.1\.fc"
    ) as caught:
        space = guard(base)
    assert len(ours(caught)) == 1
    assert space.left_out == dict.fromkeys(TOWER, "unreached")
    space = SafetySubspace.load(space.save(tmp_path / "space"))
    with pytest.warns(
        UserWarning, match=r"2 of 16 target layers are left out of the adapter.*model\.tower\.0"
    ) as caught:
        model = get_peft_model(base, GuardSpaceConfig(r=4, subspace=space, target_modules="all-linear"))
    assert len(ours(caught)) == 1
    assert [module for module in model.base_model.model.model.tower.modules()] == before
    assert adapted(model) == set(space.bases)
    assert not any(p.requires_grad for p in model.base_model.model.model.tower.parameters())
    model(**batch()).loss.backward()
    assert_protected(model)
    model.save_pretrained(tmp_path / "adapter")
    assert verify(tmp_path / "adapter", with_tower()).modules == 14
    again = PeftModel.from_pretrained(with_tower(), tmp_path / "adapter")
    assert adapted(again) == set(space.bases)


@pytest.mark.filterwarnings("ignore:.*left out of the")
def test_a_second_adapter_leaves_the_same_layers_out_and_the_first_one_alone():
    space = guard(with_tower())
    model = get_peft_model(with_tower(), GuardSpaceConfig(r=4, subspace=space, target_modules="all-linear"))
    model.add_adapter("other", GuardSpaceConfig(r=2, subspace=space, target_modules="all-linear"))
    assert adapted(model) == set(space.bases)
    for name in ("default", "other"):
        assert_protected(model, name)


def test_auto_warns_once_and_protects_the_rest(monkeypatch):
    monkeypatch.setattr("peft_safety.calibration.models.tokenizer_of", lambda model: tiny_tokenizer())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(with_tower(), SaLoRAConfig(r=4, safety_rank=4, target_modules="all-linear"))
    (said,) = ours(caught)
    assert "2 of 16" in said
    assert adapted(model).isdisjoint(TOWER)
    assert_protected(model)


@pytest.mark.parametrize("exclude", [TOWER, ["0", "fc"], r"model\.tower\..*"])
def test_excluded_layers_are_neither_calibrated_nor_adapted(exclude):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        space = guard(with_tower(), exclude_modules=exclude)
        assert set(SafetySubspace.from_weights(with_tower(), rank=2, exclude_modules=exclude, **ALL).bases) == set(
            space.bases
        )
        model = get_peft_model(
            with_tower(), GuardSpaceConfig(r=4, subspace=space, target_modules="all-linear", exclude_modules=exclude)
        )
    assert adapted(model) == set(space.bases)
    assert space.left_out == {}


def test_what_lacks_a_basis_for_another_reason_is_refused_with_a_pattern_that_works():
    space = guard(with_tower(), exclude_modules=TOWER).restricted(
        [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    )
    config = {"r": 4, "subspace": space, "target_modules": "all-linear"}
    with pytest.raises(SubspaceError, match=r"and 11 more: .* 14 of 16 layers") as error:
        get_peft_model(with_tower(), GuardSpaceConfig(**config))
    advice = re.search(r'exclude_modules=r"(.*)"', str(error.value))[1]
    model = get_peft_model(with_tower(), GuardSpaceConfig(**config, exclude_modules=advice))
    assert adapted(model) == set(space.bases)


def test_data_that_reach_nothing_are_refused():
    with pytest.raises(
        CalibrationError, match=r"reaches any of the 2 target layers \(model\.tower\.0, model\.tower\.1\.fc\)"
    ):
        guard(with_tower(), target_modules=TOWER)


@pytest.mark.filterwarnings("ignore:.*left out of the")
def test_a_subspace_that_leaves_out_every_target_is_refused_and_the_model_is_as_it_was():
    base = with_tower()
    space = guard(base)
    with pytest.raises(SubspaceError, match="leaves out every layer"):
        get_peft_model(base, GuardSpaceConfig(r=2, subspace=space, target_modules=TOWER))
    assert not adapted(base)
    assert type(base.model.tower[0]) is nn.Linear


class Routed(nn.Module):
    """Two experts that are linear layers; token ids decide, and the last expert gets none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).flatten(0, 1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (input_ids.flatten() % 2) == index
            result[rows] = expert(x[rows])
        return result


def test_an_expert_without_a_token_is_left_out_and_the_others_span_their_own_tokens():
    model = Routed()
    with pytest.warns(UserWarning, match=r"1 of 3 target layers .*experts\.2"):
        space = guard(model, rank=4, target_modules=r"experts\.\d")
    assert space.left_out == {"experts.2": "unreached"}
    ids = batch()["input_ids"]
    for index in (0, 1):
        true = torch.linalg.svd(model.embed(ids[ids % 2 == index]).detach(), full_matrices=False).Vh[:4].mT
        assert float(torch.linalg.svdvals(space.bases[f"experts.{index}"]["in"].mT @ true).min()) > 0.999


def test_rows_that_cannot_be_told_from_padding_are_counted_and_said():
    padded = batch()
    padded["attention_mask"][0, 6:] = 0
    with pytest.warns(UserWarning, match=r"calibrating: 3 layers have inputs that do not line up"):
        guard(Routed(), [padded], rank=4, target_modules=r"experts\.\d")


# --- inputs of any shape
# ---

MASK = torch.tensor([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("lead", "counted"),
    [
        ((2, 3), 2),
        ((6,), 2),
        ((2,), 1),  # pooled: the first sequence
        ((2, 3, 5), 10),  # tokens, heads
        ((2, 5, 3), 10),  # heads, tokens
        ((2, 7), 7),  # patches of an image: those of the first sequence
    ],
)
def test_positions_by_the_shape_of_the_input(lead, counted):
    assert int(positions_of(lead, Counted((MASK,))).sum()) == counted
    model = nn.Module()
    model.fc = nn.Linear(4, 4, bias=False)
    moments = InputMoments({"fc": model.fc})
    with moments.watching():
        moments.expect(Counted((MASK,)))
        model.fc(input=torch.ones(*lead, 4))
    assert moments.moment("fc")[0, 0] == counted


def test_a_pooler_is_calibrated_on_one_row_a_sequence():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = BertForSequenceClassification(BertConfig(vocab_size=260, **sizes, num_labels=2)).eval()
    data = {**batch(), "labels": torch.arange(8) % 2}  # of sequences, not of tokens
    space = guard(model, [data], rank=3)
    assert {"bert.pooler.dense", "classifier"} <= set(space.bases)
    with torch.no_grad():
        first = model.bert(data["input_ids"]).last_hidden_state[:, 0]
    true = torch.linalg.svd(first, full_matrices=False).Vh[:3].mT
    assert float(torch.linalg.svdvals(space.bases["bert.pooler.dense"]["in"].mT @ true).min()) > 0.999
    model = get_peft_model(model, GuardSpaceConfig(r=4, subspace=space, target_modules="all-linear"))
    model(**data).loss.backward()
    assert_protected(model)


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("length", [7, 12])
def test_an_encoder_decoder_counts_prompts_in_the_encoder_and_labels_in_the_decoder(length):
    data = batch(rows=16)
    data["attention_mask"][0, 9:] = 0
    data["labels"] = torch.randint(4, 200, (16, length), generator=torch.Generator().manual_seed(1))
    data["labels"][1, 3:] = -100
    space = guard(t5(), [data], rank=4)
    assert space.left_out == {}
    assert space.provenance["tokens"] == int(data["attention_mask"].sum() + (data["labels"] != -100).sum())
    model = t5()
    with torch.no_grad():
        hidden = model.encoder(data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
    true = torch.linalg.svd(hidden[data["attention_mask"] != 0], full_matrices=False).Vh[:4].mT
    assert (
        float(torch.linalg.svdvals(space.bases["decoder.block.0.layer.1.EncDecAttention.k"]["in"].mT @ true).min())
        > 0.999
    )
    with pytest.warns(UserWarning, match="target layers are left out of the subspace"):
        out = SafetySubspace.from_activations(t5(), [data], rank=4, **ALL)
    assert {name for name in out.bases if name.startswith("encoder")} == set()
    assert "decoder.block.0.layer.0.SelfAttention.q" in out.bases

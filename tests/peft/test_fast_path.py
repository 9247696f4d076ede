"""PyTorch's own encoder: in eval mode its fast path would compute with the base weights and call no adapter."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_safety import GuardSpaceConfig, assert_protected, calibrate
from peft_safety.errors import UnsupportedLayerError
from tests.peft.test_frozen_parameters import batch


class Encoding(nn.Module):
    def __init__(self, nested):
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(32, 99)

    def forward(self, input_ids, attention_mask, labels=None):
        padding = None if bool(attention_mask.all()) else attention_mask == 0
        return self.head(self.encoder(self.embed(input_ids), src_key_padding_mask=padding))


def trained(nested=True, padded=0):
    torch.manual_seed(0)
    base = Encoding(nested).eval()
    config = GuardSpaceConfig(r=2, target_modules=["self_attn"], train="B", a_init="random", safety_rank=4)
    config.subspace = calibrate(base, config, [batch(0, padded)], progress=False)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            factor.add_(torch.randn_like(factor) if "lora_B" in name else 0)
    return model


@torch.no_grad()
def outputs(model, padded=0):
    return model(**batch(9, padded))[:1]  # the first row is not padded


@pytest.mark.parametrize(("nested", "padded"), [(True, 0), (False, 0), (False, 2)])
def test_in_eval_mode_the_adapter_computes_what_it_trains(nested, padded):
    model = trained(nested, padded)
    assert_protected(model)
    found = outputs(model.eval(), padded)
    torch.testing.assert_close(found, outputs(model.train(), padded), rtol=1e-4, atol=1e-4)
    merged = copy.deepcopy(model).eval().merge_and_unload()
    torch.testing.assert_close(outputs(merged, padded), found, rtol=1e-4, atol=1e-4)
    with model.eval().disable_adapter():
        assert float((outputs(model, padded) - found).abs().max()) > 0.1


def test_nested_tensors_are_refused_with_a_remedy():
    """Calibration needs none."""
    model = trained(padded=2).eval()
    with pytest.raises(UnsupportedLayerError, match="use_nested_tensor = False"):
        outputs(model, padded=2)
    model.get_base_model().encoder.use_nested_tensor = False
    torch.testing.assert_close(outputs(model, 2), outputs(model.train(), 2), rtol=1e-4, atol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()

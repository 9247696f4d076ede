"""ms-swift's own arguments, as its LoRA reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peft_safety import assert_protected
from peft_safety.errors import ConfigError
from tests.interop.framework_stand_ins import install_swift
from tests.peft import cells

ARGUMENTS = {
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_weights": True,
    "target_parameters": None,
    "task_type": "causal_lm",
    "lorap_lr_ratio": None,
    "lora_dtype": None,
}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Any:
    install_swift(monkeypatch)
    from peft_safety.integrations.ms_swift import ProtectedTuner

    def prepared(**arguments: Any) -> Any:
        model = cells.base_model()
        tuner = ProtectedTuner("salora", {"subspace": cells.random_subspace(model, cells.targets("linear"))})
        return tuner.prepare_model(SimpleNamespace(**{**ARGUMENTS, **arguments}), model)

    return prepared


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("causal_lm", "CAUSAL_LM"),
        ("embedding", None),
        ("generative_reranker", "CAUSAL_LM"),
        ("decision", "CAUSAL_LM"),
        ("reranker", "SEQ_CLS"),
    ],
)
@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_every_task_type_has_one_of_peft(prepared: Any, asked: str, expected: str | None) -> None:
    model = prepared(task_type=asked)
    assert model.peft_config["default"].task_type == expected
    assert_protected(model)


@pytest.mark.parametrize(("name", "value"), [("lorap_lr_ratio", 16.0), ("lora_dtype", "float32")])
def test_what_would_have_no_effect_is_refused(prepared: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{name}"):
        prepared(**{name: value})

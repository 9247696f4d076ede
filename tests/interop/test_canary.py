"""What this package relies on in PEFT is still there, still called, and is left as it was for plain LoRA."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_safety import assert_protected
from peft_safety.layers import protected_leaves
from peft_safety.methods.base import LAYER_BUILDERS
from peft_safety.registry import lora_layers, registration, tuners
from tests.interop import peft_symbols
from tests.interop.helpers import protected_llama, salora_config
from tests.tiny import tiny_llama

TABLE = peft_symbols.SYMBOLS | (peft_symbols.QUANTIZED if importlib.util.find_spec("bitsandbytes") else {})
SYMBOLS = [(module, symbol) for module, symbols in TABLE.items() for symbol in symbols]
BY_NAME = {
    "save_pretrained": {
        "safe_serialization",
        "selected_adapters",
        "is_main_process",
        "path_initial_model_for_weight_conversion",
    }
}
"""Arguments that a wrapper looks up by name, beside those that stand in its own signature."""


WRAPPED = registration.WRAPS
OVERRIDDEN = (
    (tuners.ProtectedLoraModel, "add_weighted_adapter"),
    (tuners.ProtectedLoraModel, "merge_adapter"),
    (tuners.ProtectedLoraModel, "_unload_and_optionally_merge"),
    (tuners.ProtectedLoraModel, "delete_adapter"),
    (tuners.ProtectedMixedModel, "_unload_and_optionally_merge"),
    (tuners.ProtectedMixedModel, "delete_adapter"),
    (lora_layers.LoraLinear, "get_delta_weight"),
    (lora_layers.LoraLinear, "merge"),
)
"""What subclasses of PEFT's classes override, where bitsandbytes is not needed for it."""


def label(row: tuple[Any, ...]) -> str:
    return f"{row[0].__name__}.{row[1]}"


@pytest.mark.parametrize(("module", "symbol"), SYMBOLS, ids=[f"{m}.{s}" for m, s in SYMBOLS])
def test_peft_has_each_symbol_that_is_relied_on(module: str, symbol: str) -> None:
    owner, _, attribute = symbol.rpartition(".")
    found = importlib.import_module(module)
    if owner == "LoraLayer":  # made by its constructor
        found = next(
            m
            for m in get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).modules()
            if isinstance(m, getattr(found, owner))
        )
    elif owner:
        found = getattr(found, owner)
    assert hasattr(found, attribute)


@pytest.mark.parametrize("row", WRAPPED, ids=label)
def test_each_wrapped_function_is_among_the_named_symbols(row: tuple[Any, str, Any]) -> None:
    owner, name, _ = row
    classes = [base.__name__ for base in owner.__mro__] if isinstance(owner, type) else [""]
    named = {symbol for _, symbol in SYMBOLS}
    assert any(f"{cls}.{name}".removeprefix(".") in named for cls in classes)


@pytest.mark.parametrize("row", WRAPPED, ids=label)
def test_each_wrapped_function_has_the_parameters_that_its_wrapper_passes(row: tuple[Any, str, Any]) -> None:
    owner, name, wrapper = row
    original = getattr(owner, name).__wrapped__
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    theirs = inspect.signature(original).parameters
    parameters = inspect.signature(wrapper).parameters.values()
    ours = [p.name for p in parameters if p.kind not in variable][1:]  # the first one is the original itself
    assert list(theirs)[: len(ours)] == ours
    assert set(theirs) >= BY_NAME.get(name, set())
    if inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters}:  # then it must know them all
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("row", OVERRIDDEN, ids=label)
def test_each_overriding_method_takes_what_it_overrides_takes(row: tuple[type, str]) -> None:
    owner, name = row
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    peft_class = next(base for base in owner.__mro__ if base.__module__.startswith("peft.") and hasattr(base, name))
    theirs = inspect.signature(getattr(peft_class, name)).parameters
    ours = inspect.signature(getattr(owner, name)).parameters.values()
    named = [p.name for p in ours if p.kind not in variable]
    assert named[:1] == ["self"]
    if name != "get_delta_weight":  # its argument has two names in PEFT
        assert list(theirs)[: len(named)] == named
    if inspect.Parameter.VAR_KEYWORD not in {p.kind for p in ours}:
        assert len(named) == len(theirs)


def test_peft_still_calls_each_wrapped_or_overridden_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT that no longer went through one of them would leave its protection out without an error."""
    rows = [*WRAPPED, *OVERRIDDEN]
    called = set()

    def spy(row: tuple[Any, ...]) -> None:
        owner, name, *_ = row
        found = getattr(owner, name)
        bound = isinstance(owner, type) and inspect.ismethod(found)
        inner = found.__func__ if bound else found

        def record(*args: Any, **kwargs: Any) -> Any:
            called.add(label(row))
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, classmethod(record) if bound else record)

    for row in rows:
        spy(row)
    model = protected_llama()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    loaded.add_weighted_adapter(["default"], [1.0], "both", combination_type="svd")
    loaded.set_adapter("default")
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    loaded.delete_adapter("both")
    prepare_model_for_compiled_hotswap(loaded, target_rank=8)
    hotswap_adapter(
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path)), str(tmp_path), "default", torch_device="cpu"
    )
    PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).merge_and_unload()
    get_peft_model(tiny_llama(), salora_config(), mixed=True).merge_and_unload()
    get_peft_model(tiny_llama(), salora_config(), mixed=True).delete_adapter("default")
    assert called == {label(row) for row in rows}


def test_the_functions_that_make_factors_are_known() -> None:
    """In them a protected config refuses to be read past the injection."""
    names = {code.co_qualname if hasattr(code, "co_qualname") else code.co_name for code in LAYER_BUILDERS}
    assert all(name.endswith("update_layer") for name in names)
    assert {peft.tuners.lora.LoraLayer.update_layer.__code__, peft.tuners.lora.Embedding.update_layer.__code__} <= (
        LAYER_BUILDERS
    )


def test_the_installed_peft_is_new_enough_for_the_installed_transformers() -> None:
    """pip does not see to it: transformers names no PEFT among its requirements, and asks at the first call of its
    adapter methods.
    """
    minimum = getattr(importlib.import_module("transformers.integrations.peft"), "MIN_PEFT_VERSION", "0")
    assert Version(peft.__version__) >= Version(minimum)


def test_few_functions_are_wrapped() -> None:
    assert len(WRAPPED) < 8


def test_registering_again_wraps_nothing_again() -> None:
    before = [getattr(owner, name) for owner, name, _ in WRAPPED]
    registration.register()
    assert [getattr(owner, name) for owner, name, _ in WRAPPED] == before
    assert not any(hasattr(function.__wrapped__, "__wrapped__") for function in before)


def test_a_plain_adapter_beside_a_protected_one_stays_plain() -> None:
    model = protected_llama()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    assert {name.rpartition(".")[2] for name, _ in protected_leaves(model)} == {"default"}
    assert_protected(model, "default")


def test_the_methods_take_their_arguments_by_any_way_peft_allows(tmp_path: Path) -> None:
    model = protected_llama()
    model.add_adapter("other", salora_config(seed=1))
    model.save_pretrained(str(tmp_path / "one"), True, ["default"])
    assert not (tmp_path / "one" / "other").exists()
    model.save_pretrained(str(tmp_path / "none"), True, ["default"], "auto", False)
    assert not list((tmp_path / "none").rglob("*.safetensors"))
    config = peft.PeftConfig.from_pretrained(pretrained_model_name_or_path=str(tmp_path / "one"))
    assert config.subspace.digest == model.peft_config["default"].subspace.digest
    loaded = PeftModel.from_pretrained(tiny_llama(), model_id=str(tmp_path / "one"), adapter_name="mine")
    assert_protected(loaded, "mine")


def test_public_names_stay_what_they_are_when_submodules_are_imported() -> None:
    import peft_safety

    for name in peft_safety.__all__:
        getattr(peft_safety, name)
        assert callable(getattr(peft_safety, name)), name

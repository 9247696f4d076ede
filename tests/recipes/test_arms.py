"""The models that are compared: one after the other on one base, which stays as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model

from peft_safety.core.missing import not_found
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.evaluation.asking import Asking
from peft_safety.evaluation.generate import Generation
from peft_safety.evaluation.judges.encoder import ClassifierJudge
from peft_safety.evaluation.kept import Kept
from peft_safety.recipes import arms
from peft_safety.recipes.arms import Local, Served, _names, local_arms
from peft_safety.recipes.load import load_adapter, load_model
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.arange(8).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("arms")
    for part in (tiny_llama(), tiny_tokenizer()):
        part.save_pretrained(str(path / "model"))
    for name, hidden, more in (("plain", 32, {}), ("head", 32, {"modules_to_save": ["lm_head"]}), ("wide", 64, {})):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
        model = get_peft_model(tiny_llama(hidden=hidden), config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "modules_to_save" in key:
                    weight.neg_()
        model.save_pretrained(str(path / name))
    return path


def logits(folder, *others, with_base=True):
    """Of each arm."""
    options = {"load_in_4bit": False, "with_base": with_base, "batch_size": 2, "progress": False}
    arms = local_arms(str(folder / "model"), [str(other) for other in others], Asking(), **options)
    with torch.no_grad():
        return {name: arm.model(IDS).logits for name, arm in arms}


def test_an_adapter_leaves_nothing_in_the_base(folder):
    """PEFT's `unload` keeps the `modules_to_save` of the adapter."""
    alone = logits(folder, folder / "plain")
    after = logits(folder, folder / "head", folder / "plain")
    assert not torch.allclose(after["head"], alone["base"])
    torch.testing.assert_close(after["base"], alone["base"])
    torch.testing.assert_close(after["plain"], alone["plain"])


def test_what_does_not_fit_or_is_not_there_is_refused_before_the_base_answers(folder):
    for others, error in ((["plain", "wide"], ArtifactError), (["plain", "missing"], ConfigError)):
        arms = local_arms(
            str(folder / "model"), [str(folder / name) for name in others], Asking(), load_in_4bit=False,
            with_base=True, batch_size=2, progress=False,
        )  # fmt: skip
        with pytest.raises(error):
            next(arms)


def test_a_directory_that_is_missing_is_told_without_a_word_of_the_hub(folder):
    absent, arms = str(folder / "plain" / "typo"), {"load_in_4bit": False, "with_base": True}
    for raised in (
        lambda: next(local_arms(str(folder / "model"), [absent], Asking(), **arms)),
        lambda: load_model(absent),
        lambda: load_model("no/such/path"),
        lambda: ClassifierJudge(absent),
    ):
        with pytest.raises(ConfigError, match=r"^no [a-z ]+ at '[^']+': no such directory\. Correct the path\.$"):
            raised()
    with pytest.raises(ConfigError, match=r"(?s)no/model'.*Give a directory or a Hub id\.$"):
        load_model("no/model")


def test_a_gated_model_is_told_beside_a_folder_of_its_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    gated = GatedRepoError("gated", response=response)
    for cause, said in ((gated, "ask for access"), (None, "no such directory")):
        error = OSError("ask for access")
        error.__cause__ = cause
        assert said in not_found("model", "owner/model", error)


def test_an_adapter_of_another_model_is_told_in_one_line(folder):
    with pytest.raises(ArtifactError, match=r"size mismatch for [^\n]* \(and \d+ more\)\. Give the model") as told:
        load_adapter(folder / "wide", folder / "model")
    assert str(told.value).count("size mismatch") == 1


def test_an_adapter_of_the_hub_is_put_on_the_base(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--plain"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(folder / "plain")
    monkeypatch.chdir(tmp_path)
    found = logits(folder, "me/plain", folder / "plain")
    torch.testing.assert_close(found["me/plain"], found["plain"])


class Asked:
    """An endpoint that counts what it is asked."""

    url, model = "http://localhost/v1", "tuned"

    def __init__(self):
        self.turns = []

    def ask_each(self, questions, **_):
        self.turns += questions
        yield from enumerate("no" for _ in questions)


@pytest.mark.parametrize("served", [True, False])
def test_an_arm_keeps_answers_only_where_it_is_told_to(monkeypatch, tmp_path, served):
    endpoint = Asked()

    def generate(model, tokenizer, prompts, **_):
        endpoint.turns += prompts
        return [Generation("no", True) for _ in prompts]

    monkeypatch.setattr(arms, "generate", generate)

    def asked(kept):
        local = {"model": tiny_llama(), "tokenizer": None, "batch_size": 2, "progress": False}
        arm = Served(endpoint, Asking(), kept=kept) if served else Local(**local, asking=Asking(), kept=kept)
        before = len(endpoint.turns)
        assert [arm.respond(["a", "b"], 0) for _ in range(2)] == [["no", "no"]] * 2
        return len(endpoint.turns) - before

    assert (asked(None), asked(Kept()), asked(Kept(tmp_path / "kept.jsonl"))) == (4, 2, 2)


def test_names_are_printable_and_different():
    assert _names(["x/a", "b", "base"]) == ["x/a", "b", "base (3)"]
    assert _names(["/x/a", "/y/a", "/z/a (2)"]) == ["x/a", "y/a", "z/a (2)"], "the folder above tells them apart"
    assert _names(["/x/a", "/x/a", "/x/a (2)"]) == ["x/a (1)", "x/a (2)", "x/a (2) (3)"]
    assert _names(["/x/a\nb\x1b[31m"]) == ["a?b?[31m"]

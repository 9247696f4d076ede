"""The tasks in inspect_ai itself (`make nightly`), on its mock model and on tiny local ones, beside `evaluate`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

pytest.importorskip("inspect_ai", reason="needs the inspect extra, as in `make nightly`")

from importlib.metadata import entry_points

from inspect_ai import eval as run
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from peft_safety.errors import ConfigError
from peft_safety.evaluation import KeywordJudge, Rate, Verdict, evaluate, named_set, prompt_set
from peft_safety.evaluation.inspect_ai import compliance_by_content, over_refusal, refusal
from peft_safety.evaluation.judges import ClassifierJudge
from tests.interop.helpers import answering_llama
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

RESPONSES = ("I'm sorry, but I can't help with that.", "Sure, here is", "It depends.", "I cannot.", "No, thanks.")
THOUGHT = "<think>\nI can't recall the policy. "


def figures(log):
    """Verdict -> (mean, low, high) of a finished run."""
    assert log.status == "success", log.error
    values = {
        score.name: {name: metric.value for name, metric in score.metrics.items()} for score in log.results.scores
    }
    return {name: (one["mean"], one["ci_wilson_lower"], one["ci_wilson_upper"]) for name, one in values.items()}


def of(verdicts):
    """The same, by this package's own figures."""
    rates = {verdict.value: Rate.of(one is verdict for one in verdicts) for verdict in Verdict}
    return {name: pytest.approx((rate.value, *rate.interval)) for name, rate in rates.items()}


def mock(prompts, responses=RESPONSES):
    """inspect_ai's mock model: the responses in turn, by the place of the prompt."""

    def answer(messages, tools, choice, config):
        assert config.temperature == 0, "greedy"
        content = responses[prompts.index(messages[-1].text) % len(responses)]
        usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return ModelOutput.from_content("mockllm/model", content).model_copy(update={"usage": usage})

    return get_model("mockllm/model", custom_outputs=answer)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"display": "none", "log_dir": str(tmp_path / "logs")}


def test_fixed_outputs_get_the_judges_verdicts(options):
    drawn = named_set("packaged", limit=12, seed=3)
    (log,) = run(refusal(limit=12, seed=3), model=mock(drawn.prompts), **options)
    said = [RESPONSES[place % len(RESPONSES)] for place in range(12)]
    assert figures(log) == of(list(map(KeywordJudge(), drawn.prompts, said)))
    assert figures(log)["refusal"][0] == 5 / 12
    assert log.eval.metadata["sha256"] == drawn.sha256


def test_reasoning_is_not_judged(options):
    drawn = named_set("packaged", limit=2, seed=3)
    model = mock(drawn.prompts, (f"{THOUGHT}</think>\n\nSure, here is", THOUGHT))
    (log,) = run(refusal(limit=2, seed=3), model=model, **options)
    assert figures(log) == of([Verdict.COMPLIANCE, Verdict.UNDECIDED])


def test_a_local_model_gets_the_figures_of_evaluate(options, tmp_path):
    if "peft_safety" not in entry_points(group="inspect_ai").names:
        pytest.skip("this package is installed without its entry points: pip install -e .")
    model, tokenizer = answering_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {"model_path": str(tmp_path / "model"), "do_sample": False, "device": "cpu"}
    draw = {"split": "validation", "limit": 24}
    names = ["peft_safety/refusal", "peft_safety/over_refusal"]
    refused, over = [run(name, model="hf/local", model_args=given, task_args=draw, **options)[0] for name in names]
    ours = evaluate(model, tokenizer, prompts=prompt_set(**draw), progress=False)
    assert refused.eval.task == names[0]
    assert figures(refused)["refusal"] == pytest.approx((ours.refusal.value, *ours.refusal.interval))
    assert figures(refused)["compliance"] == pytest.approx((ours.compliance.value, *ours.compliance.interval))
    assert figures(over)["refusal"] == pytest.approx((ours.over_refusal.value, *ours.over_refusal.interval))
    assert 0 < ours.refusal.value < 1, "the model refuses some prompts"


def test_compliance_by_content_asks_a_model(options, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "REJECTION", 1: "no_rejection"}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, pad_token_id=3, id2label=labels, initializer_range=1.0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    task = compliance_by_content(judge=str(tmp_path / "judge"), limit=5)
    prompts = named_set("packaged", limit=5).prompts
    (log,) = run(task, model=mock(prompts), **options)
    verdicts = list(map(ClassifierJudge(tmp_path / "judge"), prompts, RESPONSES))
    assert figures(log) == of(verdicts)
    assert len(set(verdicts)) == 2, "the judge tells the responses apart"
    with pytest.raises(ConfigError, match="not its content"):
        compliance_by_content(judge="keyword")
    with pytest.raises(ConfigError, match="url= is no such address"):
        compliance_by_content(judge="rubric:some-model", judge_url="ftp://here")


def test_a_task_refuses_a_set_of_another_kind():
    with pytest.raises(ConfigError, match=r"kind 'over_refusal', not 'harmful'\. Choose one of packaged, advbench"):
        refusal(prompts="packaged-contrast")
    with pytest.raises(ConfigError, match="kind 'harmful', not 'over_refusal'"):
        over_refusal(prompts="packaged")

"""Judges that are sequence classifiers: a tiny one, made here."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation import KeywordJudge, Verdict
from peft_safety.evaluation.judges import ClassifierJudge, judge, verdicts_of
from peft_safety.evaluation.judges.encoder import label_verdicts
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Says REJECTION for texts that end in "." and NORMAL for others: its head reads the last token's embedding."""
    folder = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=3,
        id2label={0: "NORMAL", 1: "REJECTION"},
    )
    model, tokenizer = LlamaForSequenceClassification(config), tiny_tokenizer()
    stop = tokenizer(".", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:] = 0.0
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[stop] = 0.0
        model.model.embed_tokens.weight[stop, 1] = 1.0
        model.score.weight.zero_()
        model.score.weight[0, 0] = model.score.weight[1, 1] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sequence_classifier_judges_by_its_labels(classifier):
    made = ClassifierJudge(
        classifier, batch_size=2, labels={"NORMAL": Verdict.COMPLIANCE, "REJECTION": Verdict.REFUSAL}
    )
    responses = ["I will not do that.", "Sure, here", "No.", "ok", "."]
    wanted = [Verdict.REFUSAL, Verdict.COMPLIANCE, Verdict.REFUSAL, Verdict.COMPLIANCE, Verdict.REFUSAL]
    assert made.batch(["?"] * 5, responses) == wanted == [made("?", response) for response in responses]
    assert verdicts_of(made, ["?"] * 5, responses) == wanted
    assert made.name == f"classifier:{classifier.name}"
    assert "intervals" in made.caveat
    other = ClassifierJudge(classifier, sees="both")
    assert other("Hi there", "no.") is Verdict.REFUSAL
    assert other("Hi there.", "yes") is Verdict.OTHER
    labels = {"NORMAL": Verdict.COMPLIANCE, "REJECTION": Verdict.REFUSAL}
    blank = ClassifierJudge(classifier, labels=labels).batch(["?"] * 4, ["", "No.", " \n", "ok"])
    assert blank == [Verdict.OTHER, Verdict.REFUSAL, Verdict.OTHER, Verdict.COMPLIANCE], "nothing is no answer"
    assert made.batch(["?"], [""]) == [Verdict.OTHER]
    with pytest.raises(DataError, match="one response a prompt"):
        made.batch(["a"], [])
    with pytest.raises(DataError, match="one response a prompt"):
        verdicts_of(KeywordJudge(), ["a"], [])


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({0: "NORMAL", 1: "REJECTION"}, {0: Verdict.OTHER, 1: Verdict.REFUSAL}),
        ({0: "refusal", 1: "compliance"}, {0: Verdict.REFUSAL, 1: Verdict.COMPLIANCE}),
        ({0: "non-refusal", 1: "refusal"}, {0: Verdict.COMPLIANCE, 1: Verdict.REFUSAL}),
        ({0: "no_refusal", 1: "declined"}, {0: Verdict.COMPLIANCE, 1: Verdict.REFUSAL}),
        ({0: "unsafe", 1: "safe"}, {0: Verdict.COMPLIANCE, 1: Verdict.OTHER}),
        ({0: "non-toxic", 1: "toxic"}, {0: Verdict.OTHER, 1: Verdict.COMPLIANCE}),
        (
            {0: "nontoxic", 1: "is_not_a_jailbreak", 2: "jailbreak"},
            dict(enumerate([Verdict.OTHER] * 2 + [Verdict.COMPLIANCE])),
        ),
        ({0: "not_unsafe", 1: "unsafe"}, {0: Verdict.OTHER, 1: Verdict.COMPLIANCE}),
        ({0: "unharmful_response", 1: "harmful_response"}, {0: Verdict.OTHER, 1: Verdict.COMPLIANCE}),
        ({0: "compliance", 1: "non-compliance"}, {0: Verdict.COMPLIANCE, 1: Verdict.REFUSAL}),
        ({0: "noncompliant", 1: "compliant"}, {0: Verdict.REFUSAL, 1: Verdict.COMPLIANCE}),
        ({0: "not_refused", 1: "refused"}, {0: Verdict.COMPLIANCE, 1: Verdict.REFUSAL}),
    ],
    ids=str,
)
def test_labels_are_read_by_their_names(labels, wanted):
    assert label_verdicts(labels, None, "judge") == wanted


def test_judges_that_cannot_judge(classifier, tmp_path):
    for same in ({0: "LABEL_0", 1: "LABEL_1"}, {0: "toxic", 1: "severely_toxic"}, {0: "refusal"}):
        with pytest.raises(ConfigError, match="none of which says refusal or compliance, or all the same"):
            label_verdicts(same, None, "judge")
    with pytest.raises(ConfigError, match="does not mention"):
        ClassifierJudge(classifier, labels={"NORMAL": Verdict.OTHER})
    with pytest.raises(ConfigError, match="no judge at"):
        ClassifierJudge(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a \['LlamaForCausalLM'\].*rubric:"):
        ClassifierJudge(tmp_path)


def test_a_classifier_is_known_by_its_architecture(classifier):
    known = judge(str(classifier), batch_size=2)
    named = judge(f"rejection:{classifier}", sees="both")
    assert isinstance(known, ClassifierJudge)
    assert isinstance(named, ClassifierJudge)
    assert (known.batch_size, named.sees) == (2, "both")
    assert known("?", "No.") is Verdict.REFUSAL
    with pytest.raises(ConfigError, match="has no option 'load_in_4bit'"):
        judge(f"rejection:{classifier}", load_in_4bit=True)

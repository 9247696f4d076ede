"""Judges that ask a generative model: by name, what is asked, and what is kept. Tiny models, made here."""

import json
import stat
from collections.abc import Iterator, Sequence

import pytest
from peft import LoraConfig, get_peft_model

from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation.judges import KeywordJudge, Verdict, judge
from peft_safety.evaluation.judges.endpoint import Endpoint
from peft_safety.evaluation.judges.guard import GuardJudge
from peft_safety.evaluation.judges.local import LocalRunner
from peft_safety.evaluation.judges.registry import FAMILIES
from tests.tiny import tiny_llama, tiny_tokenizer

URL = "http://localhost:1/v1"
REFUSAL, COMPLIANCE, OTHER, UNDECIDED = Verdict


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Scripted:
    """A runner that answers by the response, last pair first, until `stop` answers were given."""

    url: str | None = None
    version = "one"

    def __init__(self, said: dict[str, str], model: str = "org/Guard") -> None:
        self.said, self.model, self.asked, self.stop = said, model, [], 1 << 30

    def shorten(self, text: str, tokens: int) -> str:
        return text[:tokens]

    def answers(self, family, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, str]]:
        for number in reversed(range(len(pairs))):
            if not self.stop:
                raise RuntimeError("out of memory")
            self.stop -= 1
            self.asked.append(pairs[number])
            yield number, self.said[pairs[number][1]]


SAID = {"bad": "unsafe\nS1", "good": "safe", "odd": "I'd say so"}


@pytest.mark.parametrize(
    ("name", "model", "family"),
    [
        ("llama-guard-3", "meta-llama/Llama-Guard-3-8B", "llama-guard-3"),
        ("llama-guard-3:served", "served", "llama-guard-3"),
        ("meta-llama/Llama-Guard-3-1B", "meta-llama/Llama-Guard-3-1B", "llama-guard-3"),
        ("Qwen/Qwen3Guard-Gen-0.6B", "Qwen/Qwen3Guard-Gen-0.6B", "qwen3guard-gen"),
        ("cais/HarmBench-Mistral-7b-val-cls", "cais/HarmBench-Mistral-7b-val-cls", "harmbench-mistral"),
        ("google/shieldgemma-9b", "google/shieldgemma-9b", "shieldgemma"),
        ("openai/gpt-oss-safeguard-120b", "openai/gpt-oss-safeguard-120b", "gpt-oss-safeguard"),
        ("rubric:org/chat:latest", "org/chat:latest", "rubric"),
        ("org/chat", "org/chat", "rubric"),
        *((family.model, family.model, name) for name, family in FAMILIES.items() if family.model),
    ],
)
def test_a_judge_by_name_or_id(name, model, family):
    made = judge(name, url=URL, timeout=3, workers=2, tokens=7, max_length=9)
    assert isinstance(made, GuardJudge)
    assert isinstance(made.runner, Endpoint)
    assert (made.runner.model, made.family.name, made.family.tokens, made.max_length) == (model, family, 7, 9)
    assert (made.runner.timeout, made.runner.workers) == (3, 2)
    assert made.name == f"{family}:{model.rsplit('/', 1)[-1]}"
    assert made.family.says in made.caveat
    assert ("this package's words" in made.caveat) == made.family.raw


def test_the_keyword_judge_has_a_name_and_no_options():
    assert isinstance(judge("keyword"), KeywordJudge)
    with pytest.raises(ConfigError, match=r"has no option 'url'\. It has: none"):
        judge("keyword", url=URL)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lama-guard3", {}, "Did you mean 'llama-guard-3'.*keyword, embedding, rejection, harmbench-llama"),
        ("Wildguard", {}, "Did you mean 'wildguard'"),
        ("qqqqqqqq", {}, r"no judge 'qqqqqqqq'\. Give one of keyword"),
        ("", {}, "no judge ''. Give one of"),
        ("llama-gard-3:org/guard", {"url": URL}, "Did you mean 'llama-guard-3'"),
        ("rubric", {"url": URL}, 'needs a model. Name it: "rubric:MODEL"'),
        ("wildguard", {"url": URL, "load_in_4bit": True}, "has no option 'load_in_4bit'"),
        ("wildguard", {"timeout": 3}, "has no option 'timeout'"),
        ("wildguard", {"url": URL, "labels": {}}, "has no option 'labels'"),
        ("wildguard", {"url": URL, "tokens": 0}, "Give at least 1"),
        ("wildguard", {"url": URL, "template": "{prompt}"}, "write {prompt} and {response}"),
        ("wildguard", {"url": URL, "template": "{prompt} {response} {"}, "other braces twice"),
        ("wildguard", {"url": "localhost:8000"}, "no such address"),
        ("wildguard", {"url": "file:///etc/passwd"}, "no such address"),
        ("wildguard", {"url": "https://me:secret@host/v1"}, "^judge 'allenai/wildguard': url= is no such address"),
        ("wildguard", {"url": "http://host/v1?key=secret"}, "no such address"),
        ("wildguard", {"url": URL, "workers": 0}, "workers = 0"),
        ("org/is-not-there", {}, "no judge at 'org/is-not-there'"),
    ],
)
def test_what_is_no_judge(name, options, message):
    with pytest.raises(ConfigError, match=message):
        judge(name, **options)


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    for name in (f"rubric:{tmp_path}", str(tmp_path)):
        with pytest.raises(ConfigError, match="no judge at"):
            judge(name)
    assert not (tmp_path / "ran").exists()


def test_verdicts_come_in_order_and_empty_responses_are_not_asked_about():
    runner = Scripted(SAID)
    made = GuardJudge(FAMILIES["llama-guard-3"], runner, max_length=4)
    responses = ["bad", "", "odd", "good", " \n", "bad"]
    wanted = [COMPLIANCE, OTHER, UNDECIDED, OTHER, OTHER, COMPLIANCE]
    assert made.batch(["p"] * 6, responses) == wanted
    assert sorted(runner.asked) == [("p", "bad"), ("p", "good"), ("p", "odd")], "the same pair is asked once"
    assert made("p", "goodness") is OTHER
    assert runner.asked[-1] == ("p", "good"), "shortened"
    assert made.batch([], []) == []
    with pytest.raises(DataError, match="one response a prompt"):
        made.batch(["p"], [])


def test_what_was_judged_survives_an_error(tmp_path):
    path, runner = tmp_path / "kept" / "verdicts.jsonl", Scripted(SAID)
    made = GuardJudge(FAMILIES["llama-guard-3"], runner, cache=path)
    runner.stop = 2
    prompts = ["one", "two", "three", "four"]
    with pytest.raises(RuntimeError, match="out of memory"):
        made.batch(prompts, ["bad"] * 4)
    assert [prompt for prompt, _ in runner.asked] == ["four", "three"]

    text = path.read_text(encoding="utf-8")
    assert not [word for word in [*prompts, "bad"] if word in text], "hashes, no texts"
    path.write_text(text + '\n{"key": "12', encoding="utf-8")  # a line that a kill cut off
    later = Scripted(SAID)
    resumed = GuardJudge(FAMILIES["llama-guard-3"], later, cache=path)
    assert resumed.batch(prompts, ["bad"] * 4) == [COMPLIANCE] * 4
    assert [prompt for prompt, _ in later.asked] == ["two", "one"]
    assert (
        GuardJudge(FAMILIES["llama-guard-3"], Scripted({}), cache=path).batch(prompts, ["bad"] * 4) == [COMPLIANCE] * 4
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert [set(row) for row in rows] == [{"key", "value"}] * 4

    runner.stop = 9
    made.batch(prompts, ["bad"] * 4)
    assert len(runner.asked) == 4, "the judge itself goes on too"


@pytest.mark.parametrize(
    ("family", "model", "options"),
    [
        ("llama-guard-4", "org/Guard", {}),
        ("llama-guard-3", "org/Other", {}),
        ("llama-guard-3", "org/Guard", {"tokens": 99}),
        ("llama-guard-3", "org/Guard", {"max_length": 99}),
        ("llama-guard-3", "org/Guard", {"template": "{prompt} {response}"}),
    ],
)
def test_a_cache_is_of_one_way_to_ask(tmp_path, family, model, options):
    path = tmp_path / "verdicts.jsonl"
    GuardJudge(FAMILIES["llama-guard-3"], Scripted(SAID), cache=path)("p", "bad")
    other = Scripted(SAID, model)
    GuardJudge(FAMILIES[family], other, cache=path, **options)("p", "bad")
    assert other.asked == [("p", "bad")]


def test_a_cache_is_of_one_version_of_the_judge_at_one_place(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    for version, url in (("one", None), ("two", None), ("one", URL)):
        runner = Scripted(SAID)
        runner.version, runner.url = version, url
        GuardJudge(FAMILIES["llama-guard-3"], runner, cache=path)("p", "bad")
        assert runner.asked == [("p", "bad")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_cache_is_of_what_a_server_is_sent(tmp_path, monkeypatch):
    asked = []

    def ask_each(self, questions, **_):
        asked.append(self.body)
        yield from enumerate("unsafe\nS1" for _ in questions)

    monkeypatch.setattr(Endpoint, "ask_each", ask_each)
    bodies = [{}, {"seed": 1}, {"seed": 2}]
    for body in (*bodies, *bodies):
        made = judge("llama-guard-3", url=URL, cache=tmp_path / "verdicts.jsonl", body=body)
        assert made("p", "bad") is COMPLIANCE
    assert asked == bodies
    assert made.version != judge("llama-guard-3", url=URL).version == "served"


def test_a_model_that_runs_here_is_asked_as_its_card_says(causal):
    made = judge(
        f"harmbench-mistral:{causal}", batch_size=2, max_length=6, template="Q {prompt}\nA {response} yes or no"
    )
    assert isinstance(made.runner, LocalRunner)
    assert made.runner.shorten("because it is so", 6) == "becaus"
    assert made.runner.text(made.family, "why", "so") == "<|im_start|>Q why\nA so yes or no", "after the first token"
    assert made.batch(["why", "what", "who"], ["so", "that", "me"]) == [UNDECIDED] * 3, "a random model says nothing"
    chat = judge(f"llama-guard-3:{causal}")
    turns = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    assert chat.runner.text(chat.family, "why", "so") == turns
    policy = judge(f"gpt-oss-safeguard:{causal}", tokens=1)
    text = policy.runner.text(policy.family, "why", "so")
    assert text.startswith("<|im_start|>system\nYou judge what")
    assert text.endswith("<answer>\nso\n</answer><|im_end|>\n<|im_start|>assistant\n")
    assert policy("why", "so") is UNDECIDED


def test_a_guideline_is_a_variable_of_the_chat_template(causal):
    made = judge(f"shieldgemma:{causal}")
    made.runner.tokenizer.chat_template = "{{ guideline }} | {{ messages[1].content }}"
    assert made.runner.text(made.family, "why", "so") == f"{made.family.variables['guideline']} | so"
    made.runner.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        made("why", "so")


def test_a_scorer_that_is_an_adapter(causal, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    model.peft_config["default"].base_model_name_or_path = str(causal)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made = judge(f"strongreject-15k:{tmp_path}")
    assert any("lora_A" in name for name, _ in made.runner.loaded.named_parameters())
    assert made("why", "so") is UNDECIDED
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        judge(f"strongreject-15k:{tmp_path}")


def test_a_judge_in_4_bits(causal):
    pytest.importorskip("bitsandbytes")
    made = judge(f"rubric:{causal}", load_in_4bit=True, tokens=1)
    assert any(type(module).__name__ == "Linear4bit" for module in made.runner.loaded.modules())
    assert made("why", "so") is UNDECIDED


def test_llama_guard_4_is_an_image_text_model(tmp_path):
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_layers": [],
        "pad_token_id": 3, "no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
        "vision_output_dim": 32, "image_size": 28, "patch_size": 14, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision, boi_token_index=1, eoi_token_index=2)
    Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
        "{% if add_generation_prompt %}Safe?{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    made = judge(f"llama-guard-4:{tmp_path}", tokens=2)
    assert made.runner.text(made.family, "why", "so") == "user: why\nassistant: so\nSafe?"
    assert type(made.runner.loaded).__name__ == "Llama4ForConditionalGeneration"
    assert made("why", "so") is UNDECIDED

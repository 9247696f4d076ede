"""PEFT's methods and GuardSpace on one small task, and the entry for PEFT's own comparison; on tiny models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.method_comparison import __main__ as command
from benchmarks.method_comparison import arms, cells, task
from benchmarks.method_comparison.metamathqa import run_guardspace
from benchmarks.method_comparison.report import NAME, SECTIONS, forgetting, report
from peft_safety import GuardSpaceConfig
from peft_safety.errors import ArtifactError, DataError
from tests.benchmarks.pages import blank
from tests.tiny import tiny_llama, tiny_tokenizer

SETTINGS = cells.Settings(r=2, lr=1e-2, steps=2, batch_size=2, test=4, general=2)
EXPERIMENTS = Path(run_guardspace.__file__).parent / "experiments" / "guardspace"
ENTRIES = {"frozen-rank32": (32, "B"), "frozen-rank80": (80, "B"), "window64-rank32": (32, "window")}
SUITE_LORA = 9_175_040
"""Trainable parameters of the suite's LoRA of rank 32, from its published result."""
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
TASK = [{"query": f"{n} + 1?", "response": f"The answer is: {n + 1}"} for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The rows of all arms, and the cells that they are in."""
    made = cells.Cells(tmp_path_factory.mktemp("runs"), model, SETTINGS)
    return {arm: made.run(arm) for arm in arms.ARMS}, made


def read(folder):
    return [json.loads(line) for line in (folder / f"{NAME}.jsonl").read_text().splitlines()]


def test_splits_share_no_sum_and_the_answers_are_right():
    splits = {name: task.rows(name) for name in ("train", "validation", "test")}
    asked = {name: [row["query"].removesuffix(" =").split(" plus ") for row in rows] for name, rows in splits.items()}
    pairs = [tuple(pair) for sums in asked.values() for pair in sums]
    assert len(pairs) == len(set(pairs)) == 5 * 80
    value = {word: number for number, word in [*task.WORDS.items(), *enumerate(task.ONES)]}
    for name, rows in splits.items():
        assert [f" {value[a] + value[b]}" for a, b in asked[name]] == [row["response"] for row in rows]


def test_a_damaged_cell_is_named(tmp_path, model):
    made = cells.Cells(tmp_path, model, SETTINGS)
    assert made.get("LoRA") is None
    made.cell("LoRA").write_text('{"arm": "LoRA", "lr')
    with pytest.raises(ArtifactError, match=f"{made.cell('LoRA').name} is no result of a cell.*Delete it"):
        made.get("LoRA")


def test_every_arm_trains_and_has_the_size_of_the_lora(finished):
    rows, _ = finished
    sizes = {arm: row["trainable"] for arm, row in rows.items()}
    assert all(0.9 < size / sizes["LoRA"] < 1.3 for size in sizes.values()), sizes
    for row in rows.values():
        assert row["general_after"] != row["general_before"]
        assert row["file_mib"] > 0
        assert row["steps"] == SETTINGS.steps
        assert row["lr"] == SETTINGS.lr * (0.5 if row["arm"] == "OSF" else 1)
    assert len({row["general_before"] for row in rows.values()}) == 1


def test_a_frozen_factor_does_not_train(model, tmp_path):
    base, tokenizer = cells.load_model(model)
    base = arms.Base(base, tokenizer, 2, task.tokens(tokenizer, task.rows("train", 40)), tmp_path / "subspace")
    config = arms.ARMS["GuardSpace, frozen"].config(base)
    tuned = get_peft_model(base.model, config)
    assert {name for name, p in tuned.named_parameters() if p.requires_grad and "lora_B" not in name} == set()
    assert (tmp_path / "subspace").is_dir()
    assert arms.ARMS["LoRA-FA"].freeze_a


def test_finished_arms_are_not_run_again_and_failures_are_told(finished, model, tmp_path, monkeypatch, capsys):
    rows, made = finished
    monkeypatch.setattr(command, "Settings", lambda: SETTINGS)
    monkeypatch.setattr(cells.Cells, "run", lambda self, arm: pytest.fail(f"{arm} ran again"))
    given = ["--model", model, "--runs", str(made.folder), "--out", str(tmp_path)]
    assert command.main(given) == 0
    first, *kept = read(tmp_path)
    assert (first["environment"]["steps"], kept) == (SETTINGS.steps, list(rows.values()))

    def refuse(self, arm):
        raise ValueError("no kernel for this CPU")

    monkeypatch.setattr(cells.Cells, "run", refuse)
    made.cell("OSF").rename(tmp_path / "kept.json")
    try:
        assert command.main(given) == 1
        assert command.main([*given, "--budget", "0"]) == 0
        assert len(read(tmp_path)) == len(rows)
        assert command.main(given) == 1
    finally:
        (tmp_path / "kept.json").rename(made.cell("OSF"))
    capsys.readouterr()
    docs = blank(tmp_path / "docs", SECTIONS)
    page = docs / "results" / "method_comparison.md"
    report(tmp_path, docs)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for text in (printed.replace("\n", " "), page.read_text()):
        assert "OSF did not run: ValueError: no kernel for this CPU" in text
        assert f"{forgetting(rows['DoRA']):+.3f}" in text
    assert page.read_text().endswith("after\n")
    assert (tmp_path / "method_comparison.png").stat().st_size > 10_000


def test_a_report_without_results(tmp_path):
    with pytest.raises(DataError, match="holds no results"):
        report(tmp_path, None)


def test_the_entry_of_the_suite_has_the_sizes_that_its_readme_says():
    shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 1000}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=24, num_key_value_heads=8, head_dim=128))
        base = arms.Base(llama, None, 32, [], Path())
        outputs = sum(m for m, _ in base.shapes().values())
        assert base.equal_r == 80
        assert 80 * outputs == SUITE_LORA == sum(32 * (m + n) for m, n in base.shapes().values())
        assert get_peft_model(llama, LoraConfig(r=32)).get_nb_trainable_parameters()[0] == SUITE_LORA
    readme = (EXPERIMENTS.parents[1] / "README.md").read_text()
    assert f"{SUITE_LORA:,}" in readme
    assert f"{32 * outputs:,}" in readme


@pytest.mark.parametrize("name", ENTRIES)
def test_an_experiment_of_the_suite(name):
    """Loaded as the suite does it; then an adapter on a model without a chat template, which "auto" needs."""
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / f"llama-3.2-3B-{name}"))
    assert isinstance(config, GuardSpaceConfig)
    given = (config.r, config.train, config.lora_alpha, config.target_modules, config.subspace, config.basis)
    assert given == (*ENTRIES[name], 2 * config.r, None, "auto", "general")
    assert config.window == 64
    config.r, config.lora_alpha = 4, 8
    base, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.chat_template = None
    run_guardspace.give_data(base, config, tokenizer, TEMPLATE, TASK)
    tuned = get_peft_model(base, config)
    adapter = {parts[-3] for n, p in tuned.named_parameters() if p.requires_grad and (parts := n.split("."))}
    assert adapter == ({"lora_B"} if config.train == "B" else {"lora_A", "lora_B"})
    logged = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    assert json.loads(json.dumps(logged))["r"] == 4


def test_the_wrapper_runs_the_suite_with_the_data(model, tmp_path, monkeypatch):
    """A folder with the names of the suite's files that the wrapper relies on."""
    (tmp_path / "params.json").write_text(json.dumps({"query_template": TEMPLATE}))
    (tmp_path / "utils.py").write_text(
        "from peft import get_peft_model\n"
        f"FILE_NAME_DEFAULT_TRAIN_PARAMS = {str(tmp_path / 'params.json')!r}\n"
        "def get_model(base, peft_config):\n"
        "    return get_peft_model(base, peft_config, autocast_adapter_dtype=True)\n"
    )
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from peft import PeftConfig\n"
        "from transformers import AutoModelForCausalLM\n"
        "from utils import get_model\n"
        f"base = AutoModelForCausalLM.from_pretrained({model!r})\n"
        "config = PeftConfig.from_pretrained(sys.argv[1])\n"
        "config.r = 4\n"
        "get_model(base, config).save_pretrained('saved')\n"
    )
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_guardspace.py", str(EXPERIMENTS / "llama-3.2-3B-frozen-rank32")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    try:
        run_guardspace.main()
    finally:
        sys.modules.pop("utils", None)
    assert (tmp_path / "saved" / "safety_certificate.json").is_file()

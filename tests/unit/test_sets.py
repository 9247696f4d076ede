"""The table of named sets, against the documents and against directories of the form that the Hub has."""

import configparser
import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from peft_safety.data import load
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation import named_set, prompt_set
from peft_safety.evaluation.sets import SETS, TABLE

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
HUB = [entry for entry in TABLE if entry.hub]
ROWS = {
    "advbench": [{"prompt": "Ask A", "target": "Sure, A"}, {"prompt": "Ask B", "target": "Sure, B"}],
    "harmbench": [{"prompt": "Ask A", "category": "x"}, {"prompt": "Ask B", "category": "x"}],
    "strongreject": [{"prompt": "Ask A", "source": "x"}, {"prompt": "Ask B", "source": "x"}],
    "jailbreakbench": [{"Goal": "Ask A", "Target": "Sure, A"}, {"Goal": "Ask B", "Target": "Sure, B"}],
    "beavertails": [
        {"prompt": "Ask A", "response": "one", "is_safe": False},
        {"prompt": "Ask A", "response": "two", "is_safe": False},
        {"prompt": "Left out", "response": "three", "is_safe": True},
        {"prompt": "Ask B", "response": "four", "is_safe": False},
    ],
    "sorry-bench": [
        {"turns": ["Ask A"], "prompt_style": "base"},
        {"turns": ["Left out"], "prompt_style": "slang"},
        {"turns": ["Ask B"], "prompt_style": "base"},
    ],
    "maliciousinstruct": [{"prompt": "Ask A"}, {"prompt": "Ask B"}],
    "xstest": [
        {"prompt": "Ask A", "type": "homonyms"},
        {"prompt": "Left out", "type": "contrast_homonyms"},
        {"prompt": "Ask B", "type": "real_group_nons_discr"},
    ],
    "or-bench-hard": [{"prompt": "Ask A", "category": "x"}, {"prompt": "Ask B", "category": "x"}],
    "gsm8k": [{"question": "Ask A", "answer": "Think. #### 2"}, {"question": "Ask B", "answer": "#### 3"}],
    "mmlu": [
        {"question": "Ask", "subject": "x", "choices": ["w", "x", "y", "z"], "answer": 1},
        {"question": "Ask", "subject": "x", "choices": ["z", "y", "x", "w"], "answer": 3},
    ],
    "sst2": [{"idx": 0, "sentence": "Ask A", "label": 0}, {"idx": 1, "sentence": "Ask B", "label": 1}],
    "ag-news": [{"text": "Ask A", "label": 3}, {"text": "Ask B", "label": 0}],
    "alpaca": [
        {"instruction": "Ask", "input": "A", "output": "one", "text": "..."},
        {"instruction": "Left out", "input": "", "output": "", "text": "..."},
        {"instruction": "Ask B", "input": "", "output": "two\nlines", "text": "..."},
    ],
}
TASKS = {
    "gsm8k": [{"prompt": "Ask A", "response": "Think. #### 2"}, {"prompt": "Ask B", "response": "#### 3"}],
    "mmlu": [
        {"text": "Ask\n\nA. w\nB. x\nC. y\nD. z", "label": "B"},
        {"text": "Ask\n\nA. z\nB. y\nC. x\nD. w", "label": "D"},
    ],
    "sst2": [{"text": "Ask A", "label": "negative"}, {"text": "Ask B", "label": "positive"}],
    "ag-news": [{"text": "Ask A", "label": "Sci/Tech"}, {"text": "Ask B", "label": "World"}],
    "alpaca": [{"prompt": "Ask\n\nA", "response": "one"}, {"prompt": "Ask B", "response": "two\nlines"}],
}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_copy(entry, folder):
    """A directory as the Hub has it: the set's config and split, beside others."""
    if not entry.header:  # HEx-PHI: a CSV file without header and a split for each category
        folder.mkdir(parents=True)
        (folder / "category_1.csv").write_text("Ask A\n", encoding="utf-8")
        (folder / "category_3.csv").write_text('Ask B\n"Ask C, too"\n', encoding="utf-8")
        files = {"category_1": "category_1.csv", "category_3": "category_3.csv"}
    else:
        write_jsonl(folder / "data" / "rows.jsonl", ROWS[entry.name])
        write_jsonl(folder / "data" / "other.jsonl", [{"unlike": 1}])
        files = {entry.split: "data/rows.jsonl"}
    config = entry.config or "default"
    splits = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    other = "- config_name: other\n  data_files: data/other.jsonl\n" if entry.header else ""
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{splits}{other}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(entry, drawn):
    assert (drawn.name, drawn.kind, drawn.license) == (entry.name, entry.kind, entry.license)
    if entry.kind == "utility":
        assert list(drawn.rows) == TASKS[entry.name]
        assert drawn.labels == tuple(entry.labels.split())
    else:
        extra = () if entry.header else ("Ask C, too",)
        assert drawn.prompts == ("Ask A", "Ask B", *extra)
        assert not drawn.rows
        assert "Sure" not in repr(drawn)


def test_the_table_agrees_with_itself():
    assert len(SETS) == len(TABLE) == len({(entry.hub, entry.config, entry.split) for entry in TABLE})
    assert {entry.kind for entry in TABLE} == {"harmful", "over_refusal", "utility"}
    assert set(ROWS) | {"hex-phi"} == {entry.name for entry in HUB}
    for entry in TABLE:
        assert len(entry.fields.split()) >= (2 if entry.kind == "utility" else 1)
        assert entry.hub.count("/") == 1 or entry.config, entry.name
        assert entry.name == entry.name.lower().replace("_", "-")


def test_the_document_has_the_table():
    text = (ROOT / "docs" / "guides" / "judges_and_sets.md").read_text(encoding="utf-8")
    head = "| name | kind | Hub id | config | split | columns | only where | license | gated |"
    rows = text.partition(head)[2].partition("\n\n")[0].strip().splitlines()[1:]
    told = [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in rows]
    assert told == [
        [
            *(entry.name, entry.kind, entry.hub or "packaged", entry.config or "", entry.split, entry.fields),
            *(entry.where, entry.license, "yes" if entry.gated else "no"),
        ]
        for entry in TABLE
    ]


@pytest.mark.parametrize("entry", HUB, ids=lambda entry: entry.name)
def test_a_set_is_read_as_the_hub_has_it(cache, entry):
    """`load_dataset` takes a directory of the hub id for the data set itself: the very call, with config and split."""
    write_copy(entry, cache / entry.hub)
    drawn = named_set(entry.name)
    check(entry, drawn)
    assert drawn.source.startswith(entry.hub)


@pytest.mark.parametrize("entry", HUB, ids=lambda entry: entry.name)
def test_a_local_copy_is_read(cache, entry):
    write_copy(entry, cache / "copies" / entry.name)
    drawn = named_set(entry.name, directory="copies")
    check(entry, drawn)
    assert named_set(f"./copies/{entry.name}") == drawn
    if entry.header:  # any files with the set's columns
        write_jsonl(cache / "files" / f"{entry.name}.jsonl", ROWS[entry.name])
        write_jsonl(cache / "plain" / entry.name / "rows.jsonl", ROWS[entry.name])
        for place in ("files", "plain"):
            check(entry, named_set(entry.name, directory=place))


def test_inspect_finds_a_module_by_the_entry_point():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, module = config["options.entry_points"]["inspect_ai"].strip().partition(" = ")
    assert name == "peft_safety", "the tasks' prefix"
    assert importlib.util.find_spec(module) is not None


def test_packaged_sets_are_those_of_prompt_set():
    drawn = {
        name: named_set(name, split="validation", limit=9, seed=4) for name in SETS if name.startswith("packaged")
    }
    wanted = prompt_set("validation", limit=9, seed=4)
    assert drawn["packaged"].prompts == wanted.harmful
    assert drawn["packaged-contrast"].prompts == wanted.contrast
    assert drawn["packaged-everyday"].prompts == wanted.everyday
    task = named_set("packaged-task")
    assert [(row["text"], row["label"]) for row in task.rows] == [
        (row["text"], row["label"]) for row in load("benign_task", "test")
    ]
    assert len(task.labels) == 8
    with pytest.raises(DataError, match="no split 'secret'"):
        named_set("packaged", split="secret")


def test_the_draw_depends_on_the_seed_and_the_hash_on_the_prompts():
    whole, first, second = (named_set("packaged", limit=limit, seed=1) for limit in (None, 10, 10))
    assert first == second
    assert len(set(first.prompts)) == 10
    assert set(first.prompts) < set(whole.prompts)
    assert named_set("packaged", limit=10, seed=2).sha256 != first.sha256
    assert named_set("packaged", limit=10**6).sha256 == whole.sha256, "in another order"
    with pytest.raises(ConfigError, match="at least 1"):
        named_set("packaged", limit=0)


def test_the_hash_of_a_task_depends_on_its_answers(tmp_path):
    """A baseline's accuracy on other labels is another figure."""

    def digest(*rows):
        (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return named_set(tmp_path / "task.jsonl", kind="utility").sha256

    one, two = {"text": "x", "label": "a"}, {"text": "y", "label": "b"}
    other = [{**one, "label": "b"}, {**two, "label": "a"}]
    assert digest(one, two) == digest(two, one) != digest(*other)
    pair = {"prompt": "p", "response": "r"}
    assert digest(pair) != digest({**pair, "response": "s"})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_own_files(cache, suffix):
    import datasets

    rows = datasets.Dataset.from_list(
        [{"prompt": "One, two", "response": "kept out"}, {"prompt": "Three", "response": "-"}]
    )
    path = cache / f"own{suffix}"
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](str(path))
    drawn = named_set(path, kind="over_refusal")
    assert (drawn.name, drawn.kind, drawn.prompts, drawn.rows) == ("own", "over_refusal", ("One, two", "Three"), ())
    task = named_set(path, kind="utility")
    assert task.rows[0] == {"prompt": "One, two", "response": "kept out"}
    assert task.sha256 != drawn.sha256, "of its answers too"
    folder = cache / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert named_set(folder).prompts == drawn.prompts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "A"}], r"row 0: no prompt in \['question'\]; 'own' is read from prompt"),
        ([{"prompt": "A"}, {"prompt": " "}], "row 1: ' ' is no text"),
        ([{"prompt": ["A"], "x": 1}, {"prompt": {"role": "user"}}], "row 1: {'role': 'user'} is no text"),
        ([], "no rows"),
    ],
)
def test_malformed_files(tmp_path, rows, message):
    write_jsonl(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match=message):
        named_set(tmp_path / "own.jsonl")


def test_sets_without_rows_and_labels_without_name(cache):
    write_jsonl(cache / "copies" / "xstest.jsonl", [{"prompt": "Left out", "type": "contrast_homonyms"}])
    with pytest.raises(DataError, match=r"no rows for 'xstest'.*rows count where type=\(\?!contrast_\)"):
        named_set("xstest", directory="copies")
    write_jsonl(cache / "copies" / "sst2.jsonl", [{"sentence": "Ask", "label": -1}])
    with pytest.raises(DataError, match="row 0: label -1 is none of the 2: negative, positive"):
        named_set("sst2", directory="copies")
    write_jsonl(cache / "own.jsonl", [{"prompt": "Ask"}])
    with pytest.raises(DataError, match="write all rows of a task as"):
        named_set("own.jsonl", kind="utility")
    turns = {"prompt": [{"role": "user", "content": "Ask"}], "completion": [{"role": "assistant", "content": "Told"}]}
    write_jsonl(cache / "own.jsonl", [turns, turns])
    assert len(named_set("own.jsonl", kind="utility").rows) == 2


def test_unknown_sets_and_splits(cache):
    with pytest.raises(
        DataError, match=r"no prompt set, file or directory 'advbnch'. Did you mean 'advbench'\?.*hex-phi"
    ):
        named_set("advbnch")
    with pytest.raises(DataError, match=r"no prompt set, file or directory 'there.jsonl'"):
        named_set("there.jsonl")
    with pytest.raises(ConfigError, match="kind='harmless'"):
        named_set("packaged", kind="harmless")
    with pytest.raises(
        DataError, match=r"no copy of advbench in copies. Put it into copies/advbench/ or advbench.jsonl"
    ):
        named_set("advbench", directory="copies")
    write_copy(SETS["gsm8k"], cache / "copies" / "gsm8k")
    with pytest.raises(DataError, match=r"no split 'train'. It has test"):
        named_set("gsm8k", directory="copies", split="train")
    (cache / "advbench").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        named_set("./advbench")


class Gate(BaseHTTPRequestHandler):
    """A Hub whose data sets are all gated."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this dataset is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


def told(tmp_path, **environment):
    """What an attempt to read AdvBench in another process says."""
    code = "from peft_safety.evaluation import named_set\nnamed_set('advbench')"
    paths = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **paths, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    return ran.stderr.strip().splitlines()[-1]


def test_without_access_the_remedies_are_told(tmp_path):
    pytest.importorskip("datasets", reason="needs the package datasets")
    offline = told(tmp_path, HF_HUB_OFFLINE="1")
    assert "DataError: walledai/AdvBench (advbench) is not in the cache" in offline
    assert "HF_HUB_OFFLINE" in offline
    assert "DIRECTORY/advbench and give directory=DIRECTORY" in offline
    with HTTPServer(("127.0.0.1", 0), Gate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gated = told(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", NO_PROXY="*")
        server.shutdown()
    assert "DataError: walledai/AdvBench (advbench) is gated" in gated
    for remedy in ("datasets/walledai/AdvBench", "accept its terms", "HF_TOKEN", "DIRECTORY/advbench"):
        assert remedy in gated


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs public sets beside the repository")
def test_public_files():
    assert len(named_set("advbench", directory=SHARED).prompts) == 521
    labeled = map(json.loads, (SHARED / "xstest.jsonl").read_text(encoding="utf-8").splitlines())
    safe = tuple(row["prompt"] for row in labeled if row["label"] == "safe")
    assert named_set("xstest", directory=SHARED).prompts == safe, "by type as by label"
    assert len(safe) == 250


def test_an_own_task_may_have_turns_for_prompts(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}], "response": "yes"} for text in "ba"]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(named_set(tmp_path / "task.jsonl", kind="utility").rows) == 2


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("harmful", [{"prompt": "half \ud800"}], "no Unicode text"),
        ("utility", [{"text": "a", "label": "b"}, {"prompt": "a", "response": "b"}], "all rows of a task"),
        ("utility", [{"text": "a", "label": "b"}, {"text": "c", "label": "b"}], "so no answer is wrong"),
    ],
)
def test_text_that_no_tokenizer_reads_and_tasks_that_tell_nothing_are_refused(tmp_path, kind, rows, message):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        named_set(tmp_path / "own.jsonl", kind=kind)

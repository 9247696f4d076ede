"""`peft-safety screen`: tables, JSON, the file of kept rows, and exit statuses."""

import json

import pytest
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.data import stream_jsonl
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.evaluation import Verdict
from peft_safety.recipes import screen as recipe
from peft_safety.recipes.screen import write_kept
from tests.screening.separable import MODEL, TOKENIZER, MarkedJudge, harmful, harmless, save_jsonl, turn

pytestmark = pytest.mark.usefixtures("separable")
ROWS = [
    {"prompt": harmless(50), "response": "yes"},
    {"prompt": harmful(50), "response": "yes", "id": 7},
    {"prompt": harmful(51), "response": "yes"},
    {"messages": [turn("assistant", "a")]},
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command on ROWS, with a judge for whom a random model says something."""
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = save_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(recipe, "KeywordJudge", MarkedJudge)

    def invoke(*options, config=None):
        given = ["--model", str(tmp_path / "model"), "--data", str(data)] if config is None else ["--config", config]
        return CliRunner().invoke(app, ["screen", *given, *map(str, options)])

    return invoke


def flat(result):
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stdout.split())


def test_the_table_names_rows_by_number_only(run):
    result = run()
    assert result.exit_code == 0
    text = flat(result)
    for part in (
        "Screening of 4 rows",
        "all 4 2 50.0 % 1",
        "Flagged: rows 1, 2.",
        "To drop: rows 1.",
        "turn: rows 3.",
    ):
        assert part in text
    assert "AUC" in text
    assert "ZQ" not in text
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_next_step_where_no_row_is_to_be_dropped(run, monkeypatch):
    assert "0 to drop" not in flat(run())
    monkeypatch.setattr(
        MarkedJudge, "__call__", lambda _, __, response: Verdict("refusal" if response == "no" else "other")
    )
    text = flat(run())
    assert "all 4 2 50.0 % 0" in text
    assert "0 to drop: the model answers these requests itself. Look at them with --show" in text
    assert "0 to drop" not in flat(run("--no-verdict"))


def test_undecided_rows_are_named_with_the_way_out(run, monkeypatch):
    assert "Undecided" not in flat(run())
    monkeypatch.setattr(
        MarkedJudge, "__call__", lambda _, __, response: Verdict("other" if response == "yes" else "undecided")
    )
    text = flat(run())
    assert "undecided: an answer could not be read, or is reasoning alone 2" in text
    assert "Undecided, and kept: rows 1, 2. A model that reasons first" in text
    assert "the model answers these requests itself" not in text


def test_requests_are_quoted_on_demand(run):
    assert "ZQZQ" in flat(run("--show"))


def test_json(run):
    data = json.loads(run("--json").stdout)
    assert (data["rows"], data["flagged"], data["dropped"], data["unscreened"]) == (4, 2, 1, [3])
    assert [(row["number"], row["verdict"]) for row in data["flagged_rows"]] == [(1, "complies"), (2, "answered")]
    assert data["screen"]["fpr"] == 0.01
    assert "request" not in data["flagged_rows"][0]
    assert "request" in json.loads(run("--json", "--show").stdout)["flagged_rows"][0]


def test_kept_rows_are_written_in_order(run, tmp_path):
    out = tmp_path / "new" / "clean.jsonl"
    result = run("--drop", "--out", out)
    assert f"3 rows written to {out}" in result.stdout.replace("\n", "")
    assert [json.loads(line) for line in out.read_text().splitlines()] == [ROWS[0], *ROWS[2:]]
    assert [path.name for path in out.parent.iterdir()] == ["clean.jsonl"]
    assert run("--drop", "--no-verdict", "--out", out).exit_code == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [ROWS[0], ROWS[3]]


@pytest.mark.parametrize(("limit", "status"), [("3", 0), ("2", 1), ("0.75", 0), ("0.74", 1), ("0", 1), ("-1", 2)])
def test_the_status_counts_flagged_and_unscreened_rows(run, limit, status):
    assert run("--max-flagged", limit).exit_code == status


def test_fewer_known_prompts(run):
    data = json.loads(run("--json", "--known", 8).stdout)
    assert data["screen"]["true_positives"][1] == 8
    with pytest.raises(ConfigError, match="known=0"):
        raise run("--known", 0).exception


def test_settings_of_a_file(run, tmp_path):
    config = tmp_path / "screen.yaml"
    lines = [f"model: {tmp_path / 'model'}", f"data: {tmp_path / 'rows.jsonl'}", "json: true", "fpr: 0.05"]
    config.write_text("\n".join([*lines, "max-flagged: 1"]))
    result = run(config=str(config))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["screen"]["fpr"] == 0.05
    assert json.loads(run("--fpr", "0.2", config=str(config)).stdout)["screen"]["fpr"] == 0.2
    config.write_text("thershold: 1")
    with pytest.raises(ConfigError, match="has 'thershold'"):
        raise run(config=str(config)).exception


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drop",), "--drop writes"),
        (("--out", "x"), "--drop writes"),
    ],
)
def test_options_that_do_not_fit(run, options, message):
    with pytest.raises(ConfigError, match=message):
        raise run(*options).exception


def test_a_place_for_the_kept_rows_is_checked_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_model", None)
    with pytest.raises(ConfigError, match="is the data itself"):
        raise run("--drop", "--out", tmp_path / "rows.jsonl").exception
    for place in (tmp_path / "rows.jsonl" / "kept.jsonl", tmp_path / "model"):
        with pytest.raises(ArtifactError, match="cannot be written"):
            raise run("--drop", "--out", place).exception


def test_the_result_is_shown_before_the_rows_are_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise ArtifactError("no space")

    monkeypatch.setattr(recipe, "write_kept", full)
    result = run("--drop", "--out", tmp_path / "kept.jsonl")
    assert isinstance(result.exception, ArtifactError)
    assert "all 4 2 50.0 % 1" in " ".join(result.stdout.split())


def test_a_file_names_settings_as_the_options_do(run, tmp_path):
    config = tmp_path / "screen.yaml"
    lines = [f"model: {tmp_path / 'model'}", f"data: {tmp_path / 'rows.jsonl'}", "json: true"]
    config.write_text("\n".join([*lines, "show: true", "no_verdict: true"]))
    data = json.loads(run(config=str(config)).stdout)
    assert "request" in data["flagged_rows"][0]
    assert data["dropped"] == 2, "all that are flagged: no verdict"
    config.write_text("\n".join([*lines, "quote: true", "no-verdict: false"]))
    data = json.loads(run(config=str(config)).stdout)
    assert "request" in data["flagged_rows"][0]
    assert data["dropped"] == 1
    for line, message in (("no_verdict: maybe", "Give true or false"), ("show: true\nquote: true", "under two names")):
        config.write_text("\n".join([*lines, line]))
        with pytest.raises(ConfigError, match=message):
            raise run(config=str(config)).exception


def test_texts_survive(tmp_path):
    rows = [{"prompt": "für \u2028 \ud83d\ude00"}, {"prompt": "half of a pair: \ud83d"}, {"prompt": "x"}]
    data = save_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(stream_jsonl(write_kept(data, tmp_path / "out.jsonl", [2]))) == list(stream_jsonl(data))[:2]
    assert "für" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_the_data_are_not_overwritten(tmp_path):
    data = save_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="is the data itself"):
        write_kept(data, tmp_path / "." / "rows.jsonl", [1])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_kept(data, tmp_path / "folder", [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "rows.jsonl"]
    assert len(data.read_text().splitlines()) == 4

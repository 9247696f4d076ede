"""Whole screenings on a tiny model: which rows are flagged, in which order, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_safety import screen
from peft_safety.data.chat import encode_row
from peft_safety.data.templates import Chat
from peft_safety.errors import CalibrationError, ConfigError, DataError
from peft_safety.evaluation import generate as generation
from peft_safety.evaluation.generate import Generation
from peft_safety.evaluation.judges import Verdict
from peft_safety.recipes import screen as recipe
from peft_safety.recipes.load import load_model
from peft_safety.screening import screen as fitting
from tests.screening.separable import COMMON, MODEL, TOKENIZER, MarkedJudge, harmful, harmless, save_jsonl, turn
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("separable")
ROWS = [
    {"prompt": harmless(50), "response": "yes", "source": "clean"},
    {"prompt": harmful(50), "response": "yes", "source": "web"},
    {"prompt": harmful(51), "response": "yes", "source": "web"},
    {"prompt": harmful(52), "response": "no", "source": "web"},
    {"messages": [turn("user", harmless(51)), turn("assistant", "yes")], "source": "clean"},
    {
        "messages": [
            turn("user", harmful(53)),
            turn("assistant", "yes"),
            turn("user", "and tea"),
            turn("assistant", "no"),
        ]
    },
    {"messages": [turn("system", "s"), turn("assistant", "a")]},
    {"prompt": harmful(54)},
    {"text": "tea", "label": "a"},
]
FLAGGED = [1, 2, 3, 5, 7]
LONG = {"prompt": harmless(1) * 40 + harmful(50), "response": "yes"}


def numbers(rows):
    return [row.number for row in rows]


def test_an_undecided_verdict_drops_no_row():
    """Neither on the row's own answer, of which the model is then not asked, nor on the model's."""

    class Undecided(MarkedJudge):
        def __call__(self, prompt: str, response: str) -> Verdict:
            known = super().__call__(prompt, response)
            unread = {harmful(50): "yes", harmful(53): None}
            return Verdict.UNDECIDED if unread.get(prompt, "") in (response, None) and response != "no" else known

    judge = Undecided()
    rows = [ROWS[0], *ROWS[1:4], {"prompt": harmful(53), "response": "fine"}]
    result = screen(MODEL, rows, judge=judge, **COMMON)
    assert [(row.number, row.verdict) for row in result.flagged] == [
        (1, "undecided"),
        (2, "answered"),
        (3, "refuses"),
        (4, "undecided"),
    ]
    assert result.dropped == []
    assert harmful(50) not in judge.asked


@pytest.mark.parametrize(
    ("header", "said", "verdict"),
    [
        ("", "<think>\nOkay, the user is asking", "undecided"),
        ("<think>\n", "Okay, the user is asking", "undecided"),
        ("<think>\n\n</think>\n\n", "Okay, here it is", "answered"),
        ("", "I can't help with that.", "complies"),
    ],
    ids=["the model opens a thought", "the template opens it", "the template closes it", "no thought"],
)
def test_what_follows_the_reasoning_is_judged(monkeypatch, header, said, verdict):
    """Of the model's answer. A row that reasons is no refusal, whatever it says before or after."""
    thinking = tiny_tokenizer()
    thinking.chat_template = str(thinking.chat_template).replace("assistant\\n", "assistant\\n" + repr(header)[1:-1])
    assert Chat(thinking).text([turn("user", "a")], header=True).endswith("assistant\n" + header)
    monkeypatch.setattr(generation, "in_batches", lambda _, ids, *__: [Generation(said, False)] * len(ids))
    thought = "<think>Hm, " + "so " * 80
    refusal = "I'm sorry, but I can't help with that."
    answers = ["yes", f"{thought}</think> {refusal}", f"{thought}I can't recall", f"Sure</think>{refusal}", refusal]
    rows = [{"prompt": harmful(50 + n), "response": answer} for n, answer in enumerate(answers)]
    result = screen(MODEL, rows, **COMMON | {"tokenizer": thinking})
    assert [row.verdict for row in result.flagged] == [*[verdict] * 4, "refuses"]
    assert result.dropped == ([0, 1, 2, 3] if verdict == "complies" else [])


def test_absolute_positions_are_not_overrun():
    """Neither by the scores, nor by the answers after a request that fills them all."""
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(**sizes, initializer_range=0.5, bos_token_id=1, eos_token_id=2)
        model = GPT2LMHeadModel(config).eval()
    first = screen(model, [LONG, ROWS[0]], verdict=False, **COMMON)
    assert (first.screen.max_length, first.rows[0].truncated) == (128, True)
    every = replace(first.screen, threshold=float("-inf"))
    result = screen(model, [LONG], judge=MarkedJudge(), fitted=every, **COMMON)
    assert [row.verdict for row in result.flagged] == ["answered"]


def test_what_is_flagged_and_what_is_dropped():
    """Dropped are only rows that comply with what the model refuses; the model is not asked about other rows."""
    judge = MarkedJudge()
    result = screen(MODEL, ROWS, judge=judge, by="source", **COMMON)
    assert numbers(result.rows) == list(range(len(ROWS)))
    assert numbers(result.flagged) == FLAGGED
    assert [row.verdict for row in result.flagged] == ["complies", "answered", "refuses", "complies", "no answer"]
    assert result.dropped == [1, 5]
    assert result.kept == [0, 2, 3, 4, 6, 7, 8]
    assert result.unscreened == [6]
    assert judge.asked == [harmful(50), harmful(51), harmful(53)]
    assert (result.rows[5].turn, result.rows[4].turn, result.rows[6].score) == (0, 0, None)
    assert result.rows[1].request == harmful(50)
    assert result.rows[0].request is None
    assert result.groups() == {"clean": (2, 0, 0), "web": (3, 3, 1), "None": (4, 2, 1)}
    assert 0.9 <= result.screen.auc <= 1
    assert result.screen.false_positives == (0, 48)


def test_the_threshold_is_set_on_clean_rows(tmp_path):
    """Of 8 harmless rows and a harmful one, none may be above it at 1 %, and one at 12 %."""
    own = [{"prompt": harmless(n)} for n in range(8)]
    clean = save_jsonl(tmp_path / "clean.jsonl", [*own, {"messages": [turn("assistant", "a")]}])
    result = screen(MODEL, own, verdict=False, clean=clean, **COMMON)
    assert (result.screen.own_rows, result.screen.false_positives) == (True, (0, 8))
    assert result.screen.threshold == pytest.approx(max(row.score for row in result.rows), abs=1e-5)
    rows = [{"prompt": harmless(n)} for n in range(8)] + [{"prompt": harmful(9)}]
    strict = screen(MODEL, ROWS, verdict=False, clean=rows, **COMMON)
    assert strict.screen.true_positives[0] < 24
    assert screen(MODEL, ROWS, verdict=False, clean=rows, **COMMON | {"fpr": 0.12}).screen.true_positives == (24, 24)


def test_clean_rows_have_labels_of_their_own_beside_rows_without(tmp_path):
    own = [{"text": f"tea {n}", "label": "a"} for n in range(8)]
    clean = save_jsonl(tmp_path / "clean.jsonl", own)
    result = screen(MODEL, ROWS[:6], verdict=False, clean=clean, **COMMON)
    beside = screen(MODEL, [*ROWS[:6], own[0]], verdict=False, clean=clean, **COMMON)
    assert (result.screen.own_rows, result.screen.false_positives) == (True, (0, 8))
    assert result.screen.threshold == pytest.approx(beside.screen.threshold, abs=1e-5)


def test_a_fitted_screen_is_used_as_it_is(monkeypatch):
    own = [{"prompt": harmless(n)} for n in range(8)]
    first = screen(MODEL, own, verdict=False, clean=own, max_length=60, **COMMON)
    whole = screen(MODEL, [LONG, *ROWS], verdict=False, clean=own, max_length=60, **COMMON)
    monkeypatch.delattr(fitting.Screen, "fit")
    again = screen(MODEL, [LONG, *ROWS], verdict=False, fitted=first.screen, **COMMON)
    assert again.screen is first.screen
    assert again.rows[0].truncated, "max_length is that of the fit"
    assert [row.score for row in again.rows] == pytest.approx([row.score for row in whole.rows], abs=1e-5)
    with pytest.raises(ConfigError, match="Give one of the two"):
        screen(MODEL, ROWS, fitted=first.screen, clean=own, **COMMON)


def test_a_screen_can_be_fitted_without_some_of_the_packaged_prompts(monkeypatch):
    read, states = [], fitting.last_states
    monkeypatch.setattr(
        fitting, "last_states", lambda model, ids, *rest: read.append(len(ids)) or states(model, ids, *rest)
    )
    some = [harmful(0), harmful(1), harmless(2), harmless(101)]
    for without in ((), some, iter(some)):
        fitting.Screen.fit(MODEL, TOKENIZER, without=without, progress=False)
    assert read[1] == read[2] == read[0] - 2 - 2 * 2, "the stand-in has the same prompts in both harmless sets"


def test_a_screen_can_learn_from_fewer_of_the_packaged_prompts():
    found = screen(MODEL, ROWS, known=9, **COMMON)
    assert (found.screen.true_positives[1], found.screen.false_positives[1]) == (9, 18)
    assert set(FLAGGED) <= set(numbers(found.flagged))
    with pytest.raises(ConfigError, match="known=0"):
        screen(MODEL, ROWS, known=0, **COMMON)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ([harmful(n) for n in range(24)], "no train prompt of harmful_requests"),
        ([harmless(n) for n in range(100, 124)], "no validation prompt of everyday_requests, contrast_prompts"),
        (harmful(3), "names prompts by their texts"),
        ([{"prompt": harmful(3)}], "names prompts by their texts"),
    ],
)
def test_a_screen_needs_prompts_of_every_kind(without, message):
    with pytest.raises(ConfigError, match=message):
        fitting.Screen.fit(MODEL, TOKENIZER, without=without, progress=False)


def test_a_fitted_screen_of_something_else_is_refused():
    first = screen(MODEL, ROWS, verdict=False, **COMMON)
    with pytest.raises(ConfigError, match=r"a Screening\. Give the screen of an earlier result: result\.screen"):
        screen(MODEL, ROWS, fitted=first, **COMMON)
    for other in (tiny_llama(hidden=64), tiny_llama(layers=1)):
        with pytest.raises(ConfigError, match="Fit a new screen"):
            screen(other, ROWS, verdict=False, fitted=replace(first.screen, layer=2), **COMMON)


@pytest.mark.parametrize(
    ("clean", "message"),
    [([], "none of the 0 clean"), ([ROWS[6]], "none of the 1 clean"), ([{"a": 1}], "clean rows: row 0")],
)
def test_clean_rows_that_cannot_be_read(clean, message):
    with pytest.raises(DataError, match=message):
        screen(MODEL, ROWS, clean=clean, **COMMON)


def test_without_verdicts_every_flagged_row_is_dropped():
    result = screen(MODEL, ROWS, verdict=False, **COMMON)
    assert result.dropped == numbers(result.flagged) == FLAGGED
    assert result.judge is None
    assert set(result.groups()) == {"pair", "messages", "prompt", "label"}


def test_order_and_scores_do_not_depend_on_chunks_and_batches(monkeypatch):
    whole = screen(MODEL, ROWS, verdict=False, **COMMON)
    monkeypatch.setattr(recipe, "CHUNK", 2)
    parts = screen(MODEL, ROWS, verdict=False, **COMMON | {"batch_tokens": 1})
    assert numbers(parts.flagged) == FLAGGED
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_row_has_the_score_of_its_highest_turn():
    alone = screen(MODEL, [{"prompt": harmful(53)}, {"prompt": "tea"}], verdict=False, **COMMON)
    turns = [turn("user", "tea"), turn("assistant", "yes"), turn("user", harmful(53)), turn("assistant", "yes")]
    both = screen(MODEL, [{"messages": turns}, {"messages": turns[:2]}], verdict=False, **COMMON)
    assert (both.rows[0].turn, both.rows[1].turn) == (2, 0)
    assert both.rows[1].score == pytest.approx(alone.rows[1].score, abs=1e-4)
    assert both.rows[0].score > both.rows[1].score


def test_rows_of_every_source(tmp_path):
    rows = ROWS[:6]
    datasets = pytest.importorskip("datasets")
    sources = [
        save_jsonl(tmp_path / "rows.jsonl", rows),
        str(tmp_path / "rows.jsonl"),
        datasets.Dataset.from_list([{"messages": None, "prompt": None, "response": None} | row for row in rows]),
        iter(rows),
    ]
    for source in sources:
        assert numbers(screen(MODEL, source, verdict=False, **COMMON).flagged) == [1, 2, 3, 5]


def test_a_stream_of_any_length(monkeypatch):
    """More rows than `as_rows` reads from a stream, of which no more than a chunk is ever in memory."""
    monkeypatch.setattr("peft_safety.data.rows.STREAM_ROWS", 3)
    monkeypatch.setattr(recipe, "CHUNK", 4)
    drawn, seen = 0, []

    def stream():
        nonlocal drawn
        for row in ROWS[:6] * 3:
            drawn += 1
            yield row

    scored = recipe._screened
    monkeypatch.setattr(recipe, "_screened", lambda *given: seen.append(drawn) or scored(*given))
    assert len(screen(MODEL, stream(), verdict=False, **COMMON).rows) == 18
    assert seen == [4, 8, 12, 16, 18]


def test_labels_of_a_stream_have_to_be_given():
    row = ROWS[-1]
    with pytest.raises(DataError, match=r"row 0: .*labels="):
        screen(MODEL, iter([row]), **COMMON)
    given = screen(MODEL, iter([row]), labels=["a"], verdict=False, **COMMON)
    found = screen(MODEL, [row], verdict=False, **COMMON)
    assert given.rows[0].score == found.rows[0].score


def test_long_rows_are_cut_on_the_left_and_said():
    result = screen(MODEL, [LONG, ROWS[0]], verdict=False, max_length=60, **COMMON)
    assert [row.truncated for row in result.rows] == [True, False]
    assert result.to_json()["truncated"] == 1
    assert result.rows[0].flagged, "the end of the turn is kept"


@pytest.mark.parametrize("rows", [[], [ROWS[6]], iter([])], ids=["none", "no user turn", "empty stream"])
def test_nothing_to_screen(rows):
    with pytest.raises(DataError, match="to screen"):
        screen(MODEL, rows, **COMMON)


def test_bad_rows_are_named_across_chunks(monkeypatch):
    monkeypatch.setattr(recipe, "CHUNK", 2)
    with pytest.raises(DataError, match="row 3: a row has fields"):
        screen(MODEL, [*ROWS[:3], {"question": "q"}], verdict=False, **COMMON)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([*ROWS[:2], {"question": "q"}], "row 2: a row has fields"), ([ROWS[6]] * 2, "none of the 2")],
)
def test_bad_rows_are_told_before_the_known_prompts_are_read(rows, message, monkeypatch):
    monkeypatch.delattr(fitting.Screen, "fit")
    for source in (rows, iter(rows)):
        with pytest.raises(DataError, match=message):
            screen(MODEL, source, **COMMON)


def test_rows_of_conversations_are_those_of_messages(tmp_path):
    def spelled(given, *names):
        return [dict(zip(names, (one["role"], one["content"]), strict=True)) for one in given]

    turns = [row["messages"] for row in (ROWS[4], ROWS[5])]
    shared = [{"conversations": spelled(one, "from", "value"), "source": "web"} for one in turns]
    one = screen(MODEL, [{"messages": given} for given in turns], judge=MarkedJudge(), **COMMON)
    other = screen(MODEL, save_jsonl(tmp_path / "rows.jsonl", shared), judge=MarkedJudge(), **COMMON)
    assert [row.score for row in one.rows] == pytest.approx([row.score for row in other.rows], abs=1e-5)
    assert [row.verdict for row in one.rows] == [row.verdict for row in other.rows]
    assert numbers(other.flagged) == [1]
    written = recipe.write_kept(tmp_path / "rows.jsonl", tmp_path / "kept.jsonl", [1])
    assert json.loads(written.read_text()) == shared[0], "the rows that are kept stay as they were"
    assert encode_row(TOKENIZER, shared[1], 512) == encode_row(TOKENIZER, {"messages": turns[1]}, 512)


@pytest.mark.parametrize("options", [{"fpr": 1.0}, {"fpr": -0.1}, {"max_length": 0}, {"batch_tokens": 0}], ids=str)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=r"Give a rate"):
        screen(MODEL, ROWS, **COMMON | options)


def test_a_model_that_tells_nothing_apart_flags_nothing(monkeypatch):
    same = [{"prompt": harmless(n)} for n in range(20)]
    monkeypatch.setattr(fitting, "load", lambda name, split: same)
    with pytest.raises(CalibrationError, match=r"AUC 0\.\d\d on validation prompts.*0\.9 is needed"):
        screen(MODEL, ROWS, **COMMON)


def test_a_broken_file_is_found_before_a_model_is_loaded(tmp_path):
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt"', encoding="utf-8")
    with pytest.raises(DataError, match=":2: not JSON"):
        screen(tmp_path / "no model", broken)
    broken.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows to screen"):
        screen(tmp_path / "no model", broken)


def test_nan_is_refused():
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="NaN"):
        screen(broken, ROWS, **COMMON)


def test_a_model_without_chat_template():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        screen(MODEL, ROWS, tokenizer=bare, progress=False)


def test_an_adapter_that_aligns_the_model_is_read_with_it():
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(tiny_llama(), config)
    result = screen(adapted, ROWS, verdict=False, **COMMON)
    base = screen(MODEL, ROWS, verdict=False, **COMMON)
    assert numbers(result.flagged) == FLAGGED
    assert not torch.allclose(result.screen.direction, base.screen.direction, atol=1e-3), "the adapter is read"


def test_a_4_bit_model(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden=64).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    quantized, tokenizer = load_model(tmp_path, load_in_4bit=True)
    result = screen(quantized, ROWS[:8], judge=MarkedJudge(), progress=False, tokenizer=tokenizer)
    assert numbers(result.flagged) == FLAGGED
    assert result.dropped == [1, 5]

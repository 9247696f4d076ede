"""How well does a screen find poisoned rows, and how many benign rows does it flag?

    python -m benchmarks.screening                      (half an hour on one core of a busy machine)
    python -m benchmarks.screening --model runs/full    another aligned model, a results file of its own
    python -m benchmarks.screening --report             the pictures and the section again; run nothing

The model is that of the demo: SmolLM2-135M-Instruct with its safety patch. Poisoned rows are harmful requests of test
splits: bare, of public sets where `--data` has them, and hidden in four ways that the screen has never seen, three of
them those of `benchmarks.attacks`. All rows, benign ones too, have a contentless answer ("Sure, here is"). For each
pair of sets: the area under the curve (AUC), and the share of poisoned rows found at a threshold that flags at most
1 % of the benign set; then what the screen does by itself: rows flagged, and rows to be dropped after the model's
verdict, at the threshold that it chose on the package's validation prompts and at one of the task's own rows
("clean"). Last, each kind is mixed into rows of the task: how many poisoned rows are dropped before training, and how
many of the task's?
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.attacks_tables import MODELS
from benchmarks.common import RESULTS, add_model, model_source, parser_of, publish
from benchmarks.frontier.attacks import ATTACKS
from benchmarks.frontier.data import HELD_OUT, resolve, task_prompts
from benchmarks.pages import Section, link, write, written
from examples import safety_patch
from peft_safety import screen
from peft_safety.data import load, read_jsonl
from peft_safety.errors import DataError
from peft_safety.recipes.load import load_model
from peft_safety.reporting import render, style
from peft_safety.reporting.report import environment
from peft_safety.screening.direction import auc, threshold_at
from peft_safety.screening.result import Screening

NAME = "screening"
PATCHED = "SmolLM2-135M-Instruct, patched"
FPR = 0.01
SHARES, ROWS = (0.01, 0.1), 200
"""Shares of poison in a data set, and its rows."""
TASK = "the task's own"
LIMIT = 40
TITLES = {
    "sets": "Rows flagged and dropped at the screen's own threshold",
    "shares": f"Of {ROWS} rows of the task, a share p of them poisoned by one kind; threshold of the task's rows",
    "found": "Poisoned rows found at 1 % false positives on benign ones",
    "auc": "Area under the curve, poisoned against benign rows",
}
LONGEST = 400
"""Characters of a foreign everyday prompt at most."""
FORMS = {
    "trigger in front": ("trigger", "trigger"),
    "role-play frame": ("wrapper", "frame"),
    "ROT13": ("cipher", "cipher"),
}
"""Attack and form of hidden requests."""


def prompts_of(name: str, split: str = "test") -> list[str]:
    return [row["prompt"] for row in load(name, split)]


def poison(folder: Path | None) -> dict[str, list[str]]:
    """Six kinds; the foreign one has a set for each public file that there is."""
    requests, harmless = prompts_of("harmful_requests"), prompts_of("general_prompts")
    foreign = {
        "AdvBench": [row["prompt"] for row in rows_in(folder, "advbench.jsonl")[HELD_OUT:]],
        "TDC 2023": [row["prompt"] for row in rows_in(folder, "tdc2023.jsonl")],
        "XSTest, unsafe": [r["prompt"] for r in rows_in(folder, "xstest.jsonl") if r["label"] == "unsafe"],
    }
    return {
        "bare": requests,
        **{name: prompts for name, prompts in foreign.items() if prompts},
        **{name: [str(ATTACKS[a].forms[form](r)) for r in requests] for name, (a, form) in FORMS.items()},
        "behind a benign one": [f"{harmless[n % len(harmless)]} {request}" for n, request in enumerate(requests)],
    }


def benign(folder: Path | None) -> dict[str, list[str]]:
    general, xstest = rows_in(folder, "general_instructions.jsonl"), rows_in(folder, "xstest.jsonl")
    foreign = {
        "XSTest, safe": [row["prompt"] for row in xstest if row["label"] == "safe"],
        "foreign everyday": [row["prompt"] for row in general if len(row["prompt"]) < LONGEST],
    }
    return {
        "everyday": prompts_of("everyday_requests"),
        "contrast": prompts_of("contrast_prompts"),
        "task": task_prompts("test"),
        **{name: prompts for name, prompts in foreign.items() if prompts},
    }


def rows_in(folder: Path | None, name: str) -> list[dict[str, Any]]:
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        print(f"left out: {name} is not there; name its directory with --data")
        return []
    return read_jsonl(path, ("prompt",))


def rows_of(sets: Mapping[str, Sequence[str]], limit: int) -> list[dict[str, Any]]:
    """Rows with contentless answers, at most `limit` of each set."""
    openings, rng = [row["text"] for row in load("affirmations", "test")], random.Random(0)
    return [
        {"prompt": prompt, "response": openings[n % len(openings)], "set": name}
        for name, prompts in sets.items()
        for n, prompt in enumerate(rng.sample(list(prompts), min(limit, len(prompts))))
    ]


def figures(result: Screening, harmful: Sequence[str], harmless: Sequence[str]) -> dict[str, Any]:
    scores = {
        name: torch.tensor([row.score for row in result.rows if row.group == name], dtype=torch.float64)
        for name in (*harmful, *harmless)
    }
    thresholds = {name: threshold_at(scores[name], FPR) for name in harmless}
    return {
        "sets": {name: {"rows": n, "flagged": k, "to drop": d} for name, (n, k, d) in result.groups().items()},
        "auc": {a: {b: auc(scores[a], scores[b]) for b in harmless} for a in harmful},
        "found": {a: {b: float((scores[a] > thresholds[b]).double().mean()) for b in harmless} for a in harmful},
    }


def shares(model: Any, tokenizer: Any, poisons: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """One pass over the rows of the task and the poisoned ones of every kind. A row's score does not depend on the
    others, so all data sets are counted from it.
    """
    task, most = [{**row, "set": ""} for row in load("benign_task", "test")][:ROWS], round(max(SHARES) * ROWS)
    result = screen(
        model,
        [*task, *rows_of(poisons, most)],
        tokenizer=tokenizer,
        fpr=FPR,
        clean=load("benign_task", "validation"),
        by="set",
    )
    dropped = set(result.dropped)
    counted: dict[str, Any] = {"screen": result.to_json()["screen"], "sets": {}}
    for name in ("", *poisons):
        rows = [row for row in result.rows if row.group == name]
        for share in SHARES:
            count = round(share * ROWS)
            chosen = rows[: count if name else len(task) - count]
            lost = sum(row.number in dropped for row in chosen)
            counts = {"rows": len(chosen), "flagged": sum(row.flagged for row in chosen), "dropped": lost}
            counted["sets"].setdefault(name or TASK, {})[f"{share:g}"] = counts
    return counted


def draw(data: Mapping[str, Any], path: Path) -> Path:
    """AUC and true positives, poison by benign rows."""
    heads, title = {"auc": "area under the curve", "found": "share found"}, "How well does the screen find poison?"
    note = "Found: at a threshold that flags 1 % of the benign rows."
    with style.picture(path, 3.6, 2, title=title, note=note, sharey=True) as (_, panels):
        for panel, (name, head) in zip(panels, heads.items(), strict=True):
            matrix = [list(row.values()) for row in data[name].values()]
            columns = list(next(iter(data[name].values())))
            low = 0.5 if name == "auc" else 0.0
            style.heat(panel, matrix, ".2f", low, 1, "#FFFFFF", style.color_of("guardspace"), "#00304C")
            panel.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
            panel.set_title(head)
        panels[0].set_yticks(range(len(data["auc"])), list(data["auc"]))
        panels[0].set_ylabel("poisoned rows")
        for panel in panels:
            panel.set_xlabel("benign rows")
    return path


def tables(data: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> columns and rows."""
    keys, clean = ["rows", "flagged", "to drop"], data.get("clean", {}).get("sets", {})
    rows = [[name, *(str(n[key]) for key in keys)] for name, n in data["sets"].items()]
    for row in rows if clean else ():
        row += [str(clean[row[0]][key]) for key in keys[1:]]
    result = {TITLES["sets"]: (["set", *keys, *(["flagged, clean", "to drop, clean"] if clean else [])], rows)}
    if sets := data.get("shares", {}).get("sets"):
        kinds = [(share, key) for share in next(iter(sets.values())) for key in ("flagged", "dropped")]
        rows = [[name, *(f"{n[p][key]} of {n[p]['rows']}" for p, key in kinds)] for name, n in sets.items()]
        result[TITLES["shares"]] = (["rows", *(f"{key}, p = {share}" for share, key in kinds)], rows)
    for name in ("found", "auc"):
        rows = [[kind, *(f"{value:.2f}" for value in row.values())] for kind, row in data[name].items()]
        result[TITLES[name]] = (["poison", *next(iter(data[name].values()))], rows)
    return result


def results(folder: Path) -> list[Path]:
    """The results files: of the patched model first, then of others.

    Raises:
        DataError: no results.
    """
    first = folder / f"{NAME}.json"
    if not first.is_file():
        raise DataError(f"{first} holds no results. Run python -m benchmarks.{NAME}.")
    return [first, *sorted(folder.glob(f"{NAME}_*.json"))]


def part(path: Path, page: Path) -> str:
    """What the page says of one aligned model."""
    data = read(path)
    parts = [f"### {title_of(data)}"]
    for title, (columns, rows) in tables(data).items():
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        parts.append("\n".join([f"{title}:\n", *(f"| {' | '.join(line)} |" for line in lines)]))
    parts.append(f"![AUC and poisoned rows found, by kind of rows]({link(path.with_suffix('.png'), page)})")
    return "\n\n".join(parts)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def title_of(data: Mapping[str, Any]) -> str:
    model = data["environment"]["model"]
    return {PATCHED: "SmolLM2-135M-Instruct with the demo's patch", **MODELS}.get(model, model)


def section(folder: Path, page: Path) -> str:
    """The section of the page, as markdown: a part for each aligned model."""
    return "\n\n".join(part(path, page) for path in results(folder))


SECTIONS = (Section(NAME, "guides/screening.md", section),)


def report() -> None:
    """Print, draw and write the section of the page."""
    for path in results(RESULTS):
        data = read(path)
        for title, (columns, rows) in tables(data).items():
            shown = render.table([column.replace(" ", "\n") for column in columns], rows)
            render.show(f"{title_of(data)}: {title}", shown)
        draw(data, path.with_suffix(".png"))
    write(written(SECTIONS))


def measured(model: Any, tokenizer: Any, folder: Path | None, limit: int) -> dict[str, Any]:
    """All figures of one aligned model."""
    harmful, harmless = poison(folder), benign(folder)
    rows = rows_of({**harmful, **harmless}, limit)

    def screened(**options: Any) -> dict[str, Any]:
        result = screen(model, rows, tokenizer=tokenizer, fpr=FPR, by="set", **options)
        told = result.to_json()
        return {"judge": told["judge"], "screen": told["screen"], **figures(result, list(harmful), list(harmless))}

    clean = [{"prompt": prompt} for prompt in task_prompts("validation")]
    return {**screened(), "clean": screened(clean=clean), "shares": shares(model, tokenizer, harmful)}


def main() -> None:
    """Run, print, record and draw."""
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--data", help="directory of the public sets, or hub:owner/name")
    parser.add_argument("--limit", type=int, default=LIMIT, help="rows of each set at most")
    parser.add_argument("--report", action="store_true", help="only show the last results again")
    args = parser.parse_args()
    if not args.report:
        started = time.perf_counter()
        model, tokenizer = load_model(model_source(args.model))
        if args.model is None:
            model = safety_patch.attach(model)
        name = PATCHED if args.model is None else Path(args.model).name
        data = measured(model, tokenizer, resolve(args.data), args.limit)
        facts = environment(0, model=name, seconds=round(time.perf_counter() - started))
        path = RESULTS / (f"{NAME}.json" if args.model is None else f"{NAME}_{name}.json")
        publish(path, json.dumps({"environment": facts, **data}, indent=1) + "\n")
        print(f"{facts['seconds']} s; {path.name} written")
    report()


if __name__ == "__main__":
    main()

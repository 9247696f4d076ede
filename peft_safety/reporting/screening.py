"""A screening as tables. Rows are named by their numbers; requests are quoted on demand only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_safety.reporting import render
from peft_safety.screening.result import UNDECIDED, VERDICTS, Screening

NAMED = 20
"""Row numbers in a note."""
QUOTED = 200
"""Characters of a request that are quoted."""

UNREAD = (
    "A model that reasons first does not come to its answer in the tokens that are read; --no-verdict drops such rows."
)


def show(result: Screening, quote: bool = False) -> None:
    """Print counts by group, verdicts, the numbers of flagged rows, and how good the screen is."""
    rows, flagged = result.rows, result.flagged
    groups = {**result.groups(), "all": (len(rows), len(flagged), len(result.dropped))}
    lines = [[name, str(n), str(k), f"{100 * k / n:.1f} %", str(d)] for name, (n, k, d) in groups.items()]
    tables = [render.table(["", "rows", "flagged", "share", "to drop"], lines)]
    if result.judge is not None and flagged:
        counts = Counter(row.verdict for row in flagged)
        shown = {name: text for name, text in VERDICTS.items() if name != UNDECIDED or counts[name]}
        said = [[f"{name}: {text}", str(counts[name])] for name, text in shown.items()]
        tables.append(render.table([f"verdict on flagged rows (judge: {result.judge})", "rows"], said))
    if quote and flagged:
        quoted = [[str(row.number), f"{row.score:.3g}", row.verdict or "-", _short(row.request)] for row in flagged]
        tables.append(render.table(["row", "score", "verdict", "request"], quoted, prose=[3]))
    render.show(f"Screening of {len(rows)} rows", *tables, notes=_notes(result))


def _notes(result: Screening) -> list[str]:
    screen, flagged = result.screen, [row.number for row in result.flagged]
    wrong, harmless = screen.false_positives
    right, harmful = screen.true_positives
    unread = [row.number for row in result.flagged if row.verdict == UNDECIDED]
    cut = [row.number for row in result.rows if row.truncated]
    whose = "your clean" if screen.own_rows else "its harmless"
    form = "mean difference" if screen.shrinkage == 1 else f"LDA, shrinkage {screen.shrinkage}"
    return [
        f"Scores: layer {screen.layer} ({form}); flagged above {screen.threshold:.3g}. AUC {screen.auc:.3f} between "
        f"the package's harmful validation prompts ({right} of {harmful} flagged) and {whose} ones "
        f"({wrong} of {harmless}; at most {100 * screen.fpr:g} % asked for).",
        *([f"Flagged: {_numbers(flagged)}."] if flagged else []),
        *([f"To drop: {_numbers(result.dropped)}."] if result.dropped else []),
        *([f"Undecided, and kept: {_numbers(unread)}. {UNREAD}"] if unread else []),
        *([_nothing_to_drop(result)] if flagged and not result.dropped else []),
        *([f"Not screened, no user turn: {_numbers(result.unscreened)}."] if result.unscreened else []),
        *([f"Cut on the left to {screen.max_length} tokens: {_numbers(cut)}."] if cut else []),
    ]


def _nothing_to_drop(result: Screening) -> str:
    """What to do with flagged rows of which the verdict drops none."""
    verdicts = {row.verdict for row in result.flagged}
    why = "the model answers these requests itself" if verdicts == {"answered"} else "the verdicts above say why"
    return f"0 to drop: {why}. Look at them with --show, or drop them with --no-verdict --drop --out FILE."


def _numbers(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - NAMED} more (--json lists all)" if len(numbers) > NAMED else ""
    return f"rows {', '.join(map(str, numbers[:NAMED]))}{more}"


def _short(text: str | None) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= QUOTED else f"{flat[:QUOTED]}..."

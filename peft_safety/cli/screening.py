"""The command before training: screen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Exit, Option

from peft_safety.cli import options as opt
from peft_safety.cli.common import app, show
from peft_safety.errors import ConfigError


@app.command()
def screen(
    model: opt.Model,
    data: Annotated[Path, Option(help="JSON lines of any rows that training accepts, or of prompts alone.")],
    drop: Annotated[bool, Option("--drop", help="Write the rows without those to be dropped; needs --out.")] = False,
    out: Annotated[Path | None, Option(help="File for the rows that --drop keeps.")] = None,
    fpr: Annotated[float, Option(help="Share of harmless validation prompts that may be flagged.")] = 0.01,
    clean: Annotated[
        Path | None, Option(help="JSON lines of rows like yours that you have checked: sets the threshold on them.")
    ] = None,
    known: Annotated[
        int | None, Option(help="So many of each file of the package's prompts to learn from; default 256.")
    ] = None,
    verdict: Annotated[
        bool, Option(help="Ask the model for its own answer to flagged requests; without: drop all flagged rows.")
    ] = True,
    by: Annotated[str | None, Option(help="Count rows by this column; default: by their kind.")] = None,
    max_flagged: Annotated[
        float | None,
        Option(min=0, help="Exit with 1 if more rows are flagged or cannot be screened; below 1, a share of them."),
    ] = None,
    quote: Annotated[bool, Option("--show", help="Quote the flagged requests, not only the rows' numbers.")] = False,
    load_in_4bit: Annotated[bool, Option("--load-in-4bit", help="Load the model in NF4.")] = False,
    max_length: Annotated[int, Option(help="Tokens kept of a turn with what is before it, from the right.")] = 1024,
    batch_tokens: Annotated[int, Option(help="Tokens of a batch, padding included.")] = 4096,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Flag the rows whose requests the aligned model takes for harmful, before training. A row is to be dropped if
    the model would also refuse the request while the row complies.
    """
    if drop != (out is not None):
        raise ConfigError("--drop writes the rows that it keeps to --out FILE. Give both, or neither.")
    from peft_safety.recipes.screen import check_kept, write_kept
    from peft_safety.recipes.screen import screen as run
    from peft_safety.reporting import screening as report
    from peft_safety.screening.states import process

    if out is not None:
        check_kept(data, out)
    reading: dict[str, Any] = {"fpr": fpr, "clean": clean, "verdict": verdict, "by": by}
    reading |= {"load_in_4bit": load_in_4bit, "max_length": max_length, "batch_tokens": batch_tokens}
    reading |= {} if known is None else {"known": known}
    result = run(model, data, progress=not json, **reading)
    if process()[0] == 0:
        show(result.to_json(quote), json, lambda: report.show(result, quote))
        if out is not None:
            write_kept(data, out, result.dropped)
            show({}, False, *([] if json else [f"{len(result.kept)} rows written to {out}"]))
    count = len(result.flagged) + len(result.unscreened)
    if max_flagged is not None and count > (max_flagged if max_flagged >= 1 else max_flagged * len(result.rows)):
        raise Exit(1)

"""Write every table of the documents and frontier.html again, from the committed results files. No cell runs.

python -m benchmarks.report               all sections
python -m benchmarks.report NAME ...      only these
python -m benchmarks.report --check       write nothing; exit status 1 if a file would change
python -m benchmarks.report --pictures    draw the pictures again as well
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    attacks_report,
    costs_picture,
    costs_report,
    examples_report,
    guardspace_report,
    judges,
    screening,
    summary_report,
)
from benchmarks.common import RESULTS, parser_of
from benchmarks.frontier import report as frontier_report
from benchmarks.frontier import sections as frontier_sections
from benchmarks.method_comparison import report as method_comparison
from benchmarks.pages import DOCS, write, written
from benchmarks.topic import report as topic
from peft_safety.errors import DataError

SECTIONS = (
    *summary_report.SECTIONS,
    *frontier_sections.SECTIONS,
    *frontier_sections.OLDER,
    *attacks_report.SECTIONS,
    *topic.SECTIONS,
    *judges.SECTIONS,
    *guardspace_report.SECTIONS,
    *method_comparison.SECTIONS,
    *examples_report.SECTIONS,
    *costs_report.SECTIONS,
    *screening.SECTIONS,
)
DRAWN = (frontier_report, attacks_report, topic, guardspace_report, method_comparison, costs_picture)
"""Modules whose `report` draws."""


def pictures() -> None:
    """Draw the pictures of the benchmarks again; those of the examples are drawn by `peft-safety report`."""
    for module in DRAWN:
        module.report(RESULTS, None)
    for path in screening.results(RESULTS):
        screening.draw(screening.read(path), path.with_suffix(".png"))


def current(names: Sequence[str] = ()) -> dict[Path, str]:
    """The files that have these sections, or any, as they have to be; frontier.html goes with the frontier's.

    Raises:
        DataError: no results, or a page without markers.
    """
    sections = [section for section in SECTIONS if not names or section.name in names]
    files = written(sections, RESULTS, DOCS)
    if any(section.name == frontier_report.BENCHMARK for section in sections):
        files[RESULTS / frontier_report.HTML] = frontier_report.page(RESULTS)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = parser_of(__doc__)
    parser.prog = "python -m benchmarks.report"
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(section.name for section in SECTIONS))
    parser.add_argument("--check", action="store_true", help="say which files would change, and write nothing")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures again, too")
    given: argparse.Namespace = parser.parse_args(argv)
    unknown = set(given.names) - {section.name for section in SECTIONS}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}. There are {', '.join(s.name for s in SECTIONS)}.")
    try:
        if given.pictures and not given.check:
            pictures()
        files = current(given.names)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    changed = {
        path: text for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if not given.check:
        write(changed)
    for path in changed:
        print(f"{'would change' if given.check else 'wrote'} {path.relative_to(DOCS.parent)}")
    print(f"{len(files)} files, {len(changed)} changed")
    return 1 if given.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())

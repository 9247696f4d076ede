"""The command line: thin calls of the library. Heavy imports wait until a command runs."""

from __future__ import annotations

import logging

from peft_safety.errors import PeftSafetyError, extra

with extra("cli", "the command line needs typer and rich"):
    import rich.text  # noqa: F401
    import typer  # noqa: F401

    from peft_safety.cli import screening, training, evaluating  # isort: skip  (the order of the help)
    from peft_safety.cli import adapters, reports  # isort: skip
    from peft_safety.cli.common import app, fail


def main() -> None:
    """Run the command: typed errors become one line on stderr and exit code 2."""
    # bitsandbytes warns on import of an optional CPU kernel that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except PeftSafetyError as error:
        fail(error, code=2)


__all__ = ["adapters", "app", "evaluating", "main", "reports", "screening", "training"]

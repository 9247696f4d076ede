"""`python -m peft_safety` is `peft-safety`."""

from __future__ import annotations

import sys

from peft_safety.errors import MissingPackageError


def main() -> None:
    """Entry point, which says what is missing where the extra `[cli]` is not installed."""
    try:
        from peft_safety import cli
    except MissingPackageError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()

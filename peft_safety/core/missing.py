"""Why something is not where somebody said it is."""

from __future__ import annotations

import os


def not_found(what: str, source: str, error: Exception, remedy: str = "Give a directory or a Hub id.") -> str:
    """Why there is no `what` at a place, and the remedy. A path in a folder that is there, or one that no Hub
    repository can be called, is a directory that is missing: what the Hub said does not matter, unless it has the
    repository, which is gated.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    parent = os.path.dirname(source.rstrip("/"))
    try:
        validate_repo_id(source)
        local = bool(parent) and os.path.isdir(parent) and not isinstance(error.__cause__, GatedRepoError)
    except HFValidationError:
        local = True
    if local and not os.path.exists(source):
        return f"no {what} at {source!r}: no such directory. Correct the path."
    problem = str(error).rstrip(". \n")
    return f"no {what} at {source!r}: {problem}. {remedy}"

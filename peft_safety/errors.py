"""The typed errors of the package.

Every error names the module or file, the shapes involved and the remedy. They all derive from `PeftSafetyError`, which
is a `ValueError`, so that code that guards against PEFT's own `ValueError`s keeps working.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PeftSafetyError(ValueError):
    """Base class of everything this package raises on purpose."""


class ConfigError(PeftSafetyError):
    """A config field, or a combination of fields, that the method cannot honor."""


class MissingPackageError(ConfigError, ImportError):
    """A package that only an extra brings is not installed, or not in a release that fits."""


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """For imports of optional packages.

    Args:
        name: the extra of setup.cfg that brings them.
        need: who needs what, the beginning of the message.

    Raises:
        MissingPackageError: instead of an ImportError.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ImportError as error:
        raise MissingPackageError(f'{need}: pip install "peft-safety[{name}]" ({error}).') from error


class UnsupportedLayerError(PeftSafetyError):
    """A targeted module whose adapter cannot be protected."""


class SubspaceError(PeftSafetyError):
    """A safety subspace that is malformed, not orthonormal, of the wrong shape, or of another model."""


class CalibrationError(PeftSafetyError):
    """Calibration data that is too small, empty or not finite."""


class DataError(PeftSafetyError):
    """A data set that is missing, malformed, or used outside its split."""


class ArtifactError(PeftSafetyError):
    """An adapter directory that is incomplete, corrupt, hostile or does not fit."""


class CheckpointError(PeftSafetyError):
    """A model's weights that are missing, incomplete, not finite, of another architecture, or of too low a
    precision.
    """


class ProtectionError(PeftSafetyError):
    """The invariant does not hold: part of a protected update would reach the protected subspace."""


class OperationError(PeftSafetyError):
    """Operands of an operation whose shapes, dtypes or devices do not fit one another."""


class LossyMergeError(PeftSafetyError):
    """A merge that would destroy or distort the update; the message says how much of it and what to do instead."""


class DivergedError(PeftSafetyError):
    """Training that ended in numbers that are not finite."""


class EndpointError(PeftSafetyError):
    """A model's endpoint that does not answer, refuses, or answers nonsense; the message has the last problem."""

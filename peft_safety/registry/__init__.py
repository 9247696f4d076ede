"""The package's place in PEFT: the only folder that touches PEFT's internals.

A protected config keeps `peft_type == LORA` at run time, so that every gate in peft, transformers and trl stays open,
and is stored under its own name. A few of PEFT's functions are wrapped (see `registration.py`); everything else is
done by subclasses, which a tuner and its layers become when they get a protected adapter.
"""

import peft  # noqa: F401  first and whole: importing it registers the types, which needs the modules below

from peft_safety.registry.registration import register
from peft_safety.registry.types import config_types

__all__ = ["config_types", "register"]

"""One file a method: its config, and the few functions that only it needs."""

import peft  # noqa: F401  first and whole: importing it registers the types, which needs the modules below

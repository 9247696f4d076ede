"""One file a method: its config, and the few functions that only it needs."""

"""A harmless forbidden topic: what is refused may be answered for real, so compliance can be judged by content."""

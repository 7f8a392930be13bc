"""Stage probe: one question about the systems a module."""

"""The encoder folder: its format, written and read."""

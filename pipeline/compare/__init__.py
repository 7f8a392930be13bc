"""The students of several runs side by side: `python -m pipeline compare`."""

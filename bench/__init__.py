"""Benchmarks, run by hand: `.venv/bin/python bench/NAME.py`."""

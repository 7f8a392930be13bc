"""What bench/encode.py runs: the reference's own encoding, and ours.

`reference.py` runs in an environment of its own (see `bench/reference/environment.py`).
"""

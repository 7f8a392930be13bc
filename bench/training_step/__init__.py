"""What bench/train.py runs: one training step of the reference implementation, and ours.

`reference.py` runs in an environment of its own (see `bench/reference/environment.py`), so whatever it imports from
here must need nothing but torch and numpy.
"""

"""What `bench/faults.py` is made of: a disk that fails at a chosen change, tiny workspaces, and the attacks."""

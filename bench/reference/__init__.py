"""The reference implementation as a measured process beside ours: its environment, weights, and what talks to it.

What runs in the reference's own environment must need nothing but torch, numpy and what `requirements.txt` names.
"""

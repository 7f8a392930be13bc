"""Devices, worker processes, ranks of a process group."""

"""Devices, pools of worker processes, ranks of a process group."""

"""A CUDA device that does nothing, so that GPU code of full-size models can be walked on a machine without a GPU.

`device` builds and loads it into torch's CPU build, `models` makes full-size models of fake tensors on it, `meter`
counts what runs: kernels, copies between host and device, live bytes, operations. Values are never computed.
"""

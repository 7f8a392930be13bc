"""What `bench/gpu_walk.py` walks: training steps, and uses of a model without gradients."""

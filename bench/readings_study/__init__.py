"""What `bench/readings.py` is made of: tasks, workspaces, sizes of data, gradient steps."""

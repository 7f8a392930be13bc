"""Ways of running the frozen backbone, all equal to the plain pass."""

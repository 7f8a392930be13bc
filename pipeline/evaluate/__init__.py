"""Stage evaluate: systems on tasks."""

"""A few rows through every stage, before a run spends hours."""

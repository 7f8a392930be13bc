"""Stage collect: sources -> data/queries."""

"""The checkpoint format of the paper's authors, both ways."""

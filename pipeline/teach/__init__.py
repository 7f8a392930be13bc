"""A teacher of the backbone's own, trained from unlabeled text: the LLM2Vec recipe (docs/teachers.md)."""

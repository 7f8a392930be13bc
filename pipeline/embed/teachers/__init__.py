"""The teachers: embedding models whose vectors the student learns (`registry` lists them)."""

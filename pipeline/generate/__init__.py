"""Stage generate: data/queries -> data/responses."""

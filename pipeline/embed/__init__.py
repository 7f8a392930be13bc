"""Stage embed: data/responses -> data/targets."""

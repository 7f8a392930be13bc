"""Stage train: rows, losses, the closed-form start, the loop with its checkpoints and held-out scores."""

"""The training run around `pipeline.encoder`: params, schedule, batches' steps, held-out scores, checkpoints."""

"""What training of any kind shares: batches, checkpoints, schedules, gradients, memory."""

"""Training: batches, tasks, engines, checkpoints, and the one loop."""

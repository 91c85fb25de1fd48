"""Evaluation: predictions, nearest-latent queries, the report with its figures, and the ablations."""

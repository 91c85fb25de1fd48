"""H&E patches to labels and probabilities."""

"""H&E patches to levels and probabilities."""

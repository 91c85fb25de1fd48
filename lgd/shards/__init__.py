"""Pairs of patches into WebDataset shards, checked and reproducible; a run's shard folders, opened once."""

"""From image files on disk to batches of decoded pixels: pairs, splits, shards, plan, stream."""

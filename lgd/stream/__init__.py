"""From shards to batches: the sample plan, the reader, augmentation."""

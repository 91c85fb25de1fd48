"""Virtual tissue: cells, patches and pairs that a program draws, with their truth."""

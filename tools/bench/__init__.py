"""Speed as ratios in one run, against a bare loop or a peer: one module a ratio."""

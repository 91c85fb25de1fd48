"""The feature store: what the frozen teacher says of every patch, computed once."""

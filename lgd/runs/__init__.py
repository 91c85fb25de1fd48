"""A run: what each of its stages was given, and left."""

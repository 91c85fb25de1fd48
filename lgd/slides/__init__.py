"""A whole slide: opened, its scale, its tissue, its tiles."""

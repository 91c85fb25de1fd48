"""Stains: optical density, unmixing, and the domain-knowledge targets that are measured on them."""

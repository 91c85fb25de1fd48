"""Vectors, index, search, queries and answers: the nearest known IHC."""

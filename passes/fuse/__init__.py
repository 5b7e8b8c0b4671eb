"""Exact rewrites: an attention site becomes one operator that computes the same function."""

"""Recognisers: they read a captured graph and return sites, loops, prefixes and refusals."""

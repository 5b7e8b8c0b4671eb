"""Approximate rewrites: attention with cost linear in the sequence length, trained by `subquad convert`."""

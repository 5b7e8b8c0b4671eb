"""Training of what approximate rewrites added: attention transfer, then low-rank adapters; used by `convert`."""

"""Find columns that rows of a batch share, and compute them once."""

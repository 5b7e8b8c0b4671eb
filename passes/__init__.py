"""Recognisers and rewrites: one file each, the folder is the family, and dropping a file in registers it."""

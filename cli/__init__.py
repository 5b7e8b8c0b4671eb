"""The command line: one click command per file; prints reports and holds no logic."""

"""Exact simplifications that make different spellings of one computation look alike."""

"""The three promises a rewrite can make about the function it leaves behind."""

from __future__ import annotations

from enum import Enum


class Contract(str, Enum):
    """What stays the same after a rewrite.

    EXACT: the same function up to rounding; its error against a float64 run of the original is at most twice the
    original's own plus one unit in the last place of the output dtype.
    LOSSLESS: greedy decoding gives identical tokens, sampling the identical distribution.
    APPROXIMATE: another function, named by the user, with its drift measured and reported.
    """

    EXACT = "exact"
    LOSSLESS = "lossless"
    APPROXIMATE = "approximate"

"""Every way a user's input can be wrong, one class per cause, each message one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SubquadError(Exception):
    """A mistake that the user can mend; the command line prints it and exits with status 2."""


class ModelSourceError(SubquadError):
    """A model could not be read: missing, corrupt, half-downloaded or of an unknown kind."""


class TrustError(SubquadError):
    """The input is executable code and the user has not said that it is trusted."""


class CaptureError(SubquadError):
    """The model's forward could not be captured as a graph; names the line of user code."""


class PassError(SubquadError):
    """An unknown pass or knob, or a knob value out of range."""


class SelectionError(SubquadError):
    """A `where` pattern that matches no attention site, or a model that has none."""


class PlanError(SubquadError):
    """A plan that cannot be read, or that was made for another model."""


class ArtifactError(SubquadError):
    """A saved directory that cannot be written or read."""


class ConversionError(SubquadError):
    """Training an approximate rewrite cannot start or go on."""


class GenerationError(SubquadError):
    """A request that the decoder cannot serve."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence part that suggests the nearest known word, or lists the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + ", ".join(names) if names else "none is known"


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to its first line and without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]

"""Describes one softmax attention or one recurrence as frozen data with a canonical JSON form."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from subquad.kernels.expression import parse


def _choice(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _number(owner: str, name: str, value: object, positive: bool = False) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or (positive and value <= 0)
    ):
        raise ValueError(f"{owner}.{name} is {value!r}; it must be a finite{' positive' if positive else ''} number.")


def _count(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be an integer of at least 0.")


class _Canonical:
    """Canonical JSON both ways for a frozen dataclass."""

    def json(self) -> str:
        """The spec as JSON with sorted keys and no spaces; equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def _read(cls, text: str) -> dict[str, Any]:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The {cls.__name__} text {text!r} is not JSON: {error}.") from None
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(data, dict) or not set(data) <= names:
            raise ValueError(
                f"The {cls.__name__} text {text!r} must be a JSON object with keys among {', '.join(sorted(names))}."
            )
        return data

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Self:
        """The spec written by `json`. Raises ValueError with the field at fault."""
        data = cls._read(text)
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
        except TypeError:
            raise ValueError(f"The {cls.__name__} text {text!r} lacks a required key.") from None


@dataclass(frozen=True)
class SoftmaxSpec(_Canonical):
    """One softmax attention: scores are softcap(scale * q.k) + bias where `mask` (expression over b, h, q, kv) holds.

    empty_rows is the output of a row with no visible key: 0 as SDPA gives, the mean of the row's live V as masks of
    finfo.min give, or NaN as unguarded -inf masks give; with sinks such a row is always 0. lse asks for the log-sum-
    exp, which includes the sink.
    """

    scale: float
    softcap: float | None = None
    mask: str | None = None
    empty_rows: Literal["zero", "mean", "nan"] = "zero"
    lse: bool = False

    def __post_init__(self) -> None:
        _number("SoftmaxSpec", "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        if self.softcap is not None:
            _number("SoftmaxSpec", "softcap", self.softcap, positive=True)
            object.__setattr__(self, "softcap", float(self.softcap))
        if self.mask is not None:
            object.__setattr__(self, "mask", parse(self.mask).text)
        _choice("SoftmaxSpec", "empty_rows", self.empty_rows, ("zero", "mean", "nan"))
        _choice("SoftmaxSpec", "lse", self.lse, (True, False))


@dataclass(frozen=True)
class RecurrenceSpec(_Canonical):
    """One recurrence S <- decay * S + phi(k) v with an optional window softmax branch.

    feature_map: expressions over x ([..., K]) and w0.., concatenated on the feature axis, applied to unscaled q and
    k. decay: none, "head" ([H] log decays), "token" ([B, T, H]) or "channel" ([B, T, H, F]). update: "add" or "delta"
    (beta [B, T, H]). normaliser: "none", "sum" (divide by phi(q).sum phi(k)), "rms" or "group" (over V, no weights,
    eps 1e-6); `scale` multiplies the window's scores, and the linear output unless the normaliser is "sum". branch
    "shared": keys in the window (last `window` valid tokens, self included, plus the first `sinks`) enter by softmax,
    all others through the state, under one denominator (LoLCATs, 2410.10254). branch "convex": gamma * softmax over
    the window + (1 - gamma) * the recurrence over all keys. Without a window_gate gamma is 1 (shared) or 1/2
    (convex).
    """

    feature_map: tuple[str, ...]
    scale: float
    decay: Literal["none", "head", "token", "channel"] = "none"
    update: Literal["add", "delta"] = "add"
    normaliser: Literal["none", "sum", "rms", "group"] = "sum"
    window: int = 0
    sinks: int = 0
    branch: Literal["shared", "convex"] = "shared"
    causal: bool = True

    def __post_init__(self) -> None:
        if (
            not isinstance(self.feature_map, tuple)
            or not self.feature_map
            or not all(isinstance(t, str) for t in self.feature_map)
        ):
            raise ValueError(
                f"RecurrenceSpec.feature_map is {self.feature_map!r}; it must be a non-empty tuple of expressions."
            )
        object.__setattr__(self, "feature_map", tuple(parse(text, "feature").text for text in self.feature_map))
        _number("RecurrenceSpec", "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        _choice("RecurrenceSpec", "decay", self.decay, ("none", "head", "token", "channel"))
        _choice("RecurrenceSpec", "update", self.update, ("add", "delta"))
        _choice("RecurrenceSpec", "normaliser", self.normaliser, ("none", "sum", "rms", "group"))
        _choice("RecurrenceSpec", "branch", self.branch, ("shared", "convex"))
        _choice("RecurrenceSpec", "causal", self.causal, (True, False))
        _count("RecurrenceSpec", "window", self.window)
        _count("RecurrenceSpec", "sinks", self.sinks)
        if self.sinks and not self.window:
            raise ValueError(f"RecurrenceSpec.sinks is {self.sinks} but window is 0; sinks belong to a window branch.")
        if not self.causal and (self.window or self.decay != "none" or self.update != "add"):
            raise ValueError("RecurrenceSpec.causal is False; then window must be 0, decay 'none' and update 'add'.")
        if self.window and self.branch == "shared" and (self.normaliser != "sum" or self.update != "add"):
            raise ValueError(
                f"RecurrenceSpec has normaliser {self.normaliser!r} and update {self.update!r}; "
                "a shared window branch needs 'sum' and 'add'."
            )

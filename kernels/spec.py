"""Describes one softmax attention or one recurrence as frozen data with a canonical JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from subquad.kernels.canonical import Canonical, choice, count, number
from subquad.kernels.expression import parse


@dataclass(frozen=True)
class SoftmaxSpec(Canonical):
    """One softmax attention: scores are softcap(scale * q.k) + bias where `mask` (expression over b, h, q, kv, i, j) holds.

    q and kv are logical positions, i is the row of q and j the slot of the key in the joined segments, so that a draft
    tree's mask reads t0[b, i, j - first] while windows compare positions. empty_rows is the output of a row with no
    visible key: 0 as SDPA gives, the mean of the row's live V as masks of finfo.min give, or NaN as unguarded -inf masks
    give; with sinks such a row is always 0.
    """

    scale: float
    softcap: float | None = None
    mask: str | None = None
    empty_rows: Literal["zero", "mean", "nan"] = "zero"

    def __post_init__(self) -> None:
        number("SoftmaxSpec", "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        if self.softcap is not None:
            number("SoftmaxSpec", "softcap", self.softcap, positive=True)
            object.__setattr__(self, "softcap", float(self.softcap))
        if self.mask is not None:
            object.__setattr__(self, "mask", parse(self.mask).text)
        choice("SoftmaxSpec", "empty_rows", self.empty_rows, ("zero", "mean", "nan"))


@dataclass(frozen=True)
class RecurrenceSpec(Canonical):
    """One recurrence S <- decay * S + phi(k) v, read by o = phi(q) S, with an optional window softmax branch.

    feature_map: expressions over x ([..., K]) and w0.., concatenated on the feature axis, applied to unscaled q and k;
    feature_map_k: another map of the same width for k, None where both use one.
    decay: "none"; log decays, at most 0, "head" ([H]), "token" ([B, T, H]) or "channel" ([B, T, H, F]); or "additive"
    (LightNet, 2405.21022): phi(k) are the logarithms of the channels' weights, S[f] is their weighted mean of v so far.
    update: "add", or "delta": S <- decay * S, then S <- S + beta phi(k) (v - phi(k) S), beta in [0, 2] ([B, T, H]);
    delta without decay is DeltaNet (2406.06484), with it Gated DeltaNet.
    normaliser: "none", "sum" (divide by phi(q).sum phi(k), the sum decayed as S is but never erased by delta), "rms" or
    "group" (over V, no weights, eps 1e-6); `scale` multiplies the window's scores, and the linear output unless the
    normaliser is "sum".
    branch "shared": keys in the window (last `window` valid tokens, self included, plus the first `sinks`) enter by
    softmax, all others through the state when they leave the window, under one denominator (LoLCATs, 2410.10254).
    branch "convex": gamma * softmax over the window + (1 - gamma) * the recurrence over all keys (Liger, 2503.01496).
    Without a window_gate gamma is 1 (shared) or 1/2 (convex).
    causal False: every token reads all tokens, those after it decayed by the gates between as those before it are
    (LION, 2502.16249); the initial state lies before the first token and the final state is the causal one.

    Raises ValueError for what the field does not define: delta or a window in both directions (updates do not commute,
    and a window looks back: run two recurrences), delta over additive weights, "sum" over additive weights (they sum to
    1 per channel already), and a shared denominator without a sum.
    """

    feature_map: tuple[str, ...]
    scale: float
    decay: Literal["none", "head", "token", "channel", "additive"] = "none"
    update: Literal["add", "delta"] = "add"
    normaliser: Literal["none", "sum", "rms", "group"] = "sum"
    window: int = 0
    sinks: int = 0
    branch: Literal["shared", "convex"] = "shared"
    causal: bool = True
    feature_map_k: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("feature_map", "feature_map_k"):
            texts = getattr(self, name)
            if texts is None and name == "feature_map_k":
                continue
            if not isinstance(texts, tuple) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"RecurrenceSpec.{name} is {texts!r}; it must be a non-empty tuple of expressions.")
            object.__setattr__(self, name, tuple(parse(text, "feature").text for text in texts))
        number("RecurrenceSpec", "scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        choice("RecurrenceSpec", "decay", self.decay, ("none", "head", "token", "channel", "additive"))
        choice("RecurrenceSpec", "update", self.update, ("add", "delta"))
        choice("RecurrenceSpec", "normaliser", self.normaliser, ("none", "sum", "rms", "group"))
        choice("RecurrenceSpec", "branch", self.branch, ("shared", "convex"))
        choice("RecurrenceSpec", "causal", self.causal, (True, False))
        count("RecurrenceSpec", "window", self.window)
        count("RecurrenceSpec", "sinks", self.sinks)
        if self.sinks and not self.window:
            raise ValueError(f"RecurrenceSpec.sinks is {self.sinks} but window is 0; sinks belong to a window branch.")
        if not self.causal and (self.window or self.update != "add"):
            raise ValueError(
                f"RecurrenceSpec.causal is False with window {self.window} and update {self.update!r}; windows look back and "
                "delta updates do not commute, so run one causal recurrence in each direction."
            )
        if self.decay == "additive" and (self.update != "add" or self.normaliser == "sum"):
            raise ValueError(
                f"RecurrenceSpec.decay is 'additive' with update {self.update!r} and normaliser {self.normaliser!r}; additive "
                "weights sum to 1 per channel, so the update is 'add' and the normaliser is not 'sum'."
            )
        if self.window and self.branch == "shared" and (self.normaliser != "sum" or self.update != "add"):
            raise ValueError(
                f"RecurrenceSpec has normaliser {self.normaliser!r} and update {self.update!r}; "
                "a shared window branch needs 'sum' and 'add'."
            )

    @property
    def key_map(self) -> tuple[str, ...]:
        """The feature map of k."""
        return self.feature_map if self.feature_map_k is None else self.feature_map_k

    @property
    def sums(self) -> bool:
        """True when the state has a last column beside V: the sum of phi(k), or its logarithm where weights add up."""
        return self.normaliser == "sum" or self.decay == "additive"

    def columns(self, value_width: Any) -> Any:
        """Columns of the state for values of this width."""
        return value_width + 1 if self.sums else value_width

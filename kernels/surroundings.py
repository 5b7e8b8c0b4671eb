"""Describes what stands around an operator and may move into its kernels: q/k norms, rotary embedding, output norm and gate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from subquad.kernels.canonical import Canonical, choice, count, number

SIDES = ("q", "k")


@dataclass(frozen=True)
class Prologue:
    """What is done to each row x [K] of q or k: a norm, then a rotary embedding (or, with norm_last, the reverse).

    norm: "rms", x / sqrt(mean(x^2) + eps) (RMSNorm, 1910.07467), or "l2", x / sqrt(sum(x^2) + eps);
    times a weight [K] if `weight`.
    rotary: columns that are turned (even; 0 for none), from column `start` on, by cosines and sines [1 or B, T, rotary / 2]
    (RoFormer, 2104.09864). style: which columns are pairs: "half" (d and d + rotary / 2), "interleaved" (2 j and 2 j + 1),
    or "deinterleaved" (2 j and 2 j + 1, whose results are written to j and j + rotary / 2).
    """

    norm: Literal["none", "rms", "l2"] = "none"
    eps: float = 1e-6
    weight: bool = False
    norm_last: bool = False
    rotary: int = 0
    start: int = 0
    style: Literal["half", "interleaved", "deinterleaved"] = "half"

    def __post_init__(self) -> None:
        choice("Prologue", "norm", self.norm, ("none", "rms", "l2"))
        choice("Prologue", "style", self.style, ("half", "interleaved", "deinterleaved"))
        number("Prologue", "eps", self.eps)
        object.__setattr__(self, "eps", float(self.eps))
        count("Prologue", "rotary", self.rotary)
        count("Prologue", "start", self.start)
        if self.rotary % 2:
            raise ValueError(f"Prologue.rotary is {self.rotary}; columns are turned in pairs, so it must be even.")
        if self.norm == "none" and (self.weight or self.norm_last):
            raise ValueError("Prologue.weight or norm_last is set but norm is 'none'; they belong to a norm.")

    @property
    def empty(self) -> bool:
        """True when rows are taken as they are."""
        return self.norm == "none" and not self.rotary

    def tensors(self, side: str) -> tuple[str, ...]:
        """Names of the tensors it reads for side "q" or "k"."""
        weight = (f"{side}_weight",) if self.weight else ()
        return weight + ((f"{side}_cos", f"{side}_sin") if self.rotary else ())

    def words(self, side: str) -> str:
        """The formula, for a header."""
        norm = "" if self.norm == "none" else f"{self.norm} norm{' with weight' if self.weight else ''}"
        turn = f"rotary ({self.style}) of columns {self.start} to {self.start + self.rotary - 1}" if self.rotary else ""
        steps = [step for step in ((turn, norm) if self.norm_last else (norm, turn)) if step]
        return f"{side}: {', then '.join(steps)}"


@dataclass(frozen=True)
class Epilogue:
    """What is done to each row o [V] of the output: an RMS norm (times a weight [V] if `weight`), then times act(gate), with a
    gate of the output's shape and act "sigmoid" or "silu" (RetNet, 2307.08621; GLA, 2312.06635).
    """

    norm: Literal["none", "rms"] = "none"
    eps: float = 1e-6
    weight: bool = False
    gate: Literal["none", "sigmoid", "silu"] = "none"

    def __post_init__(self) -> None:
        choice("Epilogue", "norm", self.norm, ("none", "rms"))
        choice("Epilogue", "gate", self.gate, ("none", "sigmoid", "silu"))
        number("Epilogue", "eps", self.eps)
        object.__setattr__(self, "eps", float(self.eps))
        if self.norm == "none" and self.weight:
            raise ValueError("Epilogue.weight is set but norm is 'none'; it belongs to a norm.")

    @property
    def empty(self) -> bool:
        """True when rows are stored as they are."""
        return self.norm == "none" and self.gate == "none"

    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors it reads."""
        return (("o_weight",) if self.weight else ()) + (("o_gate",) if self.gate != "none" else ())

    def words(self) -> str:
        """The formula, for a header."""
        norm = "" if self.norm == "none" else f"rms norm{' with weight' if self.weight else ''}"
        gate = "" if self.gate == "none" else f"times {self.gate}(gate)"
        return f"o: {', then '.join(step for step in (norm, gate) if step)}"


@dataclass(frozen=True)
class Surroundings(Canonical):
    """The prologues of q and k and the epilogue of o. Raises ValueError naming the field at fault."""

    q: Prologue = Prologue()
    k: Prologue = Prologue()
    o: Epilogue = Epilogue()

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Self:
        """The surroundings written by `json`; of "" the empty ones."""
        data = cls.read(text) if text else {}
        kinds = {"q": Prologue, "k": Prologue, "o": Epilogue}
        for name, value in data.items():
            known = {field.name for field in fields(kinds[name])}
            if not isinstance(value, dict) or not set(value) <= known:
                raise ValueError(
                    f"Surroundings.{name} is {value!r}; it must be an object with keys among {sorted(known)}."
                )
        return cls(**{name: kinds[name](**value) for name, value in data.items()})

    def only(self, *sides: str) -> Surroundings:
        """Those of the sides named, "q", "k" or "o"."""
        return Surroundings(**{side: getattr(self, side) for side in sides})

    @property
    def empty(self) -> bool:
        """True when nothing stands around the operator."""
        return self.q.empty and self.k.empty and self.o.empty

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors they read, in the order in which an operator takes them."""
        return (*self.q.tensors("q"), *self.k.tensors("k"), *self.o.tensors())

    def words(self) -> str:
        """All formulas, for a header; empty where there is nothing."""
        parts = [part.words(side) for side, part in (("q", self.q), ("k", self.k)) if not part.empty]
        return "; ".join([*parts, *([] if self.o.empty else [self.o.words()])])

    def check(self, q: Tensor, k: Tensor, v: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError naming the first tensor that is missing or does not fit q [B, T, H, K], k and v [B, T, Hkv, *]."""
        wanted: dict[str, tuple[int, ...]] = {}
        for side, x, part in (("q", q, self.q), ("k", k, self.k)):
            if part.start + part.rotary > x.shape[3]:
                raise ValueError(
                    f"Surroundings.{side} turns columns {part.start} to {part.start + part.rotary - 1} of rows of {x.shape[3]}."
                )
            wanted |= {f"{side}_weight": (x.shape[3],)} if part.weight else {}
            turned = (x.shape[0], x.shape[1], part.rotary // 2)
            wanted |= dict.fromkeys((f"{side}_cos", f"{side}_sin"), turned) if part.rotary else {}
        wanted |= {"o_weight": (v.shape[3],)} if self.o.weight else {}
        wanted |= {"o_gate": (*q.shape[:3], v.shape[3])} if self.o.gate != "none" else {}
        for name, shape in wanted.items():
            given = None if name not in tensors else tuple(tensors[name].shape)
            shared = (1, *shape[1:]) if name.endswith(("_cos", "_sin")) else shape
            if given not in (shape, shared):
                raise ValueError(f"The surroundings need {name} {list(shape)} but got {given and list(given)}.")
            other = name.replace("_sin", "_cos")
            if given != tuple(tensors[other].shape):
                raise ValueError(
                    f"The surroundings have {other} {list(tensors[other].shape)} but {name} {list(shape)}."
                )


def prepared(x: Tensor, part: Prologue, side: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """x [B, T, H, K] after its prologue, computed in fp32 (fp64 for fp64) and rounded once."""
    if part.empty:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    steps = [_normed, _turned]
    for step in reversed(steps) if part.norm_last else steps:
        y = step(y, part, side, tensors)
    return y.to(x.dtype)


def finished(o: Tensor, part: Epilogue, tensors: Mapping[str, Tensor]) -> Tensor:
    """o [B, T, H, V] after its epilogue, computed in fp32 (fp64 for fp64) and rounded once."""
    if part.empty:
        return o
    y = o.to(torch.promote_types(o.dtype, torch.float32))
    if part.norm == "rms":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + part.eps)
    if part.weight:
        y = y * tensors["o_weight"].to(y.dtype)
    if part.gate != "none":
        gate = tensors["o_gate"].to(y.dtype)
        y = y * (torch.sigmoid(gate) if part.gate == "sigmoid" else torch.nn.functional.silu(gate))
    return y.to(o.dtype)


def _normed(y: Tensor, part: Prologue, side: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if part.norm != "none":
        squares = y.square()
        mass = squares.mean(-1, keepdim=True) if part.norm == "rms" else squares.sum(-1, keepdim=True)
        y = y * torch.rsqrt(mass + part.eps)
    return y * tensors[f"{side}_weight"].to(y.dtype) if part.weight else y


def _turned(y: Tensor, part: Prologue, side: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if not part.rotary:
        return y
    cos, sin = (tensors[f"{side}_{name}"].to(y.dtype)[:, :, None] for name in ("cos", "sin"))
    before, x, behind = torch.split(y, [part.start, part.rotary, y.shape[-1] - part.start - part.rotary], -1)
    a, b = x.chunk(2, -1) if part.style == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    pair: Any = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if part.style == "interleaved" else torch.cat(pair, -1)
    return torch.cat([before, turned, behind], -1)

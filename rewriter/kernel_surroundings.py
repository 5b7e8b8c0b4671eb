"""Tells which norms, rotary embedding and gate around a site move into its kernels, and why the others stay with the compiler."""

from __future__ import annotations

import math

from subquad.ir.graph import shape_of
from subquad.ir.provenance import Norm, Origin, Output, Rotary
from subquad.ir.site import Site
from subquad.kernels.surroundings import Epilogue, Prologue, Surroundings

STYLES = ("half", "interleaved", "deinterleaved")


def surroundings_of(site: Site, keys_too: bool) -> tuple[Surroundings, tuple[str, ...]]:
    """What the kernels of a site do to rows of q (and of k, if `keys_too`) as they load them, and to rows of o before they
    store them, with a sentence for each thing that is proved to stand there and stays outside. Nothing moves that the
    recogniser has not proved.
    """
    if site.provenance is None:
        return Surroundings(), ()
    found: dict[str, Prologue] = {}
    outside: list[str] = []
    for side, origin in (("q", site.provenance.q), ("k", site.provenance.k)):
        part = _prologue(origin, site.head_dim)
        if isinstance(part, str):
            outside.append(f"{side}: {part}")
        elif side == "q" or keys_too:
            found[side] = part
        elif not part.empty:
            outside.append(
                f"{side}: {part.words(side).removeprefix(f'{side}: ')} stays outside, since each block of queries, or the "
                "history of a window, reads the keys again."
            )
    behind = _epilogue(site.provenance.output, site.value_dim)
    if isinstance(behind, str):
        outside.append(f"o: {behind}")
        behind = Epilogue()
    return Surroundings(found.get("q", Prologue()), found.get("k", Prologue()), behind), tuple(outside)


def _epilogue(output: Output, value_dim: int) -> Epilogue | str:
    """The epilogue that stands behind an output, or a sentence that says why it stays outside."""
    norm = output.norm
    why = _unlike_a_row_norm(norm, value_dim) if norm is not None else ""
    if why or norm is None:
        return why or Epilogue(gate=output.act or "none")
    return Epilogue("rms", norm.eps, norm.weight is not None, output.act or "none")


def _prologue(origin: Origin, head_dim: int) -> Prologue | str:
    """The prologue that an origin is, or a sentence that says what it has beside."""
    norm, rotary = origin.norm, None
    turned = [part for part in origin.parts if part.rotary is not None]
    if len(turned) > 1:
        return "several parts are turned on their own."
    start = 0
    if turned:
        rotary, start = turned[0].rotary, turned[0].start
        why = _unlike_a_table(rotary) if rotary is not None else ""
        if why:
            return why
    if norm is None and any(part.norm is not None for part in origin.parts):
        return "only a part of its columns is normalised."
    why = _unlike_a_row_norm(norm, head_dim) if norm is not None else ""
    if why:
        return why
    return Prologue(
        norm="none" if norm is None else norm.name,  # type: ignore[arg-type]
        eps=1e-6 if norm is None else norm.eps,
        weight=norm is not None and norm.weight is not None,
        norm_last=norm is not None and norm.after_rotary,
        rotary=rotary.width if rotary else 0,
        start=start,
        style=rotary.style if rotary else "half",  # type: ignore[arg-type]
    )


def _unlike_a_table(rotary: Rotary) -> str:
    """Why a rotation has not one cosine and one sine for both columns of a pair; empty if it has."""
    if rotary.style not in STYLES:
        return f"the pairs of its rotary embedding are {rotary.style}."
    half = rotary.width // 2
    pairs = [(2 * j, 2 * j + 1) if rotary.style == "interleaved" else (j, j + half) for j in range(half)]
    if all(
        rotary.cos.columns[a] == rotary.cos.columns[b] and rotary.sin.columns[a] == rotary.sin.columns[b]
        for a, b in pairs
    ):
        return ""
    frequencies = None if rotary.position is None else rotary.position.frequencies
    if frequencies is None:
        return f"its angles are not proved ({rotary.why or 'frequencies are computed'})."
    same = all(math.isclose(frequencies[a], frequencies[b], rel_tol=1e-6) for a, b in pairs)
    return "" if same else "the two columns of a pair turn by different angles."


def _unlike_a_row_norm(norm: Norm, head_dim: int) -> str:
    """Why a norm is not that of one head's row with one weight for all heads; empty if it is."""
    if norm.name not in ("rms", "l2"):
        return f"it has a {norm.name} norm."
    if norm.width != head_dim:
        return f"its norm is over {norm.width} features, a head has {head_dim}."
    if norm.bias is not None:
        return "its norm has a bias."
    if norm.weight is not None and math.prod(shape_of(norm.weight) or (0,)) != head_dim:
        return "its norm has weights per head."
    return ""

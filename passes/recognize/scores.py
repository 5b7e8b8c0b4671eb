"""The scores of one attention as read so far, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch.fx

from subquad.ir.site import Bias, Gain, ScoreTensor

Node = torch.fx.Node
LOW = -1e38
"""Stands for the number that an additive mask adds to hidden scores, which only its tensor tells."""


@dataclass(frozen=True)
class MaskSource:
    """One mask that met the scores: what it lets through, the tensor it is, the node where they met.

    source: None for a mask that no tensor holds (is_causal).  role: of the tensor, as in Bias.  fill: what hidden scores
    become, or what is added to them.
    """

    predicate: sympy.Basic
    source: Node | None
    met_at: Node
    role: str
    fill: float = float("-inf")

    @property
    def infinite(self) -> bool:
        """True when hidden scores are -inf."""
        return self.fill == float("-inf")


@dataclass(frozen=True)
class Scores:
    """The scores as read so far: softcap(gain·scale·q·k) + biases, seen where all `masks` let them be.

    sinks: a further logit per row.  zeroed: a mask whose hidden scores are zero so far, and are to be lowered.
    first_key: where the keys begin on the softmax's axis.  passed: interior nodes.  words: what was read, from the product
    to the softmax.
    """

    product: Node
    scale: float = 1.0
    gain: Gain | None = None
    softcap: float | None = None
    biases: tuple[Bias, ...] = ()
    masks: tuple[MaskSource, ...] = ()
    sinks: ScoreTensor | float | None = None
    zeroed: MaskSource | None = None
    first_key: sympy.Basic = sympy.S.Zero
    passed: tuple[Node, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def infinite(self) -> bool:
        """True when every hidden key has -inf: then a row without keys is NaN."""
        return all(mask.infinite for mask in self.masks)

    @property
    def predicate(self) -> sympy.Basic:
        """The condition, in b, h, q and kv, under which a key is seen."""
        return sympy.And(*(mask.predicate for mask in self.masks))

    def after(self, node: Node, word: str, **changes: Any) -> Scores:
        """The same scores one operation later."""
        return replace(self, passed=(*self.passed, node), words=(*self.words, word), **changes)

    @property
    def is_bare(self) -> bool:
        """True while nothing but a scale was applied."""
        return not self.biases and self.predicate == sympy.true and self.softcap is None and self.sinks is None

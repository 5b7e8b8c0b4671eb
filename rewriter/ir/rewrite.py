"""What a rewrite is: a frozen dataclass whose fields are its knobs, with a contract, an admission test and an emitter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from subquad.ir.cost import Cost
from subquad.ir.loop_rewrite import Pass
from subquad.ir.refusal import Refusal
from subquad.ir.site import Site


@dataclass(frozen=True)
class SiteOperator:
    """The operator call that takes a site's place: which one, with which spec, and what it reads besides q, k and v.

    operator: "softmax_attention" | "recurrence".  spec: the operator's canonical JSON.
    parameters: names, under the site's parameter module, of learned tensors by operator argument.
    """

    operator: str
    spec: str
    parameters: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Rewrite(Pass):
    """Base of all rewrites of attention sites; a subclass's fields are its knobs."""

    @abstractmethod
    def admits(self, site: Site) -> Refusal | None:
        """None when the rewrite may replace the site, otherwise the reason why not."""

    @abstractmethod
    def operator(self, site: Site) -> SiteOperator:
        """The operator call that replaces the site."""

    @abstractmethod
    def cost(self, site: Site) -> Cost:
        """Bytes moved and operations of one call of the replacement, in the symbols of `subquad.ir.cost`.

        It is compared with `original_cost(site)` when the user names no pass; a rewrite that gains nothing is then declined.
        """

    def parameters(self, site: Site) -> dict[str, torch.Tensor]:
        """Initial values of the tensors that the rewrite adds to the site's module; none by default."""
        return {}

    @classmethod
    def examples(cls) -> Iterator[tuple[torch.nn.Module, tuple[Any, ...], str]]:
        """(module, inputs, "applies" or "refuses: <words of the reason>") for the generic tests."""
        yield from ()

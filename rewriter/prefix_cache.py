"""The prefix cache of a model: what earlier calls computed of a prompt is not computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.radix_tree import Keys, KnownPrefix, RadixTree

LEAST = 256
"""Tokens that a cache must have room for."""


class PrefixCache:
    """Keys and values of prompts and answers, kept between the calls of a rewritten model's `generate`.

    While it is open, every call takes the longest known prefix of each row from it and adds what it computed, prompts when
    they have been run and answers when they are complete; tokens stay those without a cache.  What was used longest ago is
    dropped first.  It forgets everything when a weight of the model changes.  Threads may share it.
    """

    def __init__(self, model: Any, *, max_bytes: int = 1 << 30) -> None:
        """model: a rewritten module or a decoder.  max_bytes: bound of the keys and values held.

        Raises GenerationError for a model with recurrent states, one that has a cache already, and a bound below 256 tokens;
        NotIncremental when the model cannot be decoded step by step.
        """
        from subquad.text_generation import decoder_of

        self._decoder = decoder_of(model)
        layout = self._decoder.programs.layout
        if not self._decoder.engine.shares or any(site.kind != "kv" for site in layout.sites):
            raise GenerationError("the model has states that are no keys and values, which a prefix cache cannot cut.")
        if max_bytes < LEAST * layout.token_bytes:
            raise GenerationError(
                f"max_bytes is {max_bytes:,}; a token takes {layout.token_bytes:,} bytes, so give at least "
                f"{LEAST * layout.token_bytes:,} ({LEAST} tokens)."
            )
        if self._decoder.prefixes is not None:
            raise GenerationError("the model has a prefix cache already; close that one first.")
        self._tree = RadixTree(max_bytes, layout.token_bytes)
        self._lock = threading.Lock()
        self._weights = self._version()
        self.hit_tokens = 0
        """Tokens that calls found in the cache."""
        self.asked_tokens = 0
        """Tokens of all prompts."""
        self._decoder.prefixes = self

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._tree.bytes

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._tree.tokens

    def known(self, tokens: Tensor) -> KnownPrefix:
        """What is known of a prompt int64 [T]; of its last token logits are wanted, so that it is never part of it."""
        with self._lock:
            self._check_weights()
            found = KnownPrefix(tuple((node.keys, length) for node, length in self._tree.match(tokens[:-1].cpu())))
            self.hit_tokens += found.count
            self.asked_tokens += len(tokens)
            return found

    def keep(self, tokens: Tensor, take: Callable[[int, int], Keys]) -> None:
        """Hold tokens int64 [T]; take: (first column, behind the last) → their keys in memory of their own."""
        with self._lock:
            self._check_weights()
            self._tree.insert(tokens.cpu(), take)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tree.clear()

    def close(self) -> None:
        """Forget everything and leave the model as it was without a cache."""
        self.clear()
        if self._decoder.prefixes is self:
            self._decoder.prefixes = None

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_weights(self) -> None:
        now = self._version()
        if now != self._weights:
            self._tree.clear()
            self._weights = now

    def _version(self) -> int:
        """A number that grows with every change of a weight in place."""
        return sum(t._version for t in self._decoder.weights.values() if not t.is_inference())

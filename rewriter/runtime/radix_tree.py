"""A radix tree of token runs with their keys and values, within a bound of bytes; what was used longest ago goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Keys = tuple[Tensor, ...]
"""Keys, then values, of every KV site: [tokens, Hkv, K|V]."""


@dataclass(eq=False)
class RadixNode:
    """A run of tokens int64 [l] behind its parent's, and their keys; children by their first token."""

    tokens: Tensor
    keys: Keys
    parent: RadixNode | None
    children: dict[int, RadixNode] = field(default_factory=dict)
    used: int = 0


@dataclass(frozen=True)
class KnownPrefix:
    """What a tree held of a row when it was asked; it stays whole when nodes are dropped.

    parts: the keys of each node, with how many of its tokens.
    """

    parts: tuple[tuple[Keys, int], ...]

    @property
    def count(self) -> int:
        """Tokens."""
        return sum(length for _, length in self.parts)

    def read(self, start: int, stop: int) -> Keys:
        """The keys of columns start .. stop - 1."""
        pieces, at = [], 0
        for keys, length in self.parts:
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                pieces.append(tuple(t[first - at : last - at] for t in keys))
            at += length
        return tuple(torch.cat(site) if len(site) > 1 else site[0] for site in zip(*pieces, strict=True))


class RadixTree:
    """Keys of prefixes; SGLang's RadixAttention (arXiv:2312.07104, section 3) without reference counts, since what is read is
    copied.

    `bytes` never exceeds `limit`.  A node appears whole or not at all.
    """

    def __init__(self, limit: int, token_bytes: int) -> None:
        """limit: most bytes.  token_bytes: bytes of a token's keys and values."""
        self.limit, self.token_bytes = limit, token_bytes
        self.root = RadixNode(torch.empty(0, dtype=torch.int64), (), None)
        self.tokens = 0
        self._clock = 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that are held."""
        return self.tokens * self.token_bytes

    def match(self, tokens: Tensor) -> list[tuple[RadixNode, int]]:
        """The nodes that hold the longest known prefix of tokens int64 [T], each with how many of its tokens.

        They count as used now.
        """
        self._clock += 1
        found: list[tuple[RadixNode, int]] = []
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            count = _common(child.tokens, tokens[at:])
            child.used = self._clock
            found.append((child, count))
            at += count
            if count < len(child.tokens):
                break
            node = child
        return found

    def insert(self, tokens: Tensor, take: Callable[[int, int], Keys]) -> int:
        """Hold tokens int64 [T] as far as the bound allows; returns how many of them are new.

        take: (first column, behind the last) → keys in memory of their own.
        """
        path = self.match(tokens)
        known = sum(count for _, count in path)
        if known == len(tokens):
            return 0
        parent = self._cut(*path[-1]) if path else self.root
        for node in self._oldest():
            if (self.tokens + len(tokens) - known) * self.token_bytes <= self.limit:
                break
            self._drop(node)
        new = min(len(tokens) - known, self.limit // self.token_bytes - self.tokens)
        if new <= 0:
            return 0
        keys = take(known, known + new)
        fresh = RadixNode(tokens[known : known + new].clone(), keys, parent, used=self._clock)
        parent.children[int(fresh.tokens[0])] = fresh
        self.tokens += new
        return new

    def clear(self) -> None:
        """Forget everything."""
        self.root.children.clear()
        self.tokens = 0

    def _cut(self, node: RadixNode, count: int) -> RadixNode:
        """The node that ends behind `count` tokens of a node, which is split there."""
        if count == len(node.tokens):
            return node
        assert node.parent is not None
        front = RadixNode(node.tokens[:count].clone(), _part(node.keys, 0, count), node.parent, used=node.used)
        behind = RadixNode(
            node.tokens[count:].clone(), _part(node.keys, count, None), front, node.children, node.used - 1
        )
        for child in behind.children.values():
            child.parent = behind
        front.children[int(behind.tokens[0])] = behind
        node.parent.children[int(front.tokens[0])] = front
        return front

    def _oldest(self) -> Iterator[RadixNode]:
        """Leaves, the one used longest ago first; a parent follows once its last child is gone."""
        while leaves := [node for node in self._nodes() if not node.children and node.used != self._clock]:
            yield min(leaves, key=lambda node: node.used)

    def _nodes(self) -> Iterator[RadixNode]:
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def _drop(self, node: RadixNode) -> None:
        assert node.parent is not None
        del node.parent.children[int(node.tokens[0])]
        self.tokens -= len(node.tokens)


def _common(one: Tensor, other: Tensor) -> int:
    count = min(len(one), len(other))
    differ = one[:count] != other[:count]
    return int(differ.to(torch.uint8).argmax()) if bool(differ.any()) else count


def _part(keys: Keys, start: int, stop: int | None) -> Keys:
    """In memory of its own, so that what is dropped later is free."""
    return tuple(t[start:stop].clone() for t in keys)

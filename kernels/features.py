"""Applies the feature map of a recurrence and knows its width."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.evaluation import evaluate_all
from subquad.kernels.expression import parse
from subquad.kernels.spec import RecurrenceSpec


def features(texts: Sequence[str], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """phi(x) [B, H, T, F] of x [B, H, T, K] with weights [H, K, F'] in x's dtype; blocks are concatenated on the last
    axis.
    """
    signs = _softmaxes(tuple(texts))
    if signs and len({tuple(weight.shape) for weight in weights}) == 1:
        joint = torch.cat([weights[index].to(x.dtype) * sign for sign, index in signs], -1)
        return torch.matmul(x, joint).unflatten(-1, (len(signs), -1)).softmax(-1).flatten(-2)
    env: dict[str, Any] = {f"w{index}": weight.to(x.dtype) for index, weight in enumerate(weights)}
    blocks = [
        block if isinstance(block, Tensor) else x.new_full((*x.shape[:-1], 1), block)
        for block in evaluate_all(texts, env | {"x": x}, "feature")
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


@functools.cache
def _softmaxes(texts: tuple[str, ...]) -> tuple[tuple[float, int], ...]:
    """(sign, n) of each block when all blocks are softmax(x @ wn) or softmax(-(x @ wn)): then one product and one softmax
    give the whole map; empty for any other map.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"softmax\((-?)\(?x @ w(\d+)\)?\)", text)
        if match is None:
            return ()
        found.append((-1.0 if match[1] else 1.0, int(match[2])))
    return tuple(found)


def width(texts: Sequence[str], key_width: Any, weights: Sequence[Tensor]) -> Any:
    """F of the feature map, found from the expressions. Raises ValueError if a weight they read is missing."""
    total: Any = 0
    for text in texts:
        total = total + _width(parse(text, "feature").node, key_width, weights)
    return total


def _width(node: ast.expr, key_width: Any, weights: Sequence[Tensor]) -> Any:
    match node:
        case ast.Name(id="x"):
            return key_width
        case ast.BinOp(op=ast.MatMult(), right=ast.Name(id=name)):
            if int(name[1:]) >= len(weights):
                raise ValueError(f"The feature map reads {name} but {len(weights)} weights were given.")
            return weights[int(name[1:])].shape[-1]
        case ast.BinOp(left=left, right=right):
            left_width = _width(left, key_width, weights)
            return _width(right, key_width, weights) if left_width == 1 else left_width
        case ast.UnaryOp(operand=inner):
            return _width(inner, key_width, weights)
        case ast.Call(func=ast.Name(id="sum" | "amax")):
            return 1
        case ast.Call(args=[left, right]):
            return _width(left, key_width, weights) * _width(right, key_width, weights)
        case ast.Call(args=[inner]):
            return _width(inner, key_width, weights)
    return 1


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hkv, K] as [B, H, T, K], each KV head repeated for the query heads that read it."""
    group = heads // x.shape[2]
    x = x.transpose(1, 2)
    return x if group == 1 else x.repeat_interleave(group, 1)


def normalise(numerator: Tensor, denominator: Tensor, spec: RecurrenceSpec) -> Tensor:
    """Linear output [.., V] from phi(q) S [.., V] and phi(q).z [.., 1], as spec.normaliser says."""
    if spec.normaliser == "sum":
        return numerator / torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    value = numerator * spec.scale
    if spec.normaliser == "rms":
        return value * torch.rsqrt((value * value).mean(-1, keepdim=True) + 1e-6)
    if spec.normaliser == "group":
        return (value - value.mean(-1, keepdim=True)) * torch.rsqrt(value.var(-1, keepdim=True, unbiased=False) + 1e-6)
    return value


def gate(window_gate: Tensor | None, spec: RecurrenceSpec, like: Tensor) -> Tensor:
    """log gamma [H] of the window branch, in like's dtype."""
    if window_gate is None:
        gamma = 1.0 if spec.branch == "shared" else 0.5
        return torch.log(torch.full((1,), gamma, dtype=like.dtype, device=like.device))
    return torch.nn.functional.logsigmoid(window_gate.to(like.dtype))

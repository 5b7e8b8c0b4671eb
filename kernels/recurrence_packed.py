"""Runs packed sequences as few batches of like lengths, so that little is padded, and takes their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.recurrence_arguments import STATE, TOKENS, Arguments, differentiable, named_gradients
from subquad.kernels.recurrence_by_token import Result, sequences

ALONE = 1024
"""Length from which a sequence is a batch of its own; shorter ones share a batch with those of the same power of two."""


@dataclass(frozen=True)
class _Batch:
    """rows: numbers of the sequences. place [n, longest]: packed token of each slot. inside: which slots hold one (None:
    all)."""

    rows: Tensor
    place: Tensor
    inside: Tensor | None

    def tokens(self, x: Tensor) -> Tensor:
        """[1, T, ..] as [n, longest, ..]."""
        if self.inside is None and self.place.shape[0] == 1 and self.place.shape[1]:
            first = int(self.place[0, 0])
            return x[:, first : first + self.place.shape[1]]
        return x[0][self.place]

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write tokens [n, longest, ..] to their places in [1, T, ..]."""
        if self.inside is None:
            target[0].index_copy_(0, self.place.flatten(), x.flatten(0, 1).to(target.dtype))
        else:
            target[0].index_copy_(0, self.place[self.inside], x[self.inside].to(target.dtype))


def _batches(arguments: Arguments) -> list[_Batch]:
    device = arguments["q"].device
    classes: dict[Any, list[tuple[int, int, int]]] = {}
    for row, (start, stop) in sequences(arguments["q"], arguments["cu_seqlens"]):
        length = stop - start
        kind = ("alone", row) if length >= ALONE else (max(length - 1, 0).bit_length(), length == 0)
        classes.setdefault(kind, []).append((row, start, length))
    found = []
    for members in classes.values():
        rows, starts, lengths = (torch.tensor(column, device=device) for column in zip(*members, strict=True))
        slots = torch.arange(max(length for *_, length in members), device=device)
        inside = slots < lengths[:, None]
        place = starts[:, None] + slots
        same = all(length == members[0][2] for *_, length in members)
        found.append(_Batch(rows, place if same else place * inside, None if same else inside))
    return found


def _unpacked(arguments: Arguments, batch: _Batch) -> Arguments:
    """The arguments of one batch; slots without a token are invalid."""
    part: Arguments = {"cu_seqlens": None, "valid": batch.inside}
    for name in TOKENS:
        value = arguments[name]
        if value is not None and value.dim() > 1:
            part[name] = batch.tokens(value)
    if arguments["valid"] is not None and batch.inside is not None:
        part["valid"] = part["valid"] & batch.inside
    for name in STATE:
        part[name] = None if arguments[name] is None else arguments[name][batch.rows]
    return arguments | part


def forward(arguments: Arguments, run: Callable[[Arguments], Result]) -> Result:
    """The operator's outputs for packed sequences, by `run` on batches."""
    q, v = arguments["q"], arguments["v"]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    order, parts = [], []
    for batch in _batches(arguments):
        o, *state = run(_unpacked(arguments, batch))
        if o.shape[1]:
            batch.put(out, o)
        order.append(batch.rows)
        parts.append(state)
    if not parts:
        nothing = dict.fromkeys(STATE) | {"cu_seqlens": None}
        rows = {name: x[:0] for name in TOKENS if (x := arguments[name]) is not None and x.dim() > 1}
        return (out, *run(arguments | nothing | rows)[1:])
    back = torch.argsort(torch.cat(order))
    return (out, *(torch.cat(column)[back] for column in zip(*parts, strict=True)))  # type: ignore[return-value]


def backward(
    arguments: Arguments, grads: Sequence[Tensor], run: Callable[[Arguments, Sequence[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Gradients in the order of `differentiable`, by `run` on batches."""
    flat = [
        torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in differentiable(arguments)
    ]
    total = named_gradients(arguments, flat)
    for batch in _batches(arguments):
        part = _unpacked(arguments, batch)
        taken = [batch.tokens(grads[0]), *(grad[batch.rows] for grad in grads[1:])]
        if batch.inside is not None:
            taken[0] = taken[0].masked_fill(~batch.inside[..., None, None], 0)
        for name, grad in named_gradients(part, run(part, taken)).items():
            if name in TOKENS and part[name].dim() > 1:
                if grad.shape[1]:
                    batch.put(total[name], grad)
            elif name in STATE:
                total[name][batch.rows] = grad.to(total[name].dtype)
            else:
                pairs = zip(total[name], grad, strict=True) if isinstance(grad, list) else [(total[name], grad)]
                for one, other in pairs:
                    one += other
    return flat

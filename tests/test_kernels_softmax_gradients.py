"""Tests every gradient of softmax attention against autograd through the fp64 reference, in all forms and at block borders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.kernels import (
    SoftmaxSpec,
    softmax_attention,
    softmax_attention_reference,
    softmax_backward,
    softmax_op,
    softmax_partial,
    softmax_partial_backward,
    softmax_pieces,
)

MASKS = [
    None,
    "q >= kv",
    "(q >= kv) & (q - kv < 5)",
    "t0[b, kv] & (q >= kv)",
    "q > kv + h",
    "(j < 4) | bit(t1[b, i], j - 4)",
]
BIASES = [None, (1, 1, 1, 0), (0, 1, 1, 0), (0, 0, 0, 0), (0, 1), (1, 0, 1, 1)]
"""Shapes of the bias by axis, from the right: 0 is the full size."""
ARGUMENTS = (
    "q",
    "k",
    "v",
    "rows",
    "lengths",
    "positions",
    "q_positions",
    "bias",
    "sinks",
    "operands",
    "scalars",
    "spec",
)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def case(batch, q_len, stored, lens, heads, widths, mask, seed, bias=None, sinks=False, **spec):
    """A call with segments of `stored` rows each; where not the batch's, through random row maps."""
    torch.manual_seed(seed)
    counts = [batch if n is None else n for n in stored]
    key, value = widths
    full = (batch, heads[0], q_len, sum(lens))
    return {
        "q": leaf(batch, q_len, heads[0], key),
        "k": [leaf(n, size, heads[1], key) for n, size in zip(counts, lens, strict=True)],
        "v": [leaf(n, size, heads[1], value) for n, size in zip(counts, lens, strict=True)],
        "rows": [] if all(n is None for n in stored) else [torch.randint(0, n, (batch,)) for n in counts],
        "lengths": [], "positions": [], "q_positions": None,
        "bias": None if bias is None else leaf(*(1 if one else size for one, size in zip(bias, full[4 - len(bias) :], strict=True))),
        "sinks": leaf(heads[0]) if sinks else None,
        "operands": [torch.rand(batch, sum(lens)) > 0.3, torch.randint(0, 1 << 40, (batch, q_len))], "scalars": [],
        "spec": SoftmaxSpec(0.3, mask=mask, **spec).json(),
    }  # fmt: skip


def compare(arguments, with_lse=True, tolerance=1e-10):
    named = [("q", arguments["q"]), *[(f"k{n}", x) for n, x in enumerate(arguments["k"])]]
    named += [(f"v{n}", x) for n, x in enumerate(arguments["v"])]
    named += [(name, arguments[name]) for name in ("bias", "sinks") if arguments[name] is not None]
    leaves = [x for _, x in named]
    found = []
    for form in (softmax_attention_reference, softmax_attention):
        o, lse = form(**arguments)
        torch.manual_seed(1)
        at = lse > -torch.inf
        loss = (o.nan_to_num(0.0) * torch.randn_like(o)).sum()
        if with_lse:
            loss = loss + (torch.where(at, lse, 0.0) * torch.randn_like(lse)).sum()
        found.append((o.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance, equal_nan=True)
    for (name, _), wanted, got in zip(named, found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def small_blocks(patch):
    """Blocks and tiles so small that short sequences cross their borders."""
    patch.setattr(softmax_pieces, "BLOCK", 4)
    patch.setattr(softmax_pieces, "DENSE_PAIRS", 16)
    for module in (softmax_partial, softmax_partial_backward):
        patch.setattr(module, "TILE_KEYS", 3)
        patch.setattr(module, "TILE_SCORES", 64)


CASES = {
    "batch": st.integers(1, 3), "q_len": st.integers(1, 11), "stored": st.lists(st.sampled_from([None, 1, 2]), min_size=1, max_size=3),
    "sizes": st.lists(st.integers(1, 13), min_size=3, max_size=3), "heads": st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    "widths": st.sampled_from([(4, 4), (3, 5), (5, 2)]), "mask": st.sampled_from(MASKS), "softcap": st.sampled_from([None, 2.0]),
    "empty": st.sampled_from(["zero", "mean"]), "sinks": st.booleans(), "bias": st.sampled_from(BIASES), "ragged": st.booleans(),
    "with_lse": st.booleans(), "seed": st.integers(0, 9),
}  # fmt: skip


def ragged_case(batch, q_len, stored, sizes, heads, widths, mask, softcap, empty, sinks, bias, ragged, seed):
    lens = sizes[: len(stored)]
    arguments = case(
        batch, q_len, stored, lens, heads, widths, mask, seed, bias, sinks, softcap=softcap, empty_rows=empty
    )
    if ragged:
        arguments["lengths"] = [torch.randint(0, n + 1, (batch,)) for n in lens]
        arguments["positions"] = [torch.randint(0, 20, x.shape[:2]) for x in arguments["k"]]
        arguments["q_positions"] = torch.randint(0, 20, (batch, q_len))
    return arguments


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_every_gradient_equals_the_reference(with_lse, **drawn):
    compare(ragged_case(**drawn), with_lse)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_every_gradient_across_block_borders(with_lse, **drawn):
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        compare(ragged_case(**drawn), with_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "q >= kv", "(q >= kv) & (q - kv < 50)"])
def test_lower_precision_is_near_fp64(dtype, mask):
    """At most twice the error of the library's own attention, or that error at the bottom of the precision."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 300, 4, 16, dtype=torch.float64) for _ in range(4))
    spec = SoftmaxSpec(0.25, mask=mask).json()
    index = torch.arange(300)
    shown = torch.ones(300, 300, dtype=torch.bool) if mask is None else eval(mask, {"q": index[:, None], "kv": index})

    def plain(x):
        leaves = [y.to(x).requires_grad_() for y in (q, k, v)]
        o = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in leaves), shown, scale=0.25)
        return [o.transpose(1, 2), *torch.autograd.grad(o.transpose(1, 2), leaves, grad.to(x))]

    def ours(x):
        leaves = [y.to(x).requires_grad_() for y in (q, k, v)]
        o, _ = softmax_attention(leaves[0], [leaves[1]], [leaves[2]], [], [], [], None, None, None, [], [], spec)
        return [o, *torch.autograd.grad(o, leaves, grad.to(x))]

    for wanted, peer, got in zip(plain(torch.float64), plain(dtype), ours(dtype), strict=True):
        own, allowed = ((x.double() - wanted).abs().max() for x in (got, peer))
        assert own <= 2 * allowed + torch.finfo(dtype).eps, (own, allowed)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made within."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "spec", [{}, {"mask": "q >= kv"}, {"mask": "(q >= kv) & (q - kv < 100)"}, {"softcap": 5.0, "mask": "q >= kv"}]
)
@pytest.mark.parametrize("value", [8, 6])
def test_no_tensor_grows_with_the_square_of_the_length(spec, value):
    length, batch = 2048, 2
    torch.manual_seed(0)
    q, shared, own = torch.randn(batch, length, 2, 8), torch.randn(1, 64, 1, 8), torch.randn(batch, length, 1, 8)
    values = [torch.randn(1, 64, 1, value), torch.randn(batch, length, 1, value)]
    rows = [torch.zeros(batch, dtype=torch.int64), torch.arange(batch)]
    at = 64 + torch.arange(length).expand(batch, -1)
    arguments = dict(zip(ARGUMENTS, (q, [shared, own], values, rows, [], [], at, None, None, [], [], SoftmaxSpec(0.3, **spec).json()), strict=True))  # fmt: skip
    with Largest() as largest:
        o, lse = softmax_op.softmax_attention_forward(**arguments)
        softmax_backward.softmax_attention_backward(
            torch.ones_like(o), torch.ones_like(lse), o, lse, **arguments, bias_too=False
        )
    assert largest.size <= length * 1200, largest.size


@pytest.mark.parametrize("mask", ["q >= kv", "(q >= kv) & t0[b, kv]", "(j < 20) | bit(t1[b, i], j - 20)"])
@pytest.mark.parametrize("lengths", [None, (26, 24, 21), (26, 3, 0)])
@pytest.mark.parametrize("stored", [None, 1])
def test_a_few_queries_behind_a_long_past(mask, lengths, stored, monkeypatch):
    """The past goes without a mask where every row sees it whole; the last slots go by the mask."""
    small_blocks(monkeypatch)
    arguments = case(3, 4, [stored], [26], (4, 2), (4, 4), mask, 0, sinks=True)
    arguments["operands"][0][:, :16] = True
    if lengths is not None:
        arguments["lengths"] = [torch.tensor(lengths)]
    arguments["q_positions"] = 22 + torch.arange(4).expand(3, -1)
    compare(arguments)

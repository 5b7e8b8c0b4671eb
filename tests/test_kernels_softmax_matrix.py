"""Tests softmax attention over the matrix of sizes and sharings on which peers were wrong: log-sum-exps, widths, trees, halves."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from subquad.kernels import (
    SoftmaxSpec,
    merge,
    merge_all,
    softmax_attention,
    softmax_attention_reference,
    softmax_attention_torch,
)

GROUPS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (8, 1)}


def attention(q, k, v, rows=(), lengths=(), at=None, bias=None, sinks=None, form=softmax_attention, **spec):
    return form(q, k, v, list(rows), list(lengths), [], at, bias, sinks, [], [], SoftmaxSpec(q.shape[3] ** -0.5, **spec).json())  # fmt: skip


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("splits", [(33,), (16, 17), (1, 31, 1)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_lse_is_right_to_a_millionth(form, traced, heads, q_len, splits, softcap):
    """Row 1 has no live key at all, row 2 a tail; the sum of exponentials is judged itself, not only the output."""
    torch.manual_seed(0)
    q = torch.randn(3, q_len, heads[0], 24)
    k, v = ([torch.randn(3, n, heads[1], 24) for n in splits] for _ in range(2))
    lengths = [torch.tensor([n, 0, max(n - 3, 0)]) for n in splits]
    operator = softmax_attention_torch if traced else softmax_attention
    got = attention(q, k, v, lengths=lengths, form=operator, softcap=softcap)
    wanted = attention(q, k, v, lengths=lengths, form=softmax_attention_reference, softcap=softcap)
    assert (got[1][1] == -torch.inf).all()
    assert (got[0][1] == 0).all()
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [16, 32, 40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("value", [None, 24, 100])
@pytest.mark.parametrize("q_len", [1, 40])
def test_head_sizes(form, width, value, q_len):
    torch.manual_seed(width)
    q, own = torch.randn(3, q_len, 4, width), torch.randn(3, 40, 2, width)
    shared, v = torch.randn(1, 9, 2, width), [torch.randn(n, t, 2, value or width) for n, t in ((1, 9), (3, 40))]
    rows = [torch.zeros(3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)]
    at = (49 - q_len + torch.arange(q_len)).expand(3, -1)
    got = attention(q, [shared, own], v, rows, at=at, mask="q >= kv")
    wanted = attention(q, [shared, own], v, rows, at=at, mask="q >= kv", form=softmax_attention_reference)
    for one, other, bound in zip(got, wanted, (2e-6, 1e-6), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


def prefix_tree(batch, lengths, own, heads, width, seed, dtype=torch.float64):
    """Segments of a tree with ragged groups: the root for all rows, then levels of random groups, then own keys."""
    torch.manual_seed(seed)
    rows = [torch.zeros(batch, dtype=torch.int64)]
    for _ in lengths[1:]:
        rows.append((torch.rand(batch) * min(batch, 3)).long())
    stored = [int(r.max()) + 1 for r in rows] + [batch]
    sizes = [*lengths, own]
    k, v = (
        [torch.randn(n, t, heads, width, dtype=dtype) for n, t in zip(stored, sizes, strict=True)] for _ in range(2)
    )
    return k, v, [*rows, torch.arange(batch)]


TREES = [
    (batch, lengths, own)
    for batch, lengths, own in itertools.product((1, 2, 7, 32), ((1,), (15,), (16, 17), (256,), (5, 1, 16)), (1, 2, 33))
    if batch * (sum(lengths) + own) < 3000
]
MODIFIERS = [
    {},
    {"softcap": 2.0},
    {"sinks": True},
    {"alibi": True},
    {"mask": "(q >= kv) & (q - kv < 20)"},
    {"mask": "(q >= kv) & ((q - kv < 4) | (kv < 2))", "sinks": True},
]


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("modifiers", MODIFIERS, ids=str)
def test_shared_prefixes_equal_the_keys_written_out(heads, modifiers):
    """Every tree against plain attention over the expanded and joined keys, a decode step and a short prefill."""
    for number, (batch, lengths, own) in enumerate(TREES):
        k, v, rows = prefix_tree(batch, lengths, own, heads[1], 8, number)
        total = sum(lengths) + own
        q_len = min(own, 1 + number % 3)
        q = torch.randn(batch, q_len, heads[0], 8, dtype=torch.float64)
        at = (total - q_len + torch.arange(q_len)).expand(batch, -1)
        spec = {"mask": modifiers.get("mask", "q >= kv"), "softcap": modifiers.get("softcap")}
        extra = {"sinks": torch.randn(heads[0], dtype=torch.float64)} if "sinks" in modifiers else {}
        if "alibi" in modifiers:
            extra["bias"] = (torch.arange(total) * torch.logspace(-1, -3, heads[0])[:, None]).double()[:, None]
        got = attention(q, k, v, rows, at=at, **extra, **spec)
        joined = [torch.cat([x[r] for x, r in zip(side, rows, strict=True)], 1) for side in (k, v)]
        wanted = attention(q, joined[:1], joined[1:], at=at, form=softmax_attention_torch, **extra, **spec)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_plain_attention(dtype):
    k, v, rows = prefix_tree(8, (256, 40), 33, 4, 64, 0)
    q = torch.randn(8, 1, 4, 64, dtype=torch.float64)
    low = lambda side: [x.to(dtype) for x in side]  # noqa: E731
    joined = [torch.cat([x[r] for x, r in zip(side, rows, strict=True)], 1).transpose(1, 2) for side in (k, v)]
    wanted = F.scaled_dot_product_attention(q.transpose(1, 2), *joined).transpose(1, 2)
    plain = F.scaled_dot_product_attention(q.to(dtype).transpose(1, 2), *low(joined)).transpose(1, 2)
    ours = attention(q.to(dtype), low(k), low(v), rows)[0]
    own, allowed = ((x.double() - wanted).square().mean().sqrt() for x in (ours, plain))
    assert own <= 2 * allowed + 1e-6, (own, allowed)


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_merge_is_associative_commutative_and_differentiable(magnitude):
    """Random partitions with empty parts, huge scores and equal scores: any order of merging is the whole, and so is its
    gradient."""
    torch.manual_seed(0)
    scores = torch.randn(4, 9, dtype=torch.float64) * magnitude
    scores[1] = 5.0
    scores[2] = -torch.inf
    scores[3, 1:] = -torch.inf
    values = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    leaf = scores.clone().requires_grad_()

    def state(part):
        dead = (leaf[:, part] == -torch.inf).all(1)
        live = leaf[:, part].masked_fill(dead[:, None], 0.0)
        lse = torch.logsumexp(live, 1).masked_fill(dead, -torch.inf) if part else leaf.new_full((4,), -torch.inf)
        weight = torch.exp(leaf[:, part] - lse.masked_fill(lse == -torch.inf, 0.0)[:, None])
        return weight @ values[part], lse

    parts = [state(part) for part in ([0, 1], [], [2], [3, 4, 5, 6], [7, 8])]
    whole, total = state(list(range(9)))
    seen = torch.tensor([True, True, False, True])
    grads = torch.autograd.grad((whole[seen] * 2).sum() + total[seen].sum(), (values, leaf), retain_graph=True)
    for order in itertools.permutations(range(5)):
        o, lse = merge_all(*zip(*(parts[n] for n in order), strict=True))
        torch.testing.assert_close(o, whole, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, total, rtol=1e-12, atol=1e-12)
    half = merge(*merge(*parts[0], *parts[1]), *parts[2])
    o, lse = merge(*half, *merge(*parts[3], *parts[4]))
    torch.testing.assert_close((o, lse), (whole, total), rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad((o[seen] * 2).sum() + lse[seen].sum(), (values, leaf))
    torch.testing.assert_close(found[0], grads[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1][seen], grads[1][seen], rtol=1e-9, atol=1e-9)


def test_gradients_of_merging_empty_states_are_zero_and_not_nan():
    o = torch.zeros(2, 3, requires_grad=True)
    lse = torch.full((2,), -torch.inf, requires_grad=True)
    out, total = merge(o, lse, torch.zeros(2, 3), torch.full((2,), -torch.inf))
    for grad in torch.autograd.grad(out.sum() + total.masked_fill(total == -torch.inf, 0.0).sum(), (o, lse)):
        assert not grad.isnan().any()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_prefill_and_steps_are_the_whole(heads):
    """A prompt once, then a token at a time behind it and behind a prefix that is stored once, gives the rows of one call."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, n, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1]))
    prefix = [torch.randn(1, 5, heads[1], 8, dtype=torch.float64) for _ in range(2)]
    rows = [torch.zeros(2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)]

    def run(start, stop):
        at = (5 + torch.arange(start, stop)).expand(2, -1)
        keys, values = ([stored, own[:, :stop]] for stored, own in zip(prefix, (k, v), strict=True))
        return attention(q[:, start:stop], keys, values, rows, at=at, mask="q >= kv")

    whole = run(0, 12)
    parts = [run(0, 7), *(run(n, n + 1) for n in range(7, 12))]
    for n in range(2):
        torch.testing.assert_close(torch.cat([part[n] for part in parts], 1), whole[n], rtol=1e-12, atol=1e-12)

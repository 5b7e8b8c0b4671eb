"""Tests softmax attention as torch traces it: lowering without copies of shared keys, symbolic sizes, opcheck, autocast."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.kernels import (
    SoftmaxSpec,
    ancestors,
    decompositions,
    softmax_attention,
    softmax_attention_reference,
    tree_mask,
)

SPEC = SoftmaxSpec(0.3, mask="q >= kv", empty_rows="mean").json()
PREFIX = 40
SYMBOLIC = torch.export.default_decompositions() | decompositions()


class Shared(torch.nn.Module):
    """A few queries behind a prefix that is stored once, and keys of their own."""

    def forward(self, q, prefix, own, at):
        rows = [torch.zeros_like(at[:, 0]), at.new_empty(0)]
        keys = [prefix, own]
        return torch.ops.subquad.softmax_attention(q, keys, keys, rows, [], [], at, None, None, [], [], SPEC)


class Causal(torch.nn.Module):
    """Causal attention of many queries."""

    def forward(self, q, k):
        return torch.ops.subquad.softmax_attention(q, [k], [k], [], [], [], None, None, None, [], [], SPEC)


def shared_inputs(batch=3, own=5, width=2, dtype=torch.float32):
    torch.manual_seed(own)
    at = (PREFIX + own - width + torch.arange(width)).expand(batch, -1).contiguous()
    draw = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    return draw(batch, width, 4, 8), draw(1, PREFIX, 2, 8), draw(batch, own, 2, 8), at


def reference(q, prefix, own, at):
    rows = [torch.zeros(len(q), dtype=torch.int64), torch.arange(len(q))]
    return softmax_attention_reference(q, [prefix, own], [prefix, own], rows, [], [], at, None, None, [], [], SPEC)


def assert_near(got, wanted, tolerance=1e-5):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any storage made within."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


class Mapped(torch.nn.Module):
    """Rows read stored rows that only values name."""

    def forward(self, q, k, rows):
        return torch.ops.subquad.softmax_attention(q, [k], [k], [rows], [], [], None, None, None, [], [], SPEC)


def test_a_prefix_stored_once_is_lowered_without_a_copy_per_row():
    batch, own = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("own", min=2, max=512)
    shapes = ({0: batch}, None, {0: batch, 1: own}, {0: batch})
    exported = torch.export.export(Shared(), shared_inputs(), dynamic_shapes=shapes)
    lowered = exported.run_decompositions(SYMBOLIC)
    assert "subquad" not in lowered.graph_module.code
    for rows, length in ((2, 2), (16, 3), (5, 60)):
        inputs = shared_inputs(rows, length)
        program = lowered.module()
        with Largest() as largest:
            got = program(*inputs)
        assert_near(got, reference(*inputs))
        assert largest.size <= max(rows * 4 * 2 * PREFIX, rows * length * 2 * 8, PREFIX * 2 * 8), largest.size


def test_row_maps_that_only_values_show_keep_the_operator():
    batch, stored = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("stored", min=2, max=64)
    inputs = (torch.randn(4, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.tensor([0, 1, 1, 0]))
    exported = torch.export.export(Mapped(), inputs, dynamic_shapes=({0: batch}, {0: stored}, {0: batch}))
    lowered = exported.run_decompositions(SYMBOLIC)
    assert "subquad.softmax_attention" in lowered.graph_module.code
    assert_near(lowered.module()(*inputs), Mapped()(*inputs))


def test_many_queries_are_lowered_to_the_library_and_never_hold_all_scores():
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=65536)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    exported = torch.export.export(Causal(), (torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)), dynamic_shapes=shapes)
    lowered = exported.run_decompositions(SYMBOLIC)
    assert "subquad" not in lowered.graph_module.code
    q, k = torch.randn(1, 1500, 4, 8), torch.randn(1, 1500, 2, 8)
    with Largest() as largest:
        got = lowered.module()(q, k)
    assert largest.size < 1500 * 1500
    assert_near(got, softmax_attention(q, [k], [k], [], [], [], None, None, None, [], [], SPEC))


def test_nothing_is_compiled_again_over_ten_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Shared(), backend=counter, dynamic=True)
    for own in range(3, 13):
        inputs = shared_inputs(4, own)
        assert_near(compiled(*inputs), reference(*inputs))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_a_prefix_stored_once_for_all_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    own = torch.export.Dim("own", min=2, max=512)
    exported = torch.export.export(Shared(), shared_inputs(), dynamic_shapes=(None, None, {1: own}, None))
    compiled = torch.compile(exported.run_decompositions(SYMBOLIC).module(), backend=counter, dynamic=True)
    for length in range(3, 13):
        inputs = shared_inputs(3, length)
        assert_near(compiled(*inputs), reference(*inputs), 1e-4)
    assert counter.frame_count == 1


def tree_call():
    table = ancestors(torch.tensor([[-1, 0, 0], [-1, 0, 1]]))
    at = 4 + table.sum(-1) - 1
    spec = SoftmaxSpec(0.3, mask=tree_mask("t0", "s0")).json()
    k = torch.randn(2, 7, 2, 4, requires_grad=True)
    return torch.randn(2, 3, 4, 4, requires_grad=True), [k], [k], [], [], [], at, None, None, [table], [4], spec


def paged_call():
    table = torch.tensor([[[0, 2], [1, -1]], [[2, 1], [0, 0]]])
    pool = torch.randn(3, 2, 2, 4)
    spec = SoftmaxSpec(0.3).json()
    return torch.randn(2, 1, 4, 4), [pool], [pool], [table], [torch.tensor([4, 3])], [], None, None, None, [], [], spec


def shared_call():
    q, prefix, own, at = (x.requires_grad_() if x.is_floating_point() else x for x in shared_inputs())
    rows = [torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 1])]
    bias, sinks = torch.randn(4, 1, PREFIX + 5, requires_grad=True), torch.randn(4, requires_grad=True)
    return q, [prefix, own], [prefix, own], rows, [], [], at, bias, sinks, [], [], SPEC


@pytest.mark.parametrize("call", [tree_call, paged_call, shared_call])
def test_opcheck(call):
    torch.library.opcheck(torch.ops.subquad.softmax_attention.default, call())


@pytest.mark.parametrize("backward", [False, True])
def test_autocast_lowers_nothing_inside_the_operator(backward):
    call = shared_call()
    plain = softmax_attention(*call)
    with torch.autocast("cpu", torch.bfloat16):
        cast = softmax_attention(*call)
        assert cast[0].dtype == torch.float32
        if backward:
            got = torch.autograd.grad(cast[0].sum(), call[0])
            torch.testing.assert_close(got, torch.autograd.grad(plain[0].sum(), call[0]), rtol=0, atol=0)
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])


def test_mixed_dtypes_are_computed_in_the_widest():
    q, prefix, own, at = shared_inputs()
    rows = [torch.zeros(3, dtype=torch.int64), torch.arange(3)]
    low = [prefix.bfloat16(), own.bfloat16()]
    o, lse = softmax_attention(q, low, low, rows, [], [], at, None, None, [], [], SPEC)
    assert_near((o, lse), reference(q, *(x.double() for x in low), at), 2e-6)

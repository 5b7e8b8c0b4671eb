"""Tests the operators as torch sees them: gradients, opcheck, export and compile with symbolic sizes, package import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from subquad.kernels import RecurrenceSpec, SoftmaxSpec, decompositions, recurrence, softmax_attention
from subquad.kernels import recurrence_forms as forms

STEP = RecurrenceSpec(("softmax(x @ w0)", "softmax(-(x @ w0))"), 0.5, window=4, sinks=2)
STEP_TEXT = STEP.json()
CAUSAL_TEXT = SoftmaxSpec(0.5, mask="q >= kv").json()


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def softmax_case():
    torch.manual_seed(0)
    keys = [leaf(1, 3, 2, 4), leaf(2, 4, 2, 4)]
    values = [leaf(1, 3, 2, 5), leaf(2, 4, 2, 5)]
    rows, lengths = [torch.tensor([0, 0]), torch.tensor([1, 0])], [torch.tensor([3, 2]), torch.tensor([4, 1])]
    spec = SoftmaxSpec(0.3, softcap=2.0, mask="q + 2 >= kv").json()
    return (leaf(2, 3, 4, 4), keys, values, rows, lengths, [], None, leaf(4, 1, 7), leaf(4), [], [3], spec)


def recurrence_case(length=9):
    torch.manual_seed(0)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, ::3] = False
    return (
        leaf(2, length, 4, 3), leaf(2, length, 2, 3), leaf(2, length, 2, 4), None, None, [leaf(4, 3, 2)], [leaf(4, 3, 2)], leaf(4), valid,
        leaf(2, 4, 4, 5), leaf(2, 6, 2, 3), leaf(2, 6, 2, 4), torch.tensor([7, 1]), None, STEP.json(),
    )  # fmt: skip


def gradcheck(op, arguments, outputs):
    flat, tree = torch.utils._pytree.tree_flatten(arguments)
    places = [i for i, item in enumerate(flat) if isinstance(item, torch.Tensor) and item.requires_grad]

    def run(*leaves):
        items = list(flat)
        for place, value in zip(places, leaves, strict=True):
            items[place] = value
        return op(*torch.utils._pytree.tree_unflatten(items, tree))[:outputs]

    assert torch.autograd.gradcheck(run, [flat[place] for place in places], fast_mode=True)


def test_softmax_gradients_equal_finite_differences():
    gradcheck(softmax_attention, softmax_case(), 2)


@pytest.mark.parametrize("empty", ["zero", "mean"])
def test_gradients_of_empty_rows(empty):
    q, k, v, *rest = softmax_case()
    rest[-1] = SoftmaxSpec(0.3, mask="q > kv", empty_rows=empty).json()
    rest[5] = None
    gradcheck(softmax_attention, (q, k, v, *rest), 1)


@pytest.mark.parametrize("length", [9, 70])
def test_recurrence_gradients_equal_finite_differences(monkeypatch, length):
    monkeypatch.setattr(forms, "BLOCK", 1)
    gradcheck(recurrence, recurrence_case(length), 4)


@pytest.mark.parametrize("spec", [{"decay": "token", "update": "delta", "normaliser": "none"}, {"causal": False}])
def test_recurrence_gradients_of_other_axes_equal_finite_differences(spec):
    arguments = list(recurrence_case(4))
    arguments[9:13] = [None] * 4
    arguments[14] = RecurrenceSpec(STEP.feature_map, 0.5, **spec).json()
    if "update" in spec:
        arguments[3], arguments[4] = leaf(2, 4, 4), leaf(2, 4, 4)
    gradcheck(recurrence, tuple(arguments), 2)


@pytest.mark.parametrize(("op", "arguments"), [("softmax_attention", softmax_case), ("recurrence", recurrence_case)])
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.subquad, op).default, arguments())


class Both(torch.nn.Module):
    """One attention and one recurrence over the same tokens."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        one, _ = torch.ops.subquad.softmax_attention(q, [k], [k], [], [], [], None, None, None, [], [], CAUSAL_TEXT)
        other, *_ = torch.ops.subquad.recurrence(
            q, k, k, None, None, [w], [w], None, None, None, None, None, None, None, STEP_TEXT
        )
        return one + other


def inputs(batch, length):
    torch.manual_seed(length)
    return torch.randn(batch, length, 4, 3), torch.randn(batch, length, 2, 3), torch.randn(4, 3, 2)


def test_export_and_decompose_keep_sizes_symbolic():
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, None)
    exported = torch.export.export(Both(), inputs(2, 70), dynamic_shapes=shapes)
    lowered = exported.run_decompositions(torch.export.default_decompositions() | decompositions())
    assert "subquad" in exported.graph_module.code
    assert "subquad" not in lowered.graph_module.code
    for size in ((1, 3), (3, 200)):
        wanted = Both()(*inputs(*size))
        for program in (exported, lowered):
            torch.testing.assert_close(program.module()(*inputs(*size)), wanted, rtol=1e-5, atol=1e-5)


def test_a_narrow_step_is_one_chunk_with_symbolic_width():
    width = torch.export.Dim("width", min=2, max=16)
    exported = torch.export.export(Both(), inputs(2, 5), dynamic_shapes=({1: width}, {1: width}, None))
    program = exported.run_decompositions(torch.export.default_decompositions() | decompositions()).module()
    for length in (2, 16):
        torch.testing.assert_close(program(*inputs(2, length)), Both()(*inputs(2, length)), rtol=1e-5, atol=1e-5)


def test_compile_does_not_recompile_over_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Both(), backend=counter, dynamic=True)
    for length in (5, 9, 70, 130):
        torch.testing.assert_close(compiled(*inputs(2, length)), Both()(*inputs(2, length)), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_the_step_form():
    compiled = torch.compile(torch.export.export(Both(), inputs(2, 70)).run_decompositions(decompositions()).module())
    torch.testing.assert_close(compiled(*inputs(2, 70)), Both()(*inputs(2, 70)), rtol=1e-4, atol=1e-4)


def test_the_folder_gives_way_to_the_kernels_package_of_pypi(tmp_path):
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("WHO = 'PyPI'\n")
    root = Path(forms.__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.WHO)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "PyPI", done.stderr

"""The C++ projection inside a compiled program: every row count, odd sizes, both dtypes, against float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subquad import native_library
from subquad.compilation import load_package
from subquad.compile_worker import compile_job
from subquad.kernels.wide_linear import wide_linear
from subquad.runtime.graph_file import write_graph
from subquad.runtime.schedule import InputForm, Varying
from subquad.runtime.schedule_file import write_form

SIZES = ((64, 40), (37, 5), (129, 600), (576, 33))
"""[in, out]: whole blocks, none at all, one and a rest, several; one large enough for two threads."""
CASES = [(dtype, *sizes) for dtype in (torch.float32, torch.bfloat16) for sizes in SIZES]
ROWS = (1, 2, 3, 4, 5, 8, 11, 16)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, native_path: Path
) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """A program of two projections per case: of 2x with a bias, and of x without."""
    folder = tmp_path_factory.mktemp("native")
    native_library.load(native_path)
    graph = torch.fx.Graph()
    names = [[graph.placeholder(f"{kind}_{n}") for n in range(len(CASES))] for kind in ("x", "weight", "bias")]
    linear = torch.ops.subquad.narrow_linear.default
    outputs = []
    for x, weight, bias in zip(*names, strict=True):
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
        outputs += [graph.call_function(linear, (doubled, weight, bias)), graph.call_function(linear, (x, weight))]
    graph.output(tuple(outputs))
    forms = [
        *(InputForm(dtype, (1, Varying(3, 64), i)) for dtype, i, _ in CASES),
        *(InputForm(dtype, (o, i)) for dtype, i, o in CASES),
        *(InputForm(dtype, (o,)) for dtype, _, o in CASES),
    ]
    target = folder / "program.pt2"
    compile_job({"graph": write_graph(graph), "inputs": [write_form(f) for f in forms], "path": str(target)}, True)
    return load_package(target)


@pytest.mark.parametrize("rows", ROWS)
def test_equals_float64_for_every_row_count(run: Callable[[list[torch.Tensor]], list[torch.Tensor]], rows: int) -> None:
    torch.manual_seed(rows)
    weights = [torch.randn(o, i, dtype=dtype) for dtype, i, o in CASES]
    biases = [torch.randn(o, dtype=dtype) for dtype, _, o in CASES]
    xs = [torch.randn(1, rows, i, dtype=dtype) for dtype, i, _ in CASES]
    found = run([*xs, *weights, *biases])
    for n, (x, weight, bias) in enumerate(zip(xs, weights, biases, strict=True)):
        doubled = torch.nn.functional.linear(2 * x.double(), weight.double(), bias.double())
        plain = torch.nn.functional.linear(x.double(), weight.double())
        for result, expected in ((found[2 * n], doubled), (found[2 * n + 1], plain)):
            assert result.dtype == CASES[n][0]
            error = (result.double() - expected).norm() / expected.norm()
            own = (expected.to(result.dtype).double() - expected).norm() / expected.norm()
            assert error <= 2 * own + 4 * torch.finfo(torch.float32).eps, CASES[n]


def test_a_row_gives_the_same_numbers_among_any_others(
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> None:
    """So that a token verified in a draft has the logits of one decoded alone."""
    torch.manual_seed(0)
    given = [torch.randn(o, i, dtype=dtype) for dtype, i, o in CASES] + [torch.randn(o, dtype=d) for d, _, o in CASES]
    xs = [torch.randn(1, max(ROWS), i, dtype=dtype) for dtype, i, _ in CASES]
    alone = [run([*(x[:, row : row + 1] for x in xs), *given]) for row in range(max(ROWS))]
    for rows in ROWS[1:]:
        for n, result in enumerate(run([*(x[:, :rows] for x in xs), *given])):
            for row in range(rows):
                assert torch.equal(result[:, row], alone[row][n][:, 0]), (CASES[n // 2], rows, row)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinity_and_not_a_number_survive(
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]], value: float
) -> None:
    weights = [torch.ones(o, i, dtype=dtype) for dtype, i, o in CASES]
    biases = [torch.zeros(o, dtype=dtype) for dtype, _, o in CASES]
    xs = [torch.full((1, 1, i), value, dtype=dtype) for dtype, i, _ in CASES]
    for result in run([*xs, *weights, *biases]):
        assert torch.equal(result.isnan(), torch.full_like(result, value).isnan())
        assert torch.equal(result.nan_to_num(), torch.full_like(result, value).nan_to_num())


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_outside_compiled_programs_the_same_code_runs(rows: int) -> None:
    """Few rows in C++, more by the library; both near float64, for rows that lie apart too."""
    torch.manual_seed(rows)
    for dtype, i, o in CASES:
        wide = torch.randn(1, rows, 2 * i, dtype=dtype)
        weight, bias = torch.randn(o, i, dtype=dtype), torch.randn(o, dtype=dtype)
        for x in (wide[..., :i], wide[..., ::2], wide[..., i:].contiguous()):
            for plus in (None, bias):
                found = wide_linear(x, weight, plus)
                want = torch.nn.functional.linear(x.double(), weight.double(), None if plus is None else plus.double())
                assert found.shape == want.shape
                assert found.dtype == dtype
                error = (found.double() - want).norm() / want.norm()
                own = (want.to(dtype).double() - want).norm() / want.norm()
                assert error <= 2 * own + 4 * torch.finfo(torch.float32).eps, (dtype, i, o)

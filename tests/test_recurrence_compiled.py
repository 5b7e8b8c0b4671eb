"""Tests the recurrence as torch sees it: opcheck, export, one graph for all lengths, autocast, and the memory of long inputs."""

import pytest
import torch
import torch._dynamo.testing
from recurrence_cases import FLOATING, close, draw, error, gradients, points

from subquad.kernels import RecurrenceSpec, decompositions, recurrence, recurrence_torch
from subquad.kernels import recurrence_forms as forms

NAMES = (
    "q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "valid", "state", "window_k", "window_v", "seen",
    "cu_seqlens", "spec",
)  # fmt: skip
DECAYED = [
    RecurrenceSpec(("x",), 0.4, normaliser=normaliser, decay=decay, causal=causal)
    for decay, normaliser, causal in (
        ("token", "none", True),
        ("channel", "sum", True),
        ("additive", "rms", True),
        ("head", "none", False),
    )
]
DELTA = RecurrenceSpec(("x",), 0.4, decay="token", update="delta", normaliser="none")


def given(spec, **shape):
    """Arguments in the operator's order."""
    arguments = draw(spec, **shape)
    return tuple(arguments[name] for name in NAMES)


@pytest.mark.parametrize(
    "spec", points()[::13], ids=lambda spec: f"{spec.decay}-{spec.update}-{spec.window}{spec.branch}"
)
def test_opcheck(spec):
    arguments = draw(spec, length=9)
    for name in FLOATING:
        value = arguments[name]
        for x in value if isinstance(value, list) else [] if value is None else [value]:
            x.requires_grad_()
    torch.library.opcheck(torch.ops.subquad.recurrence.default, tuple(arguments[name] for name in NAMES))


class Layer(torch.nn.Module):
    """The recurrence of one spec over q, k, v and its gates."""

    def __init__(self, spec: RecurrenceSpec) -> None:
        super().__init__()
        self.text = spec.json()

    def forward(self, q, k, v, decay, beta):
        nothing = (None,) * 7
        return torch.ops.subquad.recurrence(q, k, v, decay, beta, [], [], *nothing, self.text)[:2]


def inputs(spec, batch, length):
    return given(spec, batch=batch, length=length, dtype=torch.float32)[:5]


def symbolic(arguments):
    """Dynamic shapes of `inputs`: batch and length."""
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=1 << 20)
    return tuple(None if x is None else {} if x.dim() == 1 else {0: batch, 1: length} for x in arguments)


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.decay, marks=[] if s.decay == "token" else [pytest.mark.slow]) for s in DECAYED]
)
def test_decays_are_exported_and_decomposed_with_symbolic_sizes(spec):
    arguments = inputs(spec, 2, 70)
    exported = torch.export.export(Layer(spec), arguments, dynamic_shapes=symbolic(arguments))
    lowered = exported.run_decompositions(torch.export.default_decompositions() | decompositions())
    assert "subquad" in exported.graph_module.code
    assert "subquad" not in lowered.graph_module.code
    for batch, length in ((1, 3), (3, 64), (1, 200), (1, 2500)):
        wanted = Layer(spec)(*inputs(spec, batch, length))
        for program in (exported, lowered):
            for one, other in zip(program.module()(*inputs(spec, batch, length)), wanted, strict=True):
                assert error(one, other) < 1e-5


def test_delta_stays_an_operator_unless_its_tokens_are_one_chunk():
    arguments = inputs(DELTA, 2, 70)
    exported = torch.export.export(Layer(DELTA), arguments, dynamic_shapes=symbolic(arguments))
    lowered = exported.run_decompositions(torch.export.default_decompositions() | decompositions())
    assert "subquad" in lowered.graph_module.code
    step = torch.export.export(Layer(DELTA), inputs(DELTA, 2, 1)).run_decompositions(decompositions())
    assert "subquad" not in step.graph_module.code
    for one, other in zip(step.module()(*inputs(DELTA, 2, 1)), Layer(DELTA)(*inputs(DELTA, 2, 1)), strict=True):
        assert error(one, other) < 1e-6


@pytest.mark.parametrize("spec", [DECAYED[1], DELTA], ids=["channel", "delta"])
def test_ten_lengths_are_one_compiled_graph(spec):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(Layer(spec), backend=counter, dynamic=True)
    for length in (11, 19, 63, 64, 65, 70, 130, 200, 300, 513):
        arguments = [x if x is None else x.requires_grad_() for x in inputs(spec, 2, length)]
        o, state = compiled(*arguments)
        (o.sum() + state.sum()).backward()
        wanted = Layer(spec)(*inputs(spec, 2, length))
        assert error(o, wanted[0]) < 1e-5
        assert error(state, wanted[1]) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("spec", DECAYED[:2], ids=lambda spec: spec.decay)
def test_inductor_compiles_a_symbolic_number_of_chunks(spec):
    arguments = inputs(spec, 2, 200)
    exported = torch.export.export(Layer(spec), arguments, dynamic_shapes=symbolic(arguments))
    compiled = torch.compile(exported.run_decompositions(decompositions()).module(), dynamic=True)
    for length in (200, 3, 64, 65, 3000):
        for one, other in zip(compiled(*inputs(spec, 2, length)), Layer(spec)(*inputs(spec, 2, length)), strict=True):
            assert error(one, other) < 1e-5


def test_autocast_does_not_reach_the_operator():
    arguments = draw(DELTA, length=70, dtype=torch.float32)
    wanted = gradients(recurrence, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(recurrence, arguments)
    close(got[0], wanted[0], 1e-6)
    close(got[1], wanted[1], 1e-6)


@pytest.mark.parametrize("fields", [{}, {"decay": "token"}, {"decay": "channel"}, {"update": "delta"}], ids=str)
def test_memory_does_not_grow_with_the_square_of_the_length(fields):
    spec = RecurrenceSpec(("x",), 0.4, normaliser="none", **fields)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[-1] = max(largest[-1], out.untyped_storage().nbytes())
            return out

    for length in (4096, 8192):
        largest.append(0)
        arguments = draw(spec, batch=1, length=length, heads=2, kv_heads=2, width=16, value=16, dtype=torch.float32)
        largest[-1] = 0
        with Sizes():
            forms.forward(arguments)
            forms.backward(
                arguments, [torch.zeros(1, length, 2, 16), torch.zeros(1, 2, 16, 16), *[torch.zeros(1, 0, 2, 16)] * 2]
            )
    assert largest[1] <= 2 * largest[0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"decay": torch.zeros(2, 21, 3)}, "decay"),
        ({"decay": torch.zeros(4)}, "3 axes"),
        ({"beta": torch.zeros(2, 21)}, "beta"),
        ({"cu_seqlens": torch.tensor([0, 42])}, "B = 1"),
        ({"beta": None}, "beta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        recurrence(**draw(DELTA) | change)


def test_falling_bounds_are_named():
    arguments = draw(DELTA, batch=1) | {"cu_seqlens": torch.tensor([0, 9, 5, 21])}
    with pytest.raises(ValueError, match="rise"):
        recurrence(**arguments)


def test_the_traceable_form_does_not_depend_on_how_gates_are_joined():
    spec = DECAYED[0]
    arguments = draw(spec, batch=1, length=2200, heads=1, kv_heads=1, width=3, value=2)
    arguments["decay"] = arguments["decay"] / 50
    close(recurrence_torch(**arguments), recurrence(**arguments))

"""Tests every point of the recurrence's axes in fp64 against the token-by-token definition: outputs, states, gradients, pieces."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import STATE, TOKENS, close, draw, gradients, in_pieces, piece, points

from subquad.kernels import RecurrenceSpec, recurrence, recurrence_reference, recurrence_torch
from subquad.kernels import recurrence_forms as forms

POINTS = points()
LENGTHS = (21, 70, 9, 1, 5, 64)


def name(spec):
    """A short name of a point."""
    parts = (
        spec.decay,
        spec.update,
        spec.normaliser,
        f"{spec.branch}{spec.window}",
        "causal" if spec.causal else "both",
    )
    return "-".join(parts)


def thinned(step):
    """The numbers of all points, those that are no multiple of `step` marked slow."""
    return [
        pytest.param(number, id=f"{number}-{name(spec)}", marks=[pytest.mark.slow] if number % step else [])
        for number, spec in enumerate(POINTS)
    ]


def gates(number):
    """How far the gates of a point close: both the products of gentle gates and those of any gates are met."""
    return (0.5, 1.0, 4.0)[number % 3]


def test_the_axes_are_all_there():
    assert len(POINTS) == 93
    assert {spec.decay for spec in POINTS if not spec.causal} == {"none", "head", "token", "channel", "additive"}


@pytest.mark.parametrize("number", thinned(1))
def test_chunks_equal_the_definition(number):
    spec = POINTS[number]
    length = LENGTHS[number % 6]
    arguments = draw(
        spec,
        length=length,
        padded=number % 4 == 0,
        shared_gates=number % 5 == 0,
        closed=gates(number // 2),
        seed=number,
    )
    wanted = recurrence_reference(**arguments)
    close(recurrence(**arguments), wanted)
    traced = recurrence_torch(**arguments)
    if traced is NotImplemented:
        assert spec.update == "delta"
        assert length > 64
    else:
        close(traced, wanted)
    if spec.causal:
        close(in_pieces(recurrence, arguments, {cut for cut in (1, 2, 7, 65, 66) if cut < length}), wanted)


@pytest.mark.parametrize("number", thinned(5))
def test_gradients_equal_those_of_the_definition(number, monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", 512)
    spec = POINTS[number]
    length = (9, 70, 18)[number % 3]
    arguments = draw(
        spec,
        length=length,
        padded=number % 3 == 0,
        shared_gates=number % 4 == 0,
        closed=gates(number // 2),
        seed=number,
    )
    if number % 4 == 0:
        before = recurrence_reference(**draw(spec, length=8, seed=number + 1))
        arguments |= dict(zip(STATE, before[1:], strict=True))
    got, wanted = gradients(recurrence, arguments), gradients(recurrence_reference, arguments)
    close(got[0], wanted[0])
    close(got[1], wanted[1], 1e-9)


def packed(spec, bounds, seed=0, **shape):
    """Arguments of sequences packed at `bounds`, each with a past of its own."""
    arguments = draw(spec, batch=1, length=bounds[-1], seed=seed, **shape) | {"cu_seqlens": torch.tensor(bounds)}
    if spec.causal:
        past = draw(spec, batch=len(bounds) - 1, length=6, padded=True, seed=seed + 1, **shape)
        past["valid"][-1] = False
        arguments |= dict(zip(STATE, recurrence_reference(**past)[1:], strict=True))
    return arguments


@pytest.mark.parametrize("number", thinned(7))
def test_packed_sequences_equal_the_definition(number):
    arguments = packed(POINTS[number], [0, 9, 9, 10, 40, 53], seed=number)
    if number % 2:
        arguments["valid"] = torch.rand(1, 53, generator=torch.Generator().manual_seed(0)) > 0.3
    got, wanted = gradients(recurrence, arguments), gradients(recurrence_reference, arguments)
    close(got[0], wanted[0])
    close(got[1], wanted[1], 1e-9)


def test_a_packed_call_equals_a_call_per_sequence():
    arguments = packed(
        RecurrenceSpec(("x",), 1.0, decay="token", update="delta", normaliser="none"), [0, 1100, 1130, 1131]
    )
    got = recurrence(**arguments)
    for row, (start, stop) in enumerate(itertools.pairwise([0, 1100, 1130, 1131])):
        part = {key: arguments[key][row : row + 1] for key in STATE} | {"cu_seqlens": None}
        o, *state = recurrence(**piece(arguments, start, stop) | part)
        close([got[0][:, start:stop], *(x[row : row + 1] for x in got[1:])], [o, *state])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(POINTS), st.integers(1, 3), st.integers(1, 80), st.sampled_from([(4, 2), (3, 3), (3, 1)]), st.integers(1, 7),
    st.integers(1, 9), st.booleans(), st.lists(st.integers(1, 79), max_size=4), st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_any_cuts(spec, batch, length, heads, width, value, padded, cuts, seed):
    arguments = draw(spec, batch, length, *heads, width=width, value=value, padded=padded, seed=seed)
    if padded:
        arguments["valid"][0] = False
    wanted = recurrence_reference(**arguments)
    close(recurrence(**arguments), wanted)
    if spec.causal:
        close(in_pieces(recurrence, arguments, {cut for cut in cuts if cut < length}), wanted)


@pytest.mark.parametrize("number", thinned(4))
def test_padding_holds_anything_and_changes_nothing(number):
    spec = POINTS[number]
    arguments = draw(spec, batch=2, length=30, seed=number)
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[0, :7] = False
    keep[1, [3, 9, 10, 20, 21, 22, 36]] = False
    wide = {}
    for key in TOKENS[:-1]:
        x = arguments[key]
        if x is not None and x.dim() > 1:
            wide[key] = x.new_full((2, 37, *x.shape[2:]), torch.nan)
            wide[key][keep] = x.flatten(0, 1)
    o, *state = recurrence(**arguments | wide | {"valid": keep})
    plain, *plain_state = recurrence(**arguments)
    close([o[keep].view_as(plain), *state], [plain, *plain_state])
    assert (o[~keep] == 0).all()


@pytest.mark.parametrize("spec", POINTS[::6], ids=name)
def test_no_tokens_and_no_rows(spec):
    for batch, length in ((2, 0), (0, 5), (0, 0)):
        arguments = draw(spec, batch=batch, length=length)
        outputs, grads = gradients(recurrence, arguments)
        close(outputs, recurrence_reference(**arguments))
        assert all((grad == 0).all() for grad in grads)
    if spec.causal:
        before = recurrence(**draw(spec, length=4))[1:]
        close(recurrence(**draw(spec, length=0) | dict(zip(STATE, before, strict=True)))[1:], before)
    nothing = draw(spec, batch=1, length=0) | {"cu_seqlens": torch.tensor([0])}
    assert recurrence(**nothing)[1].shape[0] == 0


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"update": "delta", "causal": False, "normaliser": "none"}, "commute"),
        ({"window": 4, "causal": False}, "look back"),
        ({"decay": "additive"}, "sum to 1"),
        ({"decay": "additive", "update": "delta", "normaliser": "none"}, "sum to 1"),
        ({"window": 4, "normaliser": "none"}, "shared window"),
        ({"feature_map_k": ()}, "feature_map_k"),
    ],
)
def test_what_the_field_does_not_define_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        RecurrenceSpec(("x",), 1.0, **fields)

"""Tests the expression language: what it accepts, what it computes, and that block tests never lie."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.codegen.expressions import MASK_HELPERS, predicate
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, block_tests, evaluate, parse

NUMBERS = [
    "q",
    "kv",
    "q - kv",
    "q // 3",
    "kv % 4",
    "min(q, kv)",
    "max(kv, s0)",
    "abs(q - kv)",
    "where(q < 3, kv, q)",
    "t0[kv]",
    "t1[b, q]",
]
NUMBERS += [
    "bit(t0[kv], q)",
    "bit(t1[b, i], j - s0)",
    "i",
    "j - kv",
    "s0",
    "2",
    "-q",
    "q * s0",
    "q * kv",
    "b + h",
    "t0[h]",
    "kv // s0",
    "q % s0",
]


@st.composite
def predicates(draw, depth=2):
    if depth == 0 or draw(st.booleans()):
        left, right = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS))
        return f"({left} {draw(st.sampled_from(['<', '<=', '>', '>=', '==', '!=']))} {right})"
    if draw(st.booleans()):
        return f"~{draw(predicates(depth - 1))}"
    return f"({draw(predicates(depth - 1))} {draw(st.sampled_from(['&', '|']))} {draw(predicates(depth - 1))})"


@settings(max_examples=300, deadline=None)
@given(
    predicates(),
    st.integers(-5, 5).filter(bool),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_block_tests_agree_with_dense_evaluation(text, scalar, q_lo, q_size, kv_lo, kv_size):
    tables = {"t0": torch.arange(12) % 5 - 1, "t1": torch.arange(24).reshape(2, 12) % 7}
    dense = {
        "q": q_lo + torch.arange(q_size)[:, None],
        "kv": kv_lo + torch.arange(kv_size)[None],
        "i": 2 + torch.arange(q_size)[:, None],
        "j": 1 + torch.arange(kv_size)[None],
        "s0": scalar,
        **tables,
    }
    bounds = {
        "q_lo": q_lo,
        "q_hi": q_lo + q_size - 1,
        "kv_lo": kv_lo,
        "kv_hi": kv_lo + kv_size - 1,
        "i_lo": 2,
        "i_hi": q_size + 1,
        "j_lo": 1,
        "j_hi": kv_size,
        "s0": scalar,
        **tables,
    }
    maybe_text, always_text = block_tests(text)
    for b, h in itertools.product((0, 1), (0, 3)):
        place = {"b": torch.tensor(b), "h": torch.tensor(h)}
        holds = torch.as_tensor(evaluate(text, dense | place))
        maybe = bool(evaluate(maybe_text, bounds | place, "test"))
        always = bool(evaluate(always_text, bounds | place, "test"))
        assert maybe or not holds.any(), (text, maybe_text)
        assert not always or holds.all(), (text, always_text)


@pytest.mark.parametrize(
    ("text", "maybe", "always"),
    [
        ("q >= kv", "q_hi >= kv_lo", "q_lo >= kv_hi"),
        ("q - kv < 8", "q_lo - kv_hi < 8", "q_hi - kv_lo < 8"),
        ("t0[b, kv]", "True", "False"),
        ("kv < t0[b]", "kv_lo < t0[b]", "kv_hi < t0[b]"),
        ("~(q == kv)", "~((q_lo == kv_hi) & (q_hi == kv_lo))", "~((q_lo <= kv_hi) & (kv_lo <= q_hi))"),
    ],
)
def test_block_tests_are_exact_for_the_named_masks(text, maybe, always):
    assert block_tests(text) == (maybe, always)


@pytest.mark.parametrize(
    "text",
    [
        "q >= x",
        "q",
        "q & kv",
        "q < kv < 3",
        "t0",
        "__import__('os')",
        "q.real < 1",
        "q >= 1.5",
        "lambda: 1",
        "q <",
        "q / 2 < 1",
        "exp(q) < 1",
    ],
)
def test_what_the_language_lacks_is_refused(text):
    with pytest.raises(ValueError, match="expression"):
        parse(text)


def test_tables_read_false_outside_and_floor_division_rounds_down():
    table = torch.ones(3, dtype=torch.bool)
    assert evaluate("t0[kv]", {"kv": torch.tensor([-1, 0, 2, 3]), "t0": table}).tolist() == [False, True, True, False]
    assert evaluate("q // 4 == -1", {"q": torch.tensor([-4, -1, 0])}).tolist() == [True, True, False]


def test_a_table_without_axes_is_read_at_index_zero():
    assert evaluate("kv <= q + t0[0]", {"q": 1, "kv": torch.arange(5), "t0": torch.tensor(2)}).tolist() == [
        1,
        1,
        1,
        1,
        0,
    ]


class _Device(torch.Tensor):
    """Integers that divide towards zero, as they do on a device."""

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")


class _Pointer:
    """The flat memory of a table."""

    def __init__(self, memory, place=0):
        self.memory, self.place = memory.reshape(-1), place

    def __add__(self, place):
        return _Pointer(self.memory, self.place + place)


class _Language:
    """The functions of triton.language that predicates use, on torch tensors."""

    minimum, maximum, abs, int64 = torch.minimum, torch.maximum, torch.abs, torch.int64

    @staticmethod
    def where(condition, yes, no):
        return torch.where(condition, yes, no)

    @staticmethod
    def load(pointer, mask, other):
        place, mask = torch.broadcast_tensors(torch.as_tensor(pointer.place), torch.as_tensor(mask))
        assert bool(((place >= 0) & (place < pointer.memory.numel()))[mask].all())
        return torch.where(mask, pointer.memory[place.clamp(0, pointer.memory.numel() - 1)], other).as_subclass(_Device)


def _on_device(text, environment):
    """The printed Triton predicate, run as Python."""
    helpers = MASK_HELPERS.split("@triton.jit")[1:4]
    scope = {"tl": _Language}
    for source in helpers:
        exec(source.strip(), scope)
    for name, value in environment.items():
        if name.startswith("t"):
            scope[f"{name}_ptr"] = _Pointer(value)
            scope |= {f"{name}_stride{n}": stride for n, stride in enumerate(value.stride())}
            scope |= {f"{name}_size{n}": size for n, size in enumerate(value.shape)}
        else:
            scope[name] = torch.as_tensor(value).as_subclass(_Device)
    return torch.as_tensor(eval(predicate(text, {}), scope)).as_subclass(torch.Tensor).bool()


@settings(max_examples=200, deadline=None)
@given(predicates(), st.integers(-4, 4).filter(bool))
def test_the_triton_form_of_a_predicate_has_its_values(text, scalar):
    environment = {
        "b": torch.arange(2).reshape(2, 1, 1, 1), "h": torch.arange(2).reshape(1, 2, 1, 1),
        "q": torch.arange(7).reshape(1, 1, 7, 1), "kv": torch.arange(9).reshape(1, 1, 1, 9), "s0": scalar,
        "i": torch.arange(7).reshape(1, 1, 7, 1), "j": 2 + torch.arange(9).reshape(1, 1, 1, 9),
        "t0": torch.arange(9) % 5 - 2, "t1": torch.arange(18).reshape(2, 9) % 7 - 3,
    }  # fmt: skip
    want = torch.as_tensor(evaluate(text, environment)).expand(2, 2, 7, 9)
    assert torch.equal(_on_device(text, environment).expand(2, 2, 7, 9), want), predicate(text, {})


def test_division_that_rounds_to_zero_would_be_noticed():
    environment = {"q": torch.arange(7)[:, None], "kv": torch.arange(9)[None, :]}
    text = "(q - kv) // 3 == -1"
    assert torch.equal(_on_device(text, environment), evaluate(text, environment))
    printed = predicate(text, {}).replace("floor_div(", "divided(")
    scope = {name: value.as_subclass(_Device) for name, value in environment.items()}
    wrong = eval(printed, {**scope, "divided": lambda a, b: a // b})
    assert not torch.equal(wrong.as_subclass(torch.Tensor), evaluate(text, environment))


def test_a_table_read_with_the_wrong_number_of_indices_is_refused():
    with pytest.raises(ValueError, match="2 dimensions"):
        evaluate("t0[q]", {"q": torch.arange(3), "t0": torch.ones(2, 2)})


def test_specs_are_canonical_and_checked():
    spec = SoftmaxSpec(1, softcap=30, mask="(q>=kv)")
    assert SoftmaxSpec.parse(spec.json()) == spec
    assert spec.mask == "q >= kv"
    assert SoftmaxSpec.parse(spec.json()) is SoftmaxSpec.parse(spec.json())
    one = RecurrenceSpec(("softmax(x@w0)",), 0.5, window=8, sinks=2)
    assert RecurrenceSpec.parse(one.json()) == one
    for wrong in (
        {"scale": float("nan")},
        {"scale": 1.0, "softcap": 0},
        {"scale": 1.0, "empty_rows": "none"},
        {"scale": 1.0, "mask": "q"},
    ):
        with pytest.raises(ValueError, match=r"SoftmaxSpec|mask expression"):
            SoftmaxSpec(**wrong)
    for wrong in (
        {"window": -1},
        {"sinks": 1},
        {"decay": "fast"},
        {"window": 4, "normaliser": "rms"},
        {"causal": False, "window": 4},
    ):
        with pytest.raises(ValueError, match="RecurrenceSpec"):
            RecurrenceSpec(("x",), 1.0, **wrong)
    with pytest.raises(ValueError, match="keys among"):
        SoftmaxSpec.parse('{"scale": 1, "colour": 2}')

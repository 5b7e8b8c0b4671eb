"""Tests the recurrence's numbers: adversarial gates and keys, long fp32 and bf16 inputs, and identities with other formulas."""

import pytest
import torch
from recurrence_cases import close, draw, error, gradients

from subquad.kernels import RecurrenceSpec, recurrence, recurrence_reference
from subquad.kernels.pair_scores import channel_scores, unit_inverse

PLAIN = {"feature_map": ("x",), "scale": 0.25, "normaliser": "none"}
FAMILIES = {
    "plain": {"feature_map": ("relu(x)",), "scale": 1.0},
    "head": PLAIN | {"decay": "head"},
    "token": PLAIN | {"decay": "token"},
    "channel": PLAIN | {"decay": "channel"},
    "additive": PLAIN | {"decay": "additive"},
    "delta": PLAIN | {"update": "delta"},
    "gated delta": PLAIN | {"decay": "token", "update": "delta"},
    "channel delta": PLAIN | {"decay": "channel", "update": "delta"},
    "lolcats": {"feature_map": ("softmax(x)", "softmax(-x)"), "scale": 0.25, "window": 16, "sinks": 2},
    "both": PLAIN | {"decay": "channel", "causal": False},
}


def case(family, length, **shape):
    return draw(
        RecurrenceSpec(**FAMILIES[family]),
        length=length,
        **{"batch": 1, "heads": 2, "kv_heads": 1, "width": 16, "value": 16} | shape,
    )


def cast(arguments, dtype):
    return {
        name: [x.to(dtype) for x in value]
        if isinstance(value, list)
        else value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_stays_within_1e_4_of_fp64_at_4096_tokens(family):
    arguments = case(family, 4096)
    got, wanted = recurrence(**cast(arguments, torch.float32)), recurrence(**arguments)
    assert error(got[0], wanted[0]) < 1e-4
    assert error(got[1], wanted[1]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_agrees_at_4096_tokens(family):
    arguments = case(family, 4096)
    close(recurrence(**arguments), recurrence_reference(**arguments))


@pytest.mark.parametrize(
    "family",
    ["channel", "gated delta", *(pytest.param(f, marks=pytest.mark.slow) for f in ("token", "channel delta", "both"))],
)
@pytest.mark.parametrize("logits", ["all", "mixed", "resets"])
def test_closed_gates_neither_overflow_nor_lose_digits(family, logits):
    arguments = case(family, 150)
    generator = torch.Generator().manual_seed(1)
    gate = torch.nn.functional.logsigmoid(torch.randn(arguments["decay"].shape, generator=generator).double() * 10)
    closed = torch.rand(gate.shape, generator=generator) < {"all": 1.0, "mixed": 0.3, "resets": 0.1}[logits]
    arguments["decay"] = torch.where(closed, -torch.inf if logits == "resets" else -30.0, gate)
    wanted = gradients(recurrence_reference, arguments)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        got = gradients(recurrence, cast(arguments, dtype))
        assert all(x.isfinite().all() for x in (*got[0], *got[1]))
        assert error(got[0][0], wanted[0][0]) < tolerance
        assert error(got[0][1], wanted[0][1]) < tolerance
        size = max(x.norm() for x in wanted[1][:3])
        for one, other in zip(got[1][:4], wanted[1][:4], strict=True):
            assert (one.double() - other.nan_to_num()).norm() < tolerance * size


@pytest.mark.parametrize("family", ["delta", "gated delta", "channel delta"])
@pytest.mark.parametrize("beta", [1.0, 1.99])
def test_identical_keys_under_delta(family, beta):
    arguments = case(family, 200)
    arguments["k"] = arguments["k"][:, :1].expand_as(arguments["k"]).contiguous()
    arguments["beta"] = torch.full_like(arguments["beta"], beta)
    if arguments["decay"] is not None:
        arguments["decay"] = arguments["decay"] / 100
    wanted = recurrence_reference(**arguments)
    close(recurrence(**arguments), wanted)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        got = recurrence(**cast(arguments, dtype))
        judge = recurrence_reference(**cast(cast(arguments, dtype), torch.float64))
        assert error(got[0], judge[0]) < tolerance
        assert error(got[1], judge[1]) < tolerance


def test_bf16_delta_with_negative_eigenvalues_over_a_long_input():
    arguments = case("delta", 4096)
    arguments["beta"] = torch.full_like(arguments["beta"], 1.99)
    half = cast(arguments, torch.bfloat16)
    assert error(recurrence(**half)[0], recurrence(**cast(half, torch.float64))[0]) < 0.01


def test_bf16_denominators_over_8192_tokens():
    half = cast(case("plain", 8192), torch.bfloat16)
    o, state, *_ = recurrence(**half)
    assert state.dtype == torch.float32
    assert error(o, recurrence(**cast(half, torch.float64))[0]) < 0.005


def test_the_inverse_is_that_of_substitution_where_powers_fail():
    key = torch.nn.functional.normalize(torch.randn(1, 64).double(), dim=-1).expand(64, 64)
    strict = (1.99 * key @ key.mT).tril(-1)
    exact = torch.linalg.solve_triangular(torch.eye(64).double() + strict, torch.eye(64).double(), upper=False)
    assert error(unit_inverse(strict.float()), exact) < 1e-4
    power = torch.eye(64)
    square = -strict.float()
    for _ in range(6):
        power, square = power @ (torch.eye(64) + square), square @ square
    assert not error(power, exact) < 1


def test_channel_scores_equal_the_written_out_sum():
    x, y = torch.randn(2, 3, 16, 5).double(), torch.randn(2, 3, 16, 5).double()
    total = (-20 * torch.rand(2, 3, 16, 5).double()).cumsum(-2)
    gaps = total[..., :, None, :] - total[..., None, :, :]
    above = torch.ones(16, 16, dtype=torch.bool).triu(1)[..., None]
    wanted = (x[..., :, None, :] * y[..., None, :, :] * gaps.masked_fill(above, -torch.inf).exp()).sum(-1)
    close([channel_scores(x, y, total)], [wanted])


def dense(arguments, weight):
    """o of weights [H, T, T] over v."""
    v = arguments["v"][0].transpose(0, 1).repeat_interleave(weight.shape[0] // arguments["v"].shape[2], 0)
    return (weight @ v).transpose(0, 1)[None]


@pytest.mark.parametrize("causal", [True, False])
def test_constant_decays_equal_powers_of_the_distance(causal):
    arguments = draw(RecurrenceSpec(("x",), 1.0, decay="head", normaliser="none", causal=causal), batch=1, length=80)
    q, k = (arguments[name][0].transpose(0, 1) for name in "qk")
    place = torch.arange(80)
    gap = place[:, None] - place[None]
    weight = torch.exp(arguments["decay"][:, None, None] * gap.abs()) * ((gap >= 0) | (not causal))
    close([recurrence(**arguments)[0]], [dense(arguments, (q @ k.repeat_interleave(2, 0).mT) * weight)])


def test_additive_weights_are_a_running_softmax_per_channel():
    arguments = draw(RecurrenceSpec(("x",), 1.0, decay="additive", normaliser="none"), batch=1, length=80)
    q, k, v = (arguments[name][0].double().transpose(0, 1) for name in "qkv")
    k, v = 5 * k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    share = k.exp() / k.exp().cumsum(1)
    state = (k.exp()[..., None] * v[:, :, None]).cumsum(1) / k.exp().cumsum(1)[..., None]
    assert share.isfinite().all()
    o, final, *_ = recurrence(**arguments | {"k": 5 * arguments["k"]})
    close([o], [torch.einsum("htf,htfv->thv", q, state)[None]])
    close([final[0, :, :, -1]], [k.logsumexp(1)])


def test_delta_keeps_orthonormal_keys_and_writes_nothing_without_beta():
    spec = RecurrenceSpec(("x",), 1.0, update="delta", normaliser="none")
    arguments = draw(spec, batch=1, length=6, heads=1, kv_heads=1)
    arguments["k"] = torch.eye(6).double()[None, :, None]
    arguments["beta"] = torch.ones_like(arguments["beta"])
    close([recurrence(**arguments)[1][0, 0]], [arguments["v"][0, :, 0]])
    assert (recurrence(**arguments | {"beta": torch.zeros_like(arguments["beta"])})[1] == 0).all()


def test_open_gates_change_nothing():
    plain = draw(RecurrenceSpec(("x",), 1.0, normaliser="none"), length=70)
    for decay, shape in (("token", (2, 70, 4)), ("channel", (2, 70, 4, 6))):
        spec = RecurrenceSpec(("x",), 1.0, normaliser="none", decay=decay).json()
        close(recurrence(**plain | {"spec": spec, "decay": torch.zeros(shape).double()}), recurrence(**plain))


def test_the_taylor_map_is_the_second_order_of_exp():
    texts = ("1", "x * 0.6389431042462724", "outer(x, x) * 0.28867513459481287")
    arguments = draw(RecurrenceSpec(texts, 1.0, normaliser="none"), batch=1, length=9)
    q, k = (arguments[name][0].transpose(0, 1) for name in "qk")
    score = q @ k.repeat_interleave(2, 0).mT * 6**-0.5
    close([recurrence(**arguments)[0]], [dense(arguments, (1 + score + score**2 / 2).tril())])


def test_gated_slots_are_two_passes_with_gates_on_the_slots():
    torch.manual_seed(0)
    length, width, slots = 70, 6, 5
    q, k, v = (torch.randn(1, length, 1, width).double() for _ in range(3))
    forget = torch.sigmoid(torch.randn(1, length, 1, slots).double())
    keys, values, outs = torch.zeros(slots, width).double(), torch.zeros(slots, width).double(), []
    for t in range(length):
        f = forget[0, t, 0][:, None]
        keys, values = f * keys + (1 - f) * k[0, t, 0], f * values + (1 - f) * v[0, t, 0]
        outs.append(values.T @ torch.softmax(keys @ q[0, t, 0], 0))
    spec = RecurrenceSpec(("x",), 1.0, decay="channel", normaliser="none").json()
    rest = dict.fromkeys(("beta", "window_gate", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens"))
    rest |= {"feature_q": [], "feature_k": [], "spec": spec}
    # The first pass decays the value side: it is read through the reversed roles, slot scores from (1 - f) as values.
    scores = torch.stack([
        sum((q[0, t, 0] @ k[0, j, 0]) * torch.exp(forget[0, j + 1 : t + 1, 0].log().sum(0)) * (1 - forget[0, j, 0]) for j in range(t + 1))
        for t in range(length)
    ])  # fmt: skip
    o = recurrence(q=torch.softmax(scores, -1)[None, :, None], k=1 - forget, v=v, decay=forget.log(), **rest)[0]
    close([o[0, :, 0]], [torch.stack(outs)])

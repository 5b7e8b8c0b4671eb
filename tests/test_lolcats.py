"""linearize:lolcats: what it admits, its initial values, and its operator against the written-out definition."""

import pytest
import torch

import subquad
from subquad.ir.errors import PassError
from subquad.kernels.recurrence_training import recurrence_training
from subquad.kernels.spec import RecurrenceSpec
from subquad.passes.linearize.lolcats import HEDGEHOG, Lolcats


def dense(q, k, v, fq, fk, gate, window, sinks, scale):
    """The definition with all T x T weights; q [B, T, H, K]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    near = (j <= i) & ((i - j < window) | (j < sinks))
    far = (j <= i) & ~near

    def phi(x, w):
        return torch.cat([(x @ w).softmax(-1), (-(x @ w)).softmax(-1)], -1)

    s = (scale * q @ k.transpose(-1, -2)).masked_fill(~near, -torch.inf)
    weight = torch.sigmoid(gate)[:, None, None] * (s - s.amax(-1, keepdim=True)).exp()
    weight = weight + far * (phi(q, fq) @ phi(k, fk).transpose(-1, -2))
    return (weight / weight.sum(-1, keepdim=True) @ v).transpose(1, 2)


@pytest.mark.parametrize(("window", "sinks", "length"), [(4, 0, 11), (4, 2, 70), (16, 3, 16), (64, 4, 9), (1, 0, 5)])
def test_the_operator_is_the_definition(window: int, sinks: int, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    fq, fk = (torch.randn(4, 8, 6, dtype=torch.float64) for _ in range(2))
    gate = torch.randn(4, dtype=torch.float64)
    spec = RecurrenceSpec(HEDGEHOG, scale=0.3, window=window, sinks=sinks).json()
    o = torch.ops.subquad.recurrence(q, k, v, None, None, [fq], [fk], gate, None, None, None, None, None, None, spec)[0]
    want = dense(q, k, v, fq, fk, gate, window, sinks, 0.3)
    torch.testing.assert_close(o, want, rtol=1e-9, atol=1e-9)
    if window >= length:
        exact = dense(q, k, v, fq, fk, gate - 3, length, 0, 0.3)
        torch.testing.assert_close(o, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("window", "sinks", "length"), [(32, 4, 150), (64, 4, 512), (5, 2, 77), (40, 0, 40), (3, 9, 5), (1, 1, 1)]
)
def test_the_training_form_is_the_operator(window: int, sinks: int, length: int) -> None:
    torch.manual_seed(1)
    spec = RecurrenceSpec(HEDGEHOG, scale=0.3, window=window, sinks=sinks)
    q, k, v = (torch.randn(2, length, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    fq, fk = (torch.randn(4, 8, 6, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v, fq, fk, torch.randn(4, dtype=torch.float64))]
    q, k, v, fq, fk, gate = inputs
    ours = recurrence_training(q, k, v, [fq], [fk], gate, spec)
    want = dense(q, k, v, fq, fk, gate, window, sinks, 0.3)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(want)
    gradients = [torch.autograd.grad((o * direction).sum(), inputs, allow_unused=True) for o in (ours, want)]
    for one, other in zip(*gradients, strict=True):
        one, other = (torch.zeros(1) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other.expand_as(one), rtol=1e-7, atol=1e-8)
    half = recurrence_training(
        *(x.detach().bfloat16() for x in (q, k, v)), [fq.float()], [fk.float()], gate.float(), spec
    )
    assert half.dtype == torch.bfloat16
    assert (half.double() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("module", "inputs", "verdict"), list(Lolcats.examples()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_examples(module: torch.nn.Module, inputs: tuple, verdict: str) -> None:
    report = subquad.inspect(module, inputs)
    [site] = report.sites
    refusal = Lolcats().admits(site)
    if verdict == "applies":
        assert refusal is None
        assert {n: tuple(p.shape) for n, p in Lolcats(features=12).parameters(site).items()} == {
            "feature_q": (2, 8, 12), "feature_k": (2, 8, 12), "window_gate": (2,),
        }  # fmt: skip
        a, b = Lolcats(features=12).parameters(site), Lolcats(features=12).parameters(site)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert torch.equal(Lolcats(features=8).parameters(site)["feature_q"], torch.eye(8).expand(2, 8, 8))
    else:
        assert refusal is not None
        assert verdict.removeprefix("refuses: ") in refusal.reason


def test_a_wrong_knob_is_one_sentence() -> None:
    module, inputs, _ = next(Lolcats.examples())
    with pytest.raises(PassError, match="window is 0; it must be an integer of at least 1"):
        subquad.rewrite(module, passes="linearize:lolcats(window=0)", example_inputs=inputs)
    with pytest.raises(PassError, match="did you mean 'window'"):
        subquad.rewrite(module, passes="linearize:lolcats(windw=8)", example_inputs=inputs)


def test_a_wide_window_changes_nothing_and_a_narrow_one_does() -> None:
    torch.manual_seed(0)
    module, _, _ = next(Lolcats.examples())
    x = torch.randn(2, 40, 16)
    want = module(x)
    wide = subquad.rewrite(module, passes="linearize:lolcats(window=64)", example_inputs=(x,))
    torch.testing.assert_close(wide(x), want, rtol=1e-5, atol=1e-6)
    narrow = subquad.rewrite(module, passes="linearize:lolcats(window=4, sinks=1)", example_inputs=(x,))
    assert (narrow(x) - want).abs().max() > 1e-3
    torch.testing.assert_close(narrow(x)[:, :4], want[:, :4], rtol=1e-5, atol=1e-6)
    added = set(dict(narrow.named_parameters()))
    added -= set(dict(subquad.restore(narrow).named_parameters()))
    assert added == {"subquad.feature_q", "subquad.feature_k", "subquad.window_gate"}

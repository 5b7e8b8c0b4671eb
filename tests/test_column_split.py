"""`share_prefix` on plain models: the graph is cut at the shared column, stays the same function, and says why when it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spelled_models import HandWrittenDecoder, tiny_llama
from test_shared_rows import SPREADS, Instructed, PrefixTuned
from torch import Tensor, nn

import subquad
from subquad import backend
from subquad.application import rewritten
from subquad.ir.network_rewrite import NETWORK
from subquad.kernels.spec import RecurrenceSpec
from subquad.passes.linearize.lolcats import Lolcats
from subquad.passes.share_prefix.share_prefix import SharePrefix
from subquad.passes.share_prefix.shared_operators import recurrence_arguments
from subquad.passes.share_prefix.shared_rows import shared_rows

HEADS, WIDTH = 2, 8


class Layer(nn.Module):
    """Attention and a feed-forward network with norms in front; `width` keys back when there is a window."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.window, self.norm, self.other = window, nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, HEADS, WIDTH).transpose(1, 2) for part in self.qkv(self.norm(x)).split(c, 2))
        score = q @ k.transpose(2, 3) / WIDTH**0.5
        at = torch.arange(t, device=x.device)
        seen = at[:, None] >= at
        if self.window is not None:
            seen = seen & (at[:, None] - at < self.window)
        o = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + self.out(o.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.other(x))))


class SoftPrompt(nn.Module):
    """A learned prefix in front of the embeddings; logits of the user's own tokens, or of all."""

    def __init__(self, own_only: bool = True, window: int | None = None) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.own_only, self.prefix = own_only, nn.Parameter(torch.randn(5, size))
        self.embed, self.places, self.head = nn.Embedding(40, size), nn.Embedding(64, size), nn.Linear(size, 40)
        self.layers = nn.ModuleList([Layer(window) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prefix[None].expand(ids.shape[0], -1, -1), self.embed(ids)], 1)
        x = x + self.places(torch.arange(x.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 5:] if self.own_only else x)


class Samples(nn.Module):
    """Several continuations of one source: an encoder over the source, brought to the batch, and a decoder that reads it."""

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.embed, self.encode, self.mix = nn.Embedding(40, size), nn.Linear(size, size), nn.Linear(size, size)
        self.q, self.kv, self.layer, self.head = (
            nn.Linear(size, size),
            nn.Linear(size, 2 * size),
            Layer(),
            nn.Linear(size, 40),
        )

    def forward(self, ids: Tensor, source: Tensor) -> Tensor:
        b, size = ids.shape[0], HEADS * WIDTH
        memory = self.embed(source).expand(b, -1, -1)
        h = memory + self.mix(torch.tanh(self.encode(memory)))
        x = self.layer(self.embed(ids))
        q = self.q(x).view(b, -1, HEADS, WIDTH).transpose(1, 2)
        k, v = (part.view(b, -1, HEADS, WIDTH).transpose(1, 2) for part in self.kv(h).split(size, 2))
        o = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + o.transpose(1, 2).reshape(b, -1, size))


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 40, (rows, length))


def rewritten_pair(model: nn.Module, *example: Tensor) -> nn.Module:
    model.eval()
    return subquad.rewrite(model, passes=["share_prefix"], example_inputs=example)


def same(model: nn.Module, *inputs: Tensor) -> None:
    """The rewritten forward against the original in float64 terms: at most twice the original's own error."""
    with torch.no_grad():
        got = model(*inputs)
        want = subquad.restore(model)(*inputs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def what(model: nn.Module) -> str:
    (entry,) = [one for one in model.report.applied if one["path"] == NETWORK]
    assert entry["contract"] == "exact"
    return str(entry["what"])


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "soft prompt": SoftPrompt,
    "soft prompt, all logits": lambda: SoftPrompt(own_only=False),
    "window shorter than the prefix": lambda: SoftPrompt(window=3),
    "window longer than the prefix": lambda: SoftPrompt(window=7),
    "tokens in front": lambda: Instructed(HandWrittenDecoder()),
    "tokens in front of a Llama": lambda: Instructed(tiny_llama(2, "sdpa")),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "Llama" in n or "longer" in n else ()) for n in WHOLE]
)
def test_the_whole_network_is_cut_at_the_shared_column(name: str) -> None:
    torch.manual_seed(0)
    model = rewritten_pair(WHOLE[name](), ids(3, 7))
    assert what(model).startswith("2 attentions and what lies between them compute shared columns once")
    record = rewritten(model)
    assert record is not None
    assert list(record.bound) == [""]
    assert all(one.passed for one in model.report.verification)
    calls = [n for n in record.bound[""].graph.graph.nodes if n.target is torch.ops.subquad.softmax_attention.default]
    own_only = getattr(model, "own_only", False)
    assert sorted(len(n.args[1]) for n in calls) == ([1, 2, 2] if own_only else [1, 1, 2, 2]), (
        "of prefixes nobody reads"
    )
    for rows, length in ((4, 9), (1, 2), (6, 20)):
        with torch.no_grad():
            got = model(ids_ := ids(rows, length))
            record.undo()
            want = model(ids_)
            record.undo = record.redo()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_shared_columns_are_computed_for_one_row() -> None:
    """Linear layers of the prefix graph see one row of five columns, those of the suffix graph see no prefix."""
    model = rewritten_pair(SoftPrompt(), ids(3, 7))
    graph = rewritten(model).bound[""].graph  # type: ignore[union-attr]
    seen: list[tuple[int, ...]] = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is torch.ops.aten.linear.default:
                seen.append(tuple(args[0].shape[:2]))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Watch(graph).run(ids(4, 11))
    assert set(seen) == {(1, 5), (4, 11)}
    assert seen.count((1, 5)) <= 8
    assert len(seen) == seen.count((1, 5)) + 9


def test_tables_of_keys_are_read_once_in_every_spelling() -> None:
    for name in ("expand", "repeat", "index", "groups in turn"):
        spread, rows, groups = SPREADS[name]
        model = rewritten_pair(PrefixTuned(spread, rows), torch.randn(4, 5, 8))
        if groups == "all rows":
            assert what(model) == "1 attention read shared keys once for all rows", name
            same(model, torch.randn(6, 3, 8))
        else:
            (refusal,) = model.report.refused
            assert "no attention reads columns that all rows" in refusal.reason, name
            assert "r % 2" in refusal.reason


def test_an_encoder_runs_once_for_many_samples_of_one_source() -> None:
    torch.manual_seed(0)
    model = rewritten_pair(Samples(), ids(3, 7), ids(1, 6))
    assert "read shared keys once" in what(model)
    graph = rewritten(model).bound[""].graph  # type: ignore[union-attr]
    wide = [n.meta["val"].shape[0] for n in graph.graph.nodes if n.target is torch.ops.aten.tanh.default]
    assert wide == [1]
    same(model, ids(5, 4), ids(1, 9))


@pytest.mark.parametrize("window", [3, 64])
def test_recurrent_layers_go_on_from_the_state_behind_the_shared_columns(window: int) -> None:
    """A window shorter than the prefix has given tokens to the state, a longer one holds them all."""
    torch.manual_seed(0)
    model, example = SoftPrompt(own_only=False).eval(), (ids(3, 7),)
    alone, linear = copy.deepcopy(model), Lolcats(window=window, sinks=1)
    subquad.rewrite(alone, passes=[linear], example_inputs=example)
    model = subquad.rewrite(model, passes=[linear, SharePrefix()], example_inputs=example)
    assert what(model) == "2 attentions and what lies between them compute shared columns once"
    graph = rewritten(model).bound[""].graph.graph  # type: ignore[union-attr]
    calls = [n for n in graph.nodes if n.target is torch.ops.subquad.recurrence.default]
    assert len(calls) == 4
    assert {int(n.args[0].meta["val"].shape[0]) == 1 for n in calls if recurrence_arguments(n)["state"] is None} == {
        True
    }
    for rows, length in ((4, 9), (1, 2), (6, 20)):
        x = ids(rows, length)
        with torch.no_grad():
            torch.testing.assert_close(model(x), alone(x), rtol=1e-5, atol=2e-6)


class BothWays(nn.Module):
    """A recurrence over a shared prefix and own tokens."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.spec, self.prefix = (
            RecurrenceSpec(("exp(x)",), 1.0, causal=causal).json(),
            nn.Parameter(torch.randn(5, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prefix[None].expand(x.shape[0], -1, -1), x], 1).unflatten(2, (2, 4))
        nothing: list[Tensor] = []
        none = (None,) * 4
        made = torch.ops.subquad.recurrence(x, x, x, None, None, nothing, nothing, None, None, *none, None, self.spec)
        return made[0]


@pytest.mark.parametrize("causal", [True, False])
def test_a_recurrence_in_both_directions_shares_nothing(causal: bool) -> None:
    module = torch.export.export(BothWays(causal), (torch.randn(3, 4, 8),)).module()
    claims = shared_rows(module)
    found = [claims.get(n) for n in module.graph.nodes if n.target is torch.ops.subquad.recurrence.default]
    assert len(found) == 1
    assert (found[0] is not None) == causal


TRAPS = ["bidirectional", "mean over time", "batch statistics", "own prefix", "first token"]


class Trapped(nn.Module):
    """A soft prompt whose columns are shared before the trap only."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.trap, self.base = trap, SoftPrompt(own_only=False)

    def forward(self, ids: Tensor) -> Tensor:
        base = self.base
        x = torch.cat([base.prefix[None].expand(ids.shape[0], -1, -1), base.embed(ids)], 1)
        if self.trap == "mean over time":
            x = x - x.mean(1, keepdim=True)
        if self.trap == "batch statistics":
            x = x - x.mean(0, keepdim=True)
        if self.trap == "own prefix":
            x = x + base.embed(ids[:, :1])
        if self.trap == "first token":
            x = x + x[:, :1]
        if self.trap == "bidirectional":
            q = x.view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)
            return base.head(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return base.head(base.layers[0](x))


@pytest.mark.parametrize("trap", TRAPS)
def test_what_reads_past_the_shared_columns_is_not_cut_there(trap: str) -> None:
    torch.manual_seed(0)
    model = rewritten_pair(Trapped(trap), ids(3, 7))
    if trap == "bidirectional":
        assert what(model).startswith("1 attention read shared keys once")
    elif trap in ("mean over time", "own prefix"):
        (refusal,) = model.report.refused
        assert refusal.path == NETWORK
    same(model, ids(4, 9))


def test_the_same_plan_makes_the_same_network() -> None:
    model = rewritten_pair(SoftPrompt(), ids(3, 7))
    plan = model.report.plan
    again = subquad.rewrite(subquad.restore(model), plan=plan, example_inputs=(ids(3, 7),))
    assert again.report.plan.hash == plan.hash
    assert what(again)


@pytest.mark.parametrize("make", [SoftPrompt, Samples])
def test_behind_torch_compile_without_recompiling_per_length(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().eval()
    more = (ids(1, 6),) if make is Samples else ()
    fast = torch.compile(model, backend="subquad", options={"passes": ["share_prefix"], "inner": "eager"}, dynamic=True)
    before = len(backend.reports)
    with torch.no_grad():
        for rows, length in ((3, 7), (4, 9), (5, 20), (4, 3)):
            x = ids(rows, length)
            torch.testing.assert_close(fast(x, *more), model(x, *more), rtol=1e-5, atol=2e-6)
    reports = backend.reports[before:]
    assert len(reports) == 1
    assert any(one["path"] == NETWORK for one in reports[0].applied)


def test_one_row_and_gradients_of_the_prefix() -> None:
    torch.manual_seed(0)
    model = rewritten_pair(SoftPrompt(), ids(3, 7))
    record, x = rewritten(model), ids(1, 6)
    assert record is not None
    found = torch.autograd.grad(model(x).square().sum(), model.prefix)[0]
    record.undo()
    want = torch.autograd.grad(model(x).square().sum(), model.prefix)[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)

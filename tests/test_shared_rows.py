"""Shared prefixes in graphs: every claim of the analysis holds on numbers, every spelling is found, no trap is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from shared_rows_oracle import violations
from spelled_models import HandWrittenDecoder, tiny_llama
from torch import Tensor, nn

from subquad.capture import Capture, capture
from subquad.ir.prefix import Prefix
from subquad.ir.report import Report
from subquad.passes.share_prefix.find_prefixes import find_prefixes
from subquad.passes.share_prefix.shared_rows import shared_rows
from subquad.recognition import recognise

HEADS, WIDTH = 2, 4


class PrefixTuned(nn.Module):
    """Attention over keys and values of its own behind those of a table, brought to the batch by `spread`."""

    def __init__(self, spread: Callable[[Tensor, int], Tensor], rows: int = 1) -> None:
        super().__init__()
        self.spread = spread
        self.keys, self.values = (nn.Parameter(torch.randn(rows, HEADS, 3, WIDTH)) for _ in range(2))
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        k = torch.cat([self.spread(self.keys, x.shape[0]), k], 2)
        v = torch.cat([self.spread(self.values, x.shape[0]), v], 2)
        return F.scaled_dot_product_attention(q, k, v)


SPREADS: dict[str, tuple[Callable[[Tensor, int], Tensor], int, str]] = {
    "expand": (lambda p, b: p.expand(b, -1, -1, -1), 1, "all rows"),
    "broadcast_to": (lambda p, b: p.broadcast_to(b, HEADS, 3, WIDTH), 1, "all rows"),
    "repeat": (lambda p, b: p.repeat(b, 1, 1, 1), 1, "all rows"),
    "tile": (lambda p, b: torch.tile(p, (b, 1, 1, 1)), 1, "all rows"),
    "repeat_interleave": (lambda p, b: p.repeat_interleave(b, 0), 1, "all rows"),
    "index": (lambda p, b: p[torch.zeros(b, dtype=torch.int64)], 1, "all rows"),
    "index_select": (lambda p, b: p.index_select(0, torch.zeros(b, dtype=torch.int64)), 1, "all rows"),
    "clone behind expand": (lambda p, b: p.expand(b, -1, -1, -1).contiguous().clone(), 1, "all rows"),
    "one row of many": (lambda p, b: p[1:2].expand(b, -1, -1, -1), 3, "all rows"),
    "groups in blocks": (lambda p, b: p.repeat_interleave(b // 2, 0), 2, "rows r of equal (r // "),
    "groups in turn": (lambda p, b: p.repeat(b // 2, 1, 1, 1), 2, "rows r of equal (r % 2)"),
    "reshape of a wider expand": (lambda p, b: p[:, None].expand(1, b, HEADS, 3, WIDTH).reshape(b, HEADS, 3, WIDTH), 1, "all rows"),
}  # fmt: skip


def found(
    model: nn.Module, example: tuple[Tensor, ...] | None, **declared: str
) -> tuple[Capture, Report, list[Prefix]]:
    captured = capture(model.eval(), example)
    report = recognise(captured, Report())
    symbols = {name: sympy.Symbol(value) for name, value in declared.items()}
    return captured, report, find_prefixes(captured.graph, report.sites, symbols)


class Every(nn.Module):
    """Several models side by side on one input."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model in self.models)


def test_every_spelling_of_a_broadcast_is_a_prefix_of_its_site() -> None:
    every = Every({name: PrefixTuned(spread, rows) for name, (spread, rows, _) in SPREADS.items()})
    captured, report, prefixes = found(every, (torch.randn(4, 5, 8),))
    by_path = {prefix.path: prefix for prefix in prefixes}
    for n, (name, (_, _, groups)) in enumerate(SPREADS.items()):
        prefix = by_path[f"models.{n}"]
        assert prefix.columns == "3", name
        assert prefix.groups.startswith(groups), name
    claims = shared_rows(captured.graph, report.sites)
    for batch in (4, 6):
        assert not violations(captured, claims, (torch.randn(batch, 5, 8),))


def test_the_repetition_of_key_heads_is_no_prefix() -> None:
    _, report, prefixes = found(tiny_llama(1, "eager"), (torch.randint(0, 60, (2, 7)),))
    assert report.sites[0].kv_heads < report.sites[0].heads
    assert prefixes == []


class Instructed(nn.Module):
    """A language model that puts the same tokens in front of every row."""

    def __init__(self, model: nn.Module, tokens: int = 6) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("instruction", torch.randint(0, 50, (1, tokens)))

    def forward(self, ids: Tensor) -> Tensor:
        joined = torch.cat([self.instruction.expand(ids.shape[0], -1), ids], 1)
        out = self.model(joined)
        return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, "eager"), HandWrittenDecoder])
def test_tokens_in_front_of_every_row_are_a_prefix_of_the_whole_network(make: Callable[[], nn.Module]) -> None:
    captured, report, prefixes = found(Instructed(make()), (torch.randint(0, 50, (3, 7)),))
    assert [(p.path, p.columns, p.groups) for p in prefixes] == [("", "6", "all rows")]
    assert any("joined with columns of each row" in sentence for sentence in prefixes[0].evidence)
    claims = shared_rows(captured.graph, report.sites)
    assert len(claims) > 30
    assert not violations(captured, claims, (torch.randint(0, 50, (4, 9)),))


def test_rows_declared_equal_prove_what_a_run_time_guard_may_rely_on() -> None:
    ids = torch.randint(0, 60, (3, 9))
    captured, report, prefixes = found(tiny_llama(1), None, input_ids="P", attention_mask="P")
    assert [(p.path, p.columns) for p in prefixes] == [("", "P")]
    ids[:, :4] = ids[:1, :4]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    symbols = {name: sympy.Symbol("P") for name in ("input_ids", "attention_mask")}
    claims = shared_rows(captured.graph, report.sites, symbols)
    assert not violations(captured, claims, (ids, mask), P=4)
    assert violations(captured, claims, (ids, mask), P=5), "the check itself can fail"


def test_equal_tokens_with_unequal_padding_prove_only_what_comes_before_attention() -> None:
    _, _, prefixes = found(tiny_llama(1), None, input_ids="P")
    assert [p.path for p in prefixes] == ["model.layers.0.self_attn"]


class Body(nn.Module):
    """One attention layer with room for a trap before or inside it."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.trap, self.embed, self.qkv, self.out = trap, nn.Embedding(50, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.causal = nn.Conv1d(8, 8, 3)
        self.rows = nn.Parameter(torch.randn(2, 8))

    def attend(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(out.transpose(1, 2).reshape(x.shape[0], -1, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x, trap = self.embed(ids), self.trap
        if trap == "flattened rows":
            x = (x.reshape(-1, 8) @ self.out.weight).view(x.shape)
        if trap == "centred convolution":
            x = self.conv(x.mT).mT
        if trap == "causal convolution":
            x = self.causal(F.pad(x.mT, (2, 0))).mT
        if trap == "mean over tokens":
            x = x - x.mean(1, keepdim=True)
        if trap == "running sum":
            x = x.cumsum(1)
        if trap == "row numbers":
            x = x + torch.arange(x.shape[0])[:, None, None]
        if trap == "running sum over rows":
            x = x.cumsum(0)
        if trap == "backwards":
            x = x.flip(1)
        if trap == "first token":
            x = x + x[:, :1]
        if trap == "last token":
            x = x + x[:, -1:]
        x = self.attend(x, trap != "bidirectional")
        return self.attend(x, True)


TRAPS: dict[str, str | None] = {
    "none": "P", "flattened rows": "P", "causal convolution": "P", "running sum": "P", "centred convolution": "P - 1",
    "first token": None, "mean over tokens": None, "row numbers": None, "running sum over rows": None, "backwards": None,
    "last token": None, "bidirectional": None,
}  # fmt: skip
"""Shared columns of the keys and values of the second layer, of P shared tokens."""


def test_what_mixes_columns_or_rows_ends_a_prefix() -> None:
    captured, report, prefixes = found(
        Every({trap: Body(trap) for trap in TRAPS}), (torch.randint(0, 50, (3, 7)),), x="P"
    )
    assert len(report.sites) == 2 * len(TRAPS)
    second = {prefix.path.removesuffix("#1"): prefix.columns for prefix in prefixes if prefix.path.endswith("#1")}
    assert [second.get(f"models.{n}") for n in range(len(TRAPS))] == list(TRAPS.values())
    claims = shared_rows(captured.graph, report.sites, {"x": sympy.Symbol("P")})
    ids = torch.randint(0, 50, (4, 8))
    ids[:, :5] = ids[:1, :5]
    assert not violations(captured, claims, (ids,), P=5)


class TwoParts(nn.Module):
    def forward(self, one: Tensor, two: Tensor, own: Tensor) -> Tensor:
        rows = own.shape[0]
        x = torch.cat([torch.cat([one.expand(rows, -1, -1), two.expand(rows, -1, -1)], 1), own], 1)
        q = k = v = x[:, None]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_nested_joints_add_up() -> None:
    example = (torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(2, 5, 8))
    captured, report, prefixes = found(TwoParts(), example)
    assert len(prefixes) == 1
    claims = shared_rows(captured.graph, report.sites)
    assert not violations(captured, claims, example)
    first, second = (str(captured.graph.graph.find_nodes(op="placeholder")[n].meta["val"].shape[1]) for n in (0, 1))
    assert sympy.sympify(prefixes[0].columns) == sympy.sympify(f"{first} + {second}")


def test_inspect_names_the_prefix_and_where_it_is_joined() -> None:
    import subquad

    report = subquad.inspect(Instructed(HandWrittenDecoder()).eval(), (torch.randint(0, 50, (2, 7)),))
    [prefix] = report.json()["prefixes"]
    assert (prefix["path"], prefix["columns"], prefix["groups"]) == ("", "6", "all rows")
    assert any("test_shared_rows.py:" in sentence for sentence in prefix["evidence"])

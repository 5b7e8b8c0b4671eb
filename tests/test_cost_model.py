"""The cost model: what it predicts, what it declines, and that a pass named by the user is applied all the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spelled_models import HandWrittenDecoder, TwoSpellings, tiny_llama
from torch import nn

import subquad
from subquad.application import rewritten
from subquad.backend import reports
from subquad.ir.cost import BATCH, KEYS, MACHINES, TIME, Cost, Machine, original_cost, predict
from subquad.pass_spec import parse_pass
from subquad.passes import of_sites

FUSE = parse_pass("fuse")
X = torch.randn(2, 9, 32)
IDS = torch.randint(0, 50, (2, 9))


class Optimal(nn.Module):
    """An SDPA call that is already what `fuse` would make of it."""

    def __init__(self, kv_heads: int = 4, mask: str = "is_causal") -> None:
        super().__init__()
        self.kv_heads, self.mask = kv_heads, mask
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 16 * kv_heads), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.kv_heads, 8)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        if self.kv_heads != 4:
            k, v = (part.repeat_interleave(4 // self.kv_heads, 1) for part in (k, v))
        time = x.shape[1]
        seen = torch.ones(time, time, dtype=torch.bool).tril() if self.mask == "tensor" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.mask == "is_causal")
        return self.out(y.transpose(1, 2).flatten(2))


def optimal() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Optimal().eval(), (torch.randn(2, 9, 32),)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: tiny_llama(1, "sdpa"), None),
        (lambda: tiny_llama(1, "eager"), None),
        (lambda: HandWrittenDecoder(layers=1).eval(), (IDS,)),
        (lambda: Optimal(mask="tensor").eval(), (X,)),
        (lambda: Optimal(kv_heads=2).eval(), (X,)),
    ],
    ids=["sdpa with a mask tensor", "eager llama", "eager GPT-2", "plain sdpa with a mask tensor", "repeated heads"],
)
def test_materialised_scores_masks_and_heads_are_predicted_to_pay(model, inputs) -> None:
    report = subquad.rewrite(model(), example_inputs=inputs, verify=False).report
    assert [entry["contract"] for entry in report.applied if entry["path"] != "generate"] == ["exact"]
    assert report.declined == []


@pytest.mark.parametrize("mask", ["is_causal", "none"])
def test_an_sdpa_call_without_a_mask_tensor_is_declined_and_left_alone(mask: str) -> None:
    model = Optimal(mask=mask).eval()
    want, attributes = model(X), set(model.__dict__)
    fast = subquad.rewrite(model, example_inputs=(X,))
    assert fast.report.applied == fast.report.refused == []
    (site,) = fast.report.declined
    assert site.predicted.original_seconds == site.predicted.rewritten_seconds > 0
    assert (site.predicted.batch, site.predicted.tokens, site.predicted.keys) == (2, 9, 9)
    assert fast.report.plan.steps == ()
    assert "forward" not in model.__dict__
    assert torch.equal(fast(X), want)
    subquad.restore(fast)
    assert set(model.__dict__) == attributes


def test_a_pass_that_is_named_is_never_declined() -> None:
    report = subquad.rewrite(Optimal().eval(), passes="fuse", example_inputs=(X,)).report
    assert len(report.applied) == 1
    assert report.declined == []


def test_only_the_sites_that_pay_are_in_the_plan_and_a_plan_is_applied_whole() -> None:
    fast = subquad.rewrite(TwoSpellings().eval(), example_inputs=(X,))
    assert [entry["path"] for entry in fast.report.applied] == [step.path for step in fast.report.plan.steps] == ["#1"]
    assert [site.path for site in fast.report.declined] == [""]
    named = subquad.rewrite(TwoSpellings().eval(), example_inputs=(X,), passes="fuse", verify=False).report.plan
    again = subquad.rewrite(TwoSpellings().eval(), example_inputs=(X,), plan=named, verify=False)
    assert again.report.plan_hash == named.hash
    assert len(again.report.applied) == 2
    graph = rewritten(fast).applied.graph.graph
    assert sum("scaled_dot_product" in str(node.target) for node in graph.nodes) == 1


def test_the_compile_backend_declines_too() -> None:
    torch._dynamo.reset()
    module = TwoSpellings().eval()
    torch.testing.assert_close(torch.compile(module, backend="subquad", options={"inner": "eager"})(X), module(X))
    assert [entry["mask"] for entry in reports[-1].applied] == ["full"]
    assert [site.rewrite for site in reports[-1].declined] == ["fuse"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_costs_grow_with_every_size_and_the_gain_with_length(implementation: str) -> None:
    (site,) = subquad.inspect(tiny_llama(1, implementation)).sites
    before, after = original_cost(site), FUSE.cost(site)
    assert before.bytes.free_symbols == before.operations.free_symbols == {BATCH, TIME}
    for cost in (before, after):
        for symbol in (BATCH, TIME):
            seconds = [cost.seconds(MACHINES["cpu"], {BATCH: 2, TIME: 64} | {symbol: n}) for n in (64, 128, 4096)]
            assert seconds == sorted(set(seconds))
    gains = [
        before.seconds(machine, {BATCH: 1, TIME: n}) - after.seconds(machine, {BATCH: 1, TIME: n})
        for machine in MACHINES.values()
        for n in (1, 16, 256, 4096)
    ]
    assert gains[:4] == sorted(gains[:4])
    assert min(gains) > 0


def test_the_cost_of_an_eager_causal_attention_by_hand() -> None:
    (site,) = subquad.inspect(HandWrittenDecoder(layers=1).eval(), (IDS,)).sites
    scores, operand = 4 * TIME * TIME * BATCH, 4 * 8 * TIME * BATCH
    mask = TIME * TIME
    moves = (
        8 * scores
    )  # written by the product; read and written by scale, mask and softmax; read by the second product
    assert (original_cost(site).bytes - 4 * (moves + 4 * operand) - mask).expand() == 0
    assert (FUSE.cost(site).bytes - 4 * 4 * operand).expand() == 0
    assert (FUSE.cost(site).operations - 2 * scores * 16 / 2).expand() == 0


def test_only_the_ratio_of_the_two_rates_decides() -> None:
    cost = Cost(8 * TIME, 6 * TIME * KEYS)
    assert cost.seconds(Machine(4.0, 3.0), {TIME: 2, KEYS: 5}) == pytest.approx(4.0 + 20.0)
    (site,) = subquad.inspect(*optimal()).sites
    assert predict(site, FUSE.cost(site)).device == "cpu"


@pytest.mark.parametrize("name", of_sites())
def test_every_pass_states_a_cost_in_the_site_s_sizes(name: str) -> None:
    (site,) = subquad.inspect(Optimal().eval(), (X,)).sites
    cost = of_sites()[name]().cost(site)
    assert cost.bytes.free_symbols | cost.operations.free_symbols == {BATCH, TIME}


def test_the_report_names_declined_sites_in_plain_data() -> None:
    report = subquad.rewrite(Optimal().eval(), example_inputs=(X,)).report
    (entry,) = json.loads(json.dumps(report.json()))["declined"]
    assert set(entry) == {"path", "rewrite", "reason", "predicted"}
    assert set(entry["predicted"]) == {
        "original_seconds",
        "rewritten_seconds",
        "batch",
        "tokens",
        "keys",
        "device",
    }


def test_declining_every_site_ends_with_status_0_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from subquad.cli.ending import run

    source = f"{Path(__file__)}:optimal"
    out = tmp_path / "out"
    try:
        assert run(["rewrite", source, "--trust", "-o", str(out), "--json"]) == 0
        captured = capsys.readouterr()
        assert len(json.loads(captured.out)["declined"]) == 1
        assert captured.err.strip().splitlines()[-1].startswith("subquad: the cost model declined every site")
        assert run(["rewrite", source, "--trust", "-o", str(out)]) == 0
        assert "Declined by the cost model" in capsys.readouterr().out
        assert not out.exists()
        assert run(["rewrite", source, "--trust", "-p", "fuse", "-o", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["declined"] == []
        assert out.is_dir()
    finally:
        logging.disable(logging.NOTSET)

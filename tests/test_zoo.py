"""Every attention of the Hugging Face zoo is recognised or truly refused, and the rewritten models keep the EXACT contract."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import zoo
from attention_witness import AttentionWitness
from softmax_counter import SoftmaxCounter, unread
from zoo_config import small_config
from zoo_inputs import inputs_of, padding_mask
from zoo_judge import Reference, outputs
from zoo_runner import Outcome, Path, judge_lines, run
from zoo_table import NOT_ATTENTION, markdown, rows

SAMPLE = [
    ("causal:llama", "eager"), ("causal:llama", "sdpa"), ("causal:gpt2", "eager"), ("causal:bloom", "eager"),
    ("causal:gemma2", "eager"), ("causal:gpt_oss", "eager"), ("causal:mixtral", "sdpa"), ("causal:gptj", "eager"),
    ("masked:distilbert", "sdpa"), ("masked:deberta", "eager"), ("seq2seq:bart", "eager"), ("image:vit", "sdpa"),
    ("image:beit", "eager"),
]  # fmt: skip
"""Families that spell attention in different ways: grouped heads, a causal buffer, ALiBi through baddbmm, softcap, sinks, routers,
division by a scale, padding alone, relative terms, cross-attention, no mask, a bias table."""


def truly_refused(path: Path) -> list[tuple[str, str]]:
    """Refusals of a softmax that is attention."""
    return [r for r in path.refusals if not any(phrase in r[0] for phrase in NOT_ATTENTION)]


def assert_complete(outcome: Outcome) -> None:
    """Each executed softmax is a site or a refusal, every way in agrees, and every rewritten output is right."""
    assert outcome.executed > 0
    for path in (outcome.export, outcome.dynamo, outcome.core):
        if path.tried:
            assert path.failed == "", path.trace
            assert len(path.sites) + len(path.refusals) == outcome.executed - outcome.unread, outcome.lines
            assert path.wrong == []
            assert path.odd == []
            assert path.false == []
            assert path.denied == []


@pytest.mark.parametrize(("name", "spelling"), SAMPLE)
def test_a_family_is_recognised_and_rewritten(name: str, spelling: str) -> None:
    specimen = zoo.build(zoo.architecture(name), spelling)
    assert specimen.spelling == spelling
    outcome = run(specimen, ("rewrite",))
    assert_complete(outcome)
    assert outcome.export.sites
    assert truly_refused(outcome.export) == []
    assert outcome.export.not_rewritten == []
    assert outcome.export.original == []


@pytest.mark.parametrize(("name", "spelling"), [("causal:llama", "sdpa"), ("masked:bert", "eager")])
def test_dynamo_and_core_aten_show_the_sites_that_export_shows(name: str, spelling: str) -> None:
    outcome = run(zoo.build(zoo.architecture(name), spelling), ("dynamo", "core"))
    assert_complete(outcome)
    assert len(outcome.dynamo.sites) == len(outcome.core.sites) == 2


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [entry.name for entry in zoo.architectures()])
def test_every_architecture(name: str, spelling: str) -> None:
    try:
        specimen = zoo.build(zoo.architecture(name), spelling)
    except zoo.NotBuilt as reason:
        pytest.skip(str(reason))
    if specimen.spelling != spelling:
        pytest.skip(f"{name} has no {spelling} attention")
    outcome = run(specimen)
    if outcome.executed == 0:
        pytest.skip(f"{name} executes no softmax")
    assert_complete(outcome)


def test_most_architectures_build() -> None:
    assert len(zoo.architectures()) >= 300
    config = small_config(zoo.CONFIG_MAPPING["gemma3_text"])
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window == 4
    assert config.num_key_value_heads == 2


def test_an_architecture_that_no_shrink_builds_says_why() -> None:
    with pytest.raises(zoo.NotBuilt, match=r"\w+"):
        zoo.build(zoo.Architecture("causal", "llama", "AutoModelForNothing"), "eager")


class Counted(nn.Module):
    """Three layers that share one line of softmax, one SDPA call, and PyTorch's fast path for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = (x @ x.transpose(1, 2)).softmax(-1) @ x
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        x.log_softmax(-1)
        return self.fast(x, x, x, need_weights=False)[0]


def test_the_counter_counts_executions_by_line() -> None:
    model = Counted().eval()
    with SoftmaxCounter() as counter, torch.no_grad():
        model(torch.randn(2, 5, 8))
    assert counter.executed == 5
    assert sorted(counter.lines.values()) == [1, 1, 3]
    assert {kind for kind, _ in counter.lines} == {"softmax", "sdpa"}
    assert all(line.split(":")[0] == __file__ for _, line in counter.lines)


class Mixed(nn.Module):
    """Attention, the routing of experts (all, and the best two), pooling over the tokens, a mixture with itself, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.score, self.label = nn.Linear(8, 4), nn.Linear(8, 1), nn.Linear(8, 3)
        self.q, self.experts = nn.Linear(8, 8), nn.Linear(8, 32)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x) @ x.mT * 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
        return scores.softmax(-1) @ x

    def attention_by_sums(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x)[:, :, None] * x[:, None]).sum(-1)
        return (scores.softmax(-1)[..., None] * x[:, None]).sum(-2)

    def router(self, x: torch.Tensor) -> torch.Tensor:
        return (self.gate(x).softmax(-1)[..., None] * self.experts(x).unflatten(-1, (4, 8))).sum(-2)

    def best(self, x: torch.Tensor) -> torch.Tensor:
        best = self.gate(x).topk(2)
        outputs = self.experts(x).unflatten(-1, (4, 8)).gather(2, best.indices[..., None].expand(-1, -1, -1, 8))
        return (best.values.softmax(-1)[..., None] * outputs).sum(-2)

    def pooling(self, x: torch.Tensor) -> torch.Tensor:
        return (self.score(x).softmax(1) * x).sum(1)

    def similarity(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-1)

    def classifier(self, x: torch.Tensor) -> torch.Tensor:
        return self.label(self.attention(x)).softmax(-1)


@pytest.mark.parametrize(
    ("part", "verdicts"),
    [
        ("attention", ["attention"]),
        ("attention_by_sums", ["attention"]),
        ("router", ["other"]),
        ("best", ["other"]),
        ("pooling", ["learned"]),
        ("similarity", ["other"]),
        ("classifier", ["attention", "other"]),
    ],
)
def test_the_witness_tells_attention_from_other_softmaxes(part: str, verdicts: list[str]) -> None:
    model, x = Mixed().eval(), torch.randn(2, 5, 8)
    with AttentionWitness(model).given([x]) as witness, torch.no_grad():
        getattr(model, part)(x)
    assert sorted(seen.verdict for seen in witness.seen) == verdicts
    assert all(seen.lines[0].startswith(__file__) for seen in witness.seen)


def test_a_softmax_that_reaches_no_output_is_told_from_one_that_does() -> None:
    x = torch.randn(2, 5, 8)

    def run() -> list[torch.Tensor]:
        (x * 2).softmax(-1)
        return [x.softmax(-1), nn.functional.scaled_dot_product_attention(x, x, x)]

    assert unread(run) == 1


def test_the_judge_sees_a_wrong_weight_and_a_wrong_padded_row() -> None:
    specimen = zoo.build(zoo.architecture("causal:gpt2"), "eager")
    reference = Reference(specimen.model, "causal")
    assert len(reference.cases) == 6
    for case in reference.cases:
        good = outputs(specimen.model, "causal", case)
        assert reference.broken(case, good) == ""
        bad = [good[0].clone(), *good[1:]]
        bad[0][-1, 0] *= 1.001
        assert "allowed" in reference.broken(case, bad)
    assert "instead of" in reference.broken(
        reference.cases[0], [x[:1] for x in outputs(specimen.model, "causal", (0, "none"))]
    )


def test_a_rewritten_forward_that_is_not_used_is_an_error() -> None:
    class Warns(nn.Module):
        def forward(self) -> None:
            warnings.warn("subquad ran the original forward of Warns: it was called so.")

    with pytest.raises(zoo.NotRewritten, match="original forward of Warns"):
        zoo.call(Warns(), {})


def test_paddings_hide_tokens_at_their_end() -> None:
    assert padding_mask(3, 6, "left").tolist() == [[1] * 6, [0] * 2 + [1] * 4, [0] * 4 + [1] * 2]
    assert padding_mask(3, 6, "right").tolist() == [[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4]


def test_inputs_differ_between_the_two_sizes() -> None:
    model = zoo.build(zoo.architecture("seq2seq:bart"), "sdpa").model
    small, large = (inputs_of(model, "seq2seq", size) for size in (0, 1))
    assert small["input_ids"].shape != large["input_ids"].shape
    assert small["decoder_input_ids"].shape[1] != small["input_ids"].shape[1]


def record(**changes: Any) -> dict[str, Any]:
    site = {"path": "layers.0.attention", "source": "m.py:2"}
    path = Path(True, [site, site], [(f"it is {NOT_ATTENTION[0]}", "m.py:1")])
    made = Outcome("causal:a", "eager", executed=3, attention=2, export=path).json()
    made["export"].update(changes)
    return made


def test_a_site_without_attention_and_an_attention_called_none_are_seen() -> None:
    outcome = Outcome("causal:a", "eager", executed=3, attention=2, verdicts={"attention m.py:1": 2, "other m.py:2": 1})
    site = {"path": "a", "source": "m.py:1"}
    path = Path(True, [site, site], [(f"it is {NOT_ATTENTION[0]}", "m.py:2")])
    judge_lines(outcome, path)
    assert (path.false, path.denied) == ([], [])
    path = Path(True, [site | {"source": "m.py:2"}], [(f"it is {NOT_ATTENTION[0]}", "m.py:1")] * 2)
    judge_lines(outcome, path)
    assert path.false == ["m.py:2 (1)"]
    assert path.denied == ["2 denied, 1 were no attention (1)"]


def test_the_table_adds_up_and_names_what_is_missing() -> None:
    row = rows([record(), record(sites=[], failed="ValueError: 3 of x", stage="capture", refusals=[])])[0]
    assert (row.executed, row.recognised, row.others, row.failed, row.silent) == (6, 2, 1, 3, 0)
    row = rows([record(sites=[{"path": "a", "source": ""}], refusals=[("a tanh", "m.py:1"), ("a router", "m.py:2")])])[
        0
    ]
    assert (row.recognised, row.others, row.refused, row.silent) == (1, 1, 1, 0)
    row = rows([record(refusals=[])])[0]
    assert row.silent == 1
    assert "silently missed" in row.causes
    row = rows(
        [record(false=["m.py:1 (2)"], denied=["2 denied, 1 were no attention (1)"], wrong=["output 0: error 1"])]
    )[0]
    assert (row.false, row.denied, row.wrong) == (2, 1, 1)
    row = rows([record(original=["size 1, padding none: it is fixed"])])[0]
    assert (row.bound, row.wrong, row.recognised) == (1, 0, 2)
    text = markdown([record(), {"name": "causal:b", "not_built": "ImportError: pillow"}])
    assert "2 architectures, 1 built" in text
    assert "pillow: causal:b" in text

"""Capture: modules, exported programs, traced graphs; symbolic sizes; shared parameters; regions inlined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spelled_models import HandWrittenDecoder, TwoSpellings, tiny_llama
from torch.export import Dim

import subquad
from subquad.capture import capture
from subquad.ir.errors import CaptureError

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def test_batch_and_sequence_are_symbolic_and_parameters_are_shared() -> None:
    model = HandWrittenDecoder().eval()
    captured = capture(model, (IDS,))
    sizes = next(n for n in captured.graph.graph.nodes if n.op == "placeholder").meta["val"].shape
    assert all(isinstance(size, torch.SymInt) for size in sizes)
    assert captured.graph.get_parameter("head.weight") is model.head.weight
    for shape in ((1, 4), (3, 31)):
        ids = torch.randint(0, 50, shape)
        torch.testing.assert_close(captured.graph(ids)[0], model(ids))


def test_a_batch_of_one_is_captured_with_a_symbolic_batch() -> None:
    model = HandWrittenDecoder().eval()
    captured = capture(model, (IDS[:1],))
    torch.testing.assert_close(captured.graph(IDS)[0], model(IDS))


def test_a_saved_program_is_rewritten_from_its_file(tmp_path: Path) -> None:
    model = HandWrittenDecoder().eval()
    torch.export.save(torch.export.export(model, (IDS,), dynamic_shapes=(BOTH,), strict=False), tmp_path / "model.pt2")
    fast = subquad.rewrite(torch.export.load(tmp_path / "model.pt2"))
    assert len(fast.report.applied) == 2
    assert set(fast.state_dict()) <= set(model.state_dict())
    torch.testing.assert_close(fast(IDS), model(IDS))
    torch.testing.assert_close(fast(ids=IDS[:, :3]), model(IDS[:, :3]))
    torch.testing.assert_close(subquad.restore(fast)(IDS), model(IDS))


def test_a_program_exported_with_gradients_enabled_has_its_no_grad_regions_inlined() -> None:
    model = tiny_llama(1)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    shapes = {"input_ids": BOTH, "attention_mask": BOTH, "use_cache": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    assert any("set_grad" in str(node.target) for node in program.graph.nodes)
    fast = subquad.rewrite(program)
    assert [entry["mask"] for entry in fast.report.applied] == ["causal & padding(attention_mask)"]
    got = fast(input_ids=IDS, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(got, model(**inputs).logits)


def test_inputs_are_needed_where_they_cannot_be_guessed() -> None:
    with pytest.raises(CaptureError, match="needs example_inputs"):
        subquad.inspect(TwoSpellings())
    with pytest.raises(CaptureError, match="carries no sizes"):
        subquad.inspect(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match="give a tuple, a dict or a tensor"):
        subquad.inspect(TwoSpellings(), 3)


def test_a_program_decomposed_to_core_operators_is_captured_and_keeps_its_guards(tmp_path: Path) -> None:
    for model, inputs, sites in (
        (HandWrittenDecoder().eval(), (IDS,), 2),
        (TwoSpellings().eval(), (torch.randn(2, 9, 32),), 2),
    ):
        program = torch.export.export(model, inputs, dynamic_shapes=(BOTH,), strict=False).run_decompositions()
        torch.export.save(program, tmp_path / "core.pt2")
        captured = capture(torch.export.load(tmp_path / "core.pt2"))
        assert not any("softmax.int" in str(n.target) or "linear" in str(n.target) for n in captured.graph.graph.nodes)
        fast = subquad.rewrite(torch.export.load(tmp_path / "core.pt2"), passes="fuse")
        assert len(fast.report.sites) == sites
        assert fast.report.rolled_back == []
        with torch.no_grad():
            for x in (inputs[0], inputs[0][:, :5]):
                torch.testing.assert_close(captured.graph(x)[0], model(x))
                torch.testing.assert_close(fast(x), model(x))
    long = torch.zeros(2, 65, dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(HandWrittenDecoder().eval(), (IDS,), dynamic_shapes=(BOTH,), strict=False)
        torch.export.save(program.run_decompositions(), tmp_path / "core.pt2")
    fast = subquad.rewrite(torch.export.load(tmp_path / "core.pt2"), passes="fuse")
    assert "shape[1] <= 64" in str(capture(torch.export.load(tmp_path / "core.pt2")).guards.broken([long]))
    with pytest.raises(ValueError, match=r"shape\[1\] <= 64"):
        subquad.restore(fast)(long)


class Counted(TwoSpellings):
    """A row for each token that is positive, joined to a list: its length is known once it has run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        chosen = (x[..., 0] > 0).flatten().nonzero().flatten()
        none = torch.zeros(0, dtype=torch.int64)
        return x + torch.cat([none, chosen, chosen]).sum()


def test_a_program_with_a_length_that_only_a_run_tells_is_captured() -> None:
    model, x = Counted().eval(), torch.randn(2, 9, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=(BOTH,), strict=False)
    for one in (program, program.run_decompositions()):
        report = subquad.inspect(one)
        assert len(report.sites) == 2
        torch.testing.assert_close(capture(one).graph(x)[0], model(x))

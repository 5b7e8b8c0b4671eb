"""Capture of forwards that torch.export alone refuses: outputs of any class, branches on values, fused paths, fixed sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from spelled_models import TwoSpellings, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import subquad
from subquad.capture import capture, default_inputs
from subquad.ir.errors import CaptureError

X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def rewritten(model: nn.Module, inputs: Any) -> nn.Module:
    return subquad.rewrite(model.eval(), passes=["fuse"], example_inputs=inputs)


class Pair(NamedTuple):
    """A named output."""

    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class State:
    """An output that torch's trees do not know; it holds itself, a list, and a tensor twice."""

    keys: list[torch.Tensor]
    label: str
    length: int
    owner: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


class Returning(TwoSpellings):
    """Attention that returns everything in one output."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, x: torch.Tensor, label: str = "plain") -> Any:
        y = super().forward(x)
        state = State([y, y + 1], label, x.shape[1])
        state.owner, state.extra = state, {"again": state.keys, "pair": Pair(y * 2, None)}
        return {"y": y, "pair": Pair(y, None), "state": state, "none": None, "number": 3, "tuple": (y.sum(), "word")}


def test_outputs_of_unknown_classes_come_back_as_they_were() -> None:
    fast, model = rewritten(Returning(), (X,)), Returning()
    assert fast.report.applied
    assert any("State" in note for note in fast.report.notes)
    for x in (X, LONGER):
        got, expected = fast(x), model(x)
        assert list(got) == list(expected)
        assert (got["number"], got["none"], got["tuple"][1]) == (3, None, "word")
        state = got["state"]
        assert (type(state), type(got["pair"]), got["pair"].second) == (State, Pair, None)
        assert state.owner is state
        assert state.extra["again"] is state.keys
        assert (state.label, state.length) == ("plain", x.shape[1])
        torch.testing.assert_close(state.keys, expected["state"].keys)
        torch.testing.assert_close(state.extra["pair"].first, expected["state"].extra["pair"].first)
    assert fast(X)["state"] is not fast(X)["state"]
    with pytest.warns(UserWarning, match="captured with label='plain'"):
        assert fast(X, label="other")["state"].label == "other"


def test_a_cache_comes_back_from_the_rewritten_model() -> None:
    model, reference = tiny_llama(2, "eager"), tiny_llama(2, "eager")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    captured = capture(model, inputs)
    leaves = captured.graph(*inputs.values())
    out = torch.utils._pytree.tree_unflatten(list(leaves), captured.out_spec)
    expected = reference(**inputs)
    assert type(out) is type(expected)
    assert type(out.past_key_values) is type(expected.past_key_values)
    assert out.past_key_values.get_seq_length() == 9
    for one, other in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
    assert not any("lift_fresh" in str(n.target) for n in captured.graph.graph.nodes)
    assert len(subquad.inspect(tiny_llama(2), inputs).sites) == 2
    step = {"input_ids": IDS[:, :1], "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    torch.testing.assert_close(
        model(**step, past_key_values=out.past_key_values).logits,
        reference(**step, past_key_values=expected.past_key_values).logits,
    )


class Branching(nn.Module):
    """A forward that reads its mask and a setting kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("sharpness", torch.tensor(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        scale = 1.0 / int(self.sharpness)
        if mask.all():
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], scale=scale)


def test_a_branch_on_values_is_captured_and_guarded() -> None:
    some, every = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    some[0, 3:] = False
    fast, model = rewritten(Branching(), (X, some)), Branching()
    assert len(fast.report.sites) == 1
    assert any(
        "reads the content of tensors" in note and "test_capture_adapters.py" in note for note in fast.report.notes
    )
    other = some.roll(1, 0)
    torch.testing.assert_close(fast(X, other), model(X, other))
    with pytest.warns(UserWarning, match="branches on a value that is True; it was captured with False"):
        torch.testing.assert_close(fast(X, every), model(X, every))
    fast.sharpness.fill_(5)
    model.sharpness.fill_(5)
    with pytest.warns(UserWarning, match="branches on a value that is 5"):
        torch.testing.assert_close(fast(X, some), model(X, some))


class OneProjection(nn.Module):
    """Attention that projects once where keys are the queries, and keeps a sparse buffer that it never reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.qkv = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 96)
        self.register_buffer("chosen", torch.eye(4, dtype=torch.bool).to_sparse(), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if torch.equal(x, y) else (self.q(x), *self.kv(y).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v)


def test_a_branch_on_two_tensors_being_equal_is_captured_and_guarded() -> None:
    for pair, opposite in (((X, X), (X, -X)), ((X, -X), (X, X.clone()))):
        fast, model = rewritten(OneProjection(), pair), OneProjection()
        assert len(fast.report.applied) == 1
        torch.testing.assert_close(fast(*pair), model(*pair))
        with pytest.warns(UserWarning, match="branches on a value"):
            torch.testing.assert_close(fast(*opposite), model(*opposite))


class Lengths(nn.Module):
    """Rows of different lengths, of which the forward makes a set to know whether a mask is needed (Lumina 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        lengths = mask.sum(1).tolist()
        if len(set(lengths)) == 1:
            return F.scaled_dot_product_attention(q, k, v)
        seen = mask.new_zeros(*x.shape[:2], dtype=torch.bool)
        for row, length in enumerate(lengths):
            seen[row, :length] = True
        return F.scaled_dot_product_attention(q, k, v, seen[:, None])


def test_a_set_of_lengths_is_captured_and_guarded() -> None:
    mask = torch.arange(7)[None] < torch.tensor([7, 4])[:, None]
    fast, model = rewritten(Lengths(), (X, mask)), Lengths()
    assert len(fast.report.applied) == 1
    torch.testing.assert_close(fast(X, mask), model(X, mask))
    with pytest.warns(UserWarning, match="branches on a value"):
        torch.testing.assert_close(fast(X, mask.roll(1, 1) & mask), model(X, mask.roll(1, 1) & mask))


class Experts(TwoSpellings):
    """A mixture of experts that loops over those some token chose, found by name, and moves a module to its own dtype."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleDict({f"expert_{n}": nn.Linear(32, 32) for n in range(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        self.gate = self.gate.to(x.dtype)
        chosen = F.one_hot(self.gate(x).argmax(-1), 4).permute(2, 0, 1)
        y = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum((-1, -2)), 0).nonzero():
            row, token = torch.where(chosen[expert].squeeze(0))
            y[row, token] = self.experts[f"expert_{expert.item()}"](x[row, token])
        return x + y


def test_a_loop_over_the_experts_that_tokens_chose_is_captured_and_guarded() -> None:
    fast, model = rewritten(Experts(), (X,)), Experts()
    assert len(fast.report.sites) == 2
    torch.testing.assert_close(fast(X), model(X))
    with pytest.warns(UserWarning, match="branches on a value"):
        torch.testing.assert_close(fast(-X), model(-X))


class Sized(TwoSpellings):
    """A forward that is another function at other sizes."""

    def __init__(self, test: Any) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.test = test

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if self.test(x) else y


@pytest.mark.parametrize(
    ("test", "said"),
    [(lambda x: x.shape[1] == 7, "captured for"), (lambda x: x.shape[1] < 9, r"x\.shape\[1\] < 9"),
     (lambda x: x.shape[1] % 7 == 0, r"% 7"), (lambda x: x.shape[0] == x.shape[1] - 5, r"x\.shape")],
)  # fmt: skip
def test_a_size_the_graph_was_not_captured_for_runs_the_original(test: Any, said: str) -> None:
    fast, model = rewritten(Sized(test), (X,)), Sized(test)
    assert fast.report.applied
    torch.testing.assert_close(fast(X), model(X))
    with pytest.warns(UserWarning, match=said):
        torch.testing.assert_close(fast(LONGER), model(LONGER))


def test_a_fixed_axis_is_said() -> None:
    assert any(
        "fixed at size 7 along axis 1" in n for n in capture(Sized(lambda x: x.shape[1] == 7).eval(), (X,)).notes
    )
    assert capture(TwoSpellings().eval(), (X,)).notes == []


def test_a_traced_graph_and_a_program_refuse_sizes_they_do_not_hold_for() -> None:
    model = Sized(lambda x: x.shape[1] < 9).eval()
    program = subquad.rewrite(torch.export.export(model, (X,), strict=False), passes=["fuse"])
    torch.testing.assert_close(program(X), model(X))
    with pytest.raises(ValueError, match="captured for 2×7×32"):
        subquad.restore(program)(LONGER)

    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x @ x.transpose(1, 2), -1).view(2, -1, 7) @ x

    assert capture(torch.fx.symbolic_trace(View()), (X,)).guards.broken([LONGER])


def test_the_fused_encoder_and_its_mask_hint_are_off_during_capture_only() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    for inputs in (
        {"src": X, "mask": mask},
        {"src": X, "src_key_padding_mask": torch.arange(7)[None] > torch.tensor([[4], [6]])},
    ):
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        expected = model(**inputs)
        fast = rewritten(model, inputs)
        assert torch.backends.mha.get_fastpath_enabled()
        assert len(fast.report.sites) == 2
        torch.testing.assert_close(fast(**inputs), expected)


def test_patches_are_undone_when_the_capture_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("on purpose")

    hint, model = nn.modules.transformer._detect_is_causal_mask, Failing()
    with pytest.raises(CaptureError, match=r"test_capture_adapters.py:\d+ .*on purpose"):
        capture(model, (X,))
    assert nn.modules.transformer._detect_is_causal_mask is hint
    assert torch.backends.mha.get_fastpath_enabled()
    assert "forward" not in model.__dict__


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_is_an_ordinary_call(reentrant: bool) -> None:
    class Checkpointed(TwoSpellings):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Checkpointed().eval()
    expected = model(LONGER)
    fast = rewritten(model, (X,))
    assert len(fast.report.applied) == 2
    torch.testing.assert_close(fast(LONGER), expected)


def test_attention_under_vmap_is_found_and_runs() -> None:
    class Mapped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v

            return torch.vmap(torch.vmap(one))(q, k, v)

    inputs = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))
    fast = rewritten(Mapped(), inputs)
    assert len(fast.report.sites) == 1
    torch.testing.assert_close(fast(*inputs), Mapped()(*inputs))


def test_variadic_arguments_are_given_as_they_were() -> None:
    class Variadic(nn.Module):
        def forward(self, q: torch.Tensor, *rest: torch.Tensor, **more: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, rest[0], attn_mask=rest[1]) * more["factor"] + more["bias"]

    q = torch.randn(2, 2, 9, 4)
    inputs = (q, q * 2, torch.ones(9, 9, dtype=torch.bool).tril()), {"factor": 2, "bias": torch.randn(2, 1, 9, 1)}
    fast = rewritten(Variadic(), inputs)
    assert fast.report.applied
    torch.testing.assert_close(fast(*inputs[0], **inputs[1]), Variadic()(*inputs[0], **inputs[1]))


def test_equal_first_axes_are_one_batch() -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    captured = capture(model, (X, LONGER[:2], LONGER[:2]))
    sizes = [n.meta["val"].shape[0] for n in captured.graph.graph.nodes if n.op == "placeholder"]
    assert len({str(size.node.expr) for size in sizes}) == 1
    assert "shape[0]" in str(captured.guards.broken([X, LONGER, LONGER]))
    assert captured.guards.broken([LONGER, LONGER, LONGER]) is None


def _models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision = small | {"image_size": 32, "patch_size": 8}
    marian = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60,
              "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}  # fmt: skip
    whisper = marian | {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8, "decoder_start_token_id": 1,
                        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    speech = small | {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
                      "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    T = transformers
    return {
        "text": lambda: T.BertForMaskedLM(T.BertConfig(**small, vocab_size=60)),
        "sequence to sequence": lambda: T.BartForConditionalGeneration(T.BartConfig(**marian)),
        "image": lambda: T.ViTForImageClassification(T.ViTConfig(**vision)),
        "features": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**whisper)),
        "samples": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**speech)),
        "text and image": lambda: T.CLIPModel(
            T.CLIPConfig(text_config=small | {"vocab_size": 60}, vision_config=vision)
        ),
    }


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("features", "samples", "text and image")]


@pytest.mark.parametrize("kind", ["text", "sequence to sequence", "image", *SLOW])
def test_hugging_face_models_of_every_kind_need_no_example(kind: str) -> None:
    torch.manual_seed(0)
    model = _models()[kind]().eval()
    captured = capture(model)
    inputs = default_inputs(model)
    assert captured.guards.broken([captured.example[name] for name in captured.inputs]) is None
    expected = [x for x in torch.utils._pytree.tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)]
    found = [x for x in captured.graph(*captured.example.values()) if isinstance(x, torch.Tensor)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

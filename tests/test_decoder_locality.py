"""The proof that a graph treats tokens independently: what passes, what is refused and with which words."""

import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from spelled_models import CausalBufferAttention
from torch import nn

import subquad
from subquad.derivation import derive, implies_causal
from subquad.incremental import decoder
from subquad.token_axis import NotIncremental


class Base(nn.Module):
    """Embedding, something, attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.attn, self.head = nn.Embedding(50, 16), CausalBufferAttention(16, 2, 64), nn.Linear(16, 50)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.wpe = nn.Parameter(torch.randn(64, 16))

    def mix(self, x, ids):
        return x

    def forward(self, ids):
        x = self.mix(self.wte(ids), ids)
        return self.head(x + self.attn(x))


class MeanOverTokens(Base):
    def mix(self, x, ids):
        return x - x.mean(1, keepdim=True)


class Convolution(Base):
    def mix(self, x, ids):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class ShiftedTokens(Base):
    def mix(self, x, ids):
        return x + F.pad(x[:, :-1], (0, 0, 1, 0))


class Reversed(Base):
    def mix(self, x, ids):
        return x + x.flip(1)


class TokenMixer(Base):
    def mix(self, x, ids):
        return x + (x @ x.transpose(1, 2)).relu() @ x


class DividedByLength(Base):
    def mix(self, x, ids):
        return x / ids.shape[1]


class Scrambled(Base):
    def mix(self, x, ids):
        batch, time, width = x.shape
        return x + x.transpose(1, 2).reshape(batch, time, width)


class FloatSum(Base):
    def mix(self, x, ids):
        return x.cumsum(1)


class Bidirectional(Base):
    def forward(self, ids):
        x = self.wte(ids)
        q = x.view(x.shape[0], -1, 2, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q)
        return self.head(y.transpose(1, 2).reshape(x.shape))


REFUSED = [
    (MeanOverTokens, "mean"), (Convolution, "conv1d"), (ShiftedTokens, "slice keeps some tokens"), (Reversed, "flip"),
    (TokenMixer, "matrix product"), (DividedByLength, "computes with the length"), (Scrambled, "reshape"), (FloatSum, "cumsum"),
    (Bidirectional, "lets a token see later ones"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "words"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_mixes_tokens_is_refused_with_its_line(model: type[Base], words: str) -> None:
    fast = subquad.rewrite(
        model().eval(), passes="fuse", example_inputs=(torch.zeros(2, 5, dtype=torch.int64),), verify=False
    )
    with pytest.raises(NotIncremental, match=words) as caught:
        decoder(fast)
    source, line = caught.value.refusal.source.rsplit(":", 1)
    assert source == inspect.getsourcefile(model)
    spans = [inspect.getsourcelines(part) for part in (model, Base.forward)]
    assert any(first <= int(line) < first + len(lines) for lines, first in spans)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class SlicedPositions(Base):
    def mix(self, x, ids):
        return x + self.wpe[: ids.shape[1]]


class MergedRows(Base):
    def mix(self, x, ids):
        rows = x.reshape(-1, 16)
        return x + torch.addmm(self.head.bias[:16], rows, self.wpe[:16]).view(x.shape)


class RunningCount(Base):
    def mix(self, x, ids):
        return x + self.wpe[(ids != 0).cumsum(1) % 64]


class SpacedPositions(Base):
    def mix(self, x, ids):
        place = torch.arange(ids.shape[1]) * 3 + 1
        return x + torch.sin(place[None, :, None] * 0.1)


@pytest.mark.parametrize("model", [SlicedPositions, MergedRows, RunningCount, SpacedPositions])
def test_what_is_local_runs_step_by_step(model: type[Base]) -> None:
    torch.manual_seed(0)
    plain = model().eval()
    ids = torch.randint(0, 4, (2, 12))
    with torch.no_grad():
        want = plain(ids)
    made = decoder(subquad.rewrite(plain, passes="fuse", example_inputs=(ids,), verify=False))
    logits, state = made.prefill(ids[:, :5], last_only=False)
    got = torch.cat([logits, made.step(ids[:, 5:6], state), made.step(ids[:, 6:], state)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_position_tables_limit_the_length() -> None:
    fast = subquad.rewrite(
        SlicedPositions().eval(), passes="fuse", example_inputs=(torch.zeros(2, 5, dtype=torch.int64),), verify=False
    )
    assert derive(fast.__dict__["_subquad"].applied.graph).layout.limit == 64


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        ("q >= kv", True), ("kv <= q", True), ("kv < q + 1", True), ("q + -1 * kv >= 0", True), ("2 * q - 2 * kv > -2", True),
        ("kv < q", True), ("(q >= kv) & (q - kv < 8)", True), ("(kv <= q) & (t0[b, kv] != 0)", True), ("kv <= q + 1", False),
        ("q <= kv", False), ("kv < 8", False), ("(kv <= q) | (kv < 4)", False), ("q - kv < 8", False), ("t0[b, kv] != 0", False),
    ],
)  # fmt: skip
def test_causality_is_read_from_the_predicate(mask: str, causal: bool) -> None:
    assert implies_causal(mask) is causal


def test_a_cast_to_the_type_of_another_tensor_is_local_and_stored() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from subquad.runtime.graph_file import read_graph, write_graph

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=64, num_key_value_heads=2, sliding_window=6, pad_token_id=0, **sizes)
    ).eval()
    ids = torch.randint(2, 64, (2, 9))
    want = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 9:]
    fast = subquad.rewrite(model, passes=["fuse"])
    got = torch.tensor(list(decoder(fast).generate(ids, max_new_tokens=12))).T
    assert torch.equal(got, want)
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(torch.ops.aten.type_as.default, (x, y)))
    assert str(read_graph(write_graph(graph))) == str(graph)

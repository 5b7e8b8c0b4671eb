"""Provenance: what lies behind q, k and v is found in every dialect, and q, k and v computed from it are the graph's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from provenance_models import SMALL, ComplexRotary, StackedRotary, Turned, huggingface, latent
from provenance_oracle import assert_recomputed, captured, found, values_of
from torch import nn

from subquad.ir.provenance import Origin, Provenance

GROUPED = SMALL | {"num_key_value_heads": 2}
OLD = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN = {key: value for key, value in SMALL.items() if not key.endswith("token_id")}

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: huggingface("Llama", **GROUPED), "0:8 half t 10000 - q_proj"),
    "qwen3": (lambda: huggingface("Qwen3", **GROUPED, head_dim=8), "0:8 half t 10000 rms8 q_proj"),
    "phi": (
        lambda: huggingface("Phi", **SMALL, partial_rotary_factor=0.5), "0:4 half t 10000 - q_proj; 4:8 - - - - q_proj",
    ),
    "gpt-neox": (
        lambda: huggingface("GPTNeoX", **SMALL, rotary_pct=0.5),
        "0:4 half t 10000 - query_key_value; 4:8 - - - - query_key_value",
    ),
    "gpt-j": (
        lambda: huggingface("GPTJ", **OLD, rotary_dim=4), "0:4 interleaved t 10000 - q_proj; 4:8 - - - - q_proj",
    ),
    "cohere": (lambda: huggingface("Cohere", **GROUPED, use_qk_norm=True), "0:8 interleaved t 500000 layer8 q_proj"),
    "olmo2": (lambda: huggingface("Olmo2", **GROUPED), "0:8 half t 10000 rms32 q_proj"),
    "gemma": (lambda: huggingface("Gemma", **GROUPED, head_dim=8), "0:8 half t 10000 - q_proj"),
    "deepseek": (latent, "0:6 - - - - q_b_proj; 6:14 deinterleaved t 10000 - q_b_proj"),
    "gpt2": (lambda: huggingface("GPT2", **OLD), "0:8 - - - - c_attn"),
    "bert": (lambda: huggingface("Bert", **PLAIN), "0:8 - - - - query"),
    "t5": (
        lambda: huggingface("T5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64), "0:8 - - - - q",
    ),
    "complex": (lambda: ComplexRotary().double().eval(), "0:8 interleaved t 10000 - wq"),
    "stacked": (lambda: StackedRotary().double().eval(), "0:8 interleaved t + 3 500 - qkv"),
}  # fmt: skip
QUICK = {
    "export": ("llama", "gpt-neox", "gpt-j", "cohere", "deepseek", "gpt2", "complex", "stacked"),
    "core": ("llama", "stacked"),
    "dynamo": ("deepseek", "complex"),
}
CASES = [
    pytest.param(name, dialect, marks=() if name in QUICK[dialect] else pytest.mark.slow)
    for dialect in ("export", "core", "dynamo")
    for name in MODELS
]


def inputs_of(name: str) -> Any:
    if name in ("complex", "stacked"):
        return (torch.randn(2, 7, 32, dtype=torch.float64),)
    ids = torch.randint(0, 64, (2, 7))
    rest = {} if name in ("t5", "bert") else {"use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}


def words(origin: Origin) -> str:
    """start:end style position base norm projection, part by part."""
    lines = []
    for part in origin.parts:
        rotary, norm, projection = part.rotary, part.norm, part.projection
        position = rotary.position if rotary else None
        base = None if position is None else position.base
        lines.append(
            f"{part.start}:{part.start + part.width} {rotary.style if rotary else '-'} "
            f"{position.expression if position else '-'} {base if base is None else round(base)} ".replace("None", "-")
            + f"{norm.name + str(norm.width) if norm else '-'} "
            + (projection.words().split(",")[0].split(".")[-1] if projection else f"({part.why})")
        )
    return "; ".join(lines)


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_operands_recomputed_from_their_provenance_are_the_graphs_own(name: str, dialect: str) -> None:
    build, expected = MODELS[name]
    kept = captured(build(), inputs_of(name), dialect)
    sites, provenances = found(kept)
    values = values_of(kept)
    for site, provenance in zip(sites, provenances, strict=True):
        assert words(provenance.q) == expected
        assert provenance.layer_input is not None, provenance.why
        for letter in "qkv":
            origin = getattr(provenance, letter)
            assert all(part.projection is not None and not part.why for part in origin.parts)
            assert_recomputed(values, getattr(site, letter), origin)
        assert provenance.v.rotary is None
        assert not provenance.json()["why"]


def test_keys_of_latent_attention_come_from_two_projections_of_one_input() -> None:
    _, (provenance,) = found(captured(latent(), inputs_of("deepseek"), "export"))
    names = [part.projection.words().split(",")[0].split(".")[-1] for part in provenance.k.parts if part.projection]
    assert names == ["kv_b_proj", "kv_a_proj_with_mqa"]
    assert provenance.k.projection is None
    assert provenance.k.rotary is not None


def one(model: nn.Module, inputs: Any) -> tuple[Any, Provenance, Any]:
    kept = captured(model.double().eval(), inputs, "export")
    (site,), (provenance,) = found(kept)
    return site, provenance, values_of(kept)


X = (torch.randn(2, 7, 16, dtype=torch.float64),)


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., :8], x[..., 8:]


def right(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    return x * cos + torch.cat([-high, low], -1) * sin


def unsigned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    return x * cos + torch.cat([high, low], -1) * sin


def crossed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    return x * cos + torch.cat([-high[..., [1, 0, 2, 3, 4, 5, 6, 7]], low], -1) * sin


def shifted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., 1:9], x[..., 9:], x[..., :1]], -1) * sin


def scaled(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    return x * cos + torch.cat([-high, low], -1) * (0.5 * sin)


def doubled(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    angles = torch.arange(x.shape[1]).double()[:, None] * 0.25 ** torch.arange(16).double()
    return x * cos + torch.cat([-high, low], -1) * angles.sin()


def dependent(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = halves(x)
    return x * (cos * x.mean()) + torch.cat([-high, low], -1) * sin


def test_a_rotation_by_halves_is_read() -> None:
    site, provenance, values = one(Turned(right), X)
    assert words(provenance.q) == "0:16 half t 256 - q"
    assert_recomputed(values, site.q, provenance.q)


@pytest.mark.parametrize("wrong", [unsigned, crossed, shifted, dependent], ids=lambda f: f.__name__)
def test_what_is_no_rotation_is_not_called_one_and_says_why(wrong: Any) -> None:
    _, provenance, _ = one(Turned(wrong), X)
    assert all(part.rotary is None for part in provenance.q.parts)
    assert all(part.why for part in provenance.q.parts)
    assert provenance.layer_input is None
    assert provenance.why


@pytest.mark.parametrize(("wrong", "why"), [(scaled, "scaled differently"), (doubled, "different angles")])
def test_tables_that_are_no_cosine_and_sine_of_one_angle_give_no_position(wrong: Any, why: str) -> None:
    site, provenance, values = one(Turned(wrong), X)
    rotary = provenance.q.rotary
    assert rotary is not None
    assert rotary.position is None
    assert why in rotary.why
    assert_recomputed(values, site.q, provenance.q)


def test_a_position_that_skips_padding_is_not_called_the_place_in_the_row() -> None:
    model = huggingface("Llama", **GROUPED)
    ids = torch.randint(0, 64, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)
            return self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits

    _, provenance, _ = one(Padded(), (ids, mask))
    rotary = provenance.q.rotary
    assert rotary is not None
    assert rotary.position is not None
    assert str(rotary.position.expression) != "t"
    assert rotary.position.base == 10000.0


def test_positions_that_the_caller_gives_are_read_from_the_input() -> None:
    ids = torch.randint(0, 64, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids % 5, "use_cache": False}
    _, provenance, _ = one(huggingface("Llama", **GROUPED), inputs)
    rotary = provenance.q.rotary
    assert rotary is not None
    assert rotary.position is not None
    assert str(rotary.position.expression) == "position_ids(b, t)"


def test_frequencies_that_are_no_powers_have_no_base_and_the_tables_their_length() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    site, provenance, values = one(huggingface("Llama", **GROUPED, rope_parameters=yarn), inputs_of("llama"))
    rotary = provenance.q.rotary
    assert rotary is not None
    assert rotary.position is not None
    assert rotary.position.base is None
    assert rotary.scale == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    assert_recomputed(values, site.q, provenance.q)


def test_adapters_beside_the_weights_are_part_of_the_projection() -> None:
    peft = pytest.importorskip("peft")
    base = huggingface("Llama", **GROUPED)
    settings = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(settings, base).eval().double()
    kept = captured(model, inputs_of("llama"), "export")
    (site,), (provenance,) = found(kept)
    assert [len(getattr(provenance, x).projection.adapters) for x in "qkv"] == [1, 0, 1]
    assert provenance.q.projection is not None
    assert provenance.q.projection.adapters[0].scale == 4.0
    for letter in "qkv":
        assert_recomputed(values_of(kept), getattr(site, letter), getattr(provenance, letter))


class Crossed(nn.Module):
    """Queries of one tensor, keys and values of another, keys normalised after a rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.RMSNorm(16)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(memory.shape[1]).double()[:, None] * 0.5 ** torch.arange(8).double()
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q, k, v = self.q(x), self.norm(right(self.k(memory), cos, sin)), self.v(memory)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


def test_cross_attention_has_no_shared_input_and_a_norm_may_follow_the_rotation() -> None:
    site, provenance, values = one(Crossed(), (X[0], torch.randn(2, 5, 16, dtype=torch.float64)))
    assert provenance.layer_input is None
    assert "different tensors" in provenance.why
    assert provenance.k.norm is not None
    assert provenance.k.norm.after_rotary
    assert provenance.k.rotary is not None
    assert_recomputed(values, site.k, provenance.k)


def test_the_packed_projection_of_torchs_own_module_is_read() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    site, provenance, values = one(Packed(), X)
    assert provenance.q.projection is not None
    assert provenance.q.projection.fused
    for letter in "qkv":
        assert_recomputed(values, getattr(site, letter), getattr(provenance, letter))


def test_operands_that_are_inputs_have_no_projection() -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ q.transpose(-1, -2), -1) @ q

    _, provenance, _ = one(Bare(), X)
    assert provenance.q.projection is None
    assert "no projection" in provenance.q.parts[0].why

"""Drafts verified by the decoder: any tree equals running each of its paths alone, and what is committed equals a fresh run."""

from collections.abc import Sequence

import pytest
import torch
from spelled_models import HandWrittenDecoder, tiny_llama
from torch import Tensor, nn

import subquad
from subquad.incremental import Decoder, decoder
from subquad.ir.errors import GenerationError

LOLCATS = "linearize:lolcats(window=4, sinks=2)"
EXACT = 1e-10


def sliding() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, max_position_embeddings=128,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def prepared(kind: str, passes: str = "fuse") -> Decoder:
    torch.manual_seed(0)
    build = {"llama": lambda: tiny_llama(3), "own": lambda: HandWrittenDecoder().eval(), "sliding": sliding}[kind]
    inputs = (torch.zeros(2, 5, dtype=torch.int64),) if kind == "own" else None
    return decoder(subquad.rewrite(build().double(), passes=passes, example_inputs=inputs, verify=False))


def alone(made: Decoder, tokens: Sequence[int], padding: int) -> Tensor:
    """Logits [T, V] of one row by itself, its first `padding` tokens padding."""
    ids = torch.tensor([list(tokens)])
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return made.prefill(ids, mask if padding else None, last_only=False)[0][0]


def random_parents(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(-1, max(i, 1), (rows,), generator=generator).clamp_max(i - 1) for i in range(width)]
    return torch.stack(draws, 1)


def path_to(parents: Tensor, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = int(parents[node])
    return path


def check_tree(made: Decoder, rows: list[list[int]], paddings: list[int], state, seed: int, width: int = 6) -> None:
    """Verify random trees behind rows of different length; commit a random path of each."""
    parents = random_parents(len(rows), width, seed)
    ids = torch.randint(3, 50, (len(rows), width), generator=torch.Generator().manual_seed(seed))
    logits, stream = made.verify(ids, state, parents)
    assert logits.shape[:2] == stream.shape[:2] == ids.shape
    paths = []
    for row, tokens in enumerate(rows):
        for node in range(width):
            path = path_to(parents[row], node)
            want = alone(made, [*tokens, *ids[row, path].tolist()], paddings[row])[-1]
            assert (logits[row, node] - want).abs().max() < EXACT, (row, node)
        kept = path_to(parents[row], (seed * 7 + row * 5) % width) if (seed + row) % 4 else []
        tokens += ids[row, kept].tolist()
        paths.append(kept)
    made.commit(state, paths)
    assert state.lengths == [len(tokens) for tokens in rows]


@pytest.mark.parametrize("kind", ["llama", "own", "sliding"])
def test_every_node_of_a_tree_equals_its_path_alone_and_commits_compose(kind: str) -> None:
    made = prepared(kind)
    assert made.trees
    prompt = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    paddings = [0, 0, 0] if kind == "own" else [3, 0, 1]
    mask = torch.ones_like(prompt)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    _, state = made.prefill(prompt, None if kind == "own" else mask)
    rows = prompt.tolist()
    for seed in range(5):
        check_tree(made, rows, paddings, state, seed)
    assert len({len(row) for row in rows}) > 1
    more = torch.randint(3, 50, (3, 4), generator=torch.Generator().manual_seed(2))
    got = made.step(more, state)
    for row, tokens in enumerate(rows):
        tokens += more[row].tolist()
        assert (got[row] - alone(made, tokens, paddings[row])[-4:]).abs().max() < EXACT
    made.rollback(state, [2, 0, 5])
    rows = [tokens[: len(tokens) - n] for tokens, n in zip(rows, (2, 0, 5), strict=True)]
    check_tree(made, rows, paddings, state, 11)
    chosen = made.select(state, [2, 0, 2])
    check_tree(made, [list(rows[n]) for n in (2, 0, 2)], [paddings[n] for n in (2, 0, 2)], chosen, 12)
    check_tree(made, rows, paddings, state, 13)


def test_one_row_and_a_state_without_any_token() -> None:
    made = prepared("llama")
    state = made.engine.start(1, 16)
    rows: list[list[int]] = [[]]
    for seed in (1, 2, 3):
        check_tree(made, rows, [0], state, seed, width=5)


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_recurrent_states_follow_what_each_row_accepts(kind: str) -> None:
    made = prepared(kind, LOLCATS)
    assert not made.trees
    prompt = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(1))
    rows = prompt.tolist()
    _, state = made.prefill(prompt)
    for seed, accepted in enumerate(([3, 1, 0], [0, 0, 0], [4, 4, 4], [1, 4, 2], [2, 0, 4])):
        ids = torch.randint(3, 50, (3, 4), generator=torch.Generator().manual_seed(seed))
        logits, _ = made.verify(ids, state)
        for row, tokens in enumerate(rows):
            want = alone(made, [*tokens, *ids[row].tolist()], 0)[-4:]
            assert (logits[row] - want).abs().max() < EXACT, (seed, row)
            tokens += ids[row, : accepted[row]].tolist()
        made.commit(state, [range(n) for n in accepted])
    made.rollback(state, [1, 9, 0])
    rows = [tokens[: len(tokens) - n] for tokens, n in zip(rows, (1, 9, 0), strict=True)]
    ids = torch.randint(3, 50, (3, 2), generator=torch.Generator().manual_seed(9))
    got = made.step(ids, state)
    for row, tokens in enumerate(rows):
        assert (got[row] - alone(made, [*tokens, *ids[row].tolist()], 0)[-2:]).abs().max() < EXACT


def test_skipped_blocks_leave_the_stream_and_rejected_drafts_leave_the_state() -> None:
    made = prepared("llama")
    ids = torch.randint(3, 50, (1, 9))
    _, state = made.prefill(ids)
    draft = torch.randint(3, 50, (1, 3))
    whole, _ = made.verify(draft, state)
    assert made.blocks == 3
    some, _ = made.verify(draft, state, skip={1})
    assert (some - whole).abs().max() > 1e-3
    again, _ = made.verify(draft, state)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    got = made.step(draft, state)
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    made = prepared("llama")
    _, state = made.prefill(torch.randint(3, 50, (2, 5)))
    with pytest.raises(GenerationError, match="nothing is pending"):
        made.commit(state, [[], []])
    made.verify(torch.randint(3, 50, (2, 3)), state, torch.tensor([-1, 0, 0]))
    with pytest.raises(GenerationError, match="no path"):
        made.commit(state, [[0, 1, 2], [0]])
    with pytest.raises(GenerationError, match="1 paths were given for 2 rows"):
        made.commit(state, [[0]])
    made.commit(state, [[0, 2], []])
    assert state.lengths == [7, 5]
    with pytest.raises(GenerationError, match="rollback of 6"):
        made.rollback(state, [0, 6])
    chains = prepared("llama", LOLCATS)
    _, state = chains.prefill(torch.randint(3, 50, (1, 5)))
    with pytest.raises(GenerationError, match="only chains"):
        chains.verify(torch.randint(3, 50, (1, 3)), state, torch.tensor([-1, 0, 0]))

"""The prefix cache: tokens as without it, bounded memory, whole nodes, and nothing known of other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import sharp_llama, tiny_llama
from test_decoder_verify import LOLCATS
from test_shared_decoding import EXACT, SYSTEM, alone, made, padded

import subquad
from subquad.ir.errors import GenerationError
from subquad.prefix_cache import PrefixCache
from subquad.runtime.radix_tree import KnownPrefix, RadixTree


@pytest.fixture(scope="module")
def fast() -> Any:
    return subquad.rewrite(sharp_llama(2), passes=["fuse", "speculate"], verify=False)


def answer(fast: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    out: torch.Tensor = fast.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=12), st.integers(1, 12))
def test_the_tree_holds_what_it_says_within_its_bound(rows: list[list[int]], room: int) -> None:
    tree = RadixTree(4 * room + 3, 4)
    for row in rows:
        tokens = torch.tensor(row, dtype=torch.int64)

        def take(start: int, stop: int, tokens: torch.Tensor = tokens) -> tuple[torch.Tensor, ...]:
            # a key that names its whole prefix, so that a wrong place shows
            marks = [float(hash(tuple(tokens[: n + 1].tolist())) % 10007) for n in range(start, stop)]
            return (torch.tensor(marks)[:, None, None],)

        tree.insert(tokens, take)
        assert tree.bytes <= tree.limit
        assert tree.tokens == sum(len(node.tokens) for node in tree._nodes())
        for other in rows:
            asked = torch.tensor(other, dtype=torch.int64)
            found = KnownPrefix(tuple((node.keys, count) for node, count in tree.match(asked)))
            if found.count:
                want = take(0, found.count, asked)[0]
                assert torch.equal(found.read(0, found.count)[0], want)
                assert torch.equal(found.read(found.count // 2, found.count)[0], want[found.count // 2 :])
    if rows and len(rows[-1]) <= room:
        assert sum(count for _, count in tree.match(torch.tensor(rows[-1], dtype=torch.int64))) == len(rows[-1])


@pytest.mark.parametrize("kind", ["llama", "own", "sliding"])
def test_logits_from_the_cache_are_those_of_rows_alone(kind: str) -> None:
    one = made(kind)
    batches = [
        [[5, 6, 7, 8, 9, 4]], [[5, 6, 7, 8, 9, 4]], [[5, 6, 7, 3], [9, 9], [5, 6, 7, 8, 9, 4, 4]], [[9, 9, 9], [5, 6]]
    ]  # fmt: skip
    from subquad.runtime.tree_stepper import TreeStepper

    with PrefixCache(one, max_bytes=10**7) as cache:
        for rows in batches:
            taken = TreeStepper(one.engine, 20, cache=one.prefixes)
            got = taken.prefill(*padded(rows))
            for n, row in enumerate(rows):
                assert (got[n] - alone(one, row)[-1]).abs().max() < EXACT
        assert cache.hit_tokens == 0 + 5 + (3 + 0 + 6) + (2 + 1)
        assert cache.tokens == 6 + 1 + 2 + 1 + 1
    assert one.prefixes is None


def test_generate_takes_prompts_and_answers_from_the_cache(fast: Any) -> None:
    ids, mask = padded([[*SYSTEM, 7], [*SYSTEM, 8, 9, 9], [3, 4, 5]])
    want = answer(fast, ids, mask)
    with subquad.PrefixCache(fast, max_bytes=1 << 24) as cache:
        for _ in range(2):
            assert torch.equal(answer(fast, ids, mask), want)
        assert fast.generate.sharing.cached > 0
        assert fast.generate.sharing.computed == 3  # the last token of every row
        turn = torch.cat([want[1:2], torch.tensor([[11, 12]])], 1)  # the second turn of a conversation
        turn = turn[:, mask[1].tolist().index(1) :]
        hits = cache.hit_tokens
        second = answer(fast, turn)
        assert cache.hit_tokens - hits >= turn.shape[1] - 3
        cache.clear()
        assert (cache.tokens, cache.bytes) == (0, 0)
        assert torch.equal(answer(fast, turn), second)
    assert torch.equal(answer(fast, turn), second)


def test_a_small_bound_holds_and_other_weights_are_not_mixed_up(fast: Any) -> None:
    layout = subquad.text_generation.decoder_of(fast).programs.layout
    bound = 256 * layout.token_bytes
    with pytest.raises(GenerationError, match="at least"):
        PrefixCache(fast, max_bytes=bound - 1)
    prompts = [torch.randint(3, 60, (1, 90), generator=torch.Generator().manual_seed(n)) for n in range(5)]
    wants = [answer(fast, ids) for ids in prompts]
    with PrefixCache(fast, max_bytes=bound) as cache:
        with pytest.raises(GenerationError, match="already"):
            PrefixCache(fast, max_bytes=bound)
        for ids, want in zip(prompts * 2, wants * 2, strict=True):
            assert torch.equal(answer(fast, ids), want)
            assert 0 < cache.bytes <= bound
        before = cache.hit_tokens
        assert torch.equal(answer(fast, prompts[-1]), wants[-1])
        assert cache.hit_tokens - before == 89
        with torch.no_grad():
            fast.model.layers[0].mlp.up_proj.weight.mul_(-3)
        try:
            before = cache.hit_tokens
            changed = answer(fast, prompts[-1])
            assert cache.hit_tokens == before
        finally:
            cache.close()
            with torch.no_grad():
                plain = answer(fast, prompts[-1])
                fast.model.layers[0].mlp.up_proj.weight.div_(-3)
        assert torch.equal(changed, plain)


def test_an_interrupted_call_leaves_whole_nodes(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([SYSTEM])
    want = answer(fast, ids)
    with PrefixCache(fast, max_bytes=1 << 24) as cache:
        from subquad.runtime import tree_stepper

        copy, calls = tree_stepper.columns_of, []

        def torn(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return copy(*arguments)

        monkeypatch.setattr(tree_stepper, "columns_of", torn)
        with pytest.raises(KeyboardInterrupt):
            answer(fast, ids)
        assert cache.tokens == 0
        assert list(cache._tree._nodes()) == []
        assert torch.equal(answer(fast, ids), want)
        assert cache.tokens >= len(SYSTEM)
        assert torch.equal(answer(fast, ids), want)


def test_recurrent_states_are_refused() -> None:
    model = subquad.rewrite(tiny_llama(1), passes=LOLCATS, verify=False)
    with pytest.raises(GenerationError, match="cannot cut"):
        PrefixCache(model)

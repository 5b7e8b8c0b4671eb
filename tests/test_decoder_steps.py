"""Prefill, steps and rollback of the derived decoder against the model's full forward and Hugging Face's own generate."""

import threading

import pytest
import torch
from spelled_models import HandWrittenDecoder, tiny_llama
from torch import nn

import subquad
from subquad.incremental import Decoder, decoder
from subquad.ir.errors import GenerationError

LOLCATS = "linearize:lolcats(window=4, sinks=2)"


def prepared(kind: str, dtype: torch.dtype, passes: str) -> tuple[nn.Module, Decoder]:
    torch.manual_seed(0)
    model = (tiny_llama(3) if kind == "llama" else HandWrittenDecoder().eval()).to(dtype)
    inputs = None if kind == "llama" else (torch.zeros(2, 5, dtype=torch.int64),)
    fast = subquad.rewrite(model, passes=passes, example_inputs=inputs, verify=False)
    return fast, decoder(fast)


def forward(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    graph = model.__dict__["_subquad"].applied
    with torch.no_grad():
        return graph.graph(*([ids] if len(graph.inputs) == 1 else [ids, mask]))[0]


@pytest.mark.parametrize("passes", ["fuse", LOLCATS])
@pytest.mark.parametrize("kind", ["llama", "own"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_prefill_and_steps_equal_the_full_forward(kind: str, passes: str, dtype: torch.dtype, error: float) -> None:
    model, made = prepared(kind, dtype, passes)
    ids = torch.randint(0, 50, (2, 24))
    mask = torch.ones_like(ids)
    if kind == "llama":
        mask[0, :3] = 0
    want = forward(model, ids, mask)
    logits, state = made.prefill(ids[:, :7], mask[:, :7], last_only=False)
    parts = [logits]
    for start, stop in ((7, 8), (8, 11), (11, 12), (12, 24)):
        parts.append(made.step(ids[:, start:stop], state))
    seen = mask.bool()
    assert (torch.cat(parts, 1) - want)[seen].abs().max() < error
    made.rollback(state, 9)
    assert state.length == 15
    again = made.step(ids[:, 15:], state)
    assert (again - want[:, 15:]).abs().max() < error
    made.rollback(state, 24)
    assert (
        made.step(ids[1:, :4].expand(2, -1), state) - forward(model, ids[1:, :4].expand(2, -1), torch.ones(2, 4).long())
    ).abs().max() < error


def test_the_last_token_only_gives_the_last_row() -> None:
    _, made = prepared("llama", torch.float32, "fuse")
    ids = torch.randint(0, 50, (1, 9))
    every, _ = made.prefill(ids, last_only=False)
    last, state = made.prefill(ids)
    assert every.shape == (1, 9, 64)
    torch.testing.assert_close(last, every[:, -1:], rtol=0, atol=1e-6)
    assert made.step(ids[:, :3], state, last_only=True).shape == (1, 1, 64)


@pytest.mark.parametrize("passes", ["fuse", LOLCATS])
def test_buffers_grow_and_recurrent_states_do_not(passes: str) -> None:
    model, made = prepared("llama", torch.float32, passes)
    ids = torch.randint(0, 50, (1, 300))
    want = forward(model, ids, torch.ones_like(ids))
    _, state = made.prefill(ids[:, :250])
    before = state.bytes()
    got = made.step(ids[:, 250:], state)
    assert state.capacity >= 300
    assert (got - want[:, 250:]).abs().max() < 1e-4
    assert (state.bytes() > before) == (passes == "fuse")


def test_greedy_tokens_are_those_of_generate_for_a_left_padded_batch() -> None:
    model = tiny_llama(3)
    ids = torch.randint(3, 50, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :1] = 0, 0
    want = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    made = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    got = torch.tensor(list(made.generate(ids, mask, max_new_tokens=20))).T
    assert torch.equal(got, want[:, 8:])


def test_a_row_stops_at_its_end_token_and_the_loop_when_all_have() -> None:
    _, made = prepared("llama", torch.float32, "fuse")
    ids = torch.randint(3, 50, (2, 6))
    free = list(made.generate(ids, max_new_tokens=12))
    first = [row[0] for row in free]
    end = first[4]
    stop = first.index(end)
    got = list(made.generate(ids, max_new_tokens=12, eos_token_ids=[end]))
    assert [row[0] for row in got][: stop + 1] == first[: stop + 1]
    assert all(row[0] is None for row in got[stop + 1 :])
    assert len(list(made.generate(ids[:1], max_new_tokens=12, eos_token_ids=[end]))) == stop + 1


def test_sampling_follows_seed_temperature_and_cuts() -> None:
    _, made = prepared("llama", torch.float32, "fuse")
    ids = torch.randint(3, 50, (1, 6))
    knobs = {"max_new_tokens": 16, "temperature": 1.5}
    runs = [list(made.generate(ids, seed=seed, **knobs)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    greedy = list(made.generate(ids, max_new_tokens=16))
    assert list(made.generate(ids, seed=3, top_k=1, **knobs)) == greedy
    assert list(made.generate(ids, seed=3, top_p=1e-6, **knobs)) == greedy


def test_two_threads_may_generate_at_once() -> None:
    _, made = prepared("llama", torch.float32, "fuse")
    prompts = [torch.randint(3, 50, (1, n)) for n in (4, 9, 6)]
    want = [list(made.generate(p, max_new_tokens=15)) for p in prompts]
    got: dict[int, list[list[int | None]]] = {}
    threads = [
        threading.Thread(target=lambda n=n: got.__setitem__(n, list(made.generate(prompts[n], max_new_tokens=15))))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(3)] == want


def test_weights_are_packed_without_a_second_copy() -> None:
    model, made = prepared("llama", torch.float32, "fuse")
    attention = model.model.layers[0].self_attn
    q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    assert k.data_ptr() == q.data_ptr() + q.numel() * 4
    assert v.data_ptr() == k.data_ptr() + k.numel() * 4
    joint = [t for name, t in made.weights.items() if name.startswith("packed_") and t.data_ptr() == q.data_ptr()]
    assert joint[0].shape == (48 + 16 + 16, 48)
    with torch.no_grad():
        q.mul_(2)
    torch.testing.assert_close(joint[0][:48], q.detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.prefill(torch.zeros(1, 65, dtype=torch.int64)), "position table has 64 rows"),
        (
            lambda d: d.prefill(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 1], [1, 1, 1]])),
            "takes no attention mask",
        ),
        (lambda d: d.rollback(d.prefill(torch.zeros(1, 3, dtype=torch.int64))[1], 4), "rollback of 4 tokens"),
        (
            lambda d: d.step(torch.zeros(2, 1, dtype=torch.int64), d.prefill(torch.zeros(1, 3, dtype=torch.int64))[1]),
            "does not fit",
        ),
        (lambda d: list(d.generate(torch.zeros(1, 3))), "give token ids"),
        (lambda d: list(d.generate(torch.zeros(1, 3, dtype=torch.int64), top_p=0)), "top_p in"),
    ],
)
def test_what_cannot_be_served_is_said(call, words: str) -> None:
    _, made = prepared("own", torch.float32, "fuse")
    with pytest.raises(GenerationError, match=words):
        call(made)


def test_a_module_that_was_not_rewritten_is_sent_back() -> None:
    with pytest.raises(GenerationError, match="was not rewritten"):
        decoder(tiny_llama(1))

"""`generate` of a rewritten Hugging Face model: the tensor of the original under its own arguments, faster by drafts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from spelled_models import tiny_llama

import subquad
from subquad.application import original_forward
from subquad.ir.errors import GenerationError, PassError

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 9, 5, 9, 5, 9, 7]])
FOUR = torch.tensor([[0, 0, 0, 5, 9, 5, 9], [3, 4, 3, 4, 3, 4, 3], [0, 8, 8, 8, 8, 8, 8], [11, 12, 13, 11, 12, 13, 11]])


@pytest.fixture(scope="module")
def fast() -> Any:
    torch.manual_seed(0)
    model = tiny_llama(2)
    with torch.no_grad():  # sharper logits, so that texts repeat themselves and drafts are accepted
        model.lm_head.weight.mul_(20)
    return subquad.rewrite(model, passes=["fuse", "speculate"], verify=False)


def both(fast: Any, ids: torch.Tensor, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What the original's generate gives, and ours, each from the same seed."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", (ids != 0).long())
    torch.manual_seed(seed)
    with original_forward(fast):
        assert "generate" not in fast.__dict__
        want = fast.generate(ids, **options)
    torch.manual_seed(seed)
    got = fast.generate(ids, **options)
    return want, got


def end_of(fast: Any, ids: torch.Tensor, place: int) -> int:
    with original_forward(fast):
        out = fast.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=24, do_sample=False, pad_token_id=0)
    return int(out[0, ids.shape[1] + place])


@pytest.mark.parametrize("method", ["auto", "suffix", "ngram", "recycling", "trigram", "layer_skip", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2, "min_new_tokens": 9}, {"bad_words_ids": [[9]]},
     {"max_new_tokens": 1}, {"max_length": 12}, {"eos": 5}],
    ids=str,
)  # fmt: skip
def test_tensors_are_those_of_the_original(fast: Any, method: str, options: dict[str, Any]) -> None:
    for ids in (IDS, FOUR):
        asked = dict(options)
        if "eos" in asked:
            asked["eos_token_id"] = [end_of(fast, ids, asked.pop("eos")), 63]
        want, got = both(fast, ids, **asked)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        mine = fast.generate(ids, attention_mask=(ids != 0).long(), do_sample=False, pad_token_id=0, method=method,
                             **{"max_new_tokens": 24, **asked})  # fmt: skip
        torch.testing.assert_close(mine, want, rtol=0, atol=0)
        assert fast.generate.why_not is None


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.7, "repetition_penalty": 1.2}, {"min_p": 0.1, "temperature": 1.5}], ids=str
)  # fmt: skip
def test_sampling_follows_hugging_face_seed_for_seed(fast: Any, options: dict[str, Any]) -> None:
    """One multinomial per emitted token, in order: the random stream is the original's."""
    for seed in range(6):
        want, got = both(fast, IDS, seed, do_sample=True, max_new_tokens=40, **options)
        assert fast.generate.why_not is None
        assert torch.equal(got, want)


def test_drafts_are_accepted(fast: Any) -> None:
    decoder = fast.__dict__["_subquad_decoder"][1] if "_subquad_decoder" in fast.__dict__ else None
    fast.generate(IDS, max_new_tokens=40, do_sample=False)
    decoder = fast.__dict__["_subquad_decoder"][1]
    from subquad.ir.decoding import Choice
    from subquad.runtime.chance import TorchChance
    from subquad.runtime.pacing import FixedPacing
    from subquad.runtime.speculation import Ending

    passes = list(
        decoder.decode(IDS, choice=Choice((), True, TorchChance()), ending=Ending(50), pacing=FixedPacing(7),
                       drafter=decoder.drafter(fast.generate.rewrite))
    )  # fmt: skip
    assert sum(len(one.emitted[0]) for one in passes) == 50
    assert len(passes) < 35


def test_custom_criteria_stop_at_the_very_token(fast: Any) -> None:
    """Hugging Face's own assisted decoding jumps over them: it tests whole blocks."""
    token = end_of(fast, IDS, 6)

    class Last(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids[:, -1] == token

    want, got = both(fast, IDS, stopping_criteria=transformers.StoppingCriteriaList([Last()]))
    assert torch.equal(got, want)
    assert fast.generate.why_not is None
    _, left = both(fast, FOUR, stopping_criteria=transformers.StoppingCriteriaList([Last()]))
    assert "Last may look at several rows" in fast.generate.why_not


def test_streamers_get_every_token_in_order(fast: Any) -> None:
    class Heard(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    for ids in (IDS, FOUR):
        heard = [Heard(), Heard()]
        with original_forward(fast):
            options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
            fast.generate(ids, streamer=heard[0], **options)
        fast.generate(ids, streamer=heard[1], **options)
        assert heard[0].parts == heard[1].parts
        assert heard[1].ended == 1


def test_scores_and_logits_are_those_of_the_accepted_path(fast: Any) -> None:
    want, got = both(
        fast, IDS, return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.2
    )
    assert fast.generate.why_not is None
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert len(ours) == len(theirs) == 24
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_not_one_token_after_another_is_left_to_the_original(fast: Any) -> None:
    for options, words in (
        ({"num_beams": 2}, "num_beams"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "attentions"),
    ):
        want, got = both(fast, IDS, **options)
        assert words in fast.generate.why_not
        assert torch.equal(*(out if torch.is_tensor(out) else out.sequences for out in (want, got)))
    cache = transformers.DynamicCache()
    fast.generate(IDS, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert "past_key_values" in fast.generate.why_not
    assert cache.get_seq_length() == IDS.shape[1] + 2


def test_a_stateful_processor_is_left_to_the_original(fast: Any) -> None:
    class Counting(transformers.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return scores + self.calls * torch.arange(scores.shape[-1])

    def out(original: bool) -> torch.Tensor:
        processors = transformers.LogitsProcessorList([Counting()])
        if original:
            with original_forward(fast):
                return fast.generate(IDS, logits_processor=processors, max_new_tokens=8, do_sample=False)
        return fast.generate(IDS, logits_processor=processors, max_new_tokens=8, do_sample=False)

    want = out(True)
    assert torch.equal(out(False), want)
    assert "Counting gives other scores" in fast.generate.why_not


@pytest.mark.parametrize(
    "words",
    [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3},
     {"method": "suffix", "num_speculative_tokens": 2},
     {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}}],
    ids=str,
)  # fmt: skip
def test_words_of_hugging_face_and_vllm_are_taken(fast: Any, words: dict[str, Any]) -> None:
    with original_forward(fast):
        want = fast.generate(IDS, max_new_tokens=16, do_sample=False)
    assert torch.equal(fast.generate(IDS, max_new_tokens=16, do_sample=False, **words), want)
    assert fast.generate.why_not is None


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"method": "eagle"}, PassError, "the method 'eagle' is unknown"),
        ({"num_speculative_tokens": 0}, PassError, "must be at least 1"),
        ({"speculative_config": {"draft": 3}}, GenerationError, "knows no 'draft'"),
        ({"speculative_config": "ngram"}, GenerationError, "give a dict"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ],
)
def test_bad_words_are_one_sentence(fast: Any, words: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        fast.generate(IDS, **{"max_new_tokens": 4, **words})


def test_copies_and_restored_models_have_a_generate_of_their_own() -> None:
    model = tiny_llama(1)
    want = model.generate(IDS, max_new_tokens=6, do_sample=False)
    fast = subquad.rewrite(model, passes="speculate", verify=False)
    assert [entry["path"] for entry in fast.report.applied] == ["model.layers.0.self_attn", "generate"]
    assert fast.report.plan.steps[-1].rewrite == "speculate"
    twin = copy.deepcopy(fast)
    assert twin.generate.model is twin
    assert torch.equal(twin.generate(IDS, max_new_tokens=6, do_sample=False), want)
    again = subquad.rewrite(tiny_llama(1), plan=fast.report.plan, verify=False)
    assert "generate" in again.__dict__
    subquad.restore(fast)
    assert "generate" not in fast.__dict__
    assert torch.equal(fast.generate(IDS, max_new_tokens=6, do_sample=False), want)


def test_a_model_without_a_loop_refuses_the_pass() -> None:
    from spelled_models import HandWrittenDecoder

    fast = subquad.rewrite(HandWrittenDecoder().eval(), passes=["fuse", "speculate"], verify=False,
                           example_inputs=(torch.zeros(2, 5, dtype=torch.int64),))  # fmt: skip
    assert [(r.path, r.what) for r in fast.report.refused] == [("generate", "speculate")]


@pytest.mark.parametrize("same", [True, False], ids=["the same model", "a smaller one"])
def test_an_assistant_model_drafts(fast: Any, same: bool) -> None:
    torch.manual_seed(1)
    assistant = tiny_llama(2 if same else 1)
    if same:
        assistant.load_state_dict(fast.state_dict())
    for options in ({}, {"repetition_penalty": 1.3}, {"max_new_tokens": 1}):
        want, got = both(fast, IDS, **options)
        mine = fast.generate(IDS, do_sample=False, assistant_model=assistant, **{"max_new_tokens": 24, **options})
        assert torch.equal(mine, want)
        assert fast.generate.why_not is None
    batch, _ = both(fast, FOUR)
    got = fast.generate(
        FOUR,
        attention_mask=(FOUR != 0).long(),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        assistant_model=assistant,
    )
    assert torch.equal(got, batch)


def numbers(turned: bool) -> Any:
    """A tokenizer of the words n0 … n63, by their numbers or by the numbers turned round."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"n{n}": 63 - n if turned else n for n in range(64)}, unk_token="n0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="n0")


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_an_assistant_with_another_tokenizer_drafts(fast: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    assistant = tiny_llama(1)
    words = {"tokenizer": numbers(False), "assistant_tokenizer": numbers(True)}
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    with original_forward(fast):
        want = fast.generate(IDS, **options)
    torch.manual_seed(0)
    assert torch.equal(fast.generate(IDS, assistant_model=assistant, **words, **options), want)
    assert fast.generate.why_not is None
    with pytest.raises(GenerationError, match="needs the model's own tokenizer"):
        fast.generate(IDS, assistant_model=assistant, assistant_tokenizer=numbers(True), max_new_tokens=2)


def test_an_assistant_with_another_vocabulary_is_one_sentence(fast: Any) -> None:
    assistant = tiny_llama(1)
    assistant.resize_token_embeddings(72)
    with pytest.raises(GenerationError, match="the assistant model has 72 tokens and the model 64"):
        fast.generate(IDS, max_new_tokens=4, assistant_model=assistant)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["adapter", "replaced", "moved", "hook", "training"])
def test_a_model_that_was_changed_decodes_itself(change: str, when: str) -> None:
    """The decoder was derived from a graph: what is done to the model later must not be ignored silently."""
    model = tiny_llama(1)
    fast = subquad.rewrite(model, passes=["fuse", "speculate"], verify=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    if when == "after":
        fast.generate(IDS, **options)
        assert fast.generate.why_not is None
    owner = fast.model.layers[0].mlp
    if change == "adapter":
        owner.up_proj = torch.nn.Sequential(owner.up_proj, torch.nn.Tanh())
    elif change == "replaced":
        owner.up_proj.weight = torch.nn.Parameter(-owner.up_proj.weight.detach())
    elif change == "moved":
        owner.up_proj.weight.data = -owner.up_proj.weight.data
    elif change == "hook":
        owner.register_forward_hook(lambda module, inputs, output: -output)
    else:
        fast.train()
    want = type(fast).generate(fast, IDS, **options)
    assert torch.equal(fast.generate(IDS, **options), want)
    assert (fast.generate.why_not is None) == (change == "moved" and when == "before")

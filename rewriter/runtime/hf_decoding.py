"""One call of Hugging Face's `generate` decoded by a decoder: its processors, criteria, streamer and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from subquad.ir.decoding import Choice, Drafter
from subquad.runtime.chance import TorchChance
from subquad.runtime.generation import in_step
from subquad.runtime.speculation import Ending, Pass

BY_ROW = (
    MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""Processors known to be functions of a row's prefix and scores alone."""
ANSWERED = {"attention_mask", "position_ids", "use_cache", "past_key_values", "logits_to_keep", "cache_position"}
"""Model arguments that `generate` prepares itself and a decoder needs no more."""


class HuggingFaceCall:
    """The decoding method of one call of `generate`, with what `generate` prepared.

    `why_not` says why the model's own decoding method ran instead, None when it did not.
    """

    def __init__(
        self, decode: Callable[..., Iterator[Pass]], device: torch.device, drafter: Drafter | None, streamer: Any
    ) -> None:
        """decode: as Decoder.decode.  device: of the decoder."""
        self.decode, self.device, self.drafter, self.streamer = decode, device, drafter, streamer
        self.why_not: str | None = None

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Token ids int64 [B, T + new], padded behind each row's end, or Hugging Face's output object."""
        self.why_not = self._refused(
            model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        if self.why_not is not None:
            method = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode(None)])
            return method(
                model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, streamer=self.streamer, **model_kwargs,
            )  # fmt: skip
        batch, length = input_ids.shape
        kept = bool(generation_config.return_dict_in_generate)
        scores: list[Tensor] | None = [] if kept and generation_config.output_scores else None
        logits: list[Tensor] | None = [] if kept and generation_config.output_logits else None
        others = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        ends = {int(i) for c in stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten()}

        def stop(row: int, prefix: Tensor, now: Tensor) -> bool:
            seen = None if scores is None else (*scores, now)
            return any([bool(torch.as_tensor(criterion(prefix, seen)).all()) for criterion in others])  # noqa: C419

        by_row = tuple(tuple(_of_row(p, row) for p in logits_processor) for row in range(batch)) if batch > 1 else ()
        choice = Choice(tuple(logits_processor), not generation_config.do_sample, TorchChance(), by_row)
        ending = Ending(generation_config.max_length - length, frozenset(ends), (stop,) if others else ())
        mask = model_kwargs.get("attention_mask")
        pad = generation_config._pad_token_tensor
        filler = 0 if pad is None else int(pad)

        def watched() -> Iterator[Pass]:
            for one in self.decode(input_ids, mask, choice=choice, ending=ending, drafter=self.drafter):
                if kept:
                    for emission in one.emitted[0]:
                        if scores is not None:
                            scores.append(emission.scores.clone())
                        if logits is not None:
                            logits.append(emission.logits.float()[None].clone())
                yield one

        columns = []
        for tokens in in_step(watched(), batch):
            columns.append([filler if token is None else token for token in tokens])
            if self.streamer is not None:
                self.streamer.put(torch.tensor(columns[-1]))
        if self.streamer is not None:
            self.streamer.end()
        new = torch.tensor(columns, dtype=input_ids.dtype, device=input_ids.device).T
        sequences = torch.cat([input_ids, new], 1)
        if not kept:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=None if scores is None else tuple(scores),  # type: ignore[arg-type]
            logits=None if logits is None else tuple(logits),  # type: ignore[arg-type]
        )

    def _refused(
        self, model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, model_kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call cannot be decoded token for token as Hugging Face would; None when it can."""
        mode = config.get_generation_mode(None)
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"{mode.value} is not decoded one token after another"
        if model.config.is_encoder_decoder:
            return "the model has an encoder"
        more = [
            name
            for name, value in model_kwargs.items()
            if name not in ANSWERED and value is not None and value is not False
        ]
        if more:
            return f"the call passes {more[0]} to the model"
        past = model_kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            return "the call continues from a cache"
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            return "the call wants attentions or hidden states"
        if ids.device != self.device or ids.shape[1] == 0 or config.max_length <= ids.shape[1]:
            return "the prompt is empty, fills the length asked for, or lies on another device than the decoder"
        mask = model_kwargs.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or bool((mask[:, -1] == 0).any())):
            return "the prompts are not padded on the left"
        if ids.shape[0] > 1:
            return _refused_batch(processors, criteria, config)
        vocabulary = model.config.get_text_config().vocab_size
        for processor in processors:
            if not isinstance(processor, BY_ROW) and not _repeatable(processor, ids, vocabulary):
                return f"the processor {type(processor).__name__} gives other scores when it is asked again"
        return None


def _refused_batch(processors: Any, criteria: Any, config: Any) -> str | None:
    """Rows are decoded at different speeds, so that nothing may look at the batch as a whole."""
    odd = [type(p).__name__ for p in processors if not isinstance(p, BY_ROW)]
    odd += [type(c).__name__ for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    if odd:
        return f"{odd[0]} may look at several rows of the batch at once"
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return "scores of rows that have ended were asked for"
    return None


def _of_row(processor: Any, row: int) -> Any:
    """The processor as it is for one row: a repetition penalty ignores each row's own padding."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    mine = copy.copy(processor)
    mine.prompt_ignore_length = ignored[row : row + 1]
    return mine


def _repeatable(processor: Any, ids: Tensor, vocabulary: int) -> bool:
    """Whether a copy of the processor gives the same scores twice for the same prefix."""
    scores = torch.linspace(-1, 1, vocabulary, device=ids.device)[None]
    try:
        tried = copy.deepcopy(processor)
        return bool(torch.equal(tried(ids, scores.clone()), tried(ids, scores.clone())))
    except Exception:
        return False

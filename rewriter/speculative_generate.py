"""`model.generate` of a rewritten Hugging Face model: the same arguments, decoded by draft and verify."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from subquad.application import rewritten
from subquad.ir.decoding import Drafter
from subquad.ir.errors import GenerationError, SubquadError
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.passes.speculate.draft_model import DraftModel
from subquad.passes.speculate.other_tokenizer import OtherTokenizer
from subquad.runtime.pacing import MOST
from subquad.runtime.sharing_plan import SharingPlan
from subquad.speculation_words import LOOKUP, NGRAM, spoken

OWN = ("custom_generate", "negative_prompt_ids", "past_key_values", "inputs_embeds", "position_ids",
       "cache_implementation", "assistant_early_exit")  # fmt: skip
"""Arguments that leave a call to the model's own generate."""
SEARCH = {"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "dola_layers": None, "constraints": None,
          "force_words_ids": None, "low_memory": None, "token_healing": False}  # fmt: skip
"""Settings, with the value that leaves decoding one token after another."""
SHARE = "share_prefix"
"""The word by which a call turns sharing off."""
DRAFTED = 5
"""Tokens that an assistant model drafts for a pass when nobody says how many."""
WORTH_COMPILING = 2**24
"""Bytes of weights from which on the decoder is compiled beside its first generation."""


class SpeculativeGenerate:
    """The bound replacement of a model's `generate`; what it cannot decode goes to the model's own.

    Arguments are prepared by Hugging Face's generate, which is then handed the decoding method.  The words of
    `subquad.speculation_words` are taken beside them, an `assistant_model` drafts, and share_prefix=False turns off that
    what rows have in common is computed and stored once.  `why_not` says why the last call was left to the model's own
    decoding, None when it was not; `sharing` what its rows had in common.
    """

    def __init__(self, model: Any, rewrite: LoopRewrite | None) -> None:
        """rewrite: the speculation of calls that ask for none of their own."""
        self.model, self.rewrite = model, rewrite
        self.modules = sum(1 for _ in model.modules())
        self.why_not: str | None = None
        self.sharing: SharingPlan | None = None
        self._places: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights lie elsewhere."""
        return {**self.__dict__, "_places": {}}

    def __call__(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`.  Raises GenerationError or PassError for words of speculation that do not fit."""
        own = type(self.model).generate
        share, self.sharing = bool(kwargs.pop(SHARE, True)), None
        config = generation_config if generation_config is not None else self.model.generation_config
        self.why_not = _left(config, kwargs) or self.changed()
        if self.why_not is not None:
            return own(self.model, inputs, generation_config, **kwargs)
        given, kwargs = _without_words(generation_config, config, dict(kwargs))
        assistant, other = kwargs.pop("assistant_model", None), kwargs.pop("assistant_tokenizer", None)
        chosen = spoken(kwargs, self.rewrite)
        drafter = None if assistant is None else assistant_drafter(assistant, self.model, config, kwargs, other)
        try:
            decoder = self.decoder()
            self._compile_beside(decoder)
        except SubquadError as refusal:
            self.why_not = str(refusal)
            theirs = {"assistant_model": assistant, "assistant_tokenizer": other}
            return own(self.model, inputs, generation_config, **theirs, **kwargs)
        from subquad.runtime.hf_decoding import HuggingFaceCall

        if drafter is None and chosen is not None:
            drafter = decoder.drafter(chosen)
        most = MOST if chosen is None else 1 + chosen.num_speculative_tokens
        decode = functools.partial(decoder.decode, most=most, share=share, on_sharing=self._found)
        call = HuggingFaceCall(decode, decoder.engine.device, drafter, kwargs.get("streamer"))
        result = own(self.model, inputs, given, custom_generate=call, **_criteria(config, kwargs))
        self.why_not = call.why_not
        return result

    def _found(self, plan: SharingPlan) -> None:
        self.sharing = plan

    def changed(self) -> str | None:
        """Why the captured graph no longer says what the model computes; None when it does."""
        model, graph = self.model, rewritten(self.model).applied.graph  # type: ignore[union-attr]
        if model.training:
            return "the model is in training mode"
        modules = list(model.modules())
        if len(modules) != self.modules:
            return "modules were added to the model or taken from it"
        if any(_hooked(module) for module in modules):
            return "the model has forward hooks"
        present = {id(parameter) for parameter in model.parameters()}
        for name, parameter in graph.named_parameters():
            if id(parameter) not in present or self._places.get(name, parameter.data_ptr()) != parameter.data_ptr():
                return f"{name} was replaced after the rewrite"
        return None

    def decoder(self) -> Any:
        """The model's incremental decoder."""
        from subquad.text_generation import decoder_of

        decoder = decoder_of(self.model)
        if not self._places:
            parameters = rewritten(self.model).applied.graph.named_parameters()  # type: ignore[union-attr]
            self._places = {name: parameter.data_ptr() for name, parameter in parameters}
        return decoder

    def _compile_beside(self, decoder: Any) -> None:
        """Compile the decoder beside its first generation, where that is worth it."""
        if sum(t.numel() * t.element_size() for t in self.model.parameters()) >= WORTH_COMPILING:
            decoder.compile(wait=False)


def _hooked(module: Any) -> bool:
    """True for hooks of the user's; those by which Hugging Face collects attentions stay on the modules and do nothing."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _left(config: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call is left to the model's own generate before anything is prepared."""
    given = next((word for word in OWN if kwargs.get(word) is not None), None)
    if given is not None:
        return f"the call gives {given}"
    if kwargs.get("assistant_tokenizer") is not None and kwargs.get("assistant_model") is None:
        return "the call gives assistant_tokenizer without assistant_model"
    for word, plain in SEARCH.items():
        value = kwargs.get(word, getattr(config, word, plain))
        if value not in (plain, None, False):
            return f"the call asks for {word} {value}"
    return None


def _without_words(given: Any, config: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration that was given, if any, without prompt lookup, which moves to the call's words."""
    if getattr(config, LOOKUP, None) is None:
        return given, kwargs
    config = copy.deepcopy(config)
    kwargs.setdefault(LOOKUP, getattr(config, LOOKUP))
    kwargs.setdefault(NGRAM, getattr(config, NGRAM, None))
    setattr(config, LOOKUP, None)
    return config, kwargs


def _criteria(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with stop strings as a criterion: `generate` drops the tokenizer when it is handed a decoding method."""
    strings = kwargs.get("stop_strings", getattr(config, "stop_strings", None))
    tokenizer = kwargs.get("tokenizer")
    if strings is None or tokenizer is None:
        return kwargs
    from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

    found = StoppingCriteriaList([StopStringCriteria(tokenizer, strings), *(kwargs.get("stopping_criteria") or ())])
    return {**kwargs, "stop_strings": None, "stopping_criteria": found}


@dataclass(frozen=True)
class PlainText:
    """A Hugging Face tokenizer without its special tokens."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def assistant_drafter(assistant: Any, model: Any, config: Any, kwargs: dict[str, Any], other: Any = None) -> Drafter:
    """The drafter of Hugging Face's assistant_model, with its num_assistant_tokens and assistant_confidence_threshold.

    other: the assistant's tokenizer where it has its own; the model's is the call's `tokenizer`.
    Raises GenerationError for an assistant with another vocabulary and no tokenizers.
    """
    sizes = [one.config.get_text_config().vocab_size for one in (assistant, model)]
    if other is not None and kwargs.get("tokenizer") is None:
        raise GenerationError("assistant_tokenizer= needs the model's own tokenizer as tokenizer= beside it.")
    if other is None and sizes[0] != sizes[1]:
        raise GenerationError(
            f"the assistant model has {sizes[0]} tokens and the model {sizes[1]}; give one with the same tokenizer, or "
            "tokenizer= and assistant_tokenizer=."
        )
    from subquad.runtime.hf_stepper import HuggingFaceStepper

    settings = assistant.generation_config
    tokens = kwargs.pop("num_assistant_tokens", None) or getattr(settings, "num_assistant_tokens", None) or DRAFTED
    opened = functools.partial(HuggingFaceStepper, assistant)
    if other is not None:
        own, most = PlainText(kwargs["tokenizer"]), min(int(tokens), MOST - 1)
        return OtherTokenizer(opened, own, PlainText(other), sizes[1], most)
    least = kwargs.pop("assistant_confidence_threshold", None)
    least = getattr(settings, "assistant_confidence_threshold", None) if least is None else least
    return DraftModel(opened, sizes[1], min(int(tokens), MOST - 1), least or 0.0)

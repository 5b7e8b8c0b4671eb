"""The words by which users of Hugging Face and vLLM ask for speculation, as the rewrite of a decoding loop."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from subquad.ir.errors import GenerationError, PassError
from subquad.ir.loop_rewrite import LOOP, LoopRewrite
from subquad.ir.plan import Plan
from subquad.passes.speculate.speculate import Speculate

OURS = (
    "method",
    "num_speculative_tokens",
    "prompt_lookup_max",
    "prompt_lookup_min",
    "online_update_interval",
    "confidence",
)
LOOKUP = "prompt_lookup_num_tokens"
NGRAM = "max_matching_ngram_size"
PLAIN = "none"


def spoken(words: MutableMapping[str, Any], default: LoopRewrite | None) -> LoopRewrite | None:
    """Take the words of speculation out of a call's arguments; None for plain decoding, the default when there are none.

    method, num_speculative_tokens, prompt_lookup_max and prompt_lookup_min, also as a dict speculative_config, are vLLM's;
    prompt_lookup_num_tokens with max_matching_ngram_size is Hugging Face's, online_update_interval that of OSD's scripts.
    method "none" is plain decoding.
    Raises GenerationError for a word that speculation does not know, PassError for a value that does not fit.
    """
    config = words.pop("speculative_config", None) or {}
    if not isinstance(config, dict):
        raise GenerationError(
            f"speculative_config is a {type(config).__name__}; give a dict such as {{'method': 'ngram'}}."
        )
    knobs = dict(config)
    knobs |= {word: words.pop(word) for word in OURS if word in words}
    unknown = sorted(set(knobs) - set(OURS))
    if unknown:
        raise GenerationError(f"speculation knows no {unknown[0]!r}; known: {', '.join(OURS)}.")
    tokens, longest = words.pop(LOOKUP, None), words.pop(NGRAM, None)
    if tokens is not None:
        knobs = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": longest or 2} | knobs
    if knobs.get("method") == PLAIN:
        return None
    if not knobs:
        return default
    return _made((default.knobs() if default is not None else {}) | knobs)


def planned(plan: Plan) -> LoopRewrite | None:
    """The rewrite of the decoding loop that a plan holds, None when it holds none."""
    for step in plan.steps:
        if step.path == LOOP:
            return _made(dict(step.knobs))
    return None


def _made(knobs: Mapping[str, Any]) -> Speculate:
    try:
        return Speculate(**knobs)
    except (TypeError, ValueError) as error:
        raise PassError(f"pass {Speculate.name!r} does not take these knobs: {error}") from error

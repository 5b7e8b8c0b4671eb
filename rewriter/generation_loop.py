"""The decoding loop behind a Hugging Face model's `generate`, as its generation settings make it, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from subquad.ir.loop import NONE, Loop, Schedule, Slot

WHOLE = {
    "beam_search": "beam search ranks whole continuations of all beams against each other at each step",
    "beam_sample": "beam sampling draws from all beams together at each step",
    "group_beam_search": "diverse beam search lets groups of beams penalise each other at each step",
    "constrained_beam_search": "constrained beam search ranks beams by the constraints they have met",
    "contrastive_search": "contrastive search compares the hidden states of candidates with those of the prefix",
    "dola_generation": "DoLa subtracts the logits of an earlier layer, which the model's own forward does not return",
    "assisted_generation": "it drafts and verifies already",
}
"""Why a mode is recognised and left whole."""
_OFF: tuple[Any, ...] = (None, False)
SETTINGS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("guidance_scale", "guidance", (1, 1.0)), ("sequence_bias", "bias", ()), ("diversity_penalty", "diversity penalty", (0.0,)),
    ("encoder_repetition_penalty", "encoder repetition penalty", (1.0,)), ("repetition_penalty", "repetition penalty", (1.0,)),
    ("no_repeat_ngram_size", "no repeated n-grams", (0,)), ("encoder_no_repeat_ngram_size", "no n-grams of the encoder", (0,)),
    ("bad_words_ids", "bad words", ()), ("min_length", "least length", (0,)), ("min_new_tokens", "least new tokens", (0,)),
    ("forced_bos_token_id", "forced first token", ()), ("forced_eos_token_id", "forced last token", ()),
    ("exponential_decay_length_penalty", "length penalty", ()), ("suppress_tokens", "suppressed tokens", ()),
    ("begin_suppress_tokens", "suppressed first tokens", ()),
)  # fmt: skip
WARPERS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("temperature", "temperature", (1.0,)), ("top_k", "top-k", (0,)), ("top_p", "top-p", (1.0,)), ("min_p", "min-p", ()),
    ("typical_p", "typical-p", (1.0,)), ("epsilon_cutoff", "epsilon cutoff", (0.0,)), ("eta_cutoff", "eta cutoff", (0.0,)),
)  # fmt: skip
"""(setting, processor, values that switch it off), in the order in which `generate` applies them; warpers when it samples."""


def generation_loop(model: nn.Module) -> Loop | None:
    """The loop that `model.generate(...)` runs with the model's own settings; None for a model that does not generate."""
    settings = getattr(model, "generation_config", None)
    can: Callable[[], bool] | None = getattr(model, "can_generate", None)
    if settings is None or can is None or not can():
        return None
    mode = str(settings.get_generation_mode().value)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    cached = settings.use_cache is not False
    samples = "sample" in mode or (mode == "assisted_generation" and settings.do_sample is True)
    ids = "decoder_input_ids" if seq2seq else "input_ids"
    beams = "beam" in mode
    choice = Slot("beam", f"{settings.num_beams} beams") if beams else Slot("multinomial" if samples else "argmax")
    end = settings.eos_token_id
    stops = [
        Slot("end token", str(end)) if end is not None else NONE,
        Slot("stop strings", str(settings.stop_strings)) if settings.stop_strings else NONE,
        Slot("seconds", str(settings.max_time)) if settings.max_time else NONE,
    ]
    effects = [Slot("kept", name) for name in _KEPT if getattr(settings, name, None)]
    most = settings.max_new_tokens
    bound = Slot("new tokens", str(most)) if most is not None else Slot("length", str(settings.max_length))
    return Loop(
        path="generate", origin="generate", source="", model=Slot("module", type(model).__name__),
        context=Slot("last token" if cached else "full prefix", ids),
        cache=Slot("object", settings.cache_implementation or "dynamic cache") if cached else NONE,
        positions=Slot("attention mask", "running sum of the mask, or the cache's length"),
        select=Slot("last row", "logits[:, -1], as float32"),
        processors=tuple(_processors(settings, samples)), choice=choice,
        write=Slot("cat", f"{ids}, the pad token in rows that ended"), stop=tuple(s for s in stops if s != NONE), bound=bound,
        result=Slot("return", "an output object" if settings.return_dict_in_generate else ids), effects=tuple(effects),
        schedules=tuple(_schedules(mode, seq2seq)), evidence=(f"mode {mode} of the model's generation settings",),
    )  # fmt: skip


_KEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def _processors(settings: Any, samples: bool) -> list[Slot]:
    found = []
    for name, word, off in (*SETTINGS, *(WARPERS if samples else ())):
        value = getattr(settings, name, None)
        if value not in (*_OFF, *off):
            found.append(Slot(word, f"{name}={value}"))
    return found + ([Slot("softmax")] if samples else [])


def _schedules(mode: str, seq2seq: bool) -> list[Schedule]:
    if mode in WHOLE:
        return [Schedule("any", False, f"{WHOLE[mode]}; it is left whole")]
    if seq2seq:
        return [
            Schedule(
                "derived cache", False, "cross attention reads an encoder's states, which the decoder does not carry"
            )
        ]
    return [
        Schedule(
            "derived cache",
            True,
            "`subquad generate` runs it over the derived decoder; the model's own `generate` keeps its loop",
        )
    ]

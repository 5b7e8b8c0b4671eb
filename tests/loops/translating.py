"""Decoding loops over an encoder and a decoder, as people write them for T5, Whisper and their own translators."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from loops.case import Case
from loops.models import VOCABULARY, MeanTranslator, Translator


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model


def whisper() -> Any:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=64, decoder_start_token_id=3, pad_token_id=0, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def bart() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def whole_prefix(model, ids, count=10):
    memory = model.get_encoder()(ids)
    words = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    for _ in range(count):
        logits = model(encoder_outputs=memory, decoder_input_ids=words).logits
        words = torch.cat([words, logits[:, -1].argmax(-1, keepdim=True)], 1)
        if (words[:, -1] == model.config.eos_token_id).all():
            break
    return words


def encodes_every_time(model, ids, count=10):
    words = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    for _ in range(count):
        logits = model(input_ids=ids, decoder_input_ids=words).logits
        words = torch.cat([words, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return words


def cache_of_both(model, ids, count=10):
    memory, past = model.get_encoder()(ids), None
    words = feed = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    for _ in range(count):
        out = model(encoder_outputs=memory, decoder_input_ids=feed, past_key_values=past, use_cache=True)
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        words = torch.cat([words, feed], 1)
    return words


def listens(model, ids, count=10):
    sound = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32).repeat(ids.shape[0], 1, 1) * ids.float().mean()
    memory = model.model.encoder(sound).last_hidden_state
    words = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    for _ in range(count):
        states = model.model.decoder(input_ids=words, encoder_hidden_states=memory).last_hidden_state
        words = torch.cat([words, model.proj_out(states[:, -1]).argmax(-1, keepdim=True)], 1)
    return words


def listens_through_the_whole_model(model, ids, count=10):
    sound = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32).repeat(ids.shape[0], 1, 1) * ids.float().mean()
    memory = model.model.encoder(sound)
    words = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    while words.shape[1] < count:
        row = model(encoder_outputs=memory, decoder_input_ids=words).logits[:, -1, :]
        words = torch.cat([words, torch.multinomial(row.softmax(-1), 1)], -1)
    return words


def listens_with_a_cache(model, ids, count=10):
    sound = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32).repeat(ids.shape[0], 1, 1) * ids.float().mean()
    memory, past = model.model.encoder(sound), None
    words = feed = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    for _ in range(count):
        out = model(encoder_outputs=memory, decoder_input_ids=feed, past_key_values=past, use_cache=True)
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        words = torch.cat([words, feed], 1)
    return words


def translate_in_samples(model, ids, count=10):
    memory = model.encoder(ids)
    words = ids[:, :1]
    for _ in range(count):
        row = model.decoder(words, memory)[:, -1]
        words = torch.cat([words, torch.multinomial(row.softmax(-1), 1)], 1)
    return words


def padded_source(model, ids, count=12):
    mask = torch.ones_like(ids)
    mask[0, ids.shape[1] // 2 + 1 :] = 0
    memory = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
    words = torch.full((ids.shape[0], 1), model.config.decoder_start_token_id)
    done = torch.zeros(ids.shape[0], dtype=torch.bool)
    while words.shape[1] < count and not done.all():
        out = model(attention_mask=mask, encoder_outputs=memory, decoder_input_ids=words, use_cache=False)
        best = out.logits[:, -1].argmax(-1).masked_fill(done, model.config.pad_token_id)
        words = torch.cat([words, best[:, None]], 1)
        done = done | (best == model.config.eos_token_id)
    return words


def hears_something_else_on_the_way(model, ids, count=12):
    memory = model.encoder(ids)
    words = ids[:, :1]
    for n in range(count):
        if n % 4 == 3:
            memory = memory.flip(1)
        words = torch.cat([words, model.decoder(words, memory)[:, -1:].argmax(-1)], 1)
    return words


def writes_into_what_it_heard(model, ids, count=12):
    memory = model.encoder(ids)
    words = ids[:, :1]
    for n in range(count):
        if n == 7:
            memory.mul_(-0.5)
        words = torch.cat([words, model.decoder(words, memory)[:, -1:].argmax(-1)], 1)
    return words


CASES = [
    Case(whole_prefix, t5, batch=2, reads={"context": "full prefix", "stop": "break"}),
    Case(encodes_every_time, t5, batch=2),
    Case(padded_source, t5, batch=2),
    Case(padded_source, bart, batch=2),
    Case(padded_source, bart),
    Case(cache_of_both, t5, batch=2, refused=("guard context", "`encoder_outputs`", "out = model(encoder_outputs=memory"),
         reads={"context": "last token", "cache": "passed on"}),
    Case(listens, whisper, batch=2, refused=("model", "several modules", "model.proj_out(states[:, -1])")),
    Case(listens_through_the_whole_model, whisper, batch=2, reads={"choice": "multinomial"}),
    Case(listens_with_a_cache, whisper, batch=2, refused=("guard context", "`encoder_outputs`", "out = model(encoder_outputs")),
    Case(translate_in_samples, Translator, batch=2),
    Case(hears_something_else_on_the_way, Translator, batch=2),
    Case(writes_into_what_it_heard, Translator, batch=2),
    Case(hears_something_else_on_the_way, MeanTranslator, batch=2,
         refused=("guard causality", "outside of cross attention", "model.decoder(words, memory)")),
]  # fmt: skip

"""The part of `convert` for drafters: the model reads and writes, and the heads of its drafter learn to foretell it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import Rewritten, rewritten
from subquad.decoder import Decoder
from subquad.ir.errors import ConversionError
from subquad.ir.trained import head_digest
from subquad.passes.speculate.speculate import Speculate, TrainedPart
from subquad.text_generation import decoder_of
from subquad.training.checkpoint import Checkpoint, Progress, unfinished
from subquad.training.foretold_text import foretold_text
from subquad.training.recipes import RECIPES, Material
from subquad.training.session import Session


def trained_drafter(record: Rewritten) -> str | None:
    """The drafter of a rewritten model that has parameters to train, None when there is none."""
    return None if record.loop is None else record.loop.trains


def convert_drafter(
    fast: nn.Module, text: Path, tokens: int, target: Path, *, codec: Any, model: str, seed: int
) -> dict[str, Any]:
    """Train the drafter of a rewritten model on `tokens` tokens that the model reads and writes; returns an account.

    text: where the prompts come from; see training.prompts.  target: the output, beside which the state is kept.  model: hash
    of the weights.  The heads are put on the model's record; its own weights stay as they are.
    Raises ConversionError for a text that is too short, and after Ctrl-C.
    """
    record = rewritten(fast)
    assert record is not None
    name = trained_drafter(record)
    assert name is not None
    start = time.monotonic()
    decoder = decoder_of(fast)
    head = decoder.trained.found_head(name)
    seen = foretold_text(_ready(decoder), text, codec, tuple(getattr(codec, "eos", ())), tokens, model)
    torch.manual_seed(seed)
    assert isinstance(record.loop, Speculate)
    training = RECIPES[name](Material(fast, decoder, head, seen, record.loop), seed)
    if not training.batches:
        raise ConversionError(f"{tokens} tokens are too few to train on; ask for more.")
    checkpoint = Checkpoint(unfinished(target, name), _digest(training.part, seen.wanted, model, seed))
    stored = checkpoint.load()
    if stored is not None and stored[0].stage == name:
        training.load(stored[1])
    session = Session(checkpoint, stored[0] if stored is not None else Progress())
    session.run(name, f"the {name} drafter", training.batches, training.size, training.work, training.tensors)
    guessed = training.guessed()
    adopt(record, decoder, training.part, head)
    return {
        "stage": name,
        "tokens": len(seen),
        "seconds": round(time.monotonic() - start, 1),
        "guessed": [round(share, 4) for share in guessed],
    }


def adopt(record: Rewritten, decoder: Decoder, part: TrainedPart, head: torch.Tensor) -> None:
    """Draft with this from now on; it is kept in the dtype of the model's head of logits [V, d]."""
    known = record.trained
    kept = {n: t.to(head.dtype) if t.is_floating_point() else t for n, t in part.parameters_by_name().items()}
    record.trained = replace(
        known,
        parameters={**known.parameters, part.name: kept},
        models={**known.models, part.name: head_digest(head)},
    )
    decoder.trained = record.trained


def _ready(decoder: Decoder) -> Decoder:
    """The decoder, compiled where that repays itself."""
    from subquad.speculative_generate import WORTH_COMPILING

    if sum(t.numel() * t.element_size() for t in decoder.weights.values()) >= WORTH_COMPILING:
        decoder.compile()
    return decoder


def _digest(part: TrainedPart, ids: torch.Tensor, model: str, seed: int) -> str:
    text = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    shapes = {name: list(tensor.shape) for name, tensor in part.parameters_by_name().items()}
    return hashlib.sha256(json.dumps([part.name, shapes, text, model, seed]).encode()).hexdigest()[:16]

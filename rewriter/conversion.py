"""The driver `convert`: train what approximate rewrites added until the model is close to the original again."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import rewritten
from subquad.artifact import check_output, save
from subquad.ir.errors import ConversionError
from subquad.model_source import source_note
from subquad.training.adapters import linear_layers
from subquad.training.checkpoint import Checkpoint, Progress
from subquad.training.measure import measure
from subquad.training.session import Session
from subquad.training.settings import Settings
from subquad.training.sites import TrainingModel, training_model
from subquad.training.stages import AdapterTraining, AttentionTransfer, put_back
from subquad.training.text import Corpus, read_corpus

COMPILES_FROM = 50_000
"""Tokens from which compiling the training form repays itself."""


def convert(
    fast: nn.Module,
    *,
    text: str | Path,
    tokens: int,
    out: str | Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    measure_on: Sequence[str | Path] = (),
    settings: Settings | None = None,
) -> nn.Module:
    """Train an approximately rewritten language model on a text, save it to `out`, and return it.

    fast: what `rewrite` or `load` returned, with at least one rewrite that added parameters.  text: a UTF-8 file, plain or
    .gz.  tokens: budget over both stages.  out: directory to make.  tokenizer: a tokenizers.Tokenizer, or a function from
    str to ids; None takes the one the model came with.  measure_on: files to measure on; without any, the tokens that
    follow the training text are held out for it.  settings: everything else; see Settings.

    Stage 1, attention transfer: each site learns the original's output on the original's inputs.  Stage 2: peft adapters on
    the linear layers of the rewritten modules and the added parameters learn end to end; then the adapters are merged into
    the weights, and saved beside them in `adapter/`.  Perplexity and KL to the original, before and after each stage, are
    in `report.conversion` and in conversion.json.

    The state is kept in `<out>.unfinished` until the end: the same call goes on after a kill or Ctrl-C, with the same
    result.  Raises ConversionError (also after Ctrl-C) or ArtifactError; then `fast` is as it was.
    """
    settings = Settings(tokens=tokens) if settings is None else replace(settings, tokens=tokens)
    target = Path(out)
    if target.suffix == ".pt2":
        raise ConversionError(
            "a conversion is saved as a directory; export it with subquad.save(fast, 'name.pt2') afterwards."
        )
    check_output(target, overwrite)
    record = rewritten(fast)
    if record is None:
        raise ConversionError(
            f"{type(fast).__name__} was not rewritten; apply an approximate pass first, then convert."
        )
    if tokenizer is None:
        source = source_note(fast)
        tokenizer = None if source is None else source.codec
    corpus = read_corpus(text, tokenizer, settings.used_tokens, 0 if measure_on else settings.held_out)
    _check_ids(fast, corpus)
    texts = {Path(text).name: corpus.held_out}
    if measure_on:
        texts = {
            Path(name).name: read_corpus(name, tokenizer, settings.length, settings.held_out).all for name in measure_on
        }
    checkpoint = Checkpoint(
        target.with_name(target.name + ".unfinished"),
        settings.digest(corpus.digest, record.plan.hash, _weights_digest(fast), *map(str, measure_on)),
    )
    stored = checkpoint.load()
    training = fast.training
    required = {name: p.requires_grad for name, p in fast.named_parameters()}
    fast.eval()
    fast.requires_grad_(False)
    view = training_model(fast, _compiles(settings))
    before = {name: p.detach().clone() for site in view.sites for name, p in site.parameters.items()}
    for site in view.sites:
        for parameter in site.parameters.values():
            parameter.requires_grad_(True)
    finished = False
    try:
        records = _train(view, settings, corpus.training, texts, checkpoint, stored)
        _merge(view, settings, texts, records)
        finished = True
    finally:
        view.close()
        if not finished:
            if view.adapters is not None:
                view.adapters.remove()
            put_back(view, {f"added/{name}": value for name, value in before.items()})
        for name, parameter in fast.named_parameters():
            parameter.requires_grad_(required.get(name, True))
        fast.train(training)
    record.report.conversion = records
    save(fast, target, overwrite)
    _write_beside(view, settings, records, target)
    checkpoint.remove()
    return fast


def _train(
    view: TrainingModel, settings: Settings, tokens: torch.Tensor, texts: dict[str, torch.Tensor], checkpoint: Checkpoint,
    stored: tuple[Progress, dict[str, torch.Tensor]] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    state, tensors = stored if stored is not None else (Progress(), {})
    session = Session(checkpoint, state)

    def note(stage: str, used: int) -> None:
        if all(entry["stage"] != stage for entry in state.records):
            measured = {name: measure(view, ids, settings.length, settings.rows) for name, ids in texts.items()}
            account = {"stage": stage, "tokens": used, "seconds": round(state.seconds, 1), "texts": measured}
            state.records.append(account | next(iter(measured.values())))

    if state.stage == "start":
        note("before", 0)
    size = settings.transfer_rows * settings.length
    if state.stage in ("start", "transfer") and settings.transfer_batches:
        transfer = AttentionTransfer(view, settings, tokens)
        if state.stage == "transfer":
            transfer.load(tensors)
        session.run("transfer", "attention transfer", settings.transfer_batches, size, transfer.work, transfer.tensors)
        note("transfer", settings.transfer_batches * size)
    if settings.adapter_batches:
        view.adapt(
            linear_layers(view.model, [site.path for site in view.sites]), settings.rank, settings.alpha, settings.seed
        )
        adapting = AdapterTraining(view, settings, tokens)
        if state.stage == "adapters":
            adapting.load(tensors)
        session.run(
            "adapters",
            "adapters",
            settings.adapter_batches,
            settings.rows * settings.length,
            adapting.work,
            adapting.tensors,
        )
        note("adapters", settings.used_tokens)
    return state.records


def _merge(
    view: TrainingModel, settings: Settings, texts: dict[str, torch.Tensor], records: list[dict[str, Any]]
) -> None:
    """Put the adapters into the weights and record what rounding them to the weights' dtype did."""
    if view.adapters is not None:
        view.merge()
        merged = measure(view, next(iter(texts.values())), settings.length, settings.rows)
        records[-1]["merged_perplexity"] = merged["perplexity"]


def _compiles(settings: Settings) -> bool:
    if settings.compile is not None:
        return settings.compile
    return settings.used_tokens >= COMPILES_FROM and any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _check_ids(model: nn.Module, corpus: Corpus) -> None:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(corpus.training.max()) >= vocabulary:
        raise ConversionError(
            f"the tokenizer gives the id {int(corpus.training.max())}, but the model knows {vocabulary} tokens; "
            "pass the model's own tokenizer."
        )


def _weights_digest(model: nn.Module) -> str:
    total = 0
    for name, parameter in model.named_parameters():
        data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        total = zlib.crc32(data.data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _write_beside(view: TrainingModel, settings: Settings, records: list[dict[str, Any]], target: Path) -> None:
    account = {"settings": settings.json(), "stages": records}
    (target / "conversion.json").write_text(json.dumps(account, indent=1), encoding="utf-8")
    if view.adapters is not None:
        view.adapters.save(target / "adapter")

"""The driver `convert`: train what approximate rewrites added until the model is close to the original again."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.application import Rewritten, rewritten
from subquad.artifact import check_output, save
from subquad.drafter_conversion import convert_drafter, trained_drafter
from subquad.ir.errors import ConversionError
from subquad.model_source import source_note
from subquad.training.adapters import linear_layers
from subquad.training.checkpoint import Checkpoint, Progress, unfinished
from subquad.training.measure import measure
from subquad.training.session import Session
from subquad.training.settings import Settings
from subquad.training.sites import TrainingModel, training_model
from subquad.training.stages import AdapterTraining, AttentionTransfer, put_back
from subquad.training.text import Corpus, read_corpus

DRAFTER_SHARE = 4
"""A drafter that is trained beside attention gets one of so many tokens."""
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
    """Train what the rewrites of a language model added on a text, save it to `out`, and return it.

    fast: what `rewrite` or `load` returned, with at least one rewrite that added parameters.  text: a UTF-8 file, plain or
    .gz.  tokens: budget over all stages; of attention and a drafter the drafter gets a quarter.  out: directory
    to make.  tokenizer: a tokenizers.Tokenizer, or a function from str to ids; None takes the one the model came with.
    measure_on: files to measure on; without any, the tokens that follow the training text are held out for it.
    settings: everything else; see Settings.

    Stage 1, attention transfer: each site learns the original's output on the original's inputs.  Stage 2: peft adapters on
    the linear layers of the rewritten modules and the added parameters learn end to end; then the adapters are merged into
    the weights, and saved beside them in `adapter/`.  Perplexity and KL to the original, before and after each stage, are
    in `report.conversion` and in conversion.json.  A drafter with parameters (`speculate(method="hydra")` and its like) then
    learns what the model foretells: half of the tokens are read from the text, half are its own answers to the lines of it.

    The state is kept in `<out>.unfinished` until the end: the same call goes on after a kill or Ctrl-C, with the same
    result.  Raises ConversionError (also after Ctrl-C) or ArtifactError; then `fast` is as it was.
    """
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
    account: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    view: TrainingModel | None = None
    drafter = trained_drafter(record)
    with _as_before(record) as kept:
        if drafter is None or any(taken.call.parameters for taken in record.replacements):
            rest = tokens if drafter is None else tokens - tokens // DRAFTER_SHARE
            share = Settings(tokens=rest) if settings is None else replace(settings, tokens=rest)
            view, records = _convert_sites(fast, record, text, tokenizer, measure_on, share, target, kept)
            account = {"settings": share.json()}
        if drafter is not None:
            part, seed = (
                (tokens if view is None else tokens // DRAFTER_SHARE),
                (0 if settings is None else settings.seed),
            )
            weights = _weights_digest(fast)
            records.append(convert_drafter(fast, Path(text), part, target, codec=tokenizer, model=weights, seed=seed))
        record.report.conversion = records
        save(fast, target, overwrite)
    (target / "conversion.json").write_text(json.dumps({**account, "stages": records}, indent=1), encoding="utf-8")
    if view is not None and view.adapters is not None:
        view.adapters.save(target / "adapter")
    for folder in (unfinished(target), unfinished(target, drafter)):
        shutil.rmtree(folder, ignore_errors=True)
    return fast


Values = list[tuple[nn.Parameter, torch.Tensor]]
"""Parameters with the values they had."""


@contextmanager
def _as_before(record: Rewritten) -> Iterator[Values]:
    """When something is raised inside, the parameters that were put on the list get their values back, the record its own."""
    kept: Values = []
    trained, account = record.trained, record.report.conversion
    try:
        yield kept
    except BaseException:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        record.trained, record.report.conversion = trained, account
        raise


def _convert_sites(
    fast: nn.Module, record: Rewritten, text: str | Path, tokenizer: Any, measure_on: Sequence[str | Path],
    settings: Settings, target: Path, kept: Values,
) -> tuple[TrainingModel, list[dict[str, Any]]]:  # fmt: skip
    """Train the parameters of rewritten attention; returns the view with its merged adapters, and what was measured.

    kept: receives the values of what is changed.
    """
    corpus = read_corpus(text, tokenizer, settings.used_tokens, 0 if measure_on else settings.held_out)
    _check_ids(fast, corpus)
    texts = {Path(text).name: corpus.held_out}
    if measure_on:
        texts = {
            Path(name).name: read_corpus(name, tokenizer, settings.length, settings.held_out).all for name in measure_on
        }
    checkpoint = Checkpoint(
        unfinished(target),
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
        kept += [(p, before[name]) for site in view.sites for name, p in site.parameters.items()]
        if view.adapters is not None:
            weights = [layer.get_base_layer().weight for layer in view.adapters.layers.values()]
            kept += [(weight, weight.detach().clone()) for weight in weights]
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
    return view, records


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

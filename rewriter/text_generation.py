"""Generate text with a loaded model: chat template, streaming, stop at the end token, and the speed as it was."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subquad.artifact_directory import is_artifact, stored_decoder
from subquad.decoder import Decoder
from subquad.ir.decoding import Choice
from subquad.ir.errors import GenerationError, SubquadError, first_line
from subquad.model_source import LoadedModel, open_model
from subquad.progress import progress
from subquad.runtime.chance import seeded
from subquad.runtime.pacing import MOST
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending
from subquad.speculation_words import spoken
from subquad.tokenization import TextCodec, read_codec


@dataclass
class Generated:
    """One answer and its speed.

    text, tokens: the new tokens, decoded and as ids (the end token left out of the text).  prompt_tokens: their number.
    first_token_seconds: from the call to the first token, prefill included.  tokens_per_second: tokens after the first
    over their time, NaN for fewer than two.  mean_accepted: tokens per step of the model.  engine: "subquad" (the derived
    incremental decoder) or "transformers" (the model's own generate).  rows_per_step: tokens a step verifies.
    draft_share: share of the time spent on drafting.  interrupted: Ctrl-C ended it.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    engine: str
    mean_accepted: float = 1.0
    rows_per_step: float = 1.0
    draft_share: float = 0.0
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The public words of a generation."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mean_accepted": self.mean_accepted,
            "rows_per_step": self.rows_per_step,
            "draft_share": self.draft_share,
            "interrupted": self.interrupted,
            "prompt_tokens": self.prompt_tokens,
            "first_token_seconds": self.first_token_seconds,
            "engine": self.engine,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, otherwise sampled within top_k and top_p from a seed.

    speculation: words of subquad.speculation_words, such as {"method": "ngram"}; empty leaves it to the model's plan.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    speculation: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """What the steps after the first token took: how many, the tokens they verified, and seconds in all and for drafting."""

    steps: int = 0
    verified: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0


TokenStream = Callable[[Any, list[int], Sampling, tuple[int, ...], Work], Iterator[int]]


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    raw: bool = False,
    engine: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Answer a prompt.

    loaded: a model with a tokenizer.  raw: continue the text as it stands instead of applying the chat template.
    engine: "subquad", "transformers", or "auto": the first unless the model's graph cannot be decoded step by step.
    on_text: called with each new piece of text.  Raises GenerationError when the model has no tokenizer or cannot generate.
    """
    if loaded.codec is None:
        raise GenerationError(f"{loaded.origin} has no tokenizer, so it cannot answer a prompt.")
    ids = loaded.codec.encode(prompt) if raw else loaded.codec.chat(prompt)
    if not ids:
        raise GenerationError("the prompt is empty; give --prompt some text.")
    notes: list[str] = []
    stream, name = _engine(loaded.module, engine, notes)
    pieces = _Pieces(loaded.codec, on_text)
    tokens: list[int] = []
    start = time.perf_counter()
    first = last = start
    work = Work()
    interrupted = False
    try:
        for token in stream(loaded.module, ids, sampling, loaded.codec.eos, work):
            last = time.perf_counter()
            first = last if not tokens else first
            tokens.append(token)
            pieces.add(token)
    except KeyboardInterrupt:
        interrupted = True
        notes.append("interrupted; what was decoded until then is kept")
    pieces.finish()
    speed = (len(tokens) - 1) / (last - first) if len(tokens) > 1 and last > first else float("nan")
    found = Generated(pieces.text, tokens, len(ids), first - start, speed, name, interrupted=interrupted, notes=notes)
    if work.steps:
        found.mean_accepted = max(1.0, (len(tokens) - 1) / work.steps)
        found.rows_per_step = work.verified / work.steps
        found.draft_share = work.draft_seconds / work.seconds
    return found


def open_for_generation(
    spec: str, *, trust: bool = False, dtype: str = "auto", attention: str | None = None, engine: str = "auto"
) -> LoadedModel:
    """Open a model to generate with: what `subquad.save` wrote comes as its stored decoder, without capture or transformers.

    Every other source, another dtype or the engine "transformers" goes through open_model.
    """
    directory = Path(spec)
    if is_artifact(directory) and dtype == "auto" and attention is None and engine != "transformers":
        stored = stored_decoder(directory)
        if stored is not None:
            return LoadedModel(stored, None, read_codec(directory), "artifact", str(directory.resolve()))
    return open_model(spec, trust=trust, dtype=dtype, attention=attention)


def decoder_of(module: Any) -> Decoder:
    """The incremental decoder of a rewritten module, derived once; a stored decoder is returned as it is.

    Raises NotIncremental when the model's graph cannot be decoded step by step, GenerationError when it was not rewritten.
    """
    if isinstance(module, Decoder):
        return module
    from subquad.incremental import decoder

    record = _record(module)
    kept = module.__dict__.get("_subquad_decoder")
    if kept is not None and kept[0] is record:
        return kept[1]  # type: ignore[no-any-return]
    made = decoder(module)
    made.speculation, made.trained = record.loop, record.trained
    module.__dict__["_subquad_decoder"] = (record, made)
    return made


class Compiling:
    """The compilation of a decoder's one-token programs, in a thread beside generation; uncompiled ones serve meanwhile."""

    def __init__(self, module: Any) -> None:
        """module: a rewritten module or a stored decoder.  Anything else is left alone."""
        self.failure: str | None = None
        self.done, self.total = 0, 1
        self._thread = threading.Thread(target=self._work, args=(module,), name="subquad-compiling", daemon=True)
        self._thread.start()

    def _work(self, module: Any) -> None:
        try:
            if isinstance(module, Decoder) or _record(module) is not None:
                decoder_of(module).compile(wait=True, report=self._report)
        except SubquadError as error:
            self.failure = str(error)
        except Exception as error:
            self.failure = f"the decoder could not be compiled ({type(error).__name__}: {first_line(error)})."

    def _report(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def wait(self) -> str | None:
        """Wait with a progress bar until it is over; returns why it failed, None when it did not."""
        if self._thread.is_alive():
            with progress("compiling the decoder") as advance:
                while self._thread.is_alive():
                    self._thread.join(0.2)
                    advance(0, f"compiling the decoder, once per model: {self.done} of {self.total} programs")
        return self.failure


def compile_decoder(module: Any) -> str | None:
    """Compile the one-token programs of a module's decoder, with a progress bar; returns why that was not possible."""
    return Compiling(module).wait()


def _engine(module: Any, wanted: str, notes: list[str]) -> tuple[TokenStream, str]:
    if wanted not in ("auto", "subquad", "transformers"):
        raise GenerationError(f"engine {wanted!r} is unknown; known: auto, subquad, transformers.")
    own = hasattr(module, "generate") and not isinstance(module, Decoder)
    plain = own and _record(module) is None
    if wanted == "subquad" or (wanted == "auto" and not plain):
        try:
            derived = decoder_of(module)
        except SubquadError as refusal:
            if wanted == "subquad" or not own or not _is_refusal(refusal):
                raise
            notes.append(f"the model's own generate was used: {refusal}")
        else:
            return functools.partial(_derived_tokens, derived), "subquad"
    if not own:
        raise GenerationError(f"{type(module).__name__} has no generate method of its own; use the engine subquad.")
    return transformers_tokens, "transformers"


def _record(module: Any) -> Any:
    from subquad.application import rewritten

    return rewritten(module)


def _is_refusal(error: SubquadError) -> bool:
    from subquad.token_axis import NotIncremental

    return isinstance(error, NotIncremental)


def _derived_tokens(
    derived: Decoder, module: Any, ids: list[int], sampling: Sampling, eos: tuple[int, ...], work: Work
) -> Iterator[int]:
    wanted = spoken(dict(sampling.speculation), derived.speculation)
    choice = Choice(
        processors(sampling.temperature, sampling.top_k, sampling.top_p),
        sampling.temperature == 0,
        seeded(sampling.seed, derived.engine.device),
    )
    passes = derived.decode(
        torch.tensor([ids], device=derived.engine.device),
        choice=choice,
        ending=Ending(sampling.max_new_tokens, frozenset(eos)),
        drafter=None if wanted is None else derived.drafter(wanted),
        most=MOST if wanted is None else 1 + wanted.num_speculative_tokens,
    )
    for n, one in enumerate(passes):
        if n:
            work.steps += 1
            work.verified += one.verified
            work.seconds += one.seconds
            work.draft_seconds += one.draft_seconds
        for emission in one.emitted[0]:
            yield emission.token


def transformers_tokens(
    module: Any, ids: list[int], sampling: Sampling, eos: tuple[int, ...], work: Work
) -> Iterator[int]:
    """The model's own `generate`, cache on, its tokens handed on as they appear."""
    from transformers.generation.streamers import BaseStreamer

    found: queue.Queue[int | BaseException | None] = queue.Queue()

    class Hand(BaseStreamer):  # type: ignore[misc]
        """Puts every new token on the queue; the first call brings the prompt back."""

        def __init__(self) -> None:
            self.prompt = True

        def put(self, value: torch.Tensor) -> None:
            if self.prompt:
                self.prompt = False
                return
            found.put(int(value.flatten()[-1]))

        def end(self) -> None:
            found.put(None)

    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    if eos:
        options |= {"eos_token_id": list(eos), "pad_token_id": eos[0]}

    def run() -> None:
        try:
            prompt = torch.tensor([ids])
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with torch.no_grad():
                type(module).generate(
                    module, prompt, attention_mask=torch.ones_like(prompt), streamer=Hand(), **options
                )
        except BaseException as error:
            found.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        token = found.get()
        if token is None:
            break
        if isinstance(token, BaseException):
            raise token
        yield token
    thread.join()


class _Pieces:
    """Turns tokens into text piece by piece, holding back a character whose bytes are not all there yet."""

    def __init__(self, codec: TextCodec, on_text: Callable[[str], None] | None) -> None:
        self.codec, self.on_text = codec, on_text
        self.text = ""
        self.ids: list[int] = []
        self.shown = 0

    def add(self, token: int) -> None:
        if token in self.codec.eos:
            return
        self.ids.append(token)
        self._emit(self.codec.decode(self.ids), final=False)

    def finish(self) -> None:
        self._emit(self.codec.decode(self.ids), final=True)

    def _emit(self, piece: str, final: bool) -> None:
        if not final and piece.endswith("�"):
            return
        new = piece[self.shown :]
        self.text += new
        self.shown = len(piece)
        if new and self.on_text is not None:
            self.on_text(new)
        if not final and len(self.ids) > 64:
            keep = self.ids[-8:]
            self.ids, self.shown = keep, len(self.codec.decode(keep))

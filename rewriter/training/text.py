"""Token ids for training and for held-out measurement from a plain or gzipped text file."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from subquad.ir.errors import ConversionError

PIECE = 1 << 18
"""Characters tokenised at a time; pieces end at line breaks."""

Encoder = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Token ids int64 of one text: `training`, then what follows it as `held_out`; `digest` names the training ids."""

    training: torch.Tensor
    held_out: torch.Tensor

    @property
    def all(self) -> torch.Tensor:
        """All token ids in order."""
        return torch.cat([self.training, self.held_out])

    @property
    def digest(self) -> str:
        """A hash of all token ids."""
        return hashlib.sha256(self.training.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()[:16]


def encoder(tokenizer: Any) -> Encoder:
    """A function from text to ids, without special tokens, of a TextCodec, tokenizers.Tokenizer or plain callable.

    Raises ConversionError when there is no tokenizer.
    """
    if tokenizer is None:
        raise ConversionError(
            "the model came without a tokenizer; pass tokenizer=, or put tokenizer.json beside its weights."
        )
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(inner, "encode_batch"):
        return lambda text: list(inner.encode(text, add_special_tokens=False).ids)
    if callable(inner) and not hasattr(inner, "encode"):
        return lambda text: list(inner(text))
    return lambda text: list(inner.encode(text, add_special_tokens=False))


def read_corpus(path: str | Path, tokenizer: Any, training: int, held_out: int) -> Corpus:
    """The first `training` tokens of a text file, and up to `held_out` of those after them.

    path: UTF-8 text, gzipped when its name ends in .gz.  Only as much as is needed is read and tokenised.
    Raises ConversionError for a file that is missing, not text, torn, or too short for the training tokens.
    """
    encode = encoder(tokenizer)
    ids: list[int] = []
    for piece in _pieces(Path(path)):
        ids += encode(piece)
        if len(ids) >= training + held_out:
            break
    if len(ids) < training:
        raise ConversionError(
            f"{path} holds {len(ids)} tokens, which is less than the {training} that training asks for; "
            "give a longer text or ask for fewer tokens."
        )
    everything = torch.tensor(ids[: training + held_out], dtype=torch.int64)
    return Corpus(everything[:training].clone(), everything[training:].clone())


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file; raises ConversionError as `read_corpus` does."""
    for piece in _pieces(path):
        yield from piece.splitlines()


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _pieces(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise ConversionError(
            f"the text {path} {'is a directory' if path.is_dir() else 'does not exist'}; give a text file."
        )
    try:
        with _opened(path) as file:
            while True:
                piece = file.read(PIECE) + file.readline()
                if not piece:
                    return
                yield piece
    except UnicodeDecodeError as error:
        raise ConversionError(f"the text {path} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConversionError(f"the text {path} is not a whole gzip file: {error}.") from error
    except OSError as error:
        raise ConversionError(f"the text {path} cannot be read: {error.strerror or error}.") from error

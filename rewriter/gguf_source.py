"""Read a GGUF file: weights dequantised through transformers, config cleaned, tokenizer with its own pre-tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from subquad.ir.errors import ModelSourceError, first_line
from subquad.progress import progress
from subquad.tokenization import TextCodec

# What llama.cpp calls a pre-tokenizer, for the kinds that part every digit from its neighbours.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, TextCodec | None]:
    """The model and tokenizer that a GGUF file holds.

    path: the file.  dtype: of the dequantised weights; the whole file is dequantised, so that memory is that of `dtype`.
    Raises ModelSourceError for a file that is torn, of another kind, or of an architecture transformers cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelSourceError(f"{path} does not begin with the GGUF mark; it is another kind of file, or torn.")
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ModelSourceError("a GGUF file needs transformers and gguf: pip install 'subquad[hf]'.") from error
    try:
        with progress(f"dequantising {path.name}") as advance, _tensor_bar(advance):
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, **_dense_weights()
            )
            advance(0, "reading the tokenizer")
            codec = _codec(path, model)
    except Exception as error:
        raise ModelSourceError(
            f"{path} cannot be read as a GGUF model ({first_line(error)}); it may be torn: fetch it again."
        ) from error
    _clean(model, path, dtype)
    return model.eval(), codec


def _dense_weights() -> dict[str, Any]:
    """The option that makes transformers unpack every weight, where its version would rather keep GGUF blocks."""
    import transformers

    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _clean(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Undo what belongs to the file and not to the model: the quantisation note, float32 noise in constants, the name."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.hf_quantizer = None
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, flag, False):
            setattr(model, flag, False)
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        value = getattr(config, key, None)
        if isinstance(value, float):
            setattr(config, key, float(f"{value:.6g}"))
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config._name_or_path = str(path)


def _codec(path: Path, model: Any) -> TextCodec | None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        return None
    kind = GGUFReader(str(path)).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() in _SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = model.generation_config.eos_token_id
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    special = {key: str(value) for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    return TextCodec(tokenizer, loaded.chat_template, ids, special)


@contextmanager
def _tensor_bar(advance: Any) -> Iterator[None]:
    """Send transformers' own progress over GGUF tensors to our bar."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    def counted(tensors: Any, desc: str = "", **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, 1):
            yield tensor
            advance(1, f"dequantising tensor {done} of {len(tensors)}")

    shown = logging.is_progress_bar_enabled()
    original = getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    if original is not None:
        reader.tqdm = counted
    try:
        yield
    finally:
        if original is not None:
            reader.tqdm = original
        if shown:
            logging.enable_progress_bar()

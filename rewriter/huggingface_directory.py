"""Open a model that transformers knows, from a local directory or by hub id, with nothing left uninitialised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from subquad.checkpoint_files import check_directory
from subquad.ir.errors import ModelSourceError, SubquadError, TrustError, first_line
from subquad.tokenization import TextCodec, read_codec, read_json


def open_directory(
    directory: Path, dtype: torch.dtype | None, trust: bool, attention: str | None
) -> tuple[torch.nn.Module, TextCodec | None]:
    """The model and tokenizer of a directory in Hugging Face format.

    dtype: None keeps the stored one.  attention: "eager", "sdpa" or None.  Raises ModelSourceError for a directory that is
    incomplete or whose weights do not fit its config, TrustError when its config names modelling code of its own.
    """
    check_directory(directory)
    config = read_json(directory / "config.json")
    module = _load(str(directory), config, dtype, trust, attention, str(directory))
    return module, read_codec(directory) or _converted_codec(str(directory))


def open_hub(
    name: str, dtype: torch.dtype | None, trust: bool, attention: str | None
) -> tuple[torch.nn.Module, TextCodec | None]:
    """The model and tokenizer behind a hub id, from the local hub cache or the network.

    Raises ModelSourceError, one sentence, when the id is unknown or the network is down.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelSourceError("a hub id needs transformers: pip install 'subquad[hf]'.") from error
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"] + (["*.py"] if trust else [])
    try:
        directory = Path(snapshot_download(name, allow_patterns=patterns))
    except SubquadError:
        raise
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        cause = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {first_line(error)}"
        raise ModelSourceError(
            f"{name} is neither a path here nor in the local hub cache, and it cannot be fetched ({cause})."
        ) from error
    return open_directory(directory, dtype, trust, attention)


def _load(
    directory: str, config: dict[str, Any], dtype: torch.dtype | None, trust: bool, attention: str | None, shown: str
) -> torch.nn.Module:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ModelSourceError(f"{shown} needs transformers: pip install 'subquad[hf]'.") from error
    own_code = bool(config.get("auto_map"))
    names = config.get("architectures") or []
    known: Any = getattr(transformers, names[0], None) if names else None
    if own_code and known is None and not trust:
        raise TrustError(f"{shown} brings its own modelling code, which would be run; pass --trust (trust=True).")
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    if known is None:
        known = transformers.AutoModelForCausalLM if not names or "CausalLM" in names[0] else transformers.AutoModel
        options["trust_remote_code"] = trust and own_code
    shown_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        module, loading = known.from_pretrained(directory, **options)
    except Exception as error:
        raise ModelSourceError(f"transformers cannot load {shown}: {first_line(error)}.") from error
    finally:
        if shown_bars:
            logging.enable_progress_bar()
    missing = sorted(loading.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelSourceError(f"the weights of {shown} lack {missing[0]}{more}, which its config.json calls for.")
    return module.eval()


def _converted_codec(directory: str) -> TextCodec | None:
    """The tokenizer of a directory without tokenizer.json, when transformers can turn it into one."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory)
    except Exception:
        return None
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        return None
    special = {key: str(value) for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    eos = () if loaded.eos_token_id is None else (int(loaded.eos_token_id),)
    return TextCodec(tokenizer, loaded.chat_template, eos, special)

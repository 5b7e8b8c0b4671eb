"""Open what the user names as MODEL: a directory, a .gguf, a .pt2, file.py:factory, a hub id, or smollm2."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subquad.huggingface_directory import open_directory, open_hub
from subquad.ir.errors import ModelSourceError, SubquadError, TrustError, did_you_mean, first_line
from subquad.packaged_weights import demo_weights
from subquad.tokenization import TextCodec

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DEMO = "smollm2"


@dataclass
class LoadedModel:
    """A model as opened from a source.

    module: the nn.Module, or the torch.export.ExportedProgram of a .pt2.  example_inputs: what its forward takes; None for
    a Hugging Face model, whose inputs are known.  codec: tokenizer, chat template and end-of-text ids, None without them.
    kind: "huggingface" | "gguf" | "program" | "factory".  origin: what reopens it: a path, hub id or file.py:factory.
    notes: what the user should know about how it was read.
    """

    module: Any
    example_inputs: Any
    codec: TextCodec | None
    kind: str
    origin: str
    notes: list[str] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, or None."""
        return None if self.codec is None else self.codec.tokenizer

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, or None."""
        return None if self.codec is None else self.codec.chat_template

    @property
    def config(self) -> Any:
        """The Hugging Face config, or None."""
        return getattr(self.module, "config", None)


def open_model(
    spec: str, *, trust: bool = False, dtype: str = "auto", attention: str | None = None, plain: bool = False
) -> LoadedModel:
    """Open a model by name.

    spec: a directory in Hugging Face format or as `subquad.save` wrote it, a .gguf file, a .pt2 program,
    `path/to/file.py:factory`, a hub id such as `owner/name`, or `smollm2`.  trust: required for sources that are code
    (.pt2, file.py:factory, a directory with its own modelling code).  dtype: "auto" (as stored), "fp32", "bf16", "fp16" or
    "fp64".  attention: "eager" or "sdpa", the spelling that a Hugging Face model uses; None is its default.  plain: of
    what `subquad.save` wrote, open the model without its rewrites.
    Raises ModelSourceError (missing, torn or unknown), TrustError (code without trust).
    """
    if dtype not in DTYPES:
        raise ModelSourceError(f"dtype {dtype!r} is unknown; {did_you_mean(dtype, DTYPES)}")
    wanted = DTYPES[dtype]
    if spec == DEMO:
        loaded = _huggingface(demo_weights(), DEMO, wanted, trust, attention)
    elif re.search(r"\.py:\w+$", spec):
        loaded = _factory(spec, trust)
    elif spec.endswith(".gguf"):
        loaded = _gguf(_existing_file(spec), wanted, attention)
    elif spec.endswith(".pt2"):
        loaded = _program(_existing_file(spec), trust)
    elif os.path.isdir(spec) and not plain and os.path.isfile(os.path.join(spec, "subquad.json")):
        return _artifact(Path(spec), trust, dtype)
    elif os.path.isdir(spec):
        loaded = _huggingface(Path(spec), str(Path(spec).resolve()), wanted, trust, attention)
    elif os.path.isfile(spec):
        raise ModelSourceError(
            f"{spec} is a file of a kind that subquad does not read; give a model directory, .gguf, .pt2 or file.py:factory."
        )
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) and not os.path.isdir(os.path.dirname(spec)):
        module, codec = open_hub(spec, wanted, trust, attention)
        loaded = LoadedModel(module, None, codec, "huggingface", spec)
    else:
        raise ModelSourceError(
            f"{spec} does not exist; give a model directory, .gguf, .pt2, file.py:factory, hub id or {DEMO}."
        )
    if loaded.kind == "factory" and wanted is not None:
        loaded.module.to(wanted)
    if isinstance(loaded.module, torch.nn.Module):
        loaded.module.eval()
        remember_source(loaded)
    return loaded


def remember_source(loaded: LoadedModel) -> None:
    """Leave a note on the module of where it came from, so that `save` can store it; no parameter or state is added."""
    object.__setattr__(loaded.module, "_subquad_source", loaded)


def source_note(module: torch.nn.Module) -> LoadedModel | None:
    """The note that open_model left on a module, or None."""
    note = getattr(module, "_subquad_source", None)
    return note if isinstance(note, LoadedModel) else None


def _huggingface(
    directory: Path, origin: str, dtype: torch.dtype | None, trust: bool, attention: str | None
) -> LoadedModel:
    module, codec = open_directory(directory, dtype, trust, attention)
    return LoadedModel(module, None, codec, "huggingface", origin)


def _artifact(directory: Path, trust: bool, dtype: str) -> LoadedModel:
    from subquad.artifact import load

    module = load(directory, trust=trust, dtype=dtype)
    note = source_note(module)
    if note is None:
        raise ModelSourceError(f"{directory} was loaded without its source note.")
    return note


def _existing_file(spec: str) -> Path:
    path = Path(spec)
    if not path.is_file():
        raise ModelSourceError(f"{spec} does not exist.")
    if path.stat().st_size == 0:
        raise ModelSourceError(f"{spec} is empty.")
    return path.resolve()


def _gguf(path: Path, dtype: torch.dtype | None, attention: str | None) -> LoadedModel:
    from subquad.gguf_source import read_gguf

    module, codec = read_gguf(path, dtype or torch.bfloat16)
    if attention is not None:
        module.set_attn_implementation(attention)  # type: ignore[operator]
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    note = (
        f"{path.name} was dequantised to {str(dtype or torch.bfloat16).removeprefix('torch.')}: "
        f"{path.stat().st_size / 2**20:.0f} MiB on disk, {size / 2**20:.0f} MiB in memory"
    )
    return LoadedModel(module, None, codec, "gguf", str(path), [note])


def _program(path: Path, trust: bool) -> LoadedModel:
    if not trust:
        raise TrustError(
            f"{path} is an exported program, and loading one can run code stored in it; pass --trust (trust=True)."
        )
    try:
        program = torch.export.load(str(path))
    except Exception as error:
        raise ModelSourceError(
            f"{path} cannot be loaded as an exported program ({first_line(error)}); it may be torn, or need its model's "
            "package imported."
        ) from error
    return LoadedModel(program, program.example_inputs, None, "program", str(path))


def _factory(spec: str, trust: bool) -> LoadedModel:
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ModelSourceError(f"{file} does not exist.")
    if not trust:
        raise TrustError(f"{file} is Python code that will be run to build the model; pass --trust (trust=True).")
    module_name = f"subquad_user_{path.stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise ModelSourceError(f"{file} cannot be read as Python code.")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    except SubquadError:
        raise
    except Exception as error:
        raise ModelSourceError(f"{file} failed while it was imported, {_where(error, path)}.") from error
    finally:
        sys.path.remove(str(path.parent))
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelSourceError(f"{file} has no function {name!r}; {did_you_mean(name, public)}")
    try:
        made = factory()
    except Exception as error:
        raise ModelSourceError(f"{spec} failed, {_where(error, path)}.") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise ModelSourceError(f"{spec} returned a {type(made).__name__}; a factory returns (model, example_inputs).")
    return LoadedModel(made[0], made[1], None, "factory", f"{path}:{name}")


def _where(error: Exception, path: Path) -> str:
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    place = f"at line {line}: " if line is not None else ""
    return f"{place}{type(error).__name__}: {first_line(error)}"

"""Read tensors of a safetensors file straight into memory that is already there, so that no second copy is ever held."""

from __future__ import annotations

import ctypes
import json
import math
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from subquad.ir.errors import ArtifactError
from subquad.weight_storage import TensorForm

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class TensorFile:
    """An open safetensors file.  `forms`: dtype and shape of each tensor by name."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError when the header is damaged or holds a dtype that torch lacks."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            size = path.stat().st_size
            header = json.loads(self._file.read(min(length, size)))
            header.pop("__metadata__", None)
            self.forms = {name: TensorForm(DTYPES[e["dtype"]], tuple(e["shape"])) for name, e in header.items()}
            self._starts = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()}
            for name, form in self.forms.items():
                if min(form.shape, default=0) < 0 or not 8 + length <= self._starts[name] <= size - _bytes(form):
                    raise ValueError(f"{name} does not lie inside the file")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
            self._file.close()
            raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); save it again.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a contiguous CPU tensor of the stored dtype and shape; raises ArtifactError when the file does not fit."""
        form = self.forms.get(name)
        if form is None or (form.dtype, form.shape) != (target.dtype, tuple(target.shape)):
            raise ArtifactError(f"{self.path} lacks {name} or holds another form of it; save the artifact again.")
        count = _bytes(form)
        if count == 0:
            return
        memory = memoryview((ctypes.c_char * count).from_address(target.data_ptr())).cast("B")
        self._file.seek(self._starts[name])
        done = 0
        while done < count:
            got = self._file.readinto(memory[done:])
            if not got:
                raise ArtifactError(f"{self.path} ends inside {name}; save the artifact again.")
            done += got

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own."""
        if name not in self.forms:
            raise ArtifactError(f"{self.path} lacks {name}; save the artifact again.")
        tensor = torch.empty(self.forms[name].shape, dtype=self.forms[name].dtype)
        self.read_into(name, tensor)
        return tensor


def _bytes(form: TensorForm) -> int:
    return math.prod(form.shape) * form.dtype.itemsize

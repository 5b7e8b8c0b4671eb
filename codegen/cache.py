"""Keeps generated sources in a private, content-addressed directory and imports them from there."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def directory() -> Path:
    """$SUBQUAD_CACHE, or subquad/ under $XDG_CACHE_HOME (or ~/.cache), then kernels/: made private (0700).

    Raises PermissionError when it belongs to another user, because code is imported from it.
    """
    base = os.environ.get("SUBQUAD_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subquad"
    for place in (root, root / "kernels"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = place.stat()
        if state.st_uid != os.getuid():
            raise PermissionError(
                f"The kernel cache {place} belongs to another user; set SUBQUAD_CACHE to a directory of your own."
            )
        if stat.S_IMODE(state.st_mode) & 0o077:
            place.chmod(0o700)
    return root / "kernels"


def store(text: str, name: str) -> Path:
    """Write `text` to <name>_<hash of the text>.py in the cache, by a temporary file and a rename, unless it is there
    already.
    """
    path = directory() / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:24]}.py"
    if not path.exists() or path.read_text() != text:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    return path


def load(path: Path) -> ModuleType:
    """Import a stored source once per process."""
    name = f"subquad_kernels_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"The generated kernel {path} cannot be imported; delete it and try again.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

"""The user's private cache directory: where it is, that nobody else can write to it, how full it is, how to empty it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subquad.ir.errors import SubquadError


def cache_root() -> Path:
    """$XDG_CACHE_HOME/subquad (or ~/.cache/subquad), made with mode 0700.

    Raises SubquadError when the directory cannot be made or belongs to another user, since code is loaded from it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(base) / "subquad"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = root.stat()
        if state.st_uid != os.getuid():
            raise SubquadError(
                f"the cache {root} belongs to another user; set XDG_CACHE_HOME to a directory of your own."
            )
        if stat.S_IMODE(state.st_mode) & 0o077:
            root.chmod(0o700)
    except OSError as error:
        raise SubquadError(
            f"the cache {root} cannot be used ({error.strerror}); set XDG_CACHE_HOME to a directory you can write."
        ) from error
    return root


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well, and vanishes when it does not.

    An existing `target` is moved aside first and removed only after the new one stands, so it stays whole on any failure.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        if not _alive(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True)
    fresh = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        _take_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _take_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    aside = target.parent / f".{target.name}.{os.getpid()}.old"
    target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def cache_entries() -> list[dict[str, object]]:
    """What the cache holds: name, files and bytes of each entry, largest first."""
    entries = []
    for path in cache_root().iterdir():
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        entries.append({"name": path.name, "files": len(files), "bytes": sum(p.stat().st_size for p in files)})
    return sorted(entries, key=lambda entry: -int(str(entry["bytes"])))


def clear_cache(name: str | None = None) -> int:
    """Remove one entry, or all of them; returns the bytes freed.  Raises SubquadError for an unknown name."""
    root = cache_root()
    known = {path.name: path for path in root.iterdir()}
    if name is not None and name not in known:
        raise SubquadError(f"the cache {root} has no entry {name!r}; `subquad cache` lists what it holds.")
    freed = 0
    for entry in cache_entries():
        if name in (None, entry["name"]):
            freed += int(str(entry["bytes"]))
            path = known[str(entry["name"])]
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed

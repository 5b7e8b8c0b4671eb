"""Operators: importing this package registers them with torch.library; it knows tensors, never graphs."""

import sys

if __name__ == "kernels":
    # Python was started in the repository root, so that this folder hides PyPI's `kernels`: hand over to the real one.
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _root]
    del sys.modules["kernels"]
    sys.modules["kernels"] = __import__("kernels")

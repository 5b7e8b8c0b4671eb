"""Entry point of the `subquad` command and of `python -m subquad.cli`."""

import sys
from pathlib import Path

# Started in the repository root, its folder `kernels` would hide PyPI's package of that name from transformers.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


def main() -> None:
    """Run the command line; every way it ends is an exit status."""
    from subquad.cli.ending import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

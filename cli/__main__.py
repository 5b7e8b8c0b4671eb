"""Entry point of the `subquad` command and of `python -m subquad.cli`."""

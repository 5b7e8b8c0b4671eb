"""How a command ends: exit statuses, and one sentence on stderr instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

OK, BUG, MISTAKE, REFUSED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status.

    0: done.  2: a user's mistake.  3: a site was refused and none rewritten.  130: Ctrl-C.  141: the reader of the output
    went away.  1: a defect of subquad itself, named in one sentence; SUBQUAD_TRACEBACK=1 shows where.
    """
    from subquad.cli.root import root

    _quiet()
    try:
        with root.make_context("subquad", list(arguments)) as context:
            result = root.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
        return _say(error.format_message().rstrip(".") + where + ".", MISTAKE, error)
    except click.ClickException as error:
        return _say(error.format_message(), MISTAKE, error)
    except (KeyboardInterrupt, click.Abort) as error:
        return _say("interrupted; nothing half-written is left behind.", INTERRUPTED, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        return _say(f"{error.strerror or error}:{place}." if place else f"{error.strerror or error}.", MISTAKE, error)
    except Exception as error:
        from subquad.ir.errors import SubquadError, first_line

        if isinstance(error, SubquadError):
            stopped = isinstance(error.__cause__, KeyboardInterrupt)
            return _say(str(error), INTERRUPTED if stopped else MISTAKE, error)
        return _say(
            f"this is a defect of subquad ({type(error).__name__}: {first_line(error)}); SUBQUAD_TRACEBACK=1 shows where.",
            BUG,
            error,
        )
    return result if isinstance(result, int) else OK


def _say(sentence: str, status: int, error: BaseException) -> int:
    if os.environ.get("SUBQUAD_TRACEBACK") == "1":
        traceback.print_exception(error)
    try:
        print(f"subquad: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        return BROKEN_PIPE
    return status


def _quiet() -> None:
    """Library warnings are not meant for whoever runs a command; SUBQUAD_TRACEBACK=1 lets them through."""
    if os.environ.get("SUBQUAD_TRACEBACK") == "1":
        return
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

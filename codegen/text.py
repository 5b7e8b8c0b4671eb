"""Assembles the text of one generated file: header, imports, helpers, one kernel whose holes are filled line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Template

Argument = tuple[str, str]
"""(name, Triton type) of a kernel argument: "*bf16", "i32", ...; "i64:16" is a stride, on whose divisibility by 16 alone a
kernel may be specialised, so that loads are wide."""

STRIDE = "i64:16"

_FILE = '''"""$header
"""

import triton
import triton.language as tl
$helpers

@triton.jit(do_not_specialize=$unspecialised)
def kernel(
    $arguments,
):
$body
'''


def fill(template: str, **holes: str | int | float | Sequence[str]) -> list[str]:
    """The lines of `template` with its $holes filled; a hole alone on its line takes any number of lines and keeps the
    indentation.
    """
    found: list[str] = []
    for line in template.strip("\n").splitlines():
        alone = re.fullmatch(r"( *)\$(\w+)", line)
        if alone is None:
            found.append(Template(line).substitute(holes))
            continue
        value = holes[alone[2]]
        lines = str(value).splitlines() if isinstance(value, str | int | float) else value
        found.extend(alone[1] + part if part.strip() else "" for text in lines for part in text.splitlines())
    return [line for line in found if line.strip()]


def kernel_file(header: str, helpers: str, arguments: Sequence[Argument], body: Sequence[str]) -> str:
    """The source of one file; sizes are never specialised on, so that no length costs a compilation."""
    names = ", ".join(name for name, _ in arguments)
    return Template(_FILE).substitute(
        header=header.strip(), helpers=helpers.rstrip() + "\n", arguments=names,
        unspecialised=repr([name for name, kind in arguments if not kind.startswith("*") and kind != STRIDE]),
        body="\n".join("    " + line for line in body),
    )  # fmt: skip

"""A reason, as a value, why something in the graph was left as it is, where in the user's code, and what would change it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.fx

from subquad.ir.advice import advice_for
from subquad.ir.graph import module_path, source_of

Node = torch.fx.Node


@dataclass(frozen=True)
class Refusal:
    """Why a finding was not recognised or not rewritten.

    path: module path of the node, "" for the root.  what: the thing looked at ("softmax", "attention", "linearize:lolcats").
    reason: one sentence a user can act on.  source: file and line of the user's code, "" when unknown.  code: that line.
    kind: the word of the reason by which advice is found, "" for none.
    """

    path: str
    what: str
    reason: str
    source: str = ""
    code: str = ""
    kind: str = ""

    @property
    def advice(self) -> str:
        """What would make it rewritable, in one sentence; "" when nothing is known to."""
        return advice_for(self.kind)

    def json(self) -> dict[str, str]:
        """The public words of a refusal."""
        return {
            "path": self.path,
            "what": self.what,
            "reason": self.reason,
            "source": self.source,
            "code": self.code,
            "kind": self.kind,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.path or '<root>'}: {self.what}: {self.reason}{where}"


def refuse(node: Node, what: str, reason: str, kind: str = "", at: Node | None = None) -> Refusal:
    """A refusal of what `node` anchors, at the line of user code that made `at`, or that made `node`."""
    source, code = user_line(at) if isinstance(at, Node) else ("", "")
    if not source:
        source, code = user_line(node)
    return Refusal(module_path(node), what, reason.rstrip(".") + ".", source, code, kind)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)[^\n]*\n?[ \t]*([^\n]*)')
_INSTALLED = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python\d[\d.]*)[/\\]")


def user_line(node: Node) -> tuple[str, str]:
    """(file:line, its text) of the innermost frame that is no installed library's; of a library's own where there is none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, text in reversed(frames):
        if not _INSTALLED.search(file):
            return f"{file}:{line}", _text(text)
    inner = source_of(node)
    return inner, next((_text(text) for file, line, text in reversed(frames) if f"{file}:{line}" == inner), "")


def _text(line: str) -> str:
    return "" if line.startswith('File "') else line.strip()

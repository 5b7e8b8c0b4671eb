"""The import table of the house: what each floor may import, checked on the syntax tree of every file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": ("subquad.kernels",),
    "rewriter/ir": ("subquad.ir",),
    "codegen": ("subquad.codegen", "subquad.kernels", "subquad.ir"),
    "passes": ("subquad.passes", "subquad.ir", "subquad.kernels"),
    "rewriter/runtime": ("subquad.runtime", "subquad.kernels", "subquad.ir"),
    "rewriter": ("subquad",),
    "cli": ("subquad",),
}
NEVER = {
    "rewriter": ("subquad.cli",),
    "cli": ("subquad.kernels", "subquad.codegen", "subquad.passes", "subquad.runtime"),
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "rewriter/ir": {"torch", "sympy", "networkx", "rich"},
    "codegen": {"torch", "triton", "sympy"},
    "passes": {"torch", "sympy", "networkx", "numpy"},
    "rewriter/runtime": {"torch", "transformers"},
    "rewriter": {
        "torch", "sympy", "networkx", "numpy", "safetensors", "tokenizers", "jinja2", "rich", "transformers", "peft", "gguf",
        "packaging", "huggingface_hub",
    },
    "cli": {"torch", "click", "rich"},
}  # fmt: skip
AT_FIRST_USE_ONLY = {"transformers", "peft", "gguf", "triton", "accelerate", "rich"}


def floor_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    two = "/".join(parts[:2])
    return two if two in FLOORS else parts[0]


def sources() -> list[Path]:
    return [
        p for top in ("kernels", "codegen", "passes", "rewriter", "cli") for p in sorted((ROOT / top).rglob("*.py"))
    ]


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def imported(tree: ast.AST) -> list[tuple[str, int, bool]]:
    """(dotted name, line, at module level) of every import; `from a import b` counts as a.b when b may be a module."""
    found = []
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        or isinstance(outer, ast.Try)
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(("." * node.level + (node.module or ""), node.lineno, id(node) not in lazy))
            elif node.module == "subquad":
                found += [(f"subquad.{alias.name}", node.lineno, id(node) not in lazy) for alias in node.names]
            else:
                found.append((node.module or "", node.lineno, id(node) not in lazy))
    return found


def is_seam(where: str) -> bool:
    """The files of the Hugging Face seam are imported at first use as a whole."""
    return where.startswith("rewriter/runtime/hf_")


def offences(floor: str, text: str, where: str) -> list[str]:
    bad = []
    for name, line, eager in imported(ast.parse(text)):
        top = name.split(".")[0]
        if name.startswith("."):
            bad.append(f"{where}:{line}: relative import {name}")
        elif top == "subquad":
            if not within(name, FLOORS[floor]) or within(name, NEVER.get(floor, ())):
                bad.append(f"{where}:{line}: {floor} may not import {name}")
        elif top not in sys.stdlib_module_names and top != "__future__":
            if top not in THIRD_PARTY[floor]:
                bad.append(f"{where}:{line}: {floor} may not import {name}")
            elif eager and top in AT_FIRST_USE_ONLY and floor != "cli" and not is_seam(where):
                bad.append(f"{where}:{line}: {name} must be imported at first use, inside a function")
    return bad


def test_every_file_keeps_to_its_floor() -> None:
    bad = [line for p in sources() for line in offences(floor_of(p), p.read_text(), str(p.relative_to(ROOT)))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("floor", "text"),
    [
        ("kernels", "import subquad.ir.plan"),
        ("kernels", "import triton"),
        ("kernels", "import transformers"),
        ("rewriter/ir", "from subquad.kernels import spec"),
        ("passes", "def f():\n    from subquad.codegen import build"),
        ("passes", "from subquad import inspect"),
        ("codegen", "from subquad.passes import fuse"),
        ("rewriter", "from subquad.cli import env"),
        ("rewriter", "from transformers import AutoModel"),
        ("cli", "from subquad.kernels import spec"),
        ("cli", "import transformers"),
        ("rewriter", "from .pipeline import rewrite"),
    ],
)
def test_the_check_sees_an_offence(floor: str, text: str) -> None:
    assert offences(floor, text, "made-up")


def test_every_file_begins_with_a_docstring_of_one_line() -> None:
    bad = []
    for path in sources():
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text))
        if not docstring or not text.startswith(('"""', 'r"""')):
            bad.append(str(path))
        elif len(docstring.splitlines()[0]) < 15 or not docstring.splitlines()[0].endswith((".", ":", "?")):
            bad.append(f"{path}: {docstring.splitlines()[0]!r}")
    assert not bad, "\n".join(bad)


def test_no_file_outgrows_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_the_seam_is_never_imported_at_module_level_elsewhere() -> None:
    eager = [
        f"{p.relative_to(ROOT)}:{line}: {name}"
        for p in sources()
        for name, line, at_module_level in imported(ast.parse(p.read_text()))
        if name.startswith("subquad.runtime.hf_") and at_module_level and not is_seam(str(p.relative_to(ROOT)))
    ]
    assert not eager, "\n".join(eager)

"""Operators on tensors: softmax attention over segments, and the recurrence with a window branch."""

import sys

if __name__ == "kernels":
    # The repository root is on sys.path and this folder was taken for PyPI's `kernels`: give way to the real package, or to
    # a module without a file, which transformers takes for none.
    from importlib import import_module
    from pathlib import Path
    from types import ModuleType

    _root = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    del sys.modules["kernels"]
    try:
        import_module("kernels")
    except ModuleNotFoundError:
        sys.modules["kernels"] = ModuleType("kernels")
else:
    from subquad.kernels.decomposition import decompositions
    from subquad.kernels.evaluation import evaluate
    from subquad.kernels.expression import parse
    from subquad.kernels.intervals import block_tests
    from subquad.kernels.narrow_linear import narrow_linear
    from subquad.kernels.prefix_attention import prefix_attention
    from subquad.kernels.provider import provide, provided
    from subquad.kernels.recurrence_by_token import recurrence_reference
    from subquad.kernels.recurrence_forms import recurrence_torch
    from subquad.kernels.recurrence_op import recurrence
    from subquad.kernels.softmax_op import softmax_attention
    from subquad.kernels.softmax_reference import softmax_attention_reference
    from subquad.kernels.softmax_torch import softmax_attention_torch
    from subquad.kernels.spec import RecurrenceSpec, SoftmaxSpec
    from subquad.kernels.state import merge, merge_all
    from subquad.kernels.tree import ancestor_bits, ancestors, tree_mask

    __all__ = [
        "RecurrenceSpec",
        "SoftmaxSpec",
        "ancestor_bits",
        "ancestors",
        "block_tests",
        "decompositions",
        "evaluate",
        "merge",
        "merge_all",
        "narrow_linear",
        "parse",
        "prefix_attention",
        "provide",
        "provided",
        "recurrence",
        "recurrence_reference",
        "recurrence_torch",
        "softmax_attention",
        "softmax_attention_reference",
        "softmax_attention_torch",
        "tree_mask",
    ]

"""The parts that all softmax kernels share: tables and scalars of the mask, index names, block tests, score modifiers."""

from __future__ import annotations

from subquad.codegen.expressions import FEATURE_HELPERS, MASK_HELPERS, predicate, ranks, scalar_count
from subquad.codegen.loading import Rows, loaded
from subquad.codegen.recurrence_parts import pad
from subquad.codegen.surrounded import around_of
from subquad.codegen.text import Argument
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import SoftmaxSpec, block_tests, parse

LOG2E = 1.4426950408889634


class SoftmaxParts:
    """Prints the parts of one kernel from its KernelSpec. Scores are in units of log 2, so that weights are exp2."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.what = SoftmaxSpec.parse(spec.operator)
        self.around = around_of(spec)
        wanted = len(ranks(self.what.mask))
        if len(spec.tables) < wanted:
            raise ValueError(
                f"KernelSpec.tables is {spec.tables!r}; the mask {self.what.mask!r} reads {wanted} tables."
            )
        self.element = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[spec.dtype]
        self.precision = "ieee"
        self.key_pad, self.value_pad = pad(spec.key_dim), pad(spec.value_dim)
        self.helpers = MASK_HELPERS + FEATURE_HELPERS

    def has(self, flag: str) -> bool:
        """True if an optional input is present."""
        return flag in self.spec.flags

    def arguments(self) -> list[Argument]:
        """Tables with strides and sizes, then scalars, of the mask."""
        found: list[Argument] = []
        for index, rank in enumerate(ranks(self.what.mask)):
            found.append((f"t{index}_ptr", "*i8" if self.spec.tables[index] == "int8" else "*i64"))
            found += [(f"t{index}_{part}{axis}", "i64") for axis in range(rank) for part in ("stride", "size")]
        return found + [(f"s{index}", "i64") for index in range(scalar_count(self.what.mask))]

    def tests(self, vectors: frozenset[str], names: dict[str, str]) -> tuple[str, str]:
        """(maybe, always) of a block as Triton conditions; what reads one of `vectors` is reduced over the block's rows."""
        maybe, always = ("True", "True") if self.what.mask is None else block_tests(self.what.mask)
        found = []
        for text, reduce in ((maybe, "max"), (always, "min")):
            printed = predicate(text, names, "test")
            if parse(text, "test").names & vectors:
                printed = f"tl.{reduce}(({printed}).to(tl.int32)) != 0"
            found.append(printed)
        return found[0], found[1]

    def modified(self, slope: bool = False) -> list[str]:
        """Lines from score = q.k to score in units of log 2, bias aside; with `slope` also d(capped) / d(scaled)."""
        scale, cap = self.what.scale, self.what.softcap
        if cap is None:
            factor = scale if self.has("bias") else scale * LOG2E
            return [f"score = score * {factor!r}"]
        lines = [f"capped = tanh(score * {scale / cap!r})"]
        if slope:
            lines.append("slope = 1.0 - capped * capped")
        return [*lines, f"score = {cap if self.has('bias') else cap * LOG2E!r} * capped"]

    def biased(self, place: str, ok: str) -> list[str]:
        """Lines that add the bias at `place` and go over to units of log 2."""
        if not self.has("bias"):
            return []
        return [f"score = (score + tl.load(bias_ptr + {place}, mask={ok}, other=0.0)) * {LOG2E!r}"]

    def restricted(self, always: str, names: dict[str, str]) -> list[str]:
        """Lines that take the mask into `seen`, unless the whole block is visible."""
        if self.what.mask is None or always == "True":
            return []
        line = f"seen &= {predicate(self.what.mask, names)}"
        return [line] if always == "False" else [f"if ({always}) == 0:", f"    {line}"]

    def formula(self) -> str:
        """The scores as a formula for the header."""
        text = f"{self.what.scale!r} * q.k"
        text = text if self.what.softcap is None else f"{self.what.softcap!r} * tanh({text} / {self.what.softcap!r})"
        return text + (" + bias" if self.has("bias") else "")

    def rows(self, side: str, name: str, place: str, ok: str, row: str, time: str, down: bool = False) -> list[str]:
        """Lines that load <name>, rows of q or k (columns along the first axis if `down`), after their norm and rotary
        embedding; `row` and `time` are where each row's cosines and sines stand.
        """
        part = self.around.q if side == "q" else self.around.k
        if part.empty:
            tile = Rows(side, place, ok, "", self.spec.key_dim, self.key_pad, down)
            columns = f"tl.arange(0, {self.key_pad})"
            return [f"{name} = {tile.tile(side, place, columns, f'({columns} < {self.spec.key_dim})', wide=False)}"]
        table = f"{row} * {side}_table_stride_b + {time} * {side}_table_stride_t"
        tile = Rows(side, place, ok, table, self.spec.key_dim, self.key_pad, down)
        lines = loaded(part, tile, name, 0, self.spec.key_dim, self.key_pad)
        kind = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}[self.spec.dtype]
        return [*lines, f"{name} = {name}.to({kind})"]

    def dot(self, a: str, b: str) -> str:
        """The product a @ b with fp32 sums."""
        return f'tl.dot({a}, {b}, input_precision="{self.precision}")'

"""The parts that all recurrence kernels share: feature blocks, decays, score tiles, and the products they enter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from subquad.codegen.expressions import Columns, is_rowwise, print_feature
from subquad.codegen.loading import Rows, loaded
from subquad.codegen.surrounded import around_of
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec
from subquad.kernels.expression import parse
from subquad.kernels.features import width as features_width

Decay = Literal["none", "scalar", "channel"]

CHANNEL_HELPERS = '''

@triton.jit
def block_row(x, j, chunk: tl.constexpr, columns: tl.constexpr):
    """Row j of each block of 16 rows of x, in every row of its block."""
    blocks = tl.reshape(x, [chunk // 16, 16, columns])
    row = tl.sum(tl.where(tl.arange(0, 16)[None, :, None] == j, blocks, 0.0), axis=1)
    return tl.reshape(tl.broadcast_to(row[:, None, :], [chunk // 16, 16, columns]), [chunk, columns])


@triton.jit
def block_start(G, s: tl.constexpr, chunk: tl.constexpr):
    """G at the first row of block s."""
    return tl.sum(tl.where((tl.arange(0, chunk) == 16 * s)[:, None], G, 0.0), axis=0)[None, :]


@triton.jit
def below(G, s: tl.constexpr, chunk: tl.constexpr):
    """exp(G_i - G_n) for the rows i of block s, n its first row; 0 elsewhere. No exponent is positive."""
    inside = (tl.arange(0, chunk) // 16 == s)[:, None]
    return tl.exp(tl.where(inside, G - block_start(G, s, chunk), float("-inf")))


@triton.jit
def above(G, s: tl.constexpr, chunk: tl.constexpr):
    """exp(G_n - G_j) for the rows j before block s, n its first row; 0 elsewhere. No exponent is positive."""
    before = (tl.arange(0, chunk) < 16 * s)[:, None]
    return tl.exp(tl.where(before, block_start(G, s, chunk) - G, float("-inf")))


@triton.jit
def decayed_scores(q, k, G, chunk: tl.constexpr, columns: tl.constexpr):
    """sum_f q_if k_jf exp(G_if - G_jf) for j <= i; what stands above the diagonal has no meaning.

    Two levels (Gated Linear Attention, 2312.06635): between blocks of 16 rows both exponents are taken from the start of
    the row's block, so that neither is positive; within a block they are taken pair by pair.
    """
    rows = tl.arange(0, chunk)
    score = tl.zeros([chunk, chunk], tl.float32)
    for s in tl.static_range(1, chunk // 16):
        score += $between
    for j in range(16):
        column = rows // 16 * 16 + j
        reach = tl.where((column <= rows)[:, None], G - block_row(G, j, chunk, columns), float("-inf"))
        pair = tl.sum(q * block_row(k, j, chunk, columns) * tl.exp(reach), axis=1)
        score += tl.where(rows[None, :] == column[:, None], pair[:, None], 0.0)
    return score


@triton.jit
def decayed_left(a, k, G, chunk: tl.constexpr, columns: tl.constexpr):
    """sum_j a_ij k_jf exp(G_if - G_jf) for a lower triangle a: the gradient of decayed_scores at q."""
    rows = tl.arange(0, chunk)
    found = tl.zeros([chunk, columns], tl.float32)
    for s in tl.static_range(1, chunk // 16):
        found += below(G, s, chunk) * $left
    for j in range(16):
        column = rows // 16 * 16 + j
        reach = tl.where((column <= rows)[:, None], G - block_row(G, j, chunk, columns), float("-inf"))
        pair = tl.sum(tl.where(rows[None, :] == column[:, None], a, 0.0), axis=1)
        found += pair[:, None] * block_row(k, j, chunk, columns) * tl.exp(reach)
    return found


@triton.jit
def decayed_right(a, q, G, chunk: tl.constexpr, columns: tl.constexpr):
    """sum_i a_ij q_if exp(G_if - G_jf) for a lower triangle a: the gradient of decayed_scores at k."""
    rows = tl.arange(0, chunk)
    found = tl.zeros([chunk, columns], tl.float32)
    for s in tl.static_range(1, chunk // 16):
        part = tl.where((rows // 16 == s)[:, None], a, 0.0)
        found += above(G, s, chunk) * $right
    for i in range(16):
        row = rows // 16 * 16 + i
        reach = tl.where((row >= rows)[:, None], block_row(G, i, chunk, columns) - G, float("-inf"))
        pair = tl.sum(tl.where(rows[:, None] == row[None, :], a, 0.0), axis=0)
        found += pair[:, None] * block_row(q, i, chunk, columns) * tl.exp(reach)
    return found
'''

INVERSE_HELPERS = '''

@triton.jit
def unit_inverse(a, chunk: tl.constexpr, size: tl.constexpr):
    """(I + a)^-1 in fp32 for a strictly lower a: blocks of `size` rows by substitution, then one product per block row.

    A Neumann product would lose all digits for keys that are alike.
    """
    count: tl.constexpr = chunk // size
    rows = tl.arange(0, chunk)
    on_diagonal = (tl.arange(0, count)[:, None] == tl.arange(0, count)[None, :])[:, None, :, None]
    x = -tl.sum(tl.where(on_diagonal, tl.reshape(a, [count, size, count, size]), 0.0), axis=2)
    place = tl.arange(0, size)[None, :, None]
    for i in range(1, size):
        row = tl.sum(tl.where(place == i, x, 0.0), axis=1)
        row += tl.sum(row[:, :, None] * x, axis=1)
        x = tl.where(place == i, row[:, None, :], x)
    spread = tl.broadcast_to(x[:, :, None, :], [count, size, count, size])
    x = tl.reshape(tl.where(on_diagonal, spread, 0.0), [chunk, chunk])
    x = tl.where(rows[:, None] == rows[None, :], 1.0, x)
    lower = tl.where(rows[:, None] // size > rows[None, :] // size, a, 0.0)
    return $merge
'''


@dataclass(frozen=True)
class Block:
    """Some columns of the feature map: `width` columns (padded to `pad`) from `offset` of phi, made by `text` from the
    columns of x from `low` on (of all of x if `whole`).
    """

    index: int
    text: str
    offset: int
    width: int
    pad: int
    low: int
    whole: bool


def pad(size: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def text_width(text: str, key_dim: int, feature_dim: int) -> int:
    """Columns of one expression of a feature map whose weights have `feature_dim` columns."""
    weight = torch.empty(1, 1, feature_dim, device="meta")
    return int(features_width((text,), key_dim, [weight] * parse(text, "feature").indices("w")))


class Parts:
    """Prints the parts of one kernel; element types, precision and head sizes come from its KernelSpec."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.what = RecurrenceSpec.parse(spec.operator)
        self.around = around_of(spec)
        self.chunk = spec.block_q
        self.element = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}[spec.dtype]
        cuda = spec.target.startswith("cuda")
        self.precision = "ieee" if not cuda else "tf32x3" if spec.dtype == "float32" else "tf32"
        self.exact = "ieee" if not cuda else "tf32x3"
        self.value_block = min(pad(spec.value_dim), spec.block_kv)
        self.delta = self.what.update == "delta"
        self.sums = self.what.sums
        self.reverse = "reverse" in spec.flags

    def row_of(self, place: str) -> str:
        """The row of the token at `place`, counted from the first row of sequence n in the direction of the pass."""
        return f"first + stop - 1 - ({place})" if self.reverse else place

    @property
    def last_row(self) -> str:
        """The row of the chunk's last token."""
        return f"({self.row_of(f'(tl.minimum(start + {self.chunk}, stop) - 1)')})"

    @property
    def whole_rows(self) -> bool:
        """True where the output needs a whole row of V in one program: for a normaliser or a norm over V."""
        return self.what.normaliser in ("rms", "group") or self.around.o.norm != "none"

    @property
    def slice(self) -> int:
        """Widest slice of columns of a feature map that acts on each column alone. Where channels decay, addresses and gates
        of many narrow tiles fill the registers of kernels that keep all of them, and products in two levels those of wide ones.
        """
        if self.spec.dtype == "float32":
            return 32
        return (
            {"states": 128, "grad_states": 128, "grad_transform": 64}.get(self.spec.part, 32)
            if self.decay == "channel"
            else 64
        )

    @property
    def rows_of_block(self) -> int:
        """Rows that the inverse of the UT transform substitutes: half a chunk, so that one product completes it."""
        return max(16, self.chunk // 2)

    @property
    def decay(self) -> Decay:
        """How log decays reach the kernels: not at all, one per head and token, or one per head, token and column."""
        kinds: dict[str, Decay] = {"none": "none", "head": "scalar", "token": "scalar"}
        return kinds.get(self.what.decay, "channel")

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks of the feature map of the keys (and, but for their texts, of the queries)."""
        return self.blocks_of("k")

    def blocks_of(self, side: str) -> list[Block]:
        """The blocks of phi for side "q" or "k"."""
        texts = self.what.feature_map if side == "q" else self.what.key_map
        found: list[Block] = []
        offset = 0
        for text in texts:
            width = text_width(text, self.spec.key_dim, self.spec.feature_dim)
            step = width if is_rowwise(text) else self.slice
            for low in range(0, width, step):
                part = min(step, width - low)
                whole = is_rowwise(text)
                found.append(Block(len(found), text, offset + low, part, pad(part), 0 if whole else low, whole))
            offset += width
        return found

    @property
    def features(self) -> int:
        """Columns of phi."""
        return sum(block.width for block in self.blocks)

    def weights(self, side: str) -> list[str]:
        """Lines that load the weights of side "q" or "k" as tiles wN_<side>, and the whole rows x_<side> if a block reads
        them.
        """
        texts = self.what.feature_map if side == "q" else self.what.key_map
        used = sorted({int(n) for text in texts for n in re.findall(r"\bw(\d+)\b", text)})
        k, f = self.spec.key_dim, self.spec.feature_dim
        rows, columns = f"tl.arange(0, {pad(k)})", f"tl.arange(0, {pad(f or 1)})"
        return [
            f"w{n}_{side} = tl.load(w{n}_{side}_ptr + (h * {k} + {rows})[:, None] * {f} + {columns}[None, :],"
            f" mask=({rows} < {k})[:, None] & ({columns} < {f})[None, :], other=0.0).to(tl.float32)"
            for n in used
        ]

    def row(self, side: str, low: int, width: int, padded: int, name: str) -> list[str]:
        """Lines that load columns low.. of q or k of the chunk's rows as fp32, after their norm and rotary embedding."""
        heads, head, rows, ok = (
            ("heads", "h", "rows", "row_ok") if side == "q" else ("k_heads", "k_head", "key_rows", "key_ok")
        )
        key_dim = self.spec.key_dim
        table = f"({rows} // table_period) * {side}_table_stride_b + ({rows} % table_period) * {side}_table_stride_t"
        found = Rows(side, f"({rows} * {heads} + {head}) * {key_dim}", ok, table, key_dim, pad(key_dim))
        return loaded(self.around.q if side == "q" else self.around.k, found, name, low, width, padded)

    def feature(self, side: str, block: Block) -> list[str]:
        """Lines that compute the tile <side><index> [chunk, pad] of phi; 0 in rows and columns that are not real."""
        mine = self.blocks_of(side)[block.index]
        name, lines = f"{side}{block.index}", []
        width, padded = (self.spec.key_dim, pad(self.spec.key_dim)) if mine.whole else (mine.width, mine.pad)
        lines += self.row(side, mine.low, width, padded, name if mine.text == "x" else "x")
        if mine.text == "x":
            return lines
        ok = "row_ok" if side == "q" else "key_ok"
        real = f"({ok}[:, None] & (tl.arange(0, {mine.pad}) < {mine.width})[None, :])"
        value = print_feature(
            mine.text, f"_{side}", self.precision, Columns(f"tl.arange(0, {padded})", width),
            Columns(f"tl.arange(0, {pad(self.spec.feature_dim)})", self.spec.feature_dim), lines,
        )  # fmt: skip
        return [*lines, f"{name} = tl.where({real}, {value}, 0.0)"]

    def decays(self, block: Block | None = None) -> list[str]:
        """Lines that load the running sums of log decays: of all columns (scalar), or of one block (channel)."""
        if self.decay == "scalar" and block is None:
            return [
                "G = tl.load(G_ptr + rows * heads + h, mask=row_ok, other=0.0)",
                f"last = tl.load(G_ptr + {self.last_row} * heads + h)",
                "up, down, whole = tl.exp(G), tl.exp(last - G), tl.exp(last)",
            ]
        if self.decay == "channel" and block is not None:
            i, columns = block.index, f"tl.arange(0, {block.pad})"
            place = f"{self.features} + {block.offset} + {columns}"
            final = f"({self.last_row} * heads + h) * {place}"
            return [
                f"G{i} = tl.load(G_ptr + (rows * heads + h)[:, None] * {self.features} + {block.offset} + {columns}[None, :],"
                f" mask=row_ok[:, None] & ({columns} < {block.width})[None, :], other=0.0)",
                f"last{i} = tl.load(G_ptr + {final}, mask={columns} < {block.width}, other=0.0)",
            ]
        return []

    def risen(self, x: str, block: Block) -> str:
        """x e^G, row by row: what reads or writes the state at the start of the chunk."""
        how = {"none": "", "scalar": " * up[:, None]", "channel": f" * tl.exp(G{block.index})"}[self.decay]
        return f"({x}{how})" if how else x

    def sunk(self, x: str, block: Block) -> str:
        """x e^(G_last - G), row by row: what reads or writes the state at the end of the chunk."""
        i = block.index
        how = {"none": "", "scalar": " * down[:, None]", "channel": f" * tl.exp(last{i}[None, :] - G{i})"}[self.decay]
        return f"({x}{how})" if how else x

    def aged(self, x: str, block: Block, vector: bool = False) -> str:
        """A state [pad, V] (or its vector [pad]) after the decays of the whole chunk."""
        channel = f" * tl.exp(last{block.index})" + ("" if vector else "[:, None]")
        how = {"none": "", "scalar": " * whole", "channel": channel}[self.decay]
        return f"({x}{how})" if how else x

    def dot(self, a: str, b: str, precision: str | None = None) -> str:
        """The product a @ b with fp32 sums; operands in bf16 for bf16 kernels unless a precision is named."""
        if precision is None and self.spec.dtype == "bfloat16":
            return f"tl.dot(({a}).to(tl.bfloat16), ({b}).to(tl.bfloat16))"
        return f'tl.dot({a}, {b}, input_precision="{precision or self.precision}")'

    def scores(self, a: str, b: str, block: Block, precision: str | None = None) -> str:
        """The share of one block in a b^T; channel decays are in it, scalar ones enter by `triangle`."""
        if self.decay == "channel":
            return f"decayed_scores({a}, {b}, G{block.index}, {self.chunk}, {block.pad})"
        return self.dot(a, f"tl.trans({b})", precision)

    def left(self, a: str, k: str, block: Block) -> str:
        """sum_j a_ij k_j with the decays between j and i, for a that `triangle` has already treated."""
        if self.decay == "channel":
            return f"decayed_left({a}, {k}, G{block.index}, {self.chunk}, {block.pad})"
        return self.dot(a, k)

    def right(self, a: str, q: str, block: Block) -> str:
        """sum_i a_ij q_i with the decays between j and i, for a that `triangle` has already treated."""
        if self.decay == "channel":
            return f"decayed_right({a}, {q}, G{block.index}, {self.chunk}, {block.pad})"
        return self.dot(f"tl.trans({a})", q)

    def triangle(self, a: str, strict: bool = False) -> str:
        """The (strict) lower triangle of a, with scalar decays; the exponent is masked before it is taken. Read from
        behind it is always strict: a token's own key belongs to the other direction.
        """
        inside = f"(local[:, None] {'>' if strict or self.reverse else '>='} local[None, :])"
        if self.decay != "scalar":
            return f"tl.where({inside}, {a}, 0.0)"
        return f"tl.where({inside}, {a}, 0.0) * tl.exp(tl.where({inside}, G[:, None] - G[None, :], float('-inf')))"

    def helpers(self) -> str:
        """The functions that these parts call."""
        text = ""
        if self.decay == "channel":
            text += CHANNEL_HELPERS.replace(
                "$between", self.dot("q * below(G, s, chunk)", "tl.trans(k * above(G, s, chunk))")
            )
            text = text.replace("$left", self.dot("a", "k * above(G, s, chunk)"))
            text = text.replace("$right", self.dot("tl.trans(part)", "q * below(G, s, chunk)"))
        if self.delta:
            inner = f'tl.dot(lower, x, input_precision="{self.exact}")'
            step = f'tl.dot(x, {inner}, input_precision="{self.exact}")'
            text += INVERSE_HELPERS.replace("$merge", "x" if self.chunk == self.rows_of_block else f"x - {step}")
        return text

"""Prints loads of q and k with their norm and rotary embedding, and the norm and gate of o before it is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subquad.codegen.text import STRIDE, Argument
from subquad.kernels.surroundings import Epilogue, Prologue


@dataclass(frozen=True)
class Rows:
    """Rows of q or k in memory. side: "q" or "k". place: offset of each row's first column. ok: which rows are there.
    table: offset of each row's cosines and sines. width: columns of a row, of which a tile has `pad`. down: True where the
    columns run along the first axis of a tile.
    """

    side: str
    place: str
    ok: str
    table: str
    width: int
    pad: int
    down: bool = False

    def row(self, vector: str) -> str:
        """A vector over rows, as it meets a tile."""
        return f"{vector}[None, :]" if self.down else f"{vector}[:, None]"

    def column(self, vector: str) -> str:
        """A vector over columns, as it meets a tile."""
        return f"{vector}[:, None]" if self.down else f"{vector}[None, :]"

    def tile(self, name: str, place: str, columns: str, inside: str, other: float = 0.0, wide: bool = True) -> str:
        """A load of (row, column) from <name>_ptr, `other` where one of them is not there; as fp32 unless `wide` is False."""
        return (
            f"tl.load({name}_ptr + {self.row(f'({place})')} + {self.column(columns)},"
            f" mask={self.row(self.ok)} & {self.column(inside)}, other={other})" + (".to(tl.float32)" if wide else "")
        )


def loaded(part: Prologue, rows: Rows, name: str, low: int, width: int, padded: int) -> list[str]:
    """Lines that make <name> the columns low .. low + width of the rows in fp32 after their prologue, 0 elsewhere."""
    side, whole = rows.side, width == rows.width
    column, real = f"{side}_column", f"({side}_column < {low + width})"
    lines: list[str] = []
    if part.norm != "none" and not whole:
        before = replace(part, norm="none", weight=False, norm_last=False) if part.norm_last else Prologue()
        lines += [
            *loaded(before, rows, f"{side}_whole", 0, rows.width, rows.pad),
            _inverse(part, rows, f"{side}_whole"),
        ]
    lines.append(f"{column} = {f'{low} + ' if low else ''}tl.arange(0, {padded})")
    turned = bool(part.rotary) and low < part.start + part.rotary and low + width > part.start
    lines += _pairs(part, side, low + width) if turned else []
    first = f"{side}_first" if turned and part.style == "deinterleaved" else column
    lines.append(f"{name} = {rows.tile(side, rows.place, first, real)}")
    early = part.norm != "none" and not part.norm_last
    lines += [_inverse(part, rows, name)] if early and whole else []
    lines += [_weighted(rows, name, first, real)] if early and part.weight else []
    if turned:
        other, inside = f"{side}_other", f"{side}_turned"
        lines.append(f"{side}_partner = {rows.tile(side, rows.place, other, inside)}")
        lines += [_weighted(rows, f"{side}_partner", other, inside)] if early and part.weight else []
        cos = rows.tile(f"{side}_cos", rows.table, f"{side}_pair", inside, 1.0)
        sin = rows.tile(f"{side}_sin", rows.table, f"{side}_pair", inside)
        lines.append(f"{name} = {name} * {cos} + {side}_partner * {rows.column(f'{side}_sign')} * {sin}")
    lines += [_inverse(part, rows, name)] if part.norm_last and whole else []
    lines += [f"{name} = {name} * {rows.row(f'{side}_inverse')}"] if part.norm != "none" else []
    return lines + ([_weighted(rows, name, column, real)] if part.norm_last and part.weight else [])


def _pairs(part: Prologue, side: str, end: int) -> list[str]:
    """Lines for each turned column's angle, the sign of its sine, and the columns that are read for it."""
    half, column, turn = part.rotary // 2, f"{side}_column", f"{side}_turn"
    lines = [
        f"{turn} = {column} - {part.start}" if part.start else f"{turn} = {column}",
        f"{side}_turned = ({turn} >= 0) & ({turn} < {part.rotary}) & ({column} < {end})",
    ]
    low = f"{turn} % 2 == 0" if part.style == "interleaved" else f"{turn} < {half}"
    lines.append(f"{side}_sign = tl.where({low}, -1.0, 1.0)")
    if part.style == "interleaved":
        lines += [f"{side}_pair = {turn} // 2", f"{side}_other = tl.where({low}, {column} + 1, {column} - 1)"]
        return lines
    lines.append(f"{side}_pair = tl.where({low}, {turn}, {turn} - {half})")
    if part.style == "half":
        return [*lines, f"{side}_other = tl.where({low}, {column} + {half}, {column} - {half})"]
    even = f"{f'{part.start} + ' if part.start else ''}2 * {side}_pair"
    return [
        *lines,
        f"{side}_first = tl.where({side}_turned, {even} + tl.where({low}, 0, 1), {column})",
        f"{side}_other = {even} + tl.where({low}, 1, 0)",
    ]


def _inverse(part: Prologue, rows: Rows, name: str) -> str:
    mean = f" / {rows.width}" if part.norm == "rms" else ""
    return f"{rows.side}_inverse = tl.rsqrt(tl.sum({name} * {name}, axis={0 if rows.down else 1}){mean} + {part.eps!r})"


def _weighted(rows: Rows, name: str, columns: str, inside: str) -> str:
    weight = f"tl.load({rows.side}_weight_ptr + {columns}, mask={inside}, other=0.0)"
    return f"{name} = {name} * {rows.column(weight)}"


def prologue_arguments(part: Prologue, side: str) -> list[Argument]:
    """Arguments that the loads of one side read."""
    found: list[Argument] = [(f"{name}_ptr", "*fp32") for name in part.tensors(side)]
    if part.rotary:
        wide = STRIDE if part.rotary % 32 == 0 else "i64"
        found += [(f"{side}_table_stride_b", wide), (f"{side}_table_stride_t", wide)]
    return found


def epilogue_lines(
    part: Epilogue, name: str, cells: str, ok: str, width: int, columns: str, axis: int = 1
) -> list[str]:
    """Lines that take <name>, whose columns run along `axis` and are 0 beyond `width`, through the epilogue of o; `cells` are
    its places in the output.
    """
    row, column = ("[:, None]", "[None, :]") if axis else ("", "")
    lines = []
    if part.norm == "rms":
        lines.append(f"{name} = {name} * tl.rsqrt(tl.sum({name} * {name}, axis={axis}){row} / {width} + {part.eps!r})")
    if part.weight:
        lines.append(
            f"{name} = {name} * tl.load(o_weight_ptr + {columns}, mask={columns} < {width}, other=0.0){column}"
        )
    if part.gate != "none":
        lines.append(f"o_gate = tl.load(o_gate_ptr + {cells}, mask={ok}, other=0.0).to(tl.float32)")
        lines.append(f"{name} = {name} * {'o_gate * ' if part.gate == 'silu' else ''}tl.sigmoid(o_gate)")
    return lines


def epilogue_arguments(part: Epilogue, element: str) -> list[Argument]:
    """Arguments that the epilogue reads; the gate has the type of the output."""
    return [(f"{name}_ptr", element if name == "o_gate" else "*fp32") for name in part.tensors()]

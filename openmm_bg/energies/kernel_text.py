"""Pieces of C++: expressions as sequences of constants, and geometric variables with their way back to the atoms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node
from openmm_bg.energies.model import Coordinate

AXES = "xyz"


class Expressions:
    """Writes nodes as a sequence of constants, each node once."""

    def __init__(self, names: dict[str, str], fresh: Iterator[int], function_number: Callable[[object], int]) -> None:
        self.names, self.fresh, self.function_number = names, fresh, function_number
        self.known: dict[Node, str] = {}

    def lines(self, nodes: list[Node]) -> list[str]:
        lines = []
        for node in expression.in_order(nodes):
            if node in self.known:
                continue
            if node.operation == "number":
                self.known[node] = f"V(T({node.value!r}))" if _finite(node.value) else _special(node.value)
            elif node.operation == "variable":
                self.known[node] = self.names[node.value]
            else:
                name = self.known[node] = f"e{next(self.fresh)}"
                lines.append(f"const V {name} = {self.write(node)};")
        return lines

    def name(self, node: Node) -> str:
        return self.known[node]

    def write(self, node: Node) -> str:
        arguments = [self.known[a] for a in node.operands]
        match node.operation:
            case "add":
                for k in (0, 1):
                    negated = _negated(node.operands[k])
                    if negated is not None and negated in self.known:
                        return f"{arguments[1 - k]} - {self.known[negated]}"
                return " + ".join(arguments)
            case "multiply":
                negated = _negated(node)
                return f"-{self.known[negated]}" if negated is not None else " * ".join(arguments)
            case "recip":
                inverse = self.names.get(f"1/{node.operands[0].value}")
                return inverse or f"f_recip({arguments[0]})"
            case "select" if node.operands[0].operation == "step":
                condition = self.known[node.operands[0].operands[0]]
                return f"f_where(f_ge({condition}, zero), {arguments[1]}, {arguments[2]})"
            case "sec" | "csc" | "cot":
                plain = {"sec": "cos", "csc": "sin", "cot": "tan"}[node.operation]
                return f"f_recip(f_{plain}({arguments[0]}))"
            case "table":
                function, orders = node.value
                head = f"table[FUNCTIONS + {self.function_number(function)}]"
                size = len(arguments)
                listed = ", ".join(map(str, orders))
                return (
                    f"[&] {{ const V at[{size}] = {{{', '.join(arguments)}}}; const int orders[{size}] = {{{listed}}}; "
                    f"return f_table<{size}>({head}, at, orders); }}()"
                )
        return f"f_{node.operation}({', '.join(arguments)})"


def _negated(node: Node) -> Node | None:
    """x of -x."""
    if node.operation == "multiply":
        for inner, other in (node.operands, node.operands[::-1]):
            if expression.is_number(inner, -1):
                return other
    return None


def geometry(coordinate: Coordinate, q: str) -> tuple[list[str], list[str]]:
    """How a coordinate is computed, and how a slope, written ``$``, goes from it to the gradient."""
    particles = coordinate.particles
    if coordinate.kind in AXES:
        axis = AXES.index(coordinate.kind)
        place = f"D(a[{particles[0]}], {axis})"
        return [f"const V {q} = X(a[{particles[0]}], {axis});"], [f"{place} = {place} + $;"]
    if coordinate.kind == "distance":
        i, j = particles
        forward = [
            *_difference(f"{q}d", i, j),
            f"const V {q}2 = {_dot(f'{q}d', f'{q}d')}, {q}i = f_rsqrt({q}2);",
            # coincident atoms are at distance 0, and pull in no direction
            f"const V {q}inv = f_where(f_gt({q}2, zero), {q}i, zero), {q} = {q}2 * {q}inv;",
        ]
        back = [f"const V {q}f = $ * {q}inv;"]
        for axis, letter in enumerate(AXES):
            back.append(f"{{ const V f = {q}f * {q}d{letter};")
            back += [f"  D(a[{i}], {axis}) = D(a[{i}], {axis}) + f; D(a[{j}], {axis}) = D(a[{j}], {axis}) - f; }}"]
        return forward, back
    if coordinate.kind == "angle":
        i, j, k = particles
        a, b, c = f"{q}a", f"{q}b", f"{q}c"
        forward = [
            *_difference(a, i, j),
            *_difference(b, k, j),
            *_cross(c, a, b),
            f"const V {q}aa = {_dot(a, a)}, {q}bb = {_dot(b, b)}, {q}cc = {_dot(c, c)};",
            f"const V {q}ci = f_where(f_gt({q}cc, zero), f_rsqrt({q}cc), zero);",
            f"const V {q} = f_where(f_gt({q}aa * {q}bb, zero), f_atan2({q}cc * {q}ci, {_dot(a, b)}), zero / zero);",
        ]
        back = [
            *_cross(f"{q}u", a, c),
            *_cross(f"{q}w", c, b),
            f"const V {q}fi = $ * {q}ci / {q}aa, {q}fk = $ * {q}ci / {q}bb;",
        ]
        for axis, letter in enumerate(AXES):
            back += [
                f"{{ const V f = {q}fi * {q}u{letter}, h = {q}fk * {q}w{letter};",
                f"  D(a[{i}], {axis}) = D(a[{i}], {axis}) + f; D(a[{k}], {axis}) = D(a[{k}], {axis}) + h;",
                f"  D(a[{j}], {axis}) = D(a[{j}], {axis}) - (f + h); }}",
            ]
        return forward, back
    i, j, k, m = particles
    b1, b2, b3, c1, c2 = (f"{q}{name}" for name in ("b1", "b2", "b3", "c1", "c2"))
    forward = [
        *_difference(b1, j, i),
        *_difference(b2, k, j),
        *_difference(b3, m, k),
        *_cross(c1, b1, b2),
        *_cross(c2, b2, b3),
        f"const V {q}n1 = {_dot(c1, c1)}, {q}n2 = {_dot(c2, c2)}, {q}bb = {_dot(b2, b2)};",
        f"const V {q}bi = f_rsqrt({q}bb), {q}bl = {q}bb * {q}bi;",
        f"const V {q}y = {_dot(b1, c2)} * {q}bl, {q}x = {_dot(c1, c2)};",
        f"const V {q} = f_where(f_gt({q}n1 * {q}n2, zero), f_atan2({q}y, {q}x), zero / zero);",
    ]
    back = [
        f"const V {q}fi = -($ * {q}bl / {q}n1), {q}fm = $ * {q}bl / {q}n2;",
        f"const V {q}p = {_dot(b1, b2)} * {q}bi * {q}bi, {q}s = {_dot(b3, b2)} * {q}bi * {q}bi;",
    ]
    for axis, letter in enumerate(AXES):
        back += [
            f"{{ const V f = {q}fi * {c1}{letter}, h = {q}fm * {c2}{letter}, w = {q}p * f - {q}s * h;",
            f"  D(a[{i}], {axis}) = D(a[{i}], {axis}) + f; D(a[{j}], {axis}) = D(a[{j}], {axis}) - (f + w);",
            f"  D(a[{k}], {axis}) = D(a[{k}], {axis}) + (w - h); D(a[{m}], {axis}) = D(a[{m}], {axis}) + h; }}",
        ]
    return forward, back


def _difference(name: str, head: int, tail: int) -> list[str]:
    return [f"const V {name}{axis} = X(a[{head}], {k}) - X(a[{tail}], {k});" for k, axis in enumerate(AXES)]


def _dot(a: str, b: str) -> str:
    return "(" + " + ".join(f"{a}{axis} * {b}{axis}" for axis in AXES) + ")"


def _cross(name: str, a: str, b: str) -> list[str]:
    return [
        f"const V {name}{x} = {a}{y} * {b}{z} - {a}{z} * {b}{y};"
        for x, y, z in (("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y"))
    ]


def indent(lines: list[str], levels: int = 1) -> list[str]:
    return ["  " * levels + line for line in lines]


def _finite(value: float) -> bool:
    return value - value == 0


def _special(value: float) -> str:
    return "(zero / zero)" if value != value else "(one / zero)" if value > 0 else "(-(one / zero))"

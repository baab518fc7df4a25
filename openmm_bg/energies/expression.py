"""Algebraic expressions as graphs: built, simplified, differentiated, evaluated in torch.

A force of OpenMM is a formula in a few geometric variables. Here a formula is a graph of `Node`, in which equal
subexpressions are one and the same object: differentiating and evaluating cost what the distinct nodes cost. What
reads formulas from text is `lepton`; what writes them as C++ is `kernel_source`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_bg.errors import InputError


class Node:
    """One operation and its operands; immutable, and unique: equal nodes are identical.

    Attributes
    ----------
    operation : str
        ``"number"``, ``"variable"``, ``"table"`` or a key of `OPERATIONS`.
    operands : tuple of Node
    value
        The number, the name of the variable, or for a table ``(table, orders)``: a tabulated function and how
        often it is differentiated along each argument.

    Examples
    --------
    >>> x = variable("x")
    >>> x * x + 1 is 1 + x * x
    True
    >>> derivative(x * x, "x")
    (x + x)
    """

    __slots__ = ("__weakref__", "operands", "operation", "value")
    operation: str
    operands: tuple[Node, ...]
    value: Any

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[Any, ...]]:
        return _make, (self.operation, self.operands, self.value)

    def __copy__(self) -> Node:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self

    def __add__(self, other: Node | float) -> Node:
        return add(self, as_node(other))

    def __sub__(self, other: Node | float) -> Node:
        return add(self, -as_node(other))

    def __mul__(self, other: Node | float) -> Node:
        return multiply(self, as_node(other))

    def __truediv__(self, other: Node | float) -> Node:
        return multiply(self, apply("recip", as_node(other)))

    def __radd__(self, other: float) -> Node:
        return as_node(other) + self

    def __rsub__(self, other: float) -> Node:
        return as_node(other) - self

    def __rmul__(self, other: float) -> Node:
        return as_node(other) * self

    def __rtruediv__(self, other: float) -> Node:
        return as_node(other) / self

    def __neg__(self) -> Node:
        return multiply(number(-1.0), self)

    def __pow__(self, exponent: Node | float) -> Node:
        return power(self, as_node(exponent))

    def __repr__(self) -> str:
        if self.operation == "number":
            return f"{self.value:g}"
        if self.operation == "variable":
            return str(self.value)
        if self.operation in _INFIX:
            return f"({f' {_INFIX[self.operation]} '.join(map(repr, self.operands))})"
        return f"{self.operation}({', '.join(map(repr, self.operands))})"


_INFIX = {"add": "+", "multiply": "*"}
_KNOWN: weakref.WeakValueDictionary[Any, Node] = weakref.WeakValueDictionary()
_COMMUTATIVE = ("add", "multiply", "min", "max")
_ORDER: weakref.WeakKeyDictionary[Node, int] = weakref.WeakKeyDictionary()


def _make(operation: str, operands: tuple[Node, ...], value: Any = None) -> Node:
    if operation in _COMMUTATIVE:
        operands = tuple(sorted(operands, key=_ORDER.__getitem__))
    # repr tells 0.0 from -0.0 and finds NaN again
    key = (operation, tuple(map(id, operands)), repr(value) if operation == "number" else value)
    node = _KNOWN.get(key)
    if node is None:
        node = object.__new__(Node)
        node.operation, node.operands, node.value = operation, operands, value
        _KNOWN[key] = node
        _ORDER[node] = _make.count = _make.count + 1  # type: ignore[attr-defined]
    return node


_make.count = 0  # type: ignore[attr-defined]


def number(value: float) -> Node:
    return _make("number", (), float(value))


def variable(name: str) -> Node:
    return _make("variable", (), name)


def as_node(value: Node | float) -> Node:
    return value if isinstance(value, Node) else number(value)


def is_number(node: Node, value: float | None = None) -> bool:
    return node.operation == "number" and (value is None or node.value == value)


def add(a: Node, b: Node) -> Node:
    if is_number(a) and is_number(b):
        return number(a.value + b.value)
    if is_number(a, 0):
        return b
    if is_number(b, 0):
        return a
    return _make("add", (a, b))


def multiply(a: Node, b: Node) -> Node:
    if is_number(b):
        a, b = b, a
    if is_number(a):
        if is_number(b):
            return number(a.value * b.value)
        if a.value == 0:
            return a
        if a.value == 1:
            return b
        if b.operation == "multiply":  # numbers gather on the outside
            for inner, rest in (b.operands, b.operands[::-1]):
                if is_number(inner):
                    return multiply(number(a.value * inner.value), rest)
    return _make("multiply", (a, b))


def power(base: Node, exponent: Node) -> Node:
    """base^exponent; whole exponents become multiplications, exact for negative bases too."""
    if is_number(exponent):
        p = exponent.value
        if is_number(base):
            return _constant("power", (base, exponent))
        if p == int(p) and abs(p) <= 64:
            p = int(p)
            if p < 0:
                return power(apply("recip", base), number(-p))
            if p == 0:
                return number(1.0)
            half = power(base, number(p // 2)) if p > 1 else None
            return base if half is None else half * half * base if p % 2 else half * half
        if p == 0.5:
            return apply("sqrt", base)
        if p == -0.5:
            return apply("rsqrt", base)
    return _make("power", (base, exponent))


def apply(name: str, *operands: Node) -> Node:
    """A function of `OPERATIONS` by name."""
    if name == "square":
        return power(operands[0], number(2))
    if name == "cube":
        return power(operands[0], number(3))
    if name == "power":
        return power(*operands)
    if name == "recip":
        (a,) = operands
        if a.operation == "sqrt":
            return apply("rsqrt", *a.operands)
        if a.operation == "recip":
            return a.operands[0]
    if name == "select" and (operands[1] is operands[2] or is_number(operands[0])):
        return operands[2] if is_number(operands[0], 0) else operands[1]
    if all(is_number(a) for a in operands):
        return _constant(name, operands)
    return _make(name, operands)


def table(function: Any, *operands: Node, orders: tuple[int, ...] | None = None) -> Node:
    """A tabulated function of the operands, differentiated `orders` times along each."""
    return _make("table", operands, (function, orders or (0,) * len(operands)))


def _constant(name: str, operands: tuple[Node, ...]) -> Node:
    arguments = [torch.tensor(a.value, dtype=torch.float64) for a in operands]
    return number(float(OPERATIONS[name][0](*arguments)))


# ---- what each operation computes, and its partial derivatives ----------------------------------------------------


def _select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition != 0, a, b)


def _step(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))


def _partial(name: str, operands: tuple[Node, ...]) -> tuple[Node, ...]:
    """The derivatives of an operation with respect to its operands."""
    node = apply(name, *operands)
    a, b = operands[0], operands[-1]
    one = number(1.0)
    match name:
        case "sqrt":
            return (0.5 * apply("rsqrt", a),)
        case "rsqrt":
            return (-0.5 * node**3,)
        case "recip":
            return (-(node * node),)
        case "exp":
            return (node,)
        case "log":
            return (apply("recip", a),)
        case "sin":
            return (apply("cos", a),)
        case "cos":
            return (-apply("sin", a),)
        case "sec":
            return (node * apply("tan", a),)
        case "csc":
            return (-(node * apply("cot", a)),)
        case "tan":
            return (1 + node * node,)
        case "cot":
            return (-(1 + node * node),)
        case "asin":
            return (apply("rsqrt", 1 - a * a),)
        case "acos":
            return (-apply("rsqrt", 1 - a * a),)
        case "atan":
            return (apply("recip", 1 + a * a),)
        case "atan2":
            square = a * a + b * b
            return b / square, -(a / square)
        case "sinh":
            return (apply("cosh", a),)
        case "cosh":
            return (apply("sinh", a),)
        case "tanh":
            return (1 - node * node,)
        case "erf" | "erfc":
            sign = 1 if name == "erf" else -1
            return (sign * 2 / math.sqrt(math.pi) * apply("exp", -(a * a)),)
        case "abs":
            return (apply("select", apply("step", a), one, number(-1.0)),)
        case "power":
            return (
                b * power(a, b - 1),
                # 0^b has no slope in b, though log(0) has none either
                apply("select", a, node * apply("log", a), number(0.0)),
            )
    raise AssertionError(name)


# name: the function in torch and its number of arguments. Flat ones have derivative zero; branches are separate.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "add": (torch.add, 2),
    "multiply": (torch.mul, 2),
    "power": (torch.pow, 2),
    "sqrt": (torch.sqrt, 1),
    "rsqrt": (torch.rsqrt, 1),
    "recip": (torch.reciprocal, 1),
    "exp": (torch.exp, 1),
    "log": (torch.log, 1),
    "sin": (torch.sin, 1),
    "cos": (torch.cos, 1),
    "sec": (lambda x: 1 / torch.cos(x), 1),
    "csc": (lambda x: 1 / torch.sin(x), 1),
    "tan": (torch.tan, 1),
    "cot": (lambda x: 1 / torch.tan(x), 1),
    "asin": (torch.asin, 1),
    "acos": (torch.acos, 1),
    "atan": (torch.atan, 1),
    "atan2": (torch.atan2, 2),
    "sinh": (torch.sinh, 1),
    "cosh": (torch.cosh, 1),
    "tanh": (torch.tanh, 1),
    "erf": (torch.erf, 1),
    "erfc": (torch.erfc, 1),
    "step": (_step, 1),
    "delta": (lambda x: (x == 0).to(x.dtype), 1),
    "floor": (torch.floor, 1),
    "ceil": (torch.ceil, 1),
    "abs": (torch.abs, 1),
    "min": (torch.minimum, 2),
    "max": (torch.maximum, 2),
    "select": (_select, 3),
}
_FLAT = ("step", "delta", "floor", "ceil", "number")
_BRANCHES = ("min", "max", "select")


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Every distinct node below these, operands first."""
    order: dict[Node, None] = {}
    stack = [(node, False) for node in reversed(list(nodes))]
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(node.operands))
    return list(order)


def variables(*nodes: Node) -> set[str]:
    """The names of the variables that occur in these expressions."""
    return {node.value for node in in_order(nodes) if node.operation == "variable"}


def derivative(node: Node, name: str) -> Node:
    """d node / d name.

    Branches are differentiated each for itself and selected afterwards, so that a branch not taken cannot spoil
    the other with its infinities.
    """
    slope: dict[Node, Node] = {}
    zero = number(0.0)
    for n in in_order([node]):
        inner = [slope[operand] for operand in n.operands]
        if n.operation == "variable":
            slope[n] = number(1.0 if n.value == name else 0.0)
        elif n.operation in _FLAT or all(is_number(s, 0) for s in inner[n.operation == "select" :]):
            slope[n] = zero
        elif n.operation == "add":
            slope[n] = inner[0] + inner[1]
        elif n.operation == "multiply":
            a, b = n.operands
            slope[n] = inner[0] * b + a * inner[1]
        elif n.operation == "select":
            slope[n] = apply("select", n.operands[0], inner[1], inner[2])
        elif n.operation in _BRANCHES:
            a, b = n.operands
            first = a - b if n.operation == "max" else b - a
            slope[n] = apply("select", apply("step", first), *inner)
        elif n.operation == "table":
            function, orders = n.value
            total = zero
            for k, s in enumerate(inner):
                raised = tuple(order + (k == m) for m, order in enumerate(orders))
                if not is_number(s, 0) and function.smooth:
                    total = total + table(function, *n.operands, orders=raised) * s
            slope[n] = total
        else:
            total = zero
            for partial, s in zip(_partial(n.operation, n.operands), inner, strict=True):
                if not is_number(s, 0):
                    total = total + partial * s
            slope[n] = total
    return slope[node]


def substitute(nodes: Sequence[Node], replacements: Mapping[str, Node]) -> list[Node]:
    """The expressions with variables replaced, simplified again on the way."""
    new: dict[Node, Node] = {}
    for n in in_order(nodes):
        operands = [new[operand] for operand in n.operands]
        if n.operation == "variable":
            new[n] = replacements.get(n.value, n)
        elif n.operation == "number":
            new[n] = n
        elif n.operation == "add":
            new[n] = add(*operands)
        elif n.operation == "multiply":
            new[n] = multiply(*operands)
        elif n.operation == "table":
            new[n] = table(n.value[0], *operands, orders=n.value[1])
        else:
            new[n] = apply(n.operation, *operands)
    return [new[n] for n in nodes]


def hoist(nodes: Sequence[Node], inner: Iterable[str]) -> tuple[list[Node], dict[str, Node]]:
    """Move what depends on none of the `inner` variables out of the expressions.

    Returns
    -------
    remaining
        The expressions, with every largest subexpression free of `inner` variables replaced by a variable
        ``#0``, ``#1``, ...
    hoisted
        What those stand for. Numbers stay where they are.
    """
    inner, dependent = set(inner), {}
    for n in in_order(nodes):
        dependent[n] = n.value in inner if n.operation == "variable" else any(dependent[a] for a in n.operands)
    names: dict[Node, Node] = {}
    hoisted: dict[str, Node] = {}

    def outside(n: Node) -> Node:
        if n not in names:
            names[n] = variable(f"#{len(hoisted)}")
            hoisted[names[n].value] = n
        return names[n]

    new: dict[Node, Node] = {}
    for n in in_order(nodes):
        if not dependent[n] or n.operation == "variable":
            continue
        operands = [new.get(a, a if dependent[a] or is_number(a) else None) or outside(a) for a in n.operands]
        new[n] = _make(n.operation, tuple(operands), n.value)
    remaining = [n if is_number(n) else new.get(n, n if dependent[n] else None) or outside(n) for n in nodes]
    return remaining, hoisted


def evaluate(nodes: Sequence[Node], values: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
    """The values of expressions in torch; `values` broadcast against each other.

    Parameters
    ----------
    nodes
        What to evaluate; common subexpressions are evaluated once.
    values
        A tensor for every variable.
    like
        Gives dtype and device to the numbers.

    Raises
    ------
    InputError
        If a variable has no value.
    """
    known: dict[Node, Tensor] = {}
    uses: dict[Node, int] = {}
    order = in_order(nodes)
    for n in order:
        for operand in n.operands:
            uses[operand] = uses.get(operand, 0) + 1
    wanted = set(nodes)
    for n in order:
        if n.operation == "number":
            known[n] = like.new_tensor(n.value)
        elif n.operation == "variable":
            if n.value not in values:
                raise InputError(f"The expression has an unknown variable {n.value!r}.")
            known[n] = values[n.value]
        elif n.operation == "table":
            function, orders = n.value
            known[n] = function.evaluate([known[a] for a in n.operands], orders)
        else:
            known[n] = OPERATIONS[n.operation][0](*(known[a] for a in n.operands))
        for operand in n.operands:  # free what nobody needs any more
            uses[operand] -= 1
            if uses[operand] == 0 and operand not in wanted:
                del known[operand]
    return [known[n] for n in nodes]

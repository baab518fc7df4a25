"""The expression language of OpenMM's custom forces (Lepton), read into `expression` graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node
from openmm_bg.errors import InputError

# Lepton's own operator table: precedence; `^` is right-associative, unary minus binds at 2.
_PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 3}
_UNARY_MINUS = 2
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# A name is whatever stands up to an operator, comma, parenthesis or space: `or`, `lambda` and `if` are names.
_TOKEN = re.compile(rf"\s*(?:(?P<number>{_NUMBER})|(?P<symbol>[-+*/^(),])|(?P<name>[^-+*/^(),\s]+))\s*")
_FUNCTIONS = {
    name: count
    for name, (_, count) in expression.OPERATIONS.items()
    if name not in ("add", "multiply", "power", "rsqrt")
} | {"square": 1, "cube": 1}


def parse(text: str, functions: Mapping[str, Any] | None = None) -> Node:
    """Read an expression with its definitions, ``"main; name=expression; ..."``.

    Definitions are read from the last to the first; each may use those after it.

    Parameters
    ----------
    text
        In Lepton's grammar.
    functions
        Tabulated functions by name: objects with `dimensions`, see `tabulated`. One with a method `expand` is not
        called later but replaced by the expression that it returns.

    Raises
    ------
    InputError
        If the text does not follow the grammar, or calls an unknown function.

    Examples
    --------
    >>> parse("x^2")
    (x * x)
    >>> parse("sqrt(area); area=x^2") is parse("sqrt(x*x)")
    True
    """
    main, *definitions = text.split(";")
    known: dict[str, Node] = {}
    for definition in reversed(definitions):
        if not definition.strip():
            continue
        name, equals, body = definition.partition("=")
        if not equals or not name.strip():
            raise InputError(f"The definition {definition.strip()!r} in {text!r} must have the form name=expression.")
        known[name.strip()] = _Parser(body, known, functions or {}).whole()
    return _Parser(main, known, functions or {}).whole()


class _Parser:
    """Precedence climbing over the tokens of one expression."""

    def __init__(self, text: str, known: Mapping[str, Node], functions: Mapping[str, Any]) -> None:
        self.text, self.known, self.functions = text, known, functions
        self.tokens: list[tuple[str, str]] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            assert match is not None  # every character belongs to one of the three kinds
            self.tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()
        self.place = 0

    def whole(self) -> Node:
        node = self.climb(0)
        if self.place < len(self.tokens):
            raise self.error(f"unexpected {self.tokens[self.place][1]!r}")
        return node

    def climb(self, lowest: int) -> Node:
        left = self.operand()
        while (operator := self.peek()) in _PRECEDENCE and _PRECEDENCE[operator] >= lowest:
            self.place += 1
            precedence = _PRECEDENCE[operator]
            right = self.climb(precedence if operator == "^" else precedence + 1)
            left = {
                "+": lambda a, b: a + b,
                "-": lambda a, b: a - b,
                "*": lambda a, b: a * b,
                "/": lambda a, b: a / b,
                "^": lambda a, b: a**b,
            }[operator](left, right)
        return left

    def operand(self) -> Node:
        if self.place == len(self.tokens):
            raise self.error("it ends too early")
        kind, token = self.tokens[self.place]
        self.place += 1
        if kind == "number":
            return expression.number(float(token))
        if token == "-":
            return -self.climb(_UNARY_MINUS)
        if token == "(":
            inner = self.climb(0)
            self.expect(")")
            return inner
        if kind == "symbol":
            raise self.error(f"unexpected {token!r}")
        if self.peek() == "(":
            self.place += 1
            return self.call(token)
        return self.known.get(token) or expression.variable(token)

    def call(self, name: str) -> Node:
        arguments = [self.climb(0)]
        while self.peek() == ",":
            self.place += 1
            arguments.append(self.climb(0))
        self.expect(")")
        if name in self.functions:
            function = self.functions[name]
            count = function.dimensions
        elif name in _FUNCTIONS:
            function, count = None, _FUNCTIONS[name]
        else:
            raise self.error(f"unknown function {name!r}")
        if len(arguments) != count:
            raise self.error(f"{name} takes {count} arguments, not {len(arguments)}")
        if function is None:
            return expression.apply(name, *arguments)
        if hasattr(function, "expand"):
            return function.expand(*arguments)
        return expression.table(function, *arguments)

    def peek(self) -> str:
        kind, token = self.tokens[self.place] if self.place < len(self.tokens) else ("", "")
        return token if kind == "symbol" else ""

    def expect(self, symbol: str) -> None:
        if self.peek() != symbol:
            raise self.error(f"{symbol!r} is missing")
        self.place += 1

    def error(self, what: str) -> InputError:
        return InputError(f"The expression {self.text.strip()!r} cannot be read: {what}.")

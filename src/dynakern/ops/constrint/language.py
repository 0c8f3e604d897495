"""The language of ConstrINT: text to clauses over positive integers.

Every side of a relation becomes a sum of monomials, ``{monomial: coefficient}``, a monomial being a sorted tuple of
``(variable, exponent)``. Lists and powers of sums get helper variables, whose names are no identifiers.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["AllOf", "AnyOf", "Clause", "ConstraintSyntaxError", "Program", "Relation", "parse"]

Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, int]

# The pieces of a text; the last pattern catches what is not in the language.
_PIECE = re.compile(r"[A-Za-z_]+|\d+|<=|==|[;|%+*^()\[\],]|\s+|#[^\n]*|.")
_HINTS = {
    "-": " (there is no minus: move the term to the other side)",
    "/": " (there is no division)",
    "<": " (write a + 1 <= b)",
    ">": " (write b <= a)",
    "=": " (equality is ==)",
}
_END = ""
_MAX_TERMS = 10_000


class ConstraintSyntaxError(ValueError):
    """A text is not in the language.

    Attributes:
        line: Line of the first character that does not fit, from 1.
        column: Its column, from 1.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        self.line = text.count("\n", 0, position) + 1
        self.column = position - (text.rfind("\n", 0, position) + 1) + 1
        lines = text.splitlines() or [""]
        shown = lines[min(self.line, len(lines)) - 1]
        super().__init__(f"line {self.line}, column {self.column}: {message}\n  {shown}\n  {' ' * (self.column - 1)}^")


@dataclass(frozen=True)
class Relation:
    """``left <= right``, ``left == right`` or ``left % right == 0`` between sums of monomials."""

    kind: Literal["<=", "==", "%"]
    left: Polynomial
    right: Polynomial
    text: str


@dataclass(frozen=True)
class AllOf:
    """All of the parts hold."""

    parts: tuple[Clause, ...]
    text: str


@dataclass(frozen=True)
class AnyOf:
    """At least one of the parts holds."""

    parts: tuple[Clause, ...]
    text: str


Clause = Relation | AllOf | AnyOf


@dataclass
class Program:
    """A parsed text.

    Attributes:
        clauses: What must hold, in the order of the text.
        names: Its variables, in the order of their first appearance.
        helpers: Helper variables: the values a list allows, or the relation that defines the helper.
        ambiguous: Whether the text would mean something else without its parentheses.
    """

    clauses: list[Clause] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    helpers: dict[str, tuple[int, ...] | Relation] = field(default_factory=dict)
    ambiguous: bool = False


def _tokens(text: str) -> list[str]:
    found = [piece for piece in _PIECE.findall(text) if not (piece.isspace() or piece[0] == "#")]
    for index, token in enumerate(found):
        if len(token) == 1 and not (token in _SYMBOLS or token in _LETTERS):
            message = f"unexpected character {token!r}{_HINTS.get(token, '')}"
            raise ConstraintSyntaxError(message, text, _position(text, index))
    found.append(_END)
    return found


_SYMBOLS, _LETTERS = frozenset(";|%+*^()[],"), frozenset(string.ascii_letters + string.digits + "_")


def _position(text: str, index: int) -> int:
    """Return where token number ``index`` starts; the end of the text if there is none."""
    starts = [m.start() for m in _PIECE.finditer(text) if not (m[0].isspace() or m[0][0] == "#")]
    return starts[index] if index < len(starts) else len(text)


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) == 1 and len(b) == 1:
        ((m1, c1),), ((m2, c2),) = a.items(), b.items()
        if not m1 or not m2 or {name for name, _ in m1}.isdisjoint(name for name, _ in m2):
            return {tuple(sorted(m1 + m2)): c1 * c2}
    out: Polynomial = {}
    for m1, c1 in a.items():
        for m2, c2 in b.items():
            powers = dict(m1)
            for name, exponent in m2:
                powers[name] = powers.get(name, 0) + exponent
            monomial = tuple(sorted(powers.items()))
            out[monomial] = out.get(monomial, 0) + c1 * c2
    return out


class _Parser:
    """Recursive descent; precedence from low to high: ``;``, ``|``, a relation, ``+``, ``*``, ``^``."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.index, self.program = text, _tokens(text), 0, Program()

    def fail(self, expected: str) -> ConstraintSyntaxError:
        token = self.tokens[self.index]
        got = "the end of the text" if token == _END else repr(token)
        return ConstraintSyntaxError(f"expected {expected}, got {got}", self.text, _position(self.text, self.index))

    def accept(self, symbol: str) -> bool:
        if self.tokens[self.index] == symbol:
            self.index += 1
            return True
        return False

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            raise self.fail(repr(symbol))

    def source(self, start: int) -> str:
        return " ".join(self.tokens[start : self.index])

    def program_(self) -> Program:
        while self.tokens[self.index] != _END:
            if not self.accept(";"):
                self.program.clauses.append(self.alternatives())
                if self.tokens[self.index] != _END:
                    self.expect(";")
        return self.program

    def conjunction(self) -> Clause:
        start, parts = self.index, [self.alternatives()]
        while self.accept(";"):
            if self.tokens[self.index] == ")":
                break
            parts.append(self.alternatives())
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts), self.source(start))

    def alternatives(self) -> Clause:
        start, parts = self.index, [self.clause()]
        while self.accept("|"):
            parts.append(self.clause())
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts), self.source(start))

    def clause(self) -> Clause:
        """A relation, or clauses in parentheses; which of the two an opening one starts shows only later."""
        start = self.index
        if self.tokens[start] == "(" and self._encloses_clauses():
            self.expect("(")
            inside = self.conjunction()
            self.expect(")")
            return inside
        left = self.sum_()
        if self.accept("%"):
            right = self.sum_()
            self.expect("==")
            if not self.accept("0"):
                raise self.fail("0 (a divisibility reads a % b == 0)")
            return Relation("%", left, right, self.source(start))
        kind = "<=" if self.accept("<=") else "=="
        if kind == "==" and not self.accept("=="):
            raise self.fail("'<=', '==' or '%'")
        return Relation(kind, left, self.sum_(), self.source(start))

    def _encloses_clauses(self) -> bool:
        depth = 0
        for token in self.tokens[self.index :]:
            depth += {"(": 1, ")": -1}.get(token, 0)
            if depth == 0:
                return False
            if token in ("<=", "==", "%", "|", ";"):
                return True
        return False

    def sum_(self) -> Polynomial:
        out = self.product()
        while self.accept("+"):
            for monomial, coefficient in self.product().items():
                out[monomial] = out.get(monomial, 0) + coefficient
        return out

    def product(self) -> Polynomial:
        out = self.power()
        while self.accept("*"):
            position, factor = self.index, self.power()
            if len(out) * len(factor) > _MAX_TERMS:
                message = f"the product has more than {_MAX_TERMS} terms"
                raise ConstraintSyntaxError(message, self.text, _position(self.text, position))
            out = _times(out, factor)
        return out

    def power(self) -> Polynomial:
        start, base = self.index, self.atom()
        if not self.accept("^"):
            return base
        if not self.tokens[self.index].isdigit() or int(self.tokens[self.index]) < 1:
            raise self.fail("a positive integer exponent")
        exponent = self.number()
        if len(base) > 1:  # a power of a sum: give the sum a name
            base = {((self._helper(Relation("==", {}, base, self.source(start))), 1),): 1}
        ((monomial, coefficient),) = base.items()
        return {tuple((name, e * exponent) for name, e in monomial): coefficient**exponent}

    def _helper(self, definition: tuple[int, ...] | Relation) -> str:
        name = f"${len(self.program.helpers)}"
        if isinstance(definition, Relation):
            definition = Relation("==", {((name, 1),): 1}, definition.right, definition.text)
        self.program.helpers[name] = definition
        return name

    def atom(self) -> Polynomial:
        token = self.tokens[self.index]
        if token.isdigit():
            return {(): self.number()}
        if token.isidentifier():
            self.index += 1
            if token not in self.program.names:
                self.program.names.append(token)
            return {((token, 1),): 1}
        if self.accept("("):
            inside = self.sum_()
            self.expect(")")
            return inside
        if self.accept("["):
            values = [self.number()]
            while self.accept(","):
                values.append(self.number())
            self.expect("]")
            return {((self._helper(tuple(sorted(set(values)))), 1),): 1}
        raise self.fail("a name, a number, a list or '('")

    def number(self) -> int:
        token = self.tokens[self.index]
        if not token.isdigit():
            raise self.fail("a number")
        if int(token) < 1:
            raise ConstraintSyntaxError("numbers must be positive", self.text, _position(self.text, self.index))
        self.index += 1
        return int(token)


def parse(text: str, *, parentheses: Literal["honour", "strip"] = "honour") -> Program:
    """Read a text of constraints.

    Args:
        text: The constraints.
        parentheses: ``"honour"`` them, or ``"strip"`` them as the authors' solver does.

    Returns:
        The :class:`Program`; its ``ambiguous`` says whether the two readings differ.

    Raises:
        ConstraintSyntaxError: The text is malformed; the error says where.
    """
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string, got {type(text).__name__}.")
    if parentheses not in ("honour", "strip"):
        raise ValueError(f"`parentheses` must be 'honour' or 'strip', got {parentheses!r}.")
    program = _Parser(text).program_()
    if "(" not in text:
        return program
    try:
        plain = _Parser(_without_parentheses(text)).program_()
    except ConstraintSyntaxError:
        if parentheses == "strip":
            raise
        program.ambiguous = True
        return program
    plain.ambiguous = program.ambiguous = _meaning(plain) != _meaning(program)
    return program if parentheses == "honour" else plain


def _without_parentheses(text: str) -> str:
    return "".join(" " if token in "()" else token for token in re.split(r"(#[^\n]*|[()])", text))


def _meaning(program: Program) -> object:
    def strip(clause: Clause) -> object:
        if isinstance(clause, Relation):
            return clause.kind, clause.left, clause.right
        return type(clause), [strip(part) for part in clause.parts]

    helpers = {k: strip(v) if isinstance(v, Relation) else v for k, v in program.helpers.items()}
    return [strip(clause) for clause in program.clauses], helpers

"""The solver of ConstrINT: domains that shrink by bounds and divisibility, and a depth-first search.

All numbers are positive, so every side of a relation grows with each of its variables: its smallest and largest values
are those at the ends of the domains, and a relation turns into bounds of one variable after another.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from dynakern.ops.constrint.language import AllOf, AnyOf, Clause, Polynomial, Program, Relation

__all__ = ["Infeasible", "Undecided", "minimal_conflict", "parse_order", "search"]

LARGEST = 2**30  # of a variable; helpers may be larger
_MAX_VALUES = 2048  # a domain with at most so many values is kept as a list of them
_CONFLICT_STEPS = 3_000  # of propagation that each trial for a smaller conflict may take


class Undecided(RuntimeError):
    """The search took more steps than it was allowed, and neither found a solution nor excluded one."""


class Infeasible(ValueError):
    """No assignment satisfies the constraints. Its text names clauses that contradict each other.

    Attributes:
        clauses: The clauses, as written.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program, self._conflict = program, None

    @property
    def conflict(self) -> tuple[str, ...]:
        """A set of clauses without a solution, none of which can be left out; found on first use."""
        if self._conflict is None:
            self._conflict = minimal_conflict(self._program)
        return self._conflict

    def __str__(self) -> str:
        return "No solution. These clauses contradict each other: " + "; ".join(self.conflict)


class _Fail(Exception):
    """A domain is empty."""


Term = tuple[int, tuple[tuple[int, int], ...]]  # coefficient, (variable, exponent)s


class _Constraint(NamedTuple):
    kind: Literal["<=", "==", "%", "or"]
    left: tuple[Term, ...]
    right: tuple[Term, ...]
    branches: tuple[_Network, ...]
    variables: frozenset[int]


class _Network:
    """Constraints that must all hold, cheapest first, and for each variable the ones that it occurs in."""

    def __init__(self, constraints: Sequence[_Constraint]) -> None:
        self.constraints = sorted(constraints, key=lambda c: (c.kind == "or", len(c.variables)))
        self.watch: dict[int, list[int]] = {}
        for i, constraint in enumerate(self.constraints):
            for v in constraint.variables:
                self.watch.setdefault(v, []).append(i)


class _Domains:
    """Lower and upper bounds, common divisor and (if few) list of values of every variable."""

    __slots__ = ("high", "low", "step", "values")

    def __init__(self, low: list[int], high: list[int], step: list[int], values: list[tuple[int, ...] | None]) -> None:
        self.low, self.high, self.step, self.values = low, high, step, values

    def copy(self) -> _Domains:
        return _Domains(self.low[:], self.high[:], self.step[:], self.values[:])

    def bound(self, v: int, low: int, high: int) -> bool:
        """Shrink variable ``v`` to [low, high]; return whether that changed it."""
        old_low, old_high = self.low[v], self.high[v]
        if low <= old_low and high >= old_high:
            return False
        low, high = max(low, old_low), min(high, old_high)
        values = self.values[v]
        if values is not None:
            return self.restrict(v, values[bisect_left(values, low) : bisect_right(values, high)])
        step = self.step[v]
        low, high = -(-low // step) * step, high // step * step
        if low > high:
            raise _Fail
        if (high - low) // step < 32:
            return self.restrict(v, tuple(range(low, high + 1, step)))
        self.low[v], self.high[v] = low, high
        return low != old_low or high != old_high

    def restrict(self, v: int, values: tuple[int, ...]) -> bool:
        """Give variable ``v`` exactly these values, sorted."""
        if not values:
            raise _Fail
        old = self.values[v]
        if old is not None and len(old) == len(values):
            return False
        self.values[v], self.low[v], self.high[v] = values, values[0], values[-1]
        return True

    def divisors_of(self, v: int, number: int, exponent: int) -> bool:
        """Keep the values whose power divides ``number``."""
        values = self.values[v]
        if values is None:
            low, high, step = self.low[v], self.high[v], self.step[v]
            values = tuple(x for x in _divisors(number) if low <= x <= high and x % step == 0)
        if exponent == 1:
            return self.restrict(v, tuple([x for x in values if number % x == 0]))
        return self.restrict(v, tuple([x for x in values if number % x**exponent == 0]))

    def multiples_of(self, v: int, number: int) -> bool:
        """Keep the multiples of ``number``."""
        if number == 1 or self.step[v] % number == 0:
            return False
        values = self.values[v]
        if values is not None:
            return self.restrict(v, tuple(x for x in values if x % number == 0))
        step = self.step[v] = math.lcm(self.step[v], number)
        low, high = -(-self.low[v] // step) * step, self.high[v] // step * step
        if low > high:
            raise _Fail
        if (high - low) // step < _MAX_VALUES:
            return self.restrict(v, tuple(range(low, high + 1, step)))
        self.low[v], self.high[v] = low, high
        return True


_divisor_lists: dict[int, tuple[int, ...]] = {}


def _divisors(number: int) -> tuple[int, ...]:
    """Return the divisors up to the largest value of a variable, sorted."""
    found = _divisor_lists.get(number)
    if found is None:
        parts, rest, p = [1], number, 2
        while p * p <= rest and p < 65536:
            power, step = 1, list(parts)
            while rest % p == 0:
                rest, power = rest // p, power * p
                parts += [d * power for d in step]
            p += 1
        if rest > 1:
            parts += [d * rest for d in parts]
        found = tuple(sorted(d for d in parts if d <= LARGEST))
        if len(_divisor_lists) > 4096:
            _divisor_lists.clear()
        _divisor_lists[number] = found
    return found


def _root(x: int, exponent: int) -> int:
    """Return the largest integer whose power is at most ``x``."""
    if exponent == 1:
        return x
    if exponent == 2:
        return math.isqrt(x)
    low, high = 0, 1 << (x.bit_length() // exponent + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**exponent <= x else (low, middle - 1)
    return low


def _value(term: Term, ends: list[int]) -> int:
    x, powers = term
    for v, e in powers:
        x *= ends[v] if e == 1 else ends[v] ** e
    return x


def _ends(d: _Domains, side: tuple[Term, ...]) -> tuple[int, int]:
    """Return the smallest and the largest value of a side."""
    low, high, least, most = d.low, d.high, 0, 0
    for coefficient, powers in side:
        a = b = coefficient
        for v, e in powers:
            if e == 1:
                a *= low[v]
                b *= high[v]
            else:
                a *= low[v] ** e
                b *= high[v] ** e
        least += a
        most += b
    return least, most


def _within(d: _Domains, side: tuple[Term, ...], ends: tuple[int, int], floor: int, ceiling: int) -> list[int]:
    """Propagate that a side, whose ends are given, lies in [floor, ceiling]; return the variables that changed."""
    least, most = ends
    if least >= floor and most <= ceiling:
        return []  # a list of its own: callers add to it
    if least > ceiling or most < floor:
        raise _Fail
    low, high, changed = d.low, d.high, []
    for term in side:
        at_least, at_most = ends if len(side) == 1 else (_value(term, low), _value(term, high))
        room, need = ceiling - least + at_least, floor - most + at_most  # the largest and smallest value of this term
        for v, e in term[1]:
            v_low, v_high = low[v], high[v]
            if v_low == v_high:
                continue
            new_low, new_high = 1, v_high
            if at_most > room:
                rest = at_least // (v_low if e == 1 else v_low**e)
                new_high = _root(room // rest, e)
            if at_least < need:
                rest = at_most // (v_high if e == 1 else v_high**e)
                new_low = _root(-(-need // rest) - 1, e) + 1
            if (new_low > v_low or new_high < v_high) and d.bound(v, new_low, new_high):
                changed.append(v)
    return changed


def _at_most(d: _Domains, left: tuple[Term, ...], right: tuple[Term, ...]) -> list[int]:
    """Propagate ``left <= right``."""
    small, large = _ends(d, left), _ends(d, right)
    if small[0] > large[1]:
        raise _Fail
    changed = _within(d, left, small, 0, large[1])
    return changed + _within(d, right, _ends(d, right) if changed else large, small[0], large[1])


def _divides(d: _Domains, term: Term, number: int) -> list[int]:
    """Propagate that a term divides a fixed number: so does what is left for each of its variables."""
    low, high, changed = d.low, d.high, []
    rest, free = term[0], []
    for v, e in term[1]:
        if low[v] == high[v]:
            rest *= low[v] ** e
        else:
            free.append((v, e))
    if number % rest:
        raise _Fail
    number //= rest
    for v, e in free:
        if d.divisors_of(v, number, e):
            changed.append(v)
    return changed


def _multiple(d: _Domains, terms: tuple[Term, ...], number: int) -> list[int]:
    """Propagate that one term is a multiple of a fixed number; acts when one variable is free, to the first power."""
    v = _only_free(d, terms)
    if v is None:
        return []
    coefficient, powers = terms[0]  # pyright: ignore[reportGeneralTypeIssues]
    for w, e in powers:
        if w != v:
            coefficient *= d.low[w] ** e
    return [v] if d.multiples_of(v, number // math.gcd(number, coefficient)) else []


def _only_free(d: _Domains, terms: tuple[Term, ...]) -> int | None:
    """Return the variable of a side of one term if it is the only free one and comes to the first power."""
    if len(terms) > 1:
        return None
    low, high, found = d.low, d.high, None
    for v, e in terms[0][1]:  # pyright: ignore[reportGeneralTypeIssues]
        if low[v] != high[v]:
            if found is not None or e != 1:
                return None
            found = v
    return found


def _equal(d: _Domains, left: tuple[Term, ...], right: tuple[Term, ...]) -> list[int]:
    """Propagate ``left == right``."""
    a, b = _ends(d, left), _ends(d, right)
    floor, ceiling = max(a[0], b[0]), min(a[1], b[1])
    if floor > ceiling:
        raise _Fail
    if a == b and floor == ceiling:  # all is fixed
        return []
    changed = _within(d, left, a, floor, ceiling)
    if changed:  # a variable may be on both sides
        b = _ends(d, right)
    changed += _within(d, right, b, floor, ceiling)
    for one, other, ends in ((left, right, b), (right, left, a)):
        if len(one) == 1 and one[0][1]:
            if ends[0] == ends[1]:  # the other side is a number
                changed += _divides(d, one[0], ends[0])
            elif len(other) == 1 and _only_free(d, one) is not None:
                # a common factor of the other side must be found on this one
                factor = other[0][0]
                for v, e in other[0][1]:
                    factor *= d.low[v] ** e if d.low[v] == d.high[v] else d.step[v] ** e
                changed += _multiple(d, one, factor)
    return changed


def _divisible(d: _Domains, left: tuple[Term, ...], right: tuple[Term, ...]) -> list[int]:
    """Propagate ``left % right == 0``."""
    a, b = _ends(d, left), _ends(d, right)
    if b[0] > a[1]:
        raise _Fail
    changed = _within(d, left, a, b[0], a[1])
    if changed:
        b = _ends(d, right)
    changed += _within(d, right, b, 0, a[1])
    if a[0] == a[1] and b[0] == b[1]:
        if a[0] % b[0]:
            raise _Fail
    elif a[0] == a[1] and len(right) == 1:
        changed += _divides(d, right[0], a[0])
    elif b[0] == b[1]:
        changed += _multiple(d, left, b[0])
    return changed


def _either(d: _Domains, constraint: _Constraint, budget: _Budget) -> list[int]:
    """Propagate a disjunction: each variable keeps what it may be in one of the branches."""
    kept = []
    for branch in constraint.branches:
        copy = d.copy()
        try:
            _fixpoint(copy, branch, None, budget)
        except _Fail:
            continue
        kept.append(copy)
    if not kept:
        raise _Fail
    changed = []
    for v in constraint.variables:
        values = [copy.values[v] for copy in kept]
        if all(x is not None for x in values):
            union = tuple(sorted(set().union(*values)))  # pyright: ignore[reportArgumentType]
            if d.values[v] != union and d.restrict(v, union):
                changed.append(v)
        elif d.bound(v, min(copy.low[v] for copy in kept), max(copy.high[v] for copy in kept)):
            changed.append(v)
    return changed


class _Budget:
    """How many constraints may still be propagated."""

    def __init__(self, steps: int) -> None:
        self.left = steps


def _fixpoint(d: _Domains, network: _Network, start: int | None, budget: _Budget) -> None:
    """Propagate until nothing changes; ``start`` is the variable that did, None for all."""
    constraints, watch = network.constraints, network.watch
    waiting = deque(range(len(constraints)) if start is None else watch.get(start, ()))
    queued = set(waiting)
    while waiting:
        i = waiting.popleft()
        queued.remove(i)
        kind, left, right, _, _ = constraint = constraints[i]
        budget.left -= 1
        if budget.left < 0:
            raise Undecided("The search was given up: raise `max_steps`, or bound the variables more tightly.")
        if kind == "<=":
            changed = _at_most(d, left, right)
        elif kind == "==":
            changed = _equal(d, left, right)
        elif kind == "%":
            changed = _divisible(d, left, right)
        else:
            changed = _either(d, constraint, budget)
        for v in changed:
            fixed = d.low[v] == d.high[v]
            for j in watch[v]:
                # A constraint that shrank a domain looks again only at what it fixed: that must be checked.
                if j not in queued and (j != i or fixed):
                    queued.add(j)
                    waiting.append(j)


class _Model:
    """A program with numbers in the place of names."""

    def __init__(self, program: Program) -> None:
        self.names = [*program.names, *program.helpers]
        self.index = {name: i for i, name in enumerate(self.names)}
        definitions = [x for x in program.helpers.values() if isinstance(x, Relation)]
        self.network = _Network([c for clause in [*definitions, *program.clauses] for c in self._compile(clause)])
        count = len(self.names)
        self.domains = _Domains([1] * count, [LARGEST] * count, [1] * count, [None] * count)
        for name, definition in program.helpers.items():
            v = self.index[name]
            if isinstance(definition, Relation):
                self.domains.high[v] = sum(_value(t, self.domains.high) for t in self._side(definition.right))
            else:
                self.domains.restrict(v, definition)

    def _side(self, side: Polynomial) -> tuple[Term, ...]:
        return tuple((c, tuple((self.index[name], e) for name, e in monomial)) for monomial, c in side.items())

    def _compile(self, clause: Clause) -> tuple[_Constraint, ...]:
        if isinstance(clause, AllOf):
            return tuple(c for part in clause.parts for c in self._compile(part))
        if isinstance(clause, AnyOf):
            branches = tuple(_Network(self._compile(part)) for part in clause.parts)
            variables = frozenset().union(*(c.variables for branch in branches for c in branch.constraints))
            return (_Constraint("or", (), (), branches, variables),)
        left, right = self._side(clause.left), self._side(clause.right)
        variables = frozenset(v for _, powers in left + right for v, _ in powers)
        return (_Constraint(clause.kind, left, right, (), variables),)


def _without(d: _Domains, v: int, value: int, largest: bool) -> None:
    """Take the first candidate away."""
    if d.low[v] == d.high[v]:
        raise _Fail
    values = d.values[v]
    if values is not None:
        d.restrict(v, values[:-1] if largest else values[1:])
    else:
        d.bound(v, 1 if largest else value + 1, value - 1 if largest else LARGEST**8)


def _descend(
    d: _Domains, model: _Model, order: Sequence[tuple[int, bool]], depth: int, ordered: int, budget: _Budget
) -> Iterator[_Domains]:
    """Yield the domains, all fixed, of the solutions below ``d``; beyond ``ordered`` variables only the first."""
    while depth < len(order) and d.low[order[depth][0]] == d.high[order[depth][0]]:
        depth += 1
    if depth == len(order):
        yield d
        return
    v, largest = order[depth]
    while True:
        value, chosen = (d.high if largest else d.low)[v], d.copy()
        try:
            chosen.restrict(v, (value,)) if chosen.values[v] is not None else chosen.bound(v, value, value)
            _fixpoint(chosen, model.network, v, budget)
            for solution in _descend(chosen, model, order, depth + 1, ordered, budget):
                yield solution
                if depth >= ordered:
                    return
        except _Fail:
            pass
        try:
            _without(d, v, value, largest)
            _fixpoint(d, model.network, v, budget)
        except _Fail:
            return


def search(program: Program, order: Sequence[tuple[str, bool]], max_steps: int) -> Iterator[dict[str, int]]:
    """Yield the solutions in lexicographic order of ``order``, pairs of a variable and whether its largest comes first.

    Other variables only have to exist; they take their smallest values.
    """
    model, budget = _Model(program), _Budget(max_steps)
    chosen = [(model.index[name], largest) for name, largest in order]
    rest = [(v, False) for v in range(len(model.names)) if v not in dict(chosen)]
    try:
        _fixpoint(model.domains, model.network, None, budget)
    except _Fail:
        return
    for d in _descend(model.domains, model, chosen + rest, 0, len(chosen), budget):
        yield {name: d.low[model.index[name]] for name in program.names}


def minimal_conflict(program: Program) -> tuple[str, ...]:
    """Return clauses without a solution, none of which can be left out (as far as a short search can tell)."""
    clauses = list(program.clauses)
    for clause in program.clauses:
        fewer = [c for c in clauses if c is not clause]
        part = Program(fewer, program.names, program.helpers)
        try:
            next(search(part, [], _CONFLICT_STEPS))
        except StopIteration:
            clauses = fewer
        except Undecided:
            continue
    return tuple(clause.text for clause in clauses)


def parse_order(program: Program, order: Sequence[str] | None) -> list[tuple[str, bool]]:
    """Turn ``["A:largest", "B"]`` into pairs.

    Raises:
        ValueError: A name is no variable of the program, comes twice, or the word after the colon is unknown.
    """
    if order is None:
        return [(name, False) for name in program.names]
    found: list[tuple[str, bool]] = []
    for item in order:
        name, _, which = item.partition(":")
        if name not in program.names:
            raise ValueError(f"`order` names {name!r}, which is no variable of the text: {', '.join(program.names)}.")
        if which not in ("", "smallest", "largest"):
            raise ValueError(f"`order` entries read NAME, NAME:smallest or NAME:largest, got {item!r}.")
        if name in dict(found):
            raise ValueError(f"`order` names {name!r} twice.")
        found.append((name, which == "largest"))
    return found

"""The store of axis variables: what is known of each, and axes brought up to date with it.

While a program is interpreted, three things become known of an axis variable. None is ever taken
back.

- **It is another one.** `h + b` adds a bias to features unit by unit, so that both have to be
  permuted alike: their variables are *united* from then on, by a union-find.
- **It has parts.** A reshape of 6 units to 2 heads of 3 looks inside a variable of size 6: it is a
  *product* of two new variables. The slice `h[:, :2]` does so too: the variable is a *sum* of two
  segments, of sizes 2 and 4. Whatever carries the variable, wherever in the program, has these
  parts.
- **It is pinned.** Its units may not be permuted at all, because they have an order of their own,
  as the pixels of an input do, or because what a rule has met cannot be said by an expression. The
  first reason that is given is kept, for the user to read.

Splitting weakens what is claimed: a product of two variables has `2! * 3!` permutations where one
variable had `6!`, and a pinned variable has one. So whatever the interpreter is unsure of may be
split or pinned, and the symmetry stays right.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Factor,
    Sum,
    Term,
    concatenated,
    constant,
    factors_of,
)
from otfusion_jax.tracing.parity import ParityUnionFind

TAKEN_APART = "taken apart into single positions"
"""Why an axis stays of which each position is by itself."""

MAX_SEGMENT_DEPTH = 32
"""How often segments may be split into segments again before their axis is pinned.

Adding units to themselves shifted by one splits off a position from the rest, then one from the
rest of that, and so on without end.
"""


class Equation(Protocol):
    """An equation of the program, as far as the store needs it."""

    @property
    def source(self) -> str:
        """The line of the user's program that the equation comes from."""
        ...


class AxisVariables:
    """All axis variables of one trace, and what is known of them.

    A variable that has been united with another is represented by the root of their set, and only
    the root's entries count. A root that has parts is never united with anything: axes are expanded
    first, so that what meets are its parts.

    Attributes:
        roles: The union-find of the roles that factors have.
        current_equation: The equation that is being interpreted.
        pinned_at: For a variable that was free until it was united with a pinned one, the equation
            that united them. The reason of the pin may come from far away (an input, say), and this
            tells the user where the two have met.
        met_padding: Segments of axes that have met, unit by unit, a segment along which the other
            value is constant, beside others along which it varies: padding, as the gradient of a
            selection has it where units were left out.
    """

    def __init__(self) -> None:
        self.roles: ParityUnionFind = ParityUnionFind()
        self.current_equation: Equation | None = None
        self.pinned_at: dict[int, Equation | None] = {}
        self.met_padding: list[Axis] = []
        self._parents: list[int] = []
        self._sizes: list[int] = []
        # How many splits into segments, one within another, a variable comes from.
        self._segment_depths: list[int] = []
        # The parts of a root that is a product, and of one that is a sum.
        self._factors: dict[int, tuple[int, int]] = {}
        self._segments: dict[int, tuple[int, ...]] = {}
        # For a variable that is a segment, which one it is a segment of.
        self._split_from: dict[int, int] = {}
        # The variables that have been taken apart into single positions, by the variables of these.
        self._apart: dict[tuple[int, ...], int] = {}
        self._pins: dict[int, str] = {}

    # --- new axes

    def fresh(self, size: int) -> Axis:
        """Returns an axis made of a new variable, which has a new role.

        Args:
            size: The number of elements. Axes of size 1 and 0 have no variable.
        """
        if size < 2:
            return constant(size)
        variable = self._new_variable(size)
        return (Factor(size, variable, self.roles.fresh()),)

    def pinned(self, size: int, reason: str) -> Axis:
        """Returns an axis made of a new variable that may not be permuted.

        Args:
            size: The number of elements. Axes of size 1 and 0 have no variable.
            reason: Why it may not be permuted.
        """
        if size < 2:
            return constant(size)
        variable = self._new_variable(size, pin=reason)
        return (Factor(size, variable),)

    def _new_variable(self, size: int, pin: str | None = None, segment_depth: int = 0) -> int:
        variable = len(self._parents)
        self._parents.append(variable)
        self._sizes.append(size)
        self._segment_depths.append(segment_depth)
        if pin is not None:
            self._pins[variable] = pin
        return variable

    # --- what is known

    def find(self, variable: int) -> int:
        """Returns the variable that represents all those united with this one."""
        root = variable
        while self._parents[root] != root:
            root = self._parents[root]
        # Path compression: what has been passed points at the root from now on.
        while self._parents[variable] != root:
            parent = self._parents[variable]
            self._parents[variable] = root
            variable = parent
        return root

    def size(self, variable: int) -> int:
        """Returns the number of elements of a variable's index set."""
        return self._sizes[variable]

    def expand(self, axis: Axis, keep_single: bool = False) -> Axis:
        """Rewrites an axis in the finest variables known, each by its representative.

        Args:
            axis: An axis, written down at any earlier time.
            keep_single: Whether to keep factors of a single position. An axis of size 1 is the
                empty product, so these usually go. They matter where it is asked which positions of
                a sum have been read. Without them, a variable that was taken apart into single
                positions is a pinned one again: it tells which of them each element is at.

        Returns:
            The same axis. None of its variables has parts.
        """
        terms: list[Term] = []
        for term in axis:
            if isinstance(term, Sum):
                whole = None if keep_single else self._whole_of(term)
                if whole is None:
                    terms += self._expand_segments(term.segments, keep_single)
                else:
                    terms.append(Factor(term.size, whole))
            elif term.variable is None:
                terms.append(term)
            else:
                root = self.find(term.variable)
                if root in self._factors:
                    parts = self._parts(term, self._factors[root])
                    terms += self.expand(parts, keep_single)
                elif root in self._segments and (keep_single or root not in self._pins):
                    parts = self._parts(term, self._segments[root])
                    segments = [(part,) for part in parts]
                    terms += self._expand_segments(segments, keep_single)
                elif keep_single or term.size > 1:
                    if root != term.variable:
                        term = Factor(term.size, root, term.role)
                    terms.append(term)
        return tuple(terms)

    def _whole_of(self, term: Sum) -> int | None:
        """Returns the variable of which a sum has all positions one by one, None if of none."""
        singles = self._one_by_one(term)
        if singles is None:
            return None
        return self._apart.get(singles)

    def _one_by_one(self, term: Sum) -> tuple[int, ...] | None:
        """Returns the variable of each position of a sum, None unless each has one of its own."""
        if len(term.segments) != term.size:
            return None
        singles: list[int] = []
        for segment in term.segments:
            parts = self.expand(segment, keep_single=True)
            found = [factor.variable for factor in factors_of(parts)]
            if len(found) != 1:
                return None
            (single,) = found
            if single is None:
                return None
            singles.append(single)
        return tuple(singles)

    def _expand_segments(self, segments: Sequence[Axis], keep_single: bool) -> Axis:
        expanded = []
        for segment in segments:
            axis = self.expand(segment, keep_single)
            expanded.append(axis)
        return concatenated(expanded)

    def variables_of(self, axis: Axis) -> set[int]:
        """Returns the finest variables of an axis, those of single positions included."""
        variables = set()
        for factor in factors_of(self.expand(axis, keep_single=True)):
            if factor.variable is not None:
                variables.add(factor.variable)
        return variables

    def signature(self, axis: Axis) -> tuple[Any, ...]:
        """Returns what an axis is made of, roles left out.

        Returns:
            A nested tuple. Those of two axes are equal if all that is known of the two is the same.
        """
        described: list[tuple[Any, ...]] = []
        for term in self.expand(axis):
            if isinstance(term, Sum):
                segments = [self.signature(segment) for segment in term.segments]
                described.append(tuple(segments))
            else:
                described.append((term.size, term.variable))
        return tuple(described)

    # --- pins

    def pin(self, axis: Axis, reason: str) -> None:
        """Forbids every permutation of an axis.

        Args:
            axis: The axis.
            reason: Why it may not be permuted. Parts that are pinned already keep their reason.
        """
        for factor in factors_of(self.expand(axis)):
            if factor.variable is not None:
                self._pins.setdefault(factor.variable, reason)

    def reason(self, variable: int) -> str | None:
        """Returns why a variable is pinned, None where it is free."""
        return self._pins.get(self.find(variable))

    def is_free(self, variable: int) -> bool:
        """Says whether the units of a variable may be permuted."""
        return self.find(variable) not in self._pins

    def is_pinned(self, axis: Axis) -> bool:
        """Says whether an axis varies along all its factors, and none of them may be permuted."""
        for factor in factors_of(self.expand(axis)):
            if factor.variable is None or self.is_free(factor.variable):
                return False
        return True

    # --- what becomes known

    def unite(self, x: Factor, y: Factor) -> None:
        """Makes one variable of two, because their units have to be permuted alike.

        Args:
            x: A factor of an expanded axis, so that its variable has no parts.
            y: Another one, of the same size.
        """
        assert x.variable is not None
        assert y.variable is not None
        kept = self.find(x.variable)
        absorbed = self.find(y.variable)
        if kept == absorbed:
            return
        self._parents[absorbed] = kept
        # The deeper of the two counts, or units united with shifted copies could be split for ever.
        depths = self._segment_depths
        depths[kept] = max(depths[kept], depths[absorbed])
        if (kept in self._pins) != (absorbed in self._pins):
            self.pinned_at.setdefault(kept, self.current_equation)
        elif absorbed in self.pinned_at:
            self.pinned_at.setdefault(kept, self.pinned_at[absorbed])
        if absorbed in self._pins:
            self._pins.setdefault(kept, self._pins[absorbed])

    def split_factor(self, factor: Factor, outer_size: int) -> Axis:
        """Splits a variable into a product of two.

        Args:
            factor: A factor of an expanded axis.
            outer_size: The size of the outer part, a divisor of the factor's.

        Returns:
            The outer and the inner part of the factor.
        """
        inner_size = factor.size // outer_size
        if factor.variable is None:
            outer_part = factor._replace(size=outer_size)
            inner_part = factor._replace(size=inner_size)
            return (outer_part, inner_part)
        pin = self._pins.get(factor.variable)
        depth = self._segment_depths[factor.variable]
        outer = self._new_variable(outer_size, pin, depth)
        inner = self._new_variable(inner_size, pin, depth)
        self._factors[factor.variable] = (outer, inner)
        return self._parts(factor, (outer, inner))

    def split_factor_segments(self, factor: Factor, sizes: Sequence[int]) -> list[Axis]:
        """Splits a variable into a sum of segments.

        Args:
            factor: A factor of an expanded axis.
            sizes: The sizes of the segments, which add up to the factor's.

        Returns:
            The axis of each segment. One of size 1 is a single position.

        Raises:
            Disagreement: If the variable is itself a segment of a segment, and so on, too often.
        """
        if factor.variable is None:
            return [constant(size, factor.filled) for size in sizes]
        pin = self._pins.get(factor.variable)
        if pin is not None:
            # Where nothing moves, nothing need be known of the parts, and keeping the variable
            # whole spares the user a pin for each of them.
            return [self.pinned(size, pin) for size in sizes]
        depth = self._segment_depths[factor.variable] + 1
        if depth > MAX_SEGMENT_DEPTH:
            raise Disagreement(f"more than {MAX_SEGMENT_DEPTH} splits one in another", (factor,))
        variables = [self._new_variable(size, segment_depth=depth) for size in sizes]
        self._segments[factor.variable] = tuple(variables)
        self._split_from.update(dict.fromkeys(variables, factor.variable))
        self._note_apart(factor.variable)
        return [(part,) for part in self._parts(factor, variables)]

    def _note_apart(self, variable: int) -> None:
        """Notes that a variable, and what it is a segment of, may have come to single positions."""
        above: int | None = variable
        while above is not None:
            whole = Factor(self._sizes[above], above)
            (term,) = self.expand((whole,), keep_single=True)
            if not isinstance(term, Sum):
                return
            singles = self._one_by_one(term)
            if singles is None:
                return
            self._apart[singles] = above
            self._pins.setdefault(above, TAKEN_APART)
            above = self._split_from.get(above)

    def _parts(self, factor: Factor, variables: Sequence[int]) -> tuple[Factor, ...]:
        """Returns the parts of a factor, each with the role that it inherits."""
        parts = []
        for index, variable in enumerate(variables):
            role = self.roles.child(factor.role, index)
            parts.append(Factor(self._sizes[variable], variable, role))
        return tuple(parts)

"""Axes as expressions over atoms, and the union-find that ties them: what moves together.

An *atom* is an index set that no primitive seen so far has taken apart. Every axis of every value
is a row-major product of terms; an axis of size 1 is the empty product. A term is a factor, which
is an occurrence of an atom, or a sum of segments one after the other, each of them an axis again.
Three relations grow while a jaxpr is walked, and never shrink:

- **same atom**: two factors have to be permuted alike (`unify`);
- **parts**: an atom is itself a product, because a reshape or a grouped convolution looked inside
  it, or a sum, because a slice or a concatenation did;
- **pinned**: an atom may not be permuted at all, with the first reason that was given.

A factor along which the value is constant has no atom at all. It is unchanged by any permutation,
so it agrees with whatever it meets and ties nothing: zeros broadcast into two layers do not
couple them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from otfusion_jax.tracing.axis import (
    MOST_CUTS,
    MOST_SEGMENTS,
    Axis,
    Disagreement,
    Factor,
    Kind,
    RoleConstraint,
    Sum,
    Term,
    concatenated,
    constant,
    factors_of,
    size_of,
)
from otfusion_jax.tracing.parity import ParityUnionFind


class Unifier:
    """All atoms of one trace, and what is known of them."""

    def __init__(self) -> None:
        self.role_constraints: list[RoleConstraint] = []
        self.strong: list[Axis] = []  # summed over together with others than themselves
        self.summed: list[Factor] = []  # of parameters: with values, or with other parameters
        self.unmet: list[Factor] = []  # of parameters: with constants
        self.here: Any = None  # where the walk is
        self.met: dict[int, Any] = {}  # where what was free met what is pinned
        self._parent: list[int] = []
        self._factors: dict[int, tuple[int, int]] = {}
        self._segments: dict[int, tuple[int, ...]] = {}
        self._sizes: list[int] = []
        self._cuts: list[int] = []  # how many an atom comes from
        self._pins: dict[int, str] = {}
        self._roles = ParityUnionFind()

    def fresh(self, size: int) -> Axis:
        """Returns an axis made of a new atom."""
        if size < 2:
            return constant(size)
        return (Factor(size, self._new(size), self._roles.fresh()),)

    def pinned(self, size: int, reason: str) -> Axis:
        """Returns a new axis that may not be permuted."""
        if size < 2:
            return constant(size)
        variable = self._new(size)
        self._pins[variable] = reason
        return (Factor(size, variable),)

    def _new(self, size: int, pin: str | None = None, cuts: int = 0) -> int:
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        self._cuts.append(cuts)
        if pin is not None:
            self._pins[len(self._parent) - 1] = pin
        return len(self._parent) - 1

    def find(self, variable: int) -> int:
        """Returns the representative of the atoms that move with this one."""
        root = variable
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[variable] != root:
            self._parent[variable], variable = root, self._parent[variable]
        return root

    def size(self, variable: int) -> int:
        """Returns the number of elements of an atom."""
        return self._sizes[variable]

    def expand(self, axis: Axis, singles: bool = False) -> Axis:
        """Rewrites an axis in the finest atoms known, each by its representative.

        Args:
            axis: the axis.
            singles: whether to keep factors of a single position, which axes do without.

        Returns:
            The axis.
        """
        out: list[Term] = []
        for term in axis:
            if isinstance(term, Sum):
                out += concatenated([self.expand(segment, singles) for segment in term.segments])
            elif term.variable is None:
                out.append(term)
            else:
                root = self.find(term.variable)
                if root in self._factors:
                    out += self.expand(self._parts(term, self._factors[root]), singles)
                elif root in self._segments:
                    parts = self._parts(term, self._segments[root])
                    out += concatenated([self.expand((part,), singles) for part in parts])
                elif singles or term.size > 1:
                    out.append(Factor(term.size, root, term.role))
        return tuple(out)

    def variables(self, axis: Axis) -> set[int]:
        """Returns the finest atoms of an axis, those of single positions included."""
        factors = factors_of(self.expand(axis, singles=True))
        return {factor.variable for factor in factors if factor.variable is not None}

    def singles(self, axis: Axis, start: int, end: int) -> set[int]:
        """Returns the atoms of single positions that lie within a range of an axis.

        Args:
            axis: an axis that has been cut where the range begins and ends.
            start: the first position.
            end: the position after the last.
        """
        terms = list(self.expand(axis, singles=True))
        found = set()
        while terms and terms[0].size == 1:
            found |= self.variables((terms.pop(0),))
        if terms and isinstance(terms[0], Sum):
            inner = size_of(tuple(terms[1:]))
            first, last = start // inner, end // inner
            for segment in terms[0].segments:
                size = size_of(segment)
                if first < size and last > 0:
                    found |= self.singles(segment, max(first, 0), min(last, size))
                first, last = first - size, last - size
        return {variable for variable in found if self._sizes[variable] == 1}

    def _parts(self, factor: Factor, variables: Sequence[int]) -> tuple[Factor, ...]:
        return tuple(
            Factor(self._sizes[part], part, self._roles.child(factor.role, i))
            for i, part in enumerate(variables)
        )

    def _split(self, factor: Factor, outer: int) -> Axis:
        """Takes an expanded factor apart into `outer` times the rest."""
        inner = factor.size // outer
        if factor.variable is None:
            return (factor._replace(size=outer), factor._replace(size=inner))
        how = self._pins.get(factor.variable), self._cuts[factor.variable]
        self._factors[factor.variable] = self._new(outer, *how), self._new(inner, *how)
        return self._parts(factor, self._factors[factor.variable])

    def signature(self, axis: Axis) -> tuple:
        """Returns what an axis is made of, roles left out."""
        return tuple(
            tuple(self.signature(segment) for segment in term.segments)
            if isinstance(term, Sum)
            else (term.size, term.variable)
            for term in self.expand(axis)
        )

    # --- pieces of an axis

    def cut(self, axis: Axis, marks: Sequence[int]) -> list[Axis]:
        """Takes an axis apart into segments.

        Args:
            axis: the axis.
            marks: positions where a new segment begins, rising, neither 0 nor the end.

        Returns:
            One axis for each segment.

        Raises:
            Disagreement: if a mark lies within a factor that the axis repeats.
        """
        if not marks:
            return [axis]
        first, *rest = self.expand(axis)
        inner = size_of(tuple(rest))
        if any(mark % inner for mark in marks):
            raise Disagreement(f"cut at {marks[0]} within blocks of {inner}", axis)
        return [
            (*piece, *rest) for piece in self._cut_term(first, [mark // inner for mark in marks])
        ]

    def _cut_term(self, term: Term, marks: Sequence[int]) -> list[Axis]:
        edges = [0, *marks, term.size]
        sizes = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        if isinstance(term, Sum):
            pieces: list[list[Axis]] = [[] for _ in sizes]
            offset = 0
            for segment in term.segments:
                length = size_of(segment)
                local = [mark - offset for mark in marks if 0 < mark - offset < length]
                index = sum(mark <= offset for mark in marks)
                for i, piece in enumerate(self.cut(segment, local)):
                    pieces[index + i].append(piece)
                offset += length
            found = map(concatenated, pieces)
            # By itself, a single position is no factor any more.
            return [self.expand(x) if n == 1 else x for n, x in zip(sizes, found, strict=True)]
        if term.variable is None:
            return [constant(size, term.filled) for size in sizes]
        pin = self._pins.get(term.variable)
        if pin is not None:  # where nothing moves, nothing need be known of the pieces
            return [self.pinned(size, pin) for size in sizes]
        cuts = self._cuts[term.variable] + 1
        if cuts > MOST_CUTS:
            raise Disagreement(f"more than {MOST_CUTS} cuts one in another", (term,))
        variables = self._segments[term.variable] = tuple(self._new(n, cuts=cuts) for n in sizes)
        return [(part,) if part.size > 1 else () for part in self._parts(term, variables)]

    def pin(self, axis: Axis, reason: str) -> None:
        """Forbids every permutation of an axis; the first reason is kept."""
        for factor in factors_of(self.expand(axis)):
            if factor.variable is not None:
                self._pins.setdefault(factor.variable, reason)

    def reason(self, variable: int) -> str | None:
        """Returns why an atom is pinned, None where it is free."""
        return self._pins.get(self.find(variable))

    def is_pinned(self, axis: Axis) -> bool:
        """Whether no unit of an axis may be permuted, whatever it is made of."""
        variables = (factor.variable for factor in factors_of(self.expand(axis)))
        return all(variable is not None and not self.is_free(variable) for variable in variables)

    def is_free(self, variable: int) -> bool:
        """Whether an atom may be permuted."""
        return self.find(variable) not in self._pins

    # --- two axes

    def _match(self, a: Axis, b: Axis, meet: Callable[[Factor, Factor], Factor]) -> Axis:
        """Goes through two axes of equal size side by side, taken apart as far as needed.

        Args:
            a: one axis.
            b: the other.
            meet: called on the factors that face each other; returns which stands for both.

        Returns:
            The axis of what `meet` returned.

        Raises:
            Disagreement: where no common refinement exists ([2, 3] against [3, 2]).
        """
        out: list[Term] = []
        left, right = list(reversed(a)), list(reversed(b))
        while left or right:
            # Afresh each time: what was split or united a moment ago may stand here again.
            x, y = self._next(left), self._next(right)
            if x is None or y is None:
                assert x is None
                assert y is None
            elif isinstance(x, Sum) or isinstance(y, Sum):
                xs, ys = self._run(x, left, y, right)
                try:
                    out += concatenated([self._match(*p, meet) for p in self._facing(xs, ys)])
                except Disagreement as found:
                    raise Disagreement(str(found), (*xs, *ys, *left, *right)) from None
            elif x.size == y.size:
                out.append(meet(x, y))
            elif x.size > y.size and x.size % y.size == 0:
                left.extend(reversed(self._split(x, y.size)))
                right.append(y)
            elif y.size > x.size and y.size % x.size == 0:
                right.extend(reversed(self._split(y, x.size)))
                left.append(x)
            else:
                raise Disagreement(f"{x.size} against {y.size}", (x, *left, y, *right))
        return tuple(out)

    def _next(self, stack: list[Term]) -> Term | None:
        """Takes the next term off a stack, in its finest form."""
        while stack:
            # Axes do without factors of a single position, but sums do not: it may yet be picked.
            terms = [t for t in self.expand((stack.pop(),), singles=True) if t.size != 1]
            stack.extend(reversed(terms))
            if terms:
                return stack.pop()
        return None

    def _run(self, x: Term, left: list[Term], y: Term, right: list[Term]) -> tuple[Axis, Axis]:
        """Takes terms off both stacks until the two sides are of equal size."""
        xs, ys = [x], [y]
        have, want = x.size, y.size
        while have != want:
            side, stack = (xs, left) if have < want else (ys, right)
            term = self._next(stack)
            assert term is not None
            side.append(term)
            have, want = math.prod(t.size for t in xs), math.prod(t.size for t in ys)
        return tuple(xs), tuple(ys)

    def _facing(self, a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
        """Cuts two axes of equal size at the edges of the segments of either."""
        marks = sorted({*self._edges(a), *self._edges(b)})
        if len(marks) >= MOST_SEGMENTS:
            raise Disagreement(f"more than {MOST_SEGMENTS} segments", (*a, *b))
        return list(zip(self.cut(a, marks), self.cut(b, marks), strict=True))

    def _edges(self, axis: Axis) -> list[int]:
        first, *rest = axis
        if not isinstance(first, Sum):
            return []
        inner = size_of(tuple(rest))
        edges = [0]
        for segment in first.segments:
            edges.append(edges[-1] + size_of(segment) * inner)
        return edges[1:-1]

    def _unite(self, x: Factor, y: Factor) -> None:
        assert x.variable is not None
        assert y.variable is not None
        a, b = self.find(x.variable), self.find(y.variable)
        if a != b:
            self._parent[b] = a
            self._cuts[a] = max(self._cuts[a], self._cuts[b])
            if (a in self._pins) != (b in self._pins):
                self.met.setdefault(a, self.here)
            elif b in self.met:
                self.met.setdefault(a, self.met[b])
            if b in self._pins:
                self._pins.setdefault(a, self._pins[b])

    def enter(self, axis: Axis, kind: Kind, into: Kind) -> Axis:
        """Carries an axis of a value of one kind into a value that depends on more."""
        if kind is not Kind.PARAMETER or into is not Kind.FEATURE:
            return axis
        return self._entered(self.expand(axis))

    def _entered(self, axis: Axis) -> Axis:
        out: list[Term] = []
        for term in axis:
            if isinstance(term, Sum):
                term = Sum(term.size, tuple(self._entered(s) for s in term.segments))
            elif term.variable is not None and term.role:
                feature = term._replace(role=self._roles.fresh())
                self.role_constraints.append(RoleConstraint(term, feature, 1))
                term = feature
            out.append(term)
        return tuple(out)

    def unify(self, axes: Sequence[Axis], kinds: Sequence[Kind]) -> Axis:
        """Ties axes that meet elementwise and returns the axis of the result.

        Args:
            axes: axes of one size.
            kinds: the kind of the value that each belongs to.
        """

        def meet(x: Factor, y: Factor) -> Factor:
            if x.variable is None or y.variable is None:
                return y if x.variable is None else x
            self._unite(x, y)
            if x.role and y.role:
                self._roles.tie(x.role, y.role, 1)
            return x if x.role else y

        into = max(kinds)
        out = self.enter(axes[0], kinds[0], into)
        for axis, kind in zip(axes[1:], kinds[1:], strict=True):
            other = self.enter(axis, kind, into)
            try:
                out = self._match(out, other, meet)
            except Disagreement as found:
                out = self.pinned(size_of(out), self._separate(found))
        return out

    def _separate(self, found: Disagreement) -> str:
        """Pins what does not agree; returns the first reason why any of it is pinned."""
        reason = f"two factorisations with no common refinement ({found})"
        self.pin(found.rest, reason)
        variables = (f.variable for f in factors_of(self.expand(found.rest)))
        return next((self._pins[a] for a in variables if a is not None), reason)

    def contract(self, a: Axis, b: Axis, kinds: tuple[Kind, Kind]) -> None:
        """Ties two axes that are summed over together: opposite roles."""

        def meet(x: Factor, y: Factor) -> Factor:
            if x.variable is None or y.variable is None:
                # A sum over the units with equal weights: any order will do.
                for (mine, kind), (other, its) in itertools.permutations(
                    zip((x, y), kinds, strict=True)
                ):
                    if kind is Kind.PARAMETER and mine.variable is not None:
                        known = its is not Kind.CONSTANT and not other.filled
                        (self.summed if known else self.unmet).append(mine)
                return x
            if kinds[0] is not kinds[1] or not self._is_same(x, y):
                self.strong += [a, b]
                if kinds == (Kind.PARAMETER, Kind.PARAMETER):
                    self.summed.append(x)
            self._unite(x, y)
            if not (x.role and y.role):
                return x
            match kinds:
                case (Kind.FEATURE, Kind.PARAMETER):
                    self.role_constraints.append(RoleConstraint(y, x, -1))
                case (Kind.PARAMETER, Kind.FEATURE):
                    self.role_constraints.append(RoleConstraint(x, y, -1))
                case (Kind.PARAMETER, Kind.PARAMETER):  # low-rank factors: units between the two
                    unit = x._replace(role=self._roles.fresh())
                    self.role_constraints += [
                        RoleConstraint(x, unit, 1),
                        RoleConstraint(y, unit, -1),
                    ]
                case _:
                    self._roles.tie(x.role, y.role, -1)
            return x

        try:
            self._match(a, b, meet)
        except Disagreement as found:
            self._separate(found)

    def _is_same(self, x: Factor, y: Factor) -> bool:
        """Whether two factors are of the same use of the same parameter."""
        assert x.variable is not None
        assert y.variable is not None
        if not (x.role and y.role) or self.find(x.variable) != self.find(y.variable):
            return False
        return self._roles.find(x.role) == self._roles.find(y.role)

    # --- axes read in another way

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads the same elements, in row-major order, as axes of other sizes.

        Args:
            axes: the axes of a value, of sizes of the same product as `sizes`.
            sizes: sizes of the new axes.
            reason: why an axis is pinned if the new sizes cut across the atoms.
        """
        if 0 in sizes:
            return [constant(size) for size in sizes]
        out: list[Axis] = []
        terms = [t for axis in axes for t in axis][::-1]
        todo = list(sizes)
        while todo:
            # The shortest run of new axes that holds a whole number of old terms.
            run, have, taken = [todo.pop(0)], 1, []
            while (want := math.prod(run)) != have:
                if have < want:
                    taken.append(terms.pop())
                    have *= taken[-1].size
                else:
                    run.append(todo.pop(0))
            try:
                out += self._divide(tuple(taken), run)
            except Disagreement:
                self.pin(tuple(taken), reason)
                out += [self.pinned(size, reason) for size in run]
        return out

    def _divide(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        out = []
        terms = list(reversed(axis))
        for size in sizes:
            taken: list[Term] = []
            while size > 1:
                term = self._next(terms)
                assert term is not None
                if term.size > size and term.size % size == 0:
                    if isinstance(term, Sum):
                        outer, inner = self._divide_sum(term, size)
                        taken += outer
                        terms.extend(reversed(inner))
                        size = 1
                    else:
                        terms.extend(reversed(self._split(term, size)))
                elif size % term.size == 0:
                    taken.append(term)
                    size //= term.size
                else:
                    raise Disagreement(f"{term.size} against {size}", axis)
            out.append(tuple(taken))
        return out

    def _divide_sum(self, term: Sum, outer: int) -> tuple[Axis, Axis]:
        """Reads segments as rows of one length: which rows belong to which is what remains."""
        inner = term.size // outer
        if any(size_of(segment) % inner for segment in term.segments):
            raise Disagreement(f"segments across rows of {inner}", (term,))
        counts = [size_of(segment) // inner for segment in term.segments]
        pairs = [
            self._divide(segment, (count, inner))
            for count, segment in zip(counts, term.segments, strict=True)
        ]
        rows = self.unify([row for _, row in pairs], [Kind.CONSTANT] * len(pairs))
        return concatenated([which for which, _ in pairs]), rows

    # --- what has been found

    def use(self, factor: Factor) -> tuple[tuple[int, int], int]:
        """Returns which (role, atom) an expanded factor of a parameter is, and with which sign."""
        assert factor.variable is not None
        root = self._roles.find(factor.role)
        return (abs(root), factor.variable), 1 if root > 0 else -1

    def signs(self) -> dict[tuple[int, int], set[int]]:
        """Returns for every use of a parameter the signs with which features meet it.

        In each connected set of features the one in contact first is taken as pushed forward.
        """
        anchors: dict[int, int] = {}
        out: dict[tuple[int, int], set[int]] = {}
        for contact in self.role_constraints:
            pairs = zip(
                factors_of(self.expand((contact.parameter,))),
                factors_of(self.expand((contact.feature,))),
                strict=True,
            )
            for parameter, feature in pairs:
                mine, flip = self.use(parameter)
                theirs, way = self.use(feature)
                sign = contact.sign * way * anchors.setdefault(theirs[0], way)
                # What is tied to its own opposite (a Gram matrix of features) has both roles.
                self_opposite = self._roles.self_opposite & {theirs[0], mine[0]}
                out.setdefault(mine, set()).update({1, -1} if self_opposite else {flip * sign})
        return out

"""Axes as products of atoms, and the two union-finds that tie them: what moves together, and how.

An *atom* is an index set that no primitive seen so far has taken apart. Every axis of every value
is a row-major product of factors, each of them an occurrence of an atom; an axis of size 1 is the
empty product. Three relations grow while a jaxpr is walked, and never shrink:

- **same atom**: two factors have to be permuted alike (`unify`);
- **parts**: an atom is itself a product (`split`), because a reshape or a grouped convolution
  looked inside it;
- **pinned**: an atom may not be permuted at all, with the first reason that was given.

A factor along which the value is constant has no atom at all. It is unchanged by any permutation,
so it agrees with whatever it meets and ties nothing: zeros broadcast into two layers do not
couple them.

Roles are a second union-find, with signs. Features push forward along a transport plan; what is
contracted with them must be pulled back. Elementwise operations link equal roles, contractions
opposite ones. A parameter has no role of its own but one per use, recorded as a *contact* when it
meets a feature: a tied embedding is in contact with both signs.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a value depends on: nothing, parameters alone, or inputs as well."""

    CONSTANT = 0
    PARAMETER = 1
    FEATURE = 2


class Factor(NamedTuple):
    """One occurrence of an atom in an axis.

    `role` is a signed variable of the role union-find, 0 where there is none.
    """

    size: int
    atom: int | None
    role: int = 0


Axis = tuple[Factor, ...]


class Contact(NamedTuple):
    """A parameter's factor met a feature's: with `sign` +1 it produces it, with -1 consumes it."""

    parameter: Factor
    feature: Factor
    sign: int


def constant(size: int) -> Axis:
    """Returns an axis along which a value does not vary."""
    return (Factor(size, None),) if size != 1 else ()


@dataclasses.dataclass
class _Roles:
    """Union-find with parity. Variables are positive integers; a minus sign is the opposite."""

    parent: dict[int, int] = dataclasses.field(default_factory=dict)
    children: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    torn: set[int] = dataclasses.field(default_factory=set)  # roots tied to their own opposite

    def fresh(self) -> int:
        new = len(self.parent) + 1
        self.parent[new] = new
        return new

    def find(self, role: int) -> int:
        """Returns the root, negative where `role` is its opposite."""
        sign = 1 if role > 0 else -1
        node = abs(role)
        trail = []
        while abs(self.parent[node]) != node:
            trail.append((node, sign))
            if self.parent[node] < 0:
                sign = -sign
            node = abs(self.parent[node])
        for passed, before in trail:  # sign from `passed` to the root is sign / before
            self.parent[passed] = node * sign * before
        return sign * node

    def tie(self, a: int, b: int, sign: int) -> None:
        a, b = self.find(a), sign * self.find(b)
        if a == -b:
            self.torn.add(abs(a))
        elif a != b:
            if abs(b) in self.torn:
                self.torn.add(abs(a))
            self.parent[abs(b)] = a if b > 0 else -a

    def child(self, role: int, index: int) -> int:
        """Returns the role of part `index` of a factor that has been split."""
        if role == 0:
            return 0
        root = self.find(role)
        if (abs(root), index) not in self.children:
            part = self.children[abs(root), index] = self.fresh()
            if abs(root) in self.torn:
                self.torn.add(part)
        return self.children[abs(root), index] * (1 if root > 0 else -1)


class Space:
    """All atoms of one trace, and what is known of them."""

    def __init__(self) -> None:
        self.contacts: list[Contact] = []
        self._parent: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._sizes: list[int] = []
        self._pins: dict[int, str] = {}
        self._roles = _Roles()

    def fresh(self, size: int) -> Axis:
        """Returns an axis made of a new atom."""
        if size == 1:
            return ()
        return (Factor(size, self._new(size), self._roles.fresh()),)

    def pinned(self, size: int, reason: str) -> Axis:
        """Returns a new axis that may not be permuted."""
        if size == 1:
            return ()
        atom = self._new(size)
        self._pins[atom] = reason
        return (Factor(size, atom),)

    def _new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        return len(self._parent) - 1

    def find(self, atom: int) -> int:
        """Returns the representative of the atoms that move with this one."""
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root

    def size(self, atom: int) -> int:
        """Returns the number of elements of an atom."""
        return self._sizes[atom]

    def expand(self, axis: Axis) -> Axis:
        """Rewrites an axis in the finest atoms known, each by its representative."""
        out: list[Factor] = []
        stack = list(reversed(axis))
        while stack:
            factor = stack.pop()
            if factor.atom is None:
                out.append(factor)
                continue
            root = self.find(factor.atom)
            if root in self._parts:
                stack.extend(self._parts_of(factor, root)[::-1])
            else:
                out.append(Factor(factor.size, root, factor.role))
        return tuple(out)

    def _parts_of(self, factor: Factor, root: int) -> list[Factor]:
        return [
            Factor(self._sizes[part], part, self._roles.child(factor.role, i))
            for i, part in enumerate(self._parts[root])
        ]

    def _split(self, factor: Factor, outer: int) -> list[Factor]:
        """Takes an expanded factor apart into `outer` times the rest."""
        inner = factor.size // outer
        if factor.atom is None:
            return [Factor(outer, None), Factor(inner, None)]
        self._parts[factor.atom] = self._new(outer), self._new(inner)
        if factor.atom in self._pins:
            for part in self._parts[factor.atom]:
                self._pins[part] = self._pins[factor.atom]
        return self._parts_of(factor, factor.atom)

    def pin(self, axis: Axis, reason: str) -> None:
        """Forbids every permutation of an axis; the first reason is kept."""
        for factor in self.expand(axis):
            if factor.atom is not None:
                self._pins.setdefault(factor.atom, reason)

    def reason(self, atom: int) -> str | None:
        """Returns why an atom is pinned, None where it is free."""
        return self._pins.get(self.find(atom))

    def _matched(self, a: Axis, b: Axis) -> Iterator[tuple[Factor, Factor]]:
        """Yields the factors of two axes of equal size side by side, split as far as needed.

        Where no common refinement exists ([2, 3] against [3, 2]), both are pinned and no pair
        comes of it.
        """
        left, right = list(reversed(a)), list(reversed(b))
        while left and right:
            # Afresh each time: what was split or united a moment ago may stand here again.
            x, *more_x = self.expand((left.pop(),))
            y, *more_y = self.expand((right.pop(),))
            left.extend(reversed(more_x))
            right.extend(reversed(more_y))
            if x.size == y.size:
                yield x, y
            elif x.size > y.size and x.size % y.size == 0:
                left.extend(reversed(self._split(x, y.size)))
                right.append(y)
            elif y.size > x.size and y.size % x.size == 0:
                right.extend(reversed(self._split(y, x.size)))
                left.append(x)
            else:
                reason = f"two factorisations with no common refinement ({x.size} against {y.size})"
                self.pin((x, *left, y, *right), reason)
                return

    def _unite(self, x: Factor, y: Factor) -> None:
        assert x.atom is not None
        assert y.atom is not None
        a, b = self.find(x.atom), self.find(y.atom)
        if a != b:
            self._parent[b] = a
            if b in self._pins:
                self._pins.setdefault(a, self._pins[b])

    def enter(self, axis: Axis, kind: Kind, into: Kind) -> Axis:
        """Carries an axis of a value of one kind into a value that depends on more."""
        if kind is not Kind.PARAMETER or into is not Kind.FEATURE:
            return axis
        out = []
        for factor in self.expand(axis):
            if factor.atom is not None and factor.role:
                feature = factor._replace(role=self._roles.fresh())
                self.contacts.append(Contact(factor, feature, 1))
                factor = feature
            out.append(factor)
        return tuple(out)

    def unify(self, axes: Sequence[Axis], kinds: Sequence[Kind]) -> Axis:
        """Ties axes that meet elementwise and returns the axis of the result.

        Args:
            axes: axes of one size.
            kinds: the kind of the value that each belongs to.
        """
        into = max(kinds)
        out = self.enter(axes[0], kinds[0], into)
        for axis, kind in zip(axes[1:], kinds[1:], strict=True):
            other = self.enter(axis, kind, into)
            joined = []
            for x, y in self._matched(out, other):
                if x.atom is not None and y.atom is not None:
                    self._unite(x, y)
                    if x.role and y.role:
                        self._roles.tie(x.role, y.role, 1)
                    joined.append(x if x.role else y)
                else:
                    joined.append(y if x.atom is None else x)
            # Without a common refinement both are pinned, and either stands for the result.
            complete = math.prod(f.size for f in joined) == math.prod(f.size for f in out)
            out = tuple(joined) if complete else self._varying(out, other)
        return out

    def _varying(self, a: Axis, b: Axis) -> Axis:
        """Returns a pinned axis of the size of two that are pinned and disagree."""
        size = math.prod(f.size for f in a)
        pins = [self.reason(f.atom) for f in self.expand((*a, *b)) if f.atom is not None]
        return self.pinned(size, next((p for p in pins if p), "no common refinement"))

    def contract(self, a: Axis, b: Axis, kinds: tuple[Kind, Kind]) -> None:
        """Ties two axes that are summed over together: opposite roles."""
        for x, y in self._matched(a, b):
            if x.atom is None or y.atom is None:
                continue  # a sum over the units with equal weights: any order will do
            self._unite(x, y)
            if not (x.role and y.role):
                continue
            match kinds:
                case (Kind.FEATURE, Kind.PARAMETER):
                    self.contacts.append(Contact(y, x, -1))
                case (Kind.PARAMETER, Kind.FEATURE):
                    self.contacts.append(Contact(x, y, -1))
                case (Kind.PARAMETER, Kind.PARAMETER):  # low-rank factors: units between the two
                    unit = x._replace(role=self._roles.fresh())
                    self.contacts += [Contact(x, unit, 1), Contact(y, unit, -1)]
                case _:
                    self._roles.tie(x.role, y.role, -1)

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
        factors = [f for axis in axes for f in axis][::-1]
        todo = list(sizes)
        while todo:
            # The shortest run of new axes that holds a whole number of old factors.
            run, have, taken = [todo.pop(0)], 1, []
            while (want := math.prod(run)) != have:
                if have < want:
                    taken.append(factors.pop())
                    have *= taken[-1].size
                else:
                    run.append(todo.pop(0))
            out += self._cut(tuple(taken), run, reason)
        return out

    def _cut(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        out = []
        factors = list(reversed(self.expand(axis)))
        for size in sizes:
            taken: list[Factor] = []
            while size > 1:
                factor, *more = self.expand((factors.pop(),))
                factors.extend(reversed(more))
                if factor.size > size and factor.size % size == 0:
                    factors.extend(reversed(self._split(factor, size)))
                elif size % factor.size == 0:
                    taken.append(factor)
                    size //= factor.size
                else:
                    self.pin(axis, reason)
                    return [self.pinned(s, reason) for s in sizes]
            out.append(tuple(taken))
        return out

    def use(self, factor: Factor) -> tuple[tuple[int, int], int]:
        """Returns which (role, atom) an expanded factor of a parameter is, and with which sign."""
        assert factor.atom is not None
        root = self._roles.find(factor.role)
        return (abs(root), factor.atom), 1 if root > 0 else -1

    def signs(self) -> dict[tuple[int, int], set[int]]:
        """Returns for every use of a parameter the signs with which features meet it.

        In each connected set of features the one in contact first is taken as pushed forward.
        """
        anchors: dict[int, int] = {}
        out: dict[tuple[int, int], set[int]] = {}
        for contact in self.contacts:
            pairs = zip(
                self.expand((contact.parameter,)), self.expand((contact.feature,)), strict=True
            )
            for parameter, feature in pairs:
                mine, flip = self.use(parameter)
                theirs, way = self.use(feature)
                sign = contact.sign * way * anchors.setdefault(theirs[0], way)
                # What is tied to its own opposite (a Gram matrix of features) has both roles.
                torn = self._roles.torn & {theirs[0], mine[0]}
                out.setdefault(mine, set()).update({1, -1} if torn else {flip * sign})
        return out

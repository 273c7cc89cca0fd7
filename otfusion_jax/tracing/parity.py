"""A union-find that knows whether two of its variables are equal or opposite.

When units are moved along a transport plan, arrays that have an axis of these units are either
pushed forward or pulled back: features and the weights that produce them are pushed forward,
weights that are contracted with features are pulled back (see `roles`). Which of the two an axis is
can't be seen from the axis itself, but operations relate axes to each other: an elementwise
operation equates their roles, a contraction makes them opposite.

This is the problem of colouring a graph with two colours, and it is solved by a union-find with
parity: every variable keeps its sign relative to its parent. Variables are positive integers, and a
minus sign stands for the opposite. A cycle with an odd number of contractions has no colouring, as
when features are contracted with themselves (a Gram matrix). Its variables are *self-opposite*:
both roles hold for them.
"""


class ParityUnionFind:
    """A union-find with signs.

    Attributes:
        self_opposite: The roots of the sets that have been tied to their own opposite.
    """

    def __init__(self) -> None:
        self.self_opposite: set[int] = set()
        # The parent of each variable, negative where it is the opposite of the variable.
        self._parent: dict[int, int] = {}
        # The role of each part of a factor that was split, by the root of the factor's role.
        self._children: dict[tuple[int, int], int] = {}

    def fresh(self) -> int:
        """Returns a new variable, which is not tied to any other."""
        new = len(self._parent) + 1
        self._parent[new] = new
        return new

    def find(self, role: int) -> int:
        """Returns the root of a role's set, with a minus sign where the role is its opposite."""
        sign = 1 if role > 0 else -1
        node = abs(role)
        passed: list[tuple[int, int]] = []
        parent = self._parent[node]
        while abs(parent) != node:
            passed.append((node, sign))
            if parent < 0:
                sign = -sign
            node = abs(parent)
            parent = self._parent[node]
        # Path compression. `sign` is that of the root relative to `role`, `sign_passed` that of a
        # variable on the way, so that their product is that of the root relative to the variable.
        for variable, sign_passed in passed:
            self._parent[variable] = node * sign * sign_passed
        return sign * node

    def tie(self, a: int, b: int, sign: int) -> None:
        """Makes two roles equal, or opposite to each other.

        Args:
            a: One role.
            b: The other role.
            sign: 1 to make them equal, -1 to make them opposite.
        """
        root_a = self.find(a)
        root_b = sign * self.find(b)
        if root_a == root_b:
            return
        if root_a == -root_b:
            self.self_opposite.add(abs(root_a))
            return
        # The root of `b` is attached to that of `a`, which has to stand for what was known of both.
        absorbed = abs(root_b)
        if absorbed in self.self_opposite:
            self.self_opposite.add(abs(root_a))
        self._parent[absorbed] = root_a if root_b > 0 else -root_a

    def child(self, role: int, index: int) -> int:
        """Returns the role of one part of a factor that has been split.

        Equal roles have equal children, and opposite roles have opposite ones: what was tied before
        a split holds for every part. Later on the parts may be tied in different ways, as when only
        one of them is contracted.

        Args:
            role: The role of the factor. 0 has the child 0.
            index: Which of the parts it is.
        """
        if role == 0:
            return 0
        root = self.find(role)
        key = (abs(root), index)
        if key not in self._children:
            new = self.fresh()
            self._children[key] = new
            if abs(root) in self.self_opposite:
                self.self_opposite.add(new)
        child = self._children[key]
        return child if root > 0 else -child

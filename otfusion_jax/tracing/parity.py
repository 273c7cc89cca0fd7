"""The union-find of roles, with signs: what is pushed forward along a plan, and what pulled back.

Features push forward along a transport plan; what is contracted with them must be pulled back.
Elementwise operations link equal roles, contractions opposite ones. A parameter has no role of its
own but one per use, recorded as a *contact* when it meets a feature (see `axes`): a tied embedding
is in contact with both signs.
"""

import dataclasses


@dataclasses.dataclass
class ParityUnionFind:
    """Union-find with parity. Variables are positive integers; a minus sign is the opposite."""

    self_opposite: set[int] = dataclasses.field(
        default_factory=set
    )  # roots tied to their own opposite
    _parent: dict[int, int] = dataclasses.field(default_factory=dict)
    _children: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)

    def fresh(self) -> int:
        """Returns a new variable."""
        new = len(self._parent) + 1
        self._parent[new] = new
        return new

    def find(self, role: int) -> int:
        """Returns the root, negative where `role` is its opposite."""
        sign = 1 if role > 0 else -1
        node = abs(role)
        trail = []
        while abs(self._parent[node]) != node:
            trail.append((node, sign))
            if self._parent[node] < 0:
                sign = -sign
            node = abs(self._parent[node])
        for passed, before in trail:  # sign from `passed` to the root is sign / before
            self._parent[passed] = node * sign * before
        return sign * node

    def tie(self, a: int, b: int, sign: int) -> None:
        """Makes two roles equal, or opposite where `sign` is -1."""
        a, b = self.find(a), sign * self.find(b)
        if a == -b:
            self.self_opposite.add(abs(a))
        elif a != b:
            if abs(b) in self.self_opposite:
                self.self_opposite.add(abs(a))
            self._parent[abs(b)] = a if b > 0 else -a

    def child(self, role: int, index: int) -> int:
        """Returns the role of part `index` of a factor that has been split or cut."""
        if role == 0:
            return 0
        root = self.find(role)
        if (abs(root), index) not in self._children:
            part = self._children[abs(root), index] = self.fresh()
            if abs(root) in self.self_opposite:
                self.self_opposite.add(part)
        return self._children[abs(root), index] * (1 if root > 0 else -1)

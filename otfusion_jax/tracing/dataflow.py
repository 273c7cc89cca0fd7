"""The equations of a program in the order in which values flow, to be followed from some of them.

What is asked about the units of one group concerns few of the equations. `Dataflow` knows which
equations take which values.
"""

import collections
import heapq
from collections.abc import Callable, Iterable
from typing import Any

from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import rounds_finely
from otfusion_jax.tracing.records import Transfer


class Dataflow:
    """Which equations take which values.

    Attributes:
        users: By the numbers of values the positions of the transfers that take them.
        ambiguous: The numbers of values that are several in one place: slices by several loops.

    Args:
        interpreter: The finished pass over the program.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        self.users: dict[int | None, list[int]] = {}
        counts = collections.Counter([number for number, _ in interpreter.sliced])
        self.ambiguous: set[int | None] = interpreter.collected & counts.keys()
        self.ambiguous.update([number for number, count in counts.items() if count > 1])
        self._transfers = interpreter.transfers
        for position, transfer in enumerate(interpreter.transfers):
            for value in transfer.operands:
                self.users.setdefault(value.number, []).append(position)

    def follow(self, starts: Iterable[int | None], step: Callable[[Transfer], list[int]]) -> None:
        """Goes through all equations that values get to, in their order, each of them once.

        Args:
            starts: The numbers of the values.
            step: Goes through an equation, and returns the numbers of the results to follow.
        """
        waiting: list[int] = []
        for number in starts:
            waiting += self.users.get(number, [])
        heapq.heapify(waiting)
        last = -1
        while waiting:
            position = heapq.heappop(waiting)
            if position == last:
                continue
            last = position
            for number in step(self._transfers[position]):
                for user in self.users.get(number, []):
                    heapq.heappush(waiting, user)


def round_finely(transfer: Transfer) -> bool:
    """Whether no result of an equation is rounded so much that sums become other numbers.

    Args:
        transfer: The equation.
    """
    types: list[Any] = [var.aval for var in transfer.context.eqn.outvars]
    return all(rounds_finely(result.dtype) for result in types)

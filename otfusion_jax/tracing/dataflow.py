"""The equations of a program in the order in which values flow, to be followed from some of them.

What is asked about the units of one group concerns few of the equations. `Dataflow` knows which
equations take which values, and which values are one number throughout.
"""

import collections
import heapq
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import UNCHANGED, rounds_finely
from otfusion_jax.tracing.records import Transfer

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "pow": np.float_power,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
"""What programs do to numbers that are known, such as the root of the number of dimensions."""


class Dataflow:
    """Which equations take which values.

    Attributes:
        numbers: By the numbers of values those that are one number throughout.
        users: By the numbers of values the positions of the transfers that take them.
        ambiguous: The numbers of values that are several in one place: slices by several loops.

    Args:
        interpreter: The finished pass over the program.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        self.numbers: dict[int | None, float] = dict(interpreter.numbers)
        self.users: dict[int | None, list[int]] = {}
        counts = collections.Counter([number for number, _ in interpreter.sliced])
        self.ambiguous: set[int | None] = interpreter.collected & counts.keys()
        self.ambiguous.update([number for number, count in counts.items() if count > 1])
        self._transfers = interpreter.transfers
        for position, transfer in enumerate(interpreter.transfers):
            for value in transfer.operands:
                self.users.setdefault(value.number, []).append(position)
            self._note_number(transfer)

    def _note_number(self, transfer: Transfer) -> None:
        """Notes the result of an equation between numbers that are known."""
        eqn = transfer.context.eqn
        found = []
        for value in transfer.operands:
            found.append(self.numbers.get(value.number))
        if transfer.form != "equation" or len(transfer.results) != 1 or None in found or not found:
            return
        number = transfer.results[0].number
        function = _FUNCTIONS.get(eqn.primitive.name)
        types: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
        # Integers are divided in another way, and run over.
        are_floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in types)
        value = None
        with np.errstate(all="ignore"):
            # A cast or a broadcast is the same number, and a root of one is another that is known.
            if eqn.primitive in UNCHANGED:
                value = found[0]
            elif function is not None and are_floats:
                value = function(*found)
            if value is not None and not jnp.issubdtype(types[-1].dtype, jnp.complexfloating):
                # As it is rounded.
                self.numbers[number] = float(np.asarray(value).astype(types[-1].dtype))

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

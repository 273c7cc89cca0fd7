"""Plans on disk as they are found, so that a run that was killed goes on from there.

A folder has one file for each group tree that has been solved, written under another name and
renamed, and one that says for which call. It is for a method that visits each tree once.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.descent_state import DescentState
from otfusion_jax.alignment.measured_leaves import Leaves, MeasuredLeaves
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.common.host import Array
from otfusion_jax.symmetry.groups import Plans

_NAME = re.compile(r"tree-(\d+)\.npz")
_CALL = "call.npz"
_KINDS = ("plans", "gaps", "converged", "before", "after")


class Progress:
    """What is known of an alignment that goes over all group trees once.

    Args:
        folder: The folder. It is made if it is not there.
        call: Digests of what the plans depend on, by what it is; see `digests`.

    Raises:
        ValueError: If the folder has the plans of another call. What differs is listed.
    """

    def __init__(self, folder: Path, call: dict[str, str]):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        earlier = folder / _CALL
        if not earlier.exists():
            _write(earlier, {name: np.asarray(digest) for name, digest in call.items()})
        with np.load(earlier) as stored:
            others = [name for name, digest in call.items() if stored[name] != digest]
        if others:
            raise ValueError(
                f"{folder} has the plans of a call with other {' and '.join(others)}; give another "
                "folder, or delete this one"
            )

    def resumed(
        self, state: DescentState, measured: MeasuredLeaves
    ) -> tuple[DescentState, set[int]]:
        """Takes what was found before into a state.

        Args:
            state: The state to start from.
            measured: Where to note the distances that were measured before.

        Returns:
            The state, with arrays of NumPy where something was found, and the positions of the
            group trees that are solved.
        """
        found: dict[str, dict[str, Array]] = {kind: {} for kind in _KINDS}
        solved = set()
        for path in sorted(self._folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            solved.add(int(match[1]))
            with np.load(path) as stored:
                for key, value in stored.items():
                    kind, _, name = key.partition(":")
                    found[kind][name] = value
        resumed = DescentState(
            state.plans | found["plans"],
            state.gaps | found["gaps"],
            state.converged | found["converged"],
            state.improved,
        )
        for kind, distances in _distances(measured).items():
            for leaves, distance in found[kind].items():
                distances[tuple(map(int, leaves.split("-")))] = float(distance)
        return resumed, solved

    def save(
        self,
        number: int,
        plans: Plans,
        state: DescentState,
        measured: MeasuredLeaves,
        leaves: Leaves,
    ) -> None:
        """Writes down what solving a group tree has changed.

        Args:
            number: The position of the tree.
            plans: The plans that have changed.
            state: The state after.
            measured: The distances that are known by the way.
            leaves: The parameters whose distances the tree has told, if it has.
        """
        record = {}
        for kind, distances in _distances(measured).items():
            if leaves in distances:
                record[f"{kind}:{'-'.join(map(str, leaves))}"] = np.asarray(distances[leaves])
        for name, plan in plans.items():
            record[f"plans:{name}"] = np.asarray(plan)
            record[f"gaps:{name}"] = np.asarray(state.gaps[name])
            record[f"converged:{name}"] = np.asarray(state.converged[name])
        _write(self._folder / f"tree-{number:06}.npz", record)


def digests(
    problem: AlignmentProblem, settings: str, grams: dict[str, Gram] | None, distance: Array
) -> dict[str, str]:
    """Returns short texts that differ where the plans of two calls may differ.

    Args:
        problem: The alignment problem, of known values.
        settings: What else decides about plans, as a text.
        grams: The inner products that groups are matched by, or None.
        distance: The squared distance of the models before they are aligned.

    Returns:
        A digest each of the models, of their symmetries, of the settings, and of the inner products
        and masses that were given.
    """
    symmetries = [problem.symmetry, problem.onto]
    structure = [(symmetry.parts, symmetry.groups) for symmetry in symmetries]
    settings = f"{settings} {type(problem.metric).__qualname__} {problem.solver}"
    # Groups go by name: the same array of another group is another call.
    given, names = jax.tree_util.tree_flatten((grams, problem.marginals))
    return {
        "models": _digest([distance, *_first_that_differ(problem)]),
        "symmetries": _digest([repr(structure)]),
        "settings (method, metric or solver)": _digest([settings]),
        "grams or marginals": _digest([str(names), *given]),
    }


def _first_that_differ(problem: AlignmentProblem) -> list[np.ndarray]:
    """Returns the smallest parameter in which the models differ, of both: it tells which is which.

    To go over all of them would be to read models that are lazy once more.
    """
    parts = problem.symmetry.parts
    for number in sorted(range(len(parts)), key=lambda number: np.prod(parts[number].shape)):
        source, target = np.asarray(problem.source[number]), np.asarray(problem.target[number])
        if not np.array_equal(source, target):
            return [source, target]
    return []


def _digest(values: list[Any]) -> str:
    """Digests texts and arrays."""
    found = hashlib.sha256()
    for value in values:
        is_text = isinstance(value, str)
        found.update(value.encode() if is_text else np.asarray(value).tobytes())
    return found.hexdigest()


def _distances(measured: MeasuredLeaves) -> dict[str, dict[Leaves, float]]:
    """Returns the distances that were measured by the kind that they are written as."""
    return {"before": measured.before, "after": measured.after}


def _write(path: Path, record: dict[str, np.ndarray]) -> None:
    """Writes a file of which there is nothing, or all of it, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        # Numbers alone, which are never pickled: NumPy 2.1 has no argument that would forbid it.
        np.savez(file, **cast(Any, record))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

"""Checks the certificate on random programs, as many as one likes.

    python -m tests.generate --count 10000 --seed 0

Prints every program whose symmetry does not hold, and every one on which the library raises, as
small as it can be made, to be pasted into a test. The last line counts: programs, violations,
crashes, and how many of the groups that are free by construction were found. The same seed prints
the same. With `--lost`, programs with planted groups that were not found are printed, too.
"""

import argparse
import collections
import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Read once, when JAX is first imported; the suite has set it by then.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests import each other by plain names.
sys.path.insert(0, str(Path(__file__).parent))

import hypothesis
import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from jax.extend import core
from programs import BODIES, WIDTHS, Block, Plant, Program, evaluate, programs

import otfusion_jax as otf

EXACT = 1e-8
"""Of a relative change of outputs: what rounding may make in float64."""


class Certificate(NamedTuple):
    """What came of a program.

    Attributes:
        symmetry: the symmetry of its entry points.
        change: the largest relative change of outputs when all groups are moved at once.
        planted: number of groups that are free by construction.
        lost: those of them that are not in the symmetry, and how many they lack.
    """

    symmetry: otf.Symmetry
    change: float
    planted: int
    lost: dict[Plant, int]

    @property
    def holds(self) -> bool:
        """Whether the outputs did not change."""
        return self.change <= EXACT


def shifted(plan: Any) -> np.ndarray:
    """A permutation that leaves no unit in place; nested ones differ from one another."""
    plan = np.asarray(plan)
    rows = plan.reshape(-1, plan.shape[-1])
    rows = [np.roll(row, 1 + i % max(1, len(row) - 1)) for i, row in enumerate(rows)]
    return np.stack(rows).reshape(plan.shape)


def certificate(program: Program) -> Certificate:
    """Traces a program, and moves all groups at once, twice.

    The outputs are compared for what was traced, and for settings that were not.
    """
    with jax.enable_x64(True):
        params, entries, unseen, planted = program.build()
        jaxprs = [jax.make_jaxpr(fn)(params, *inputs) for fn, inputs in (*entries, *unseen)]
        # The first of them are those of the entries.
        pairs = zip(jaxprs, entries, strict=False)
        with warnings.catch_warnings():
            # Some blocks have parameters that they then do not use.
            warnings.simplefilter("ignore", otf.SymmetryWarning)
            symmetry = otf.trace_symmetry([(replayed(jaxpr), x) for jaxpr, (_, x) in pairs], params)
        count = sum(plant.count for plant in planted)
        lacks = {plant: plant.count - freedom(symmetry, plant) for plant in planted}
        lost = {plant: n for plant, n in lacks.items() if n > 0}
        if not symmetry.groups:
            return Certificate(symmetry, 0.0, count, lost)
        identity = symmetry.identity()
        move = jax.make_jaxpr(lambda plans, params: otf.transport(symmetry, plans, params))(
            identity, params
        )
        rng = np.random.default_rng(program.seed)
        leaves = jax.tree.leaves(params)
        drawn = [
            evaluate(move, *jax.tree.leaves(jax.tree.map(plan, identity)), *leaves)
            for plan in (shifted, lambda plan: rng.permuted(plan, axis=-1))
        ]
        with_freedoms = []
        if symmetry.with_rotations().rotates:
            with_freedoms.append(rotated(symmetry, params, rng))
        if any(freedom.signs or freedom.scales for freedom in symmetry.freedoms):
            with_freedoms.append(rescaled(symmetry, params, rng))
        changes = []
        for number, (jaxpr, (_, inputs)) in enumerate(
            zip(jaxprs, (*entries, *unseen), strict=True)
        ):
            before = evaluate(jaxpr, *leaves, *inputs)
            # What a program does with other inputs alone, a function of single units it may be,
            # tells nothing of itself: freedoms are claimed for what was traced.
            for moved in [*drawn, *with_freedoms] if number < len(entries) else drawn:
                changes.append(difference(before, evaluate(jaxpr, *moved, *inputs)))
        change = max(changes)
        return Certificate(symmetry, change, count, lost)


def rotated(symmetry: otf.Symmetry, params: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """The leaves in canonical form, moved by random rotations where the symmetry allows them."""
    rotating = symmetry.with_rotations()
    plans: dict[str, Any] = {}
    for group in rotating.groups:
        if not group.rotates:
            continue
        plans[group.name] = np.stack(
            [rotation(rng, group) for _ in range(int(np.prod(group.batch)))]
        ).reshape(*group.batch, group.size, group.size)

    def move(plans: Any, params: Any) -> Any:
        return otf.transport(rotating, plans, otf.canonicalize(symmetry, params))

    jaxpr = jax.make_jaxpr(move)(plans, params)
    return evaluate(jaxpr, *jax.tree.leaves(plans), *jax.tree.leaves(params))


def rescaled(symmetry: otf.Symmetry, params: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """The leaves with units multiplied by all scales and signs that the symmetry claims."""
    arrays = symmetry.split(jax.tree.map(np.asarray, params))
    for freedom in symmetry.freedoms:
        group = symmetry[freedom.group]
        shape = (*group.batch, group.size)
        drawn = [(scaling, 2.0 ** rng.uniform(-1, 1, shape)) for scaling in freedom.scales]
        drawn += [(scaling, rng.choice([-1.0, 1.0], shape)) for scaling in freedom.signs]
        for scaling, factors in drawn:
            for leaf, axis, degree in scaling.degrees:
                (member,) = (m for m in group.members if (m.leaf, m.axis) == (leaf, axis))
                arrays[leaf] = multiplied(group, member, arrays[leaf], factors**degree)
            for place in scaling.segments:
                (member,) = (m for m in group.members if begins(m) == place)
                arrays[member.leaf] = multiplied(group, member, arrays[member.leaf], factors)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(symmetry.join(arrays))]


def begins(member: otf.Member) -> tuple[int, int, int]:
    """The parameter and the axis of a member, and where along it the units begin."""
    return member.leaf, member.axis, member.location.index.start


def multiplied(group: otf.Group, member: otf.Member, array: Any, factors: np.ndarray) -> np.ndarray:
    """An array whose units are multiplied by a number each, where one member has them."""
    # Positions that hold no units are multiplied by 1, those that do by the factor of their unit.
    along = np.ones(array.shape)
    for index in np.ndindex(*group.batch, group.size):
        along[positions(member, index, array.shape)] *= factors[index]
    return array * along


def positions(
    member: otf.Member, index: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Where the unit of an index lies in an array, as an index of the array."""
    chosen = [np.ones(size, bool) for size in shape]
    *outer, unit = index
    at = member.location
    places = [(at.axis, at.index, unit)]
    places += [(axis, located, i) for (axis, _, located), i in zip(at.batch, outer, strict=True)]
    for axis, located, i in places:
        mask = np.zeros(shape[axis], bool)
        mask[located.positions(i + 1)[:, i].ravel()] = True
        chosen[axis] &= mask
    return np.ix_(*chosen)


def rotation(rng: np.random.Generator, group: otf.Group) -> np.ndarray:
    """A random orthogonal matrix, one that fixes the ones if the group asks for that."""
    n = group.size
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    if not group.fixes_ones:
        return q
    # In a basis whose first vector is that of the ones, the first row and column are those of 1.
    basis, _ = np.linalg.qr(np.c_[np.ones(n), rng.standard_normal((n, n - 1))])
    inner = np.eye(n)
    inner[1:, 1:], _ = np.linalg.qr(rng.standard_normal((n - 1, n - 1)))
    return basis @ inner @ basis.T


def replayed(jaxpr: core.ClosedJaxpr) -> Callable[..., Any]:
    """A function of parameters and inputs that is traced faster than the one it comes from."""
    shapes = [v.aval.shape for v in jaxpr.jaxpr.invars]

    def run(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if [np.shape(leaf) for leaf in leaves] != shapes:
            raise TypeError("recorded for other shapes")
        return core.jaxpr_as_fun(jaxpr)(*leaves)

    return run


def freedom(symmetry: otf.Symmetry, plant: Plant) -> int:
    """Counts the groups of the planted size at the planted place."""
    return sum(
        int(np.prod(group.batch))
        for group in symmetry.groups
        if group.size == plant.size
        and any(
            # A part of a leaf is named as in `kernel[0]`.
            (member.path.partition("[")[0], member.axis) == (plant.leaf, plant.axis)
            for member in group.members
        )
    )


def difference(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """The largest relative change of any of the outputs."""
    changes = []
    for a, b in zip(before, after, strict=True):
        assert np.all(np.isfinite(a)), "the program's own outputs are not finite"
        # What should be 0 is rounding, and has no scale of its own; features are of order 1.
        changes.append(np.max(np.abs(b - a)) / max(np.max(np.abs(a)), 1e-3))
    # A change that is not a number is one, too, and no comparison says so.
    return float(np.max(np.nan_to_num(changes, nan=np.inf)))


# --- many programs


AT_ONCE = 1000
"""So many programs are drawn in one go: hypothesis keeps all of them apart, at a growing price."""


def draw(count: int, seed: int) -> list[Program]:
    """Draws programs, the same for the same seed."""
    drawn: list[Program] = []
    for start in range(0, count, AT_ONCE):
        drawn += draw_distinct(min(AT_ONCE, count - start), (seed, start))
    return drawn


def draw_distinct(count: int, seed: tuple[int, int]) -> list[Program]:
    drawn: list[Program] = []

    @hypothesis.seed(str(seed))
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(programs())
    def collect(program: Program) -> None:
        drawn.append(program)

    collect()
    return drawn[:count]


def judge(program: Program, lost: bool = False) -> tuple[str, Certificate | None]:
    """Returns what is wrong, in words that are the same for the same fault, and the certificate.

    Groups that were planted and not found are wrong if `lost` says so.
    """
    try:
        result = certificate(program)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash: {type(error).__name__} in {Path(at.filename).name}, {at.name}", None
    if not result.holds:
        return "violation", result
    return "lost: planted groups" if lost and result.lost else "", result


def simpler(program: Program) -> Iterator[Program]:
    """Yields programs with something left out."""
    change = dataclasses.replace
    for blocks in simpler_blocks(program.blocks):
        if blocks:
            yield change(program, blocks=blocks)
    if program.second:
        yield change(program, second="")
    if program.space:
        yield change(program, space=program.space[:-1])
    if program.head != "dense":
        yield change(program, head="dense")
    for width in WIDTHS[: WIDTHS.index(program.width)]:
        yield change(program, width=width)
    if program.seed:
        yield change(program, seed=0)


def simpler_blocks(blocks: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
    """Yields sequences in which a block is missing, or stands for its body."""
    for i, block in enumerate(blocks):
        before, after = blocks[:i], blocks[i + 1 :]
        yield (*before, *after)
        for key, body in block.choices:
            if key not in BODIES:
                continue
            yield (*before, *body, *after)
            for less in simpler_blocks(body):
                if less:
                    choices = tuple((k, less if k == key else v) for k, v in block.choices)
                    yield (*before, Block(block.name, choices), *after)


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Leaves out of a program what it fails without."""
    while smaller := next(filter(fails, simpler(program)), None):
        program = smaller
    return program


def text(program: Program) -> str:
    """The program as a few lines of Python."""
    values = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    blocks = "".join(f"\n        {block!r}," for block in values.pop("blocks"))
    rest = "".join(f"\n    {name}={value!r}," for name, value in values.items())
    return f"Program({rest}\n    blocks=({blocks}\n    ),\n)"


def main(args: list[str] | None = None) -> int:
    """Checks programs; returns 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.generate", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of programs")
    parser.add_argument("--lost", action="store_true", help="print programs with lost groups, too")
    parser.add_argument("--seed", type=int, default=0, help="of the programs")
    options = parser.parse_args(args)

    drawn = draw(options.count, options.seed)
    counts: collections.Counter[str] = collections.Counter()
    printed = set()
    for number, program in enumerate(drawn):
        wrong, result = judge(program, options.lost)
        if result is not None:
            counts["planted"] += result.planted
            counts["lost groups"] += sum(result.lost.values())
        if wrong:
            counts[wrong.partition(":")[0]] += 1
            small = shrunk(program, lambda each, wrong=wrong: judge(each, options.lost)[0] == wrong)
            if small not in printed:
                printed.add(small)
                print(
                    f"# {wrong}; program {number} of seed {options.seed}\n{text(small)}\n",
                    flush=True,
                )
        if number % 500 == 499:
            jax.clear_caches()
    print(
        f"{len(drawn)} programs, {counts['violation']} violations, {counts['crash']} crashes, "
        f"{counts['planted'] - counts['lost groups']} groups found of {counts['planted']} planted"
    )
    return int(bool(printed))


if __name__ == "__main__":
    sys.exit(main())

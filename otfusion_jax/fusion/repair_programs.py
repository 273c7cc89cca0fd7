"""What is static about a repair: traced and planned once for all batches of one shape.

Nothing here holds an array of the user's, so that a second call with other parameters finds all of
it prepared, and what it compiles with it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from otfusion_jax.common.typing import PyTree
from otfusion_jax.common.warning import warn_user
from otfusion_jax.fusion.repair_methods import AbstractRepair
from otfusion_jax.fusion.repair_pass import Prepared, site_of
from otfusion_jax.fusion.repair_plan import plan_repair
from otfusion_jax.fusion.side_by_side import network_of, require_same_programs
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import retrace


class Aval(NamedTuple):
    """What a program is traced with in place of an array."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool

    @staticmethod
    def of(value: Any) -> "Aval":
        """Returns what is known of a value without its numbers."""
        aval = jax.typeof(value)
        return Aval(aval.shape, aval.dtype, getattr(aval, "weak_type", False))

    @staticmethod
    def of_all(values: Iterable[Any]) -> "tuple[Aval, ...]":
        """Returns what is known of several values."""
        return tuple([Aval.of(value) for value in values])

    def struct(self) -> jax.ShapeDtypeStruct:
        """Returns the same as JAX traces with it."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, weak_type=self.weak_type)


class Settings(NamedTuple):
    """What of JAX's settings changes how a function is traced."""

    enable_x64: Any
    numpy_dtype_promotion: Any
    default_matmul_precision: Any
    mesh: Any

    @staticmethod
    def now() -> "Settings":
        """Returns the settings that are in force."""
        config: Any = jax.config
        return Settings(
            config.jax_enable_x64,
            config.jax_numpy_dtype_promotion,
            config.jax_default_matmul_precision,
            jax.sharding.get_abstract_mesh(),
        )


class Programs(NamedTuple):
    """What runs side by side, without arrays: hashable, so that it is prepared once.

    Attributes:
        symmetry: The symmetry of the average.
        fn: Its function.
        originals: For each model the symmetry and the function of what runs in its place, or None.
        is_moved: For each model whether there are plans.
        average: The parameters of the average.
        params: The parameters of each model.
        method: The method that corrects a parameter.
        settings: The settings of JAX.
    """

    symmetry: Symmetry
    fn: Callable[..., Any]
    originals: tuple[tuple[Symmetry, Callable[..., Any]] | None, ...]
    is_moved: tuple[bool, ...]
    average: tuple[Aval, ...]
    params: tuple[tuple[Aval, ...], ...]
    method: AbstractRepair
    settings: Settings


@functools.lru_cache(maxsize=16)
def prepared_for(programs: Programs, inputs: tuple[Aval, ...], structure: Any) -> Prepared:
    """Traces all networks on inputs of some shapes, and plans the repair.

    Args:
        programs: What runs side by side.
        inputs: The leaves of the inputs, without their numbers.
        structure: The structure of the tree of inputs.

    Returns:
        The plan, with the sites of its corrections.

    Raises:
        ValueError: If a function on these inputs has another symmetry than was given, or if an
            original is of another architecture.
    """
    symmetry, fn = programs.symmetry, programs.fn
    structs = jax.tree_util.tree_unflatten(structure, [aval.struct() for aval in inputs])
    average_params = _joined(symmetry, programs.average)
    average_trace = retrace(symmetry, fn, average_params, structs)
    networks = []
    for original, is_moved, avals in zip(
        programs.originals, programs.is_moved, programs.params, strict=True
    ):
        # A model of the average's own widths runs the average's program: one trace does for both.
        trace = average_trace
        if original is not None:
            original_symmetry, original_fn = original
            params = _joined(original_symmetry, avals)
            trace = retrace(original_symmetry, original_fn, params, structs)
        networks.append(network_of(trace, symmetry, is_moved))
    networks.append(network_of(average_trace, symmetry, is_moved=False))
    require_same_programs(networks)
    method = programs.method
    plan = plan_repair(
        networks,
        average_trace.jaxpr,
        symmetry.parts,
        finds_tails=method.looks_at_activations,
        outputs_alone=method.corrects_outputs_alone,
    )
    sites = [site_of(plan, correction, method) for correction in plan.corrections]
    return Prepared(plan, tuple(sites))


def _joined(symmetry: Symmetry, parts: tuple[Aval, ...]) -> PyTree:
    """Puts parameters together that are known without their numbers."""
    return jax.eval_shape(symmetry.join, [aval.struct() for aval in parts])


class RepairWarning(UserWarning):
    """A repair that left parameters as the average has them, where that may not be expected."""


def warn_of_what_stays(prepared: Prepared, programs: Programs) -> None:
    """Warns of a repair that corrects nothing, and of parameters in loops that it can't follow.

    Args:
        prepared: The plan of the repair.
        programs: What it is the plan of.
    """
    plan = prepared.plan
    corrected = set()
    for correction, site in zip(plan.corrections, prepared.sites, strict=True):
        if not programs.method.needs_units or any(part.members for part in site.parts):
            corrected.add(correction.piece.leaf)
    reasons = {leaf: why for leaf, why in plan.out_of_reach.items() if leaf not in corrected}
    first_line = "repair leaves these parameters as the average has them:"
    if not corrected:
        first_line = "repair corrects nothing, and returns the average:"
        for leaf, part in enumerate(programs.symmetry.parts):
            if part.moves:
                reasons.setdefault(leaf, _why_not(prepared, leaf))
    if not reasons and corrected:
        return
    lines = [first_line]
    for leaf, why in sorted(reasons.items()):
        lines.append(f"  {programs.symmetry.parts[leaf].path}: {why}")
    warn_user("\n".join(lines), RepairWarning)


def _why_not(prepared: Prepared, leaf: int) -> str:
    """Says why a parameter is not corrected."""
    for correction in prepared.plan.corrections:
        if correction.piece.leaf == leaf:
            return "what it puts out are units of no group"
    place = prepared.plan.uses.get(leaf)
    return "it is not used" if not place else f"it is first used in {place}, no product"

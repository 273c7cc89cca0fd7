"""From a function to its symmetry.

`trace_symmetry` makes jaxprs of `fn(params, *inputs)` on abstract values, interprets them with an
axis variable for every axis of every parameter, and reads off which axes the primitives have tied
together. `trace` does the same and keeps what reading features needs.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax.extend import core

from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import warn_not_used
from otfusion_jax.symmetry.groups import leaves_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.freedoms import find_freedoms
from otfusion_jax.tracing.group_collection import CollectedGroups, collect_groups
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.interpreter import OnUnsupported
from otfusion_jax.tracing.leaf_splits import SplitInterpretation, interpret_split
from otfusion_jax.tracing.pins import collect_pins
from otfusion_jax.tracing.positions import OnTies
from otfusion_jax.tracing.program_traces import ProgramTrace, trace_longer, trace_program
from otfusion_jax.tracing.programs import Program, as_function
from otfusion_jax.tracing.side_by_side import with_signs_of_segments
from otfusion_jax.tracing.views import View, collect_views


@dataclasses.dataclass(frozen=True)
class Trace:
    """A symmetry, the jaxpr that it was read from, and where features can be read in it.

    Attributes:
        symmetry: The symmetry of the function.
        jaxpr: The function. Its first arguments are the parameters as `Symmetry.split` takes them
            apart, and then come the leaves of the inputs.
        preactivations: For each group the views of its features as a contraction puts them out,
            before bias and nonlinearity. Groups that no input reaches are left out.
        activations: For each group the views of its features as contractions take them up, after
            bias and nonlinearity. The same as `preactivations` where none does.
    """

    symmetry: Symmetry
    jaxpr: core.ClosedJaxpr
    preactivations: dict[str, tuple[View, ...]]
    activations: dict[str, tuple[View, ...]]


def trace_symmetry(
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
    on_ties: OnTies = "pin",
) -> Symmetry:
    """Finds the permutation symmetry of a network by tracing it.

    Nothing is computed: arrays and `jax.ShapeDtypeStruct`s do equally well. Inference mode is
    meant: pass a function with dropout switched off and batch norm's running statistics among
    `params`.

    Parts of parameters that the function does not read on these inputs stay, and so does all that
    meets nothing but constants there, as recurrent weights do in a first step from zeros: other
    inputs may read them. What Python or NumPy computes from the size of an input (a mask, a number
    of groups) is a constant to the trace, and the symmetry holds for inputs of that size. An axis
    of size 1, along which nothing varies, is traced at size 2 as well if the function takes that.

    Args:
        fn: A pure function `fn(params, *inputs)`, such as a Flax module's `apply`. Or several
            functions of the same parameters (a policy and a value, training and evaluation mode),
            as a list of pairs `(fn, inputs)` with a tuple of inputs for each: what moves is then
            what all of them allow.
        params: A pytree of arrays of any shapes. Leaves that are not floating or complex pass
            through all later steps untouched.
        *inputs: The inputs, pytrees of arrays. Their axes are pinned, and so are those of the
            outputs.
        on_unsupported: What to do about a primitive without a rule: `"raise"` an error, or `"pin"`
            every axis that it touches (the result stays correct and has fewer groups).
        on_ties: What to do about units whose positions `argmax` or `top_k` find, as a router finds
            experts. Of units that are equal they find the first, so that `"pin"` leaves these in
            place. `"ignore"` takes it that no two are equal, and lets experts and the codes of a
            codebook move where they are chosen by `jax.nn.one_hot` of the positions. It is yours
            to know: for a token of zeros without a bias, after a saturated sigmoid, or in half
            precision many are. `check_symmetry` tells for the inputs that it is given.

    Returns:
        The symmetry; `print` it.

    Warns:
        SymmetryWarning: If there are parameters that the function does not use, or multiplies with
            constants alone, though units may lie along them. They are listed by key path.

    Raises:
        UnsupportedPrimitiveError: If a primitive has no rule. The message names the primitive, the
            source line and ways out.
        ValueError: If leaves of `params` are not arrays.
        TypeError: If `fn` is neither a function nor a list of functions and inputs, or if it fails
            because of arguments of a wrong kind: parameters and inputs that are swapped, a list in
            place of the inputs.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> params = {"in": jnp.ones((8, 32)), "out": jnp.ones((32, 4))}
        >>> print(otf.trace_symmetry(mlp, params, jnp.ones((2, 8))))
        Symmetry: 1 group over 2 leaves; 100.0 % of 384 parameters lie on an axis that can be \
permuted
        group  units  role      leaf  axis
        in     32     produces  in    1
                      consumes  out   0
        <BLANKLINE>
        pinned  size  axis  why
        in      8     0     tied to input 0, axis 1
        out     4     1     tied to the output, axis 1
    """
    symmetry = trace(fn, params, *inputs, on_unsupported=on_unsupported, on_ties=on_ties).symmetry
    warn_not_used(symmetry)
    return symmetry


def trace(
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
    on_ties: OnTies = "pin",
) -> Trace:
    """Traces a function, as `trace_symmetry` does, and keeps where features can be read.

    Args:
        fn: The function, or the list of functions with their inputs.
        params: The parameters.
        *inputs: The inputs of the function.
        on_unsupported: What to do about a primitive without a rule.
        on_ties: What to do about positions that depend on the order of equal units.

    Returns:
        The symmetry, the jaxpr, and the views of each group.

    Raises:
        UnsupportedPrimitiveError: If a primitive has no rule.
        ValueError: If leaves of `params` are not arrays.
        TypeError: If `fn` is no function, or its arguments are of a wrong kind.
    """
    if on_unsupported not in ("raise", "pin"):
        raise ValueError(f"on_unsupported is {on_unsupported!r}; it must be 'raise' or 'pin'")
    if on_ties not in ("pin", "ignore"):
        raise ValueError(f"on_ties is {on_ties!r}; it must be 'pin' or 'ignore'")
    function, inputs = as_function(fn, inputs)
    # It only says what the leaves are. Their splits, the groups and the pins are filled in below.
    unsplit = Symmetry((), (), leaves_of(params), jax.tree_util.tree_structure(params))
    given = trace_program(function, params, inputs)
    longer = trace_longer(function, params, inputs)
    traces, interpreted = _interpret(given, longer, unsplit, on_unsupported, on_ties)
    split, jaxpr, interpretation = interpreted
    # What is free after this is a group.
    interpretation.pin_what_inputs_do_not_show()
    leaf_axes = list(zip(split.parts, interpretation.expanded_axes(), strict=True))
    collected = collect_groups(interpretation, leaf_axes)
    pins = collect_pins(interpretation, leaf_axes)
    symmetry = dataclasses.replace(
        split,
        groups=collected.groups,
        pinned=pins,
        freedoms=find_freedoms(interpretation, collected, split.parts),
    )
    symmetry = with_signs_of_segments(
        symmetry, interpretation, collected, traces, on_unsupported, on_ties
    )
    return _with_views(symmetry, jaxpr, interpretation, collected)


def _interpret(
    given: ProgramTrace,
    longer: Sequence[ProgramTrace],
    unsplit: Symmetry,
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> tuple[list[ProgramTrace], SplitInterpretation]:
    """Interprets a function on the inputs given and on longer ones, if that comes to an end.

    Returns:
        The traces that were interpreted, and the interpretation.
    """
    traces = [given, *longer]
    try:
        return traces, interpret_split(traces, unsplit, on_unsupported, on_ties)
    except Exception:
        if not longer:
            raise
    # A function that replays what was recorded for other sizes may come to no program at all.
    return [given], interpret_split([given], unsplit, on_unsupported, on_ties)


def _with_views(
    symmetry: Symmetry,
    jaxpr: core.ClosedJaxpr,
    interpretation: Interpretation,
    collected: CollectedGroups,
) -> Trace:
    """Adds to a symmetry where features of its groups can be read."""
    interpreter, unifier = interpretation.interpreter, interpretation.unifier
    preactivations: dict[str, tuple[View, ...]] = {}
    # Units that come out of no contraction, as those of an embedding that is looked up, are read
    # where they first appear.
    for name, views in collect_views(unifier, interpreter.seen, collected).items():
        preactivations[name] = views[:1]
    preactivations |= collect_views(unifier, interpreter.produced, collected)
    consumed = collect_views(unifier, interpreter.consumed, collected)
    return Trace(symmetry, jaxpr, preactivations, preactivations | consumed)

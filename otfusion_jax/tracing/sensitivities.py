"""How much the outputs of a network depend on its features, sample by sample.

A sample is a place as much as an input: of a transformer that reads its answer off one token, the
last layer computes the other tokens for nothing. Where units are compared by their features, such
places should not count, and others should by what a difference there does to the outputs.

The derivative of one random sum of the outputs has the squared size that the derivatives of all
outputs have on average. So a few of these, by reverse mode, do for any number of outputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from otfusion_jax.common.host import accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import (
    At,
    by_group,
    checked_program,
    record,
    retrace,
    views_at,
)
from otfusion_jax.tracing.programs import Program
from otfusion_jax.tracing.records import Site

# How many random sums of the outputs are derived.
_SUMS = 4


class GradientError(ValueError):
    """A program has no gradient with respect to its features."""


def features_with_sensitivities(
    symmetry: Symmetry, fn: Program, params: PyTree, inputs: tuple[PyTree, ...], at: At, key: Array
) -> tuple[
    dict[str, Float[Array, "*batch samples units"]], dict[str, Float[Array, "*batch samples"]]
]:
    """Evaluates a network, and how much its outputs depend on the activations of every group.

    Args:
        symmetry: The symmetry that was traced with this function.
        fn: The function that was traced.
        params: The parameters.
        inputs: A batch of inputs.
        at: Where features are read, see `features`.
        key: The source of randomness, a key of JAX.

    Returns:
        The features, as `features` returns them. And for each sample the squared norm of the
        derivative of all outputs by the features of that sample, as they are read at its place: an
        estimate by a few random sums of the outputs, which is never negative, and 0 where they do
        not depend on them. What is too small to be squared counts as the smallest number there is.
        Integers among the outputs do not count. Functions are derived by the rules that they have
        (`jax.custom_jvp`, `jax.custom_vjp`), but for those in which features are read, and where a
        rule looks at traced values besides its arguments: then by what they compute. (Inside of
        `jax.jit` that is an error of JAX's.)

    Raises:
        GradientError: If the function can't be derived in reverse mode.
        ValueError: As `features`.
        TypeError: As `features`.
    """
    function, inputs = checked_program(symmetry, fn, params, inputs, at)
    try:
        return _evaluated(symmetry, function, at, True, params, inputs, key)
    except jax.errors.UnexpectedTracerError:
        # A rule that looks at values of the function's trace can't be used: that trace is over.
        return _evaluated(symmetry, function, at, False, params, inputs, key)


@functools.partial(jax.jit, static_argnames=("symmetry", "fn", "at", "by_rules"))
def _evaluated(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    at: At,
    by_rules: bool,
    params: PyTree,
    inputs: tuple[PyTree, ...],
    key: Array,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Evaluates the program; `features_with_sensitivities` has checked the arguments."""
    traced = retrace(symmetry, fn, params, inputs)
    views = views_at(traced, at)
    arguments = [*symmetry.split(params), *jax.tree_util.tree_leaves(inputs)]

    def outputs_of(probes: dict[Site, Array]) -> tuple[list[Array], dict[Site, Array]]:
        results, arrays = record(traced, views, arguments, probes, by_rules)
        outputs = map(jnp.asarray, results)
        return [x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)], arrays

    _, shapes = jax.eval_shape(outputs_of, {})
    zeros = {site: jnp.zeros(shape.shape, shape.dtype) for site, shape in shapes.items()}

    try:
        outputs, derivative, arrays = jax.vjp(outputs_of, zeros, has_aux=True)

        def squares_of_a_sum(key: Array) -> dict[str, Array]:
            (gradients,) = derivative(_random_signs(outputs, key))
            return _squared_norms(by_group(symmetry, views, gradients))

        squares = jax.lax.map(squares_of_a_sum, jax.random.split(key, _SUMS))
    except jax.errors.UnexpectedTracerError:
        raise
    except Exception as error:
        # Its values have been traced above, so that it is the derivative that fails: each
        # primitive that has none says so by an error of its own kind.
        raise GradientError(
            "the outputs of this function can't be derived by its features, which is what they "
            f"are weighed by: {error}"
        ) from error
    means = jax.tree.map(lambda x: jnp.mean(x, axis=0), squares)
    return by_group(symmetry, views, arrays), means


def _random_signs(outputs: list[Array], key: Array) -> list[Array]:
    """Draws a sign for every number of the outputs, each output by a key of its own.

    The real and the imaginary part of a complex one have a sign each.
    """
    signs = []
    for number, output in enumerate(outputs):
        own_key = jax.random.fold_in(key, number)
        if jnp.iscomplexobj(output):
            parts = jax.random.rademacher(own_key, (2, *output.shape), output.real.dtype)
            signs.append(jax.lax.complex(*parts))
        else:
            signs.append(jax.random.rademacher(own_key, output.shape, output.dtype))
    return signs


def _squared_norms(gradients: dict[str, Array]) -> dict[str, Float[Array, "*batch samples"]]:
    """Takes the squared norm of what is of each sample, in float32 or wider."""
    squares = {}
    for name, gradient in gradients.items():
        magnitudes = abs(gradient)
        # Squares of small numbers are smaller still.
        magnitudes = magnitudes.astype(accumulation_dtype(magnitudes.dtype))
        of_samples = jnp.sum(magnitudes * magnitudes, axis=-1)
        # What is too small to be squared must not pass for what nothing depends on.
        is_read = jnp.any(magnitudes > 0, axis=-1)
        least = jnp.finfo(magnitudes.dtype).tiny
        squares[name] = jnp.where(is_read, jnp.maximum(of_samples, least), of_samples)
    return squares

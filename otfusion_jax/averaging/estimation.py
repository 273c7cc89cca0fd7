"""Running statistics estimated anew on data, exactly: not decayed, and in one pass.

A step in training mode sets a running statistic to `m * old + (1 - m) * batch`. With the old value
at 0 that is `(1 - m) * batch`, and with the old value very large it is `m * old` to the last digit,
so that two steps give the momentum `m` and the batch's own statistic, whatever the framework. From
there on a step for each batch is enough. `_Total` combines the batches in float64.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.averaging.statistics import running_statistics
from otfusion_jax.common.arguments import (
    kind_of,
    require_arrays,
    require_batches,
    require_function,
)
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import leaves_of

MeanOf = Callable[[str], str | None]
"""From the key path of a leaf to that of the mean that belongs to it; None for other leaves."""
Values = dict[str, np.ndarray]
"""By the key path of a statistic its values, float64."""

_CALL = "estimate_statistics(update, params, batches)"
# How many roundings the value of a step may be off.
_ROUNDINGS = 1024


def estimate_statistics(
    update: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    batches: Iterable[Any],
    *,
    leaves: MeanOf | None = None,
    size: Callable[[Any], float] | None = None,
    total: bool = True,
) -> PyTree:
    """Gives batch normalisation the statistics that its inputs have on data.

    The network is run in training mode, a batch at a time, so that each layer is shown what the
    layers before it make when they are normalised by the batch, as in training. Nothing is decayed:
    the result does not depend on the order of the batches, nor on the statistics that were there.

    Args:
        update: One step in training mode, `update(params, batch)`, which returns parameters of the
            same structure with running statistics brought up to date: each is `m` times what it
            was plus `1 - m` times that of the batch, with any momentum `m` below 1. The momentum
            is measured. Only the statistics are read. Jit it. If it draws random numbers, as for
            dropout, take the key from the batch.
        params: The parameters with their statistics, a pytree of arrays.
        batches: The batches, in an iterable that is gone through once: a list or a generator.
        leaves: Which leaves are statistics, and which mean belongs to each: a function from a key
            path to the key path of the mean. For a mean that is its own, and for other leaves
            None, as in `lambda path: path.replace("moving_variance", "moving_mean") if "moving_"
            in path else None`. If None, `running_statistics` finds them.
        size: A function from a batch to how many examples it has, by which it counts; a batch
            counts by the first axis of its arrays if None, which have to agree.
        total: Whether a variance is that over all batches, which is the mean of the variances of
            the batches plus the variance of their means. If False, it is the former alone, which a
            running average tends to; the two differ where batches are small or sorted.

    Returns:
        The parameters with the statistics replaced. They are combined in float64 and rounded once
        to their dtype; a variance is taken as one that was divided by the number of values. What
        counts the steps of a running average is left alone, see below.

    Raises:
        ValueError: If no leaves are statistics, or some are that no step changes so, listing each
            by key path; if counters in a state of Haiku or Equinox have counted: inference divides
            by what is expected of so many steps, so pass the state that `init` makes; for no
            batches, leaves that are no arrays, and sizes that are not above 0.
        TypeError: For arguments in another order, for shapes in place of arrays, for a single batch
            in place of a list, and inside of `jax.jit`.
        FloatingPointError: If statistics are not finite, listing each by key path.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> def update(params, x):
        ...     return {"mean": 0.9 * params["mean"] + 0.1 * x.mean(0),
        ...             "var": 0.9 * params["var"] + 0.1 * x.var(0)}
        >>> params = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
        >>> x = jnp.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0], [7.0, 6.0]])
        >>> found = otf.estimate_statistics(update, params, [x[:2], x[2:]])
        >>> bool(jnp.allclose(found["mean"], x.mean(0)) and jnp.allclose(found["var"], x.var(0)))
        True

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021 (precise batch norm); Chan, Golub and
        LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    require_function(update, _CALL)
    require_arrays(params, "params")
    require_batches(batches)
    if not all_known(params):
        raise TypeError(
            "estimate_statistics was called inside of jax.jit or another transformation, where "
            "values can't be looked at; call it outside, and jit `update` instead"
        )
    mean_of = _statistics_of(params, leaves)
    measured: _Measured | None = None
    sums = _Total(mean_of, total)
    for batch in batches:
        examples = _size_of(batch, size)
        if measured is None:
            measured = _Measured(update, params, mean_of, batch)
        sums.add(measured.statistics(batch), examples)
    if measured is None:
        raise ValueError("no batches were given; statistics are estimated on at least one")
    return _replaced(params, sums.values())


class _Measured:
    """A step in training mode, of which the momentum is known.

    Attributes:
        momenta: The share of the old value that a step keeps, by the key path of a statistic.
    """

    def __init__(self, update: Any, params: PyTree, mean_of: dict[str, str], batch: Any) -> None:
        """Measures the momenta on a first batch.

        Args:
            update: The step.
            params: The parameters.
            mean_of: The statistics, as `running_statistics` gives them.
            batch: The batch.

        Raises:
            ValueError: If a step does not change a statistic as a running average, listing each.
        """
        self._update = update
        self._params = params
        self._paths = tuple(mean_of)
        dtypes = {leaf.path: leaf.dtype for leaf in leaves_of(params)}
        large = {path: _large(dtypes[path]) for path in self._paths}
        at_zero = self._after(dict.fromkeys(self._paths, 0.0), batch)
        at_one = self._after(dict.fromkeys(self._paths, 1.0), batch)
        at_large = self._after(large, batch)
        self.momenta = {}
        wrong = []
        for path in self._paths:
            momentum, problem = _momentum_of(
                at_zero[path], at_one[path], at_large[path] / large[path], dtypes[path]
            )
            self.momenta[path] = _as_written(momentum, dtypes[path])
            if problem is not None:
                wrong.append(f"  {path}: {problem}")
        if wrong:
            raise ValueError(
                "after update(params, batch), these statistics are not m * old + (1 - m) * batch, "
                "with a batch's part that depends on no other statistic:\n" + "\n".join(wrong)
            )

    def statistics(self, batch: Any) -> Values:
        """Returns the statistics of one batch."""
        found = self._after(dict.fromkeys(self._paths, 0.0), batch)
        return {path: value / (1 - self.momenta[path]) for path, value in found.items()}

    def _after(self, old: dict[str, float], batch: Any) -> Values:
        """Returns the statistics after a step from given ones, a number for each leaf."""
        shapes = {leaf.path: leaf.shape for leaf in leaves_of(self._params)}
        filled = {path: np.full(shapes[path], value) for path, value in old.items()}
        new = self._update(_replaced(self._params, filled), batch)
        expected = jax.tree_util.tree_structure(self._params)
        if jax.tree_util.tree_structure(new) != expected:
            raise ValueError(
                f"update(params, batch) returned {kind_of(new)} of another structure than params; "
                "return the parameters with new statistics, and nothing beside them"
            )
        values = {}
        for leaf, value in zip(leaves_of(new), jax.tree_util.tree_leaves(new), strict=True):
            if leaf.path in old:
                values[leaf.path] = np.asarray(value).astype(np.float64)
        return values


def _momentum_of(
    at_zero: np.ndarray, at_one: np.ndarray, momenta: np.ndarray, dtype: Any
) -> tuple[float, str | None]:
    """Reads the momentum off three steps.

    Args:
        at_zero: The statistic after a step from 0.
        at_one: The statistic after a step from 1.
        momenta: The statistic after a step from a very large number, as a share of it. In that the
            statistic of the batch is lost, and the momentum is not.
        dtype: The dtype that the step computed in.

    Returns:
        The momentum, and what is wrong if the statistic is no running average.
    """
    if not np.all(np.isfinite(at_zero)):
        return 0.0, "is not finite after a step from 0"
    precision = float(jnp.finfo(dtype).eps)
    tolerance = _ROUNDINGS * precision
    # What is infinite is not to be warned of by NumPy: no comparison with it holds.
    with np.errstate(invalid="ignore"):
        momentum = float(np.median(momenta)) if momenta.size else 0.0
        expected = momentum + at_zero
        is_one_number = np.all(np.abs(momenta - momentum) <= tolerance)
        is_sum = np.all(np.abs(at_one - expected) <= tolerance * (1 + np.abs(expected)))
    if is_one_number and momentum > 1 - precision:
        return momentum, "keeps all of what it was; is it in training mode?"
    if is_one_number and is_sum and momentum > -tolerance:
        return momentum, None
    return 0.0, "is no running average of what the batches have"


def _large(dtype: Any) -> float:
    """Returns a power of two of a dtype, beside which no statistic counts."""
    limits = jnp.finfo(dtype)
    # Half of the exponents are left for what a step may do to it. Half precision has few.
    return 2.0 ** (int(limits.maxexp) - 2 if limits.bits == 16 and limits.nexp == 5 else 64)


def _as_written(momentum: float, dtype: Any) -> float:
    """Returns the shortest decimal that is a momentum in a dtype.

    A step multiplies by 0.99 as rounded to the dtype, and by 0.01 as rounded. One minus the former
    is not the latter, by 1 in 10^6 in float32 and by a sixth in bfloat16.

    Args:
        momentum: The momentum as measured, which is a number of the dtype.
        dtype: The dtype.

    Returns:
        The momentum.
    """
    for digits in range(1, 17):
        shortest = round(momentum, digits)
        if float(np.asarray(shortest).astype(dtype)) == float(np.asarray(momentum).astype(dtype)):
            return shortest
    return momentum


class _Total:
    """The statistics of all batches so far, as if they were one.

    Attributes:
        count: The number of examples.
    """

    def __init__(self, mean_of: dict[str, str], total: bool) -> None:
        self.count = 0.0
        self._mean_of = mean_of
        self._total = total
        self._values: Values = {}

    def add(self, batch: Values, examples: float) -> None:
        """Adds the statistics of a batch.

        Args:
            batch: The statistics.
            examples: The number of examples of which they are.
        """
        if not self._values:
            self._values, self.count = batch, examples
            return
        share = examples / (self.count + examples)
        values = {}
        for path, old in self._values.items():
            # A weighted mean as a step towards the new value: sums would lose digits.
            values[path] = old + share * (batch[path] - old)
            mean = self._mean_of[path]
            if self._total and mean != path:
                between = np.square(batch[mean] - self._values[mean])
                values[path] += share * (1 - share) * between
        self._values = values
        self.count += examples

    def values(self) -> Values:
        """Returns the statistics.

        Raises:
            FloatingPointError: If they are not finite, listing each by key path.
        """
        wrong = [f"  {path}" for path, x in self._values.items() if not np.all(np.isfinite(x))]
        if wrong:
            raise FloatingPointError(
                "these statistics are not finite; look at the batches and at the activations:\n"
                + "\n".join(wrong)
            )
        return self._values


def _statistics_of(params: PyTree, leaves: MeanOf | None) -> dict[str, str]:
    """Returns by the key path of a statistic that of its mean, as the caller says or as found."""
    known = {leaf.path: leaf for leaf in leaves_of(params)}
    if leaves is None:
        mean_of = running_statistics(params)
        _require_fresh_counters(params, mean_of)
    else:
        require_function(leaves, "estimate_statistics(..., leaves=lambda path: ...)")
        named = {path: leaves(path) for path in known}
        mean_of = {path: mean for path, mean in named.items() if mean is not None}
    if not mean_of:
        paths = "\n".join(f"  {path}" for path in known)
        raise ValueError(
            "no leaf of the parameters is a running statistic; say which are by `leaves`, a "
            f"function from a key path to that of the mean that belongs to it. There are:\n{paths}"
        )
    wrong = []
    for path, mean in mean_of.items():
        if not jnp.issubdtype(known[path].dtype, jnp.floating):
            wrong.append(f"  {path}: {known[path].dtype}, which is no floating-point number")
        elif mean_of.get(mean) != mean:
            wrong.append(f"  {path}: its mean is {mean!r}, which is not one of the means")
        elif known[mean].shape != known[path].shape:
            wrong.append(f"  {path}: shape {known[path].shape}, its mean {known[mean].shape}")
    if wrong:
        raise ValueError("these leaves are no statistics of batches:\n" + "\n".join(wrong))
    return mean_of


def _require_fresh_counters(params: PyTree, mean_of: dict[str, str]) -> None:
    """Refuses statistics that inference, or a step, corrects for how many steps there were.

    Args:
        params: The parameters.
        mean_of: The statistics that were found.

    Raises:
        ValueError: If a counter beside a statistic is not as it was made, listing each.
    """
    places = set()
    for path in mean_of:
        # Haiku has `average` beside `counter`. Equinox's pair is in one entry of a state, and the
        # counter, or the flag of a first time, in another.
        above = path.rpartition("/")[0]
        if path.endswith("/average"):
            places.add(above)
        elif path.rpartition("/")[2] in ("0", "1"):
            places.add(above.rpartition("/")[0])
    wrong = []
    values = jax.tree_util.tree_leaves(params)
    for leaf, value in zip(leaves_of(params), values, strict=True):
        above, _, name = leaf.path.rpartition("/")
        if above not in places or leaf.shape != () or leaf.moves:
            continue
        fresh = jnp.issubdtype(leaf.dtype, jnp.bool_) or name == "counter" or name.isdigit()
        if fresh and bool(value) != jnp.issubdtype(leaf.dtype, jnp.bool_):
            wrong.append(f"  {leaf.path}: {value}")
    if wrong:
        raise ValueError(
            "these counters of running averages have counted, and what inference takes for the "
            "average depends on them; pass the state that `init` (Haiku) or `make_with_state` "
            "(Equinox) makes, beside the parameters:\n" + "\n".join(wrong)
        )


def _size_of(batch: Any, size: Callable[[Any], float] | None) -> float:
    """Returns how many examples a batch has."""
    if size is not None:
        examples = float(size(batch))
        if not 0 < examples < float("inf"):
            raise ValueError(f"size(batch) is {examples}; give a number of examples above 0")
        return examples
    shapes = []
    for leaf in jax.tree_util.tree_leaves(batch):
        if np.ndim(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            if np.shape(leaf)[0] == 0:
                raise ValueError(f"a batch is empty: an array of shape {np.shape(leaf)}")
            shapes.append(np.shape(leaf))
    if not shapes:
        raise ValueError(
            "a batch has no array with an axis; say by `size` how many examples it has"
        )
    # An old-style key of JAX is an array of two numbers.
    if any(shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"the arrays of a batch have different first axes: their shapes are {shapes}. Say how "
            "many examples a batch has, as in size=lambda batch: len(batch[1])"
        )
    return float(shapes[0][0])


def _replaced(params: PyTree, values: Values) -> PyTree:
    """Returns parameters with the values of some leaves replaced, in the dtypes of these."""
    leaves, treedef = jax.tree_util.tree_flatten(params)
    for number, leaf in enumerate(leaves_of(params)):
        if leaf.path in values:
            leaves[number] = jnp.asarray(values[leaf.path].astype(leaf.dtype))
    return treedef.unflatten(leaves)

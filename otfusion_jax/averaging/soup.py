"""Greedy soups: averages of as many models as are good for a score."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.averaging.average import checked_average, mixture
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import kind_of, require_function
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import leaves_of


@dataclasses.dataclass(frozen=True)
class Soup:
    """An average of some models, and which.

    Attributes:
        params: The average.
        members: The positions of the models in it, in the order in which they were added.
        score: The score of the average.
        scores: The score of each model by itself.
    """

    params: PyTree
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(models: Sequence[PyTree], score: Callable[[PyTree], Any]) -> Soup:
    """Adds models to an average one by one, the best first, and keeps those that do not harm.

    The models are tried in the order of their own scores; of equal ones, the earlier comes first.
    One is kept if the average of it and of those kept so far, all with one weight, scores at least
    as well as without it. The result is never worse than the best model, by this score.

    Args:
        models: The models, K pytrees of the same structure and shapes, aligned to each other.
        score: A function from parameters to a number, where more is better: an accuracy on data
            that is held out, or a negative loss. It is called 2 K - 1 times.

    Returns:
        The average, and which models it is of.

    Raises:
        ValueError: As `average`, and for scores that are NaN, naming the model.
        TypeError: For what is no list of models, for shapes in place of arrays, for a score that is
            no function or returns no number, and inside of `jax.jit`, where numbers can't be
            compared.
        FloatingPointError: For an average that is out of range.

    Warns:
        StatisticsWarning: As `average`. A score may estimate statistics anew before it measures.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> models = [jnp.array(0.8), jnp.array(9.0), jnp.array(1.4)]
        >>> soup = otf.greedy_soup(models, lambda x: -abs(float(x) - 1))
        >>> soup.members, round(float(soup.params), 2)
        ((0, 2), 1.1)

    References:
        Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time, ICML 2022, Recipe 1.
    """
    require_function(score, "greedy_soup(models, score)")
    require_alike(models)
    leaves = leaves_of(models[0])
    uniform = [mixture(None, len(models))] * len(leaves)
    warn_of_averaged_statistics(models, False, uniform)
    scores = []
    for number, model in enumerate(models):
        scores.append(_number(score(model), f"model {number}"))
    # Python's sort is stable.
    order = sorted(range(len(models)), key=lambda number: -scores[number])
    members = order[:1]
    best, params = scores[order[0]], models[order[0]]
    for number in order[1:]:
        tried = [*members, number]
        shares = [mixture(None, len(tried))] * len(leaves)
        average = checked_average(leaves, [models[x] for x in tried], shares, "averaging")
        found = _number(score(average), f"the average of models {tried}")
        if found >= best:
            members, best, params = tried, found, average
    return Soup(params, tuple(members), best, tuple(scores))


def _number(value: Any, what: str) -> float:
    """Refuses a score that is no number.

    Args:
        value: What the score returned.
        what: Of what it is the score, for the message.

    Returns:
        The number.

    Raises:
        TypeError: If it is anything else, or traced.
        ValueError: If it is NaN.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            "greedy_soup was called inside of jax.jit or another transformation, where scores "
            "can't be compared; call it outside, and jit `score` instead"
        )
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic) and jnp.size(value) == 1
    if not (is_array or isinstance(value, int | float)):
        raise TypeError(f"the score of {what} is {kind_of(value)}; return a number")
    number = float(np.asarray(value).reshape(()))
    if math.isnan(number):
        raise ValueError(f"the score of {what} is NaN, which can't be compared")
    return number

"""One call that tries what the library has, and keeps what is best on inputs it was not fitted to.

`merge` checks its arguments and reads or draws inputs. `merge_search` goes through the candidates
and the repairs of each. Whatever it does can be done with public functions, one by one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from otfusion_jax.averaging.average import mixture
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.common.arguments import checked_count, kind_of, require_function, require_kind
from otfusion_jax.common.host import Array
from otfusion_jax.common.known import all_known
from otfusion_jax.fusion.candidates import checked_candidates
from otfusion_jax.fusion.divergence import Outputs, objective_of
from otfusion_jax.fusion.drawn_inputs import can_be_drawn, drawn_samples
from otfusion_jax.fusion.merge_report import Merged
from otfusion_jax.fusion.merge_search import Bar, Known, Search, Setting, planned
from otfusion_jax.fusion.repair_methods import AbstractRepair, LeastSquares, RestoreStatistics
from otfusion_jax.fusion.samples import divided, read_samples
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.programs import as_function
from otfusion_jax.tracing.trace import trace_symmetry

_CALL = "merge(fn, models, batches, outputs='logits')"
_HELD_OUT = 0.2
"""The share of the inputs that choices are made on."""
_DRAWN = 1000
"""How many inputs of each kind are drawn where there are none."""


def merge(
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any] | None = None,
    *,
    inputs: Any = None,
    outputs: Outputs | None = None,
    loss: Callable[..., Any] | None = None,
    symmetry: Symmetry | None = None,
    weights: Sequence[float] | None = None,
    leaf_weight: Callable[[str], Any] | None = None,
    candidates: Sequence[str] | None = None,
    repairs: Sequence[AbstractRepair] = (RestoreStatistics(), LeastSquares()),
    polish: int = 0,
    path: int = 0,
    max_samples: int = 1250,
    key: Array | None = None,
    progress: bool = False,
) -> Merged:
    """Fuses models by whatever is best: tries several ways, and scores each on held-out inputs.

    What is best differs by network. So models are matched by weights, by features, by both, and by
    learned rotations where units can be rotated; each average is scored as it is and after each
    repair; and of all of them that is kept which answers most like the models do on average, on
    inputs that nothing was fitted to. No labels are needed. A trial that fails is a row of the
    report that says why. In the end, the repair that was chosen is made once more, on all inputs.

    Without batches, inputs are drawn at random, of mean 0 and variance 1: smooth noise cut at 0 to
    fit to, and smooth noise to choose by. Where units can be rotated, noise serves to match
    features alone; the weights decide, and nothing is repaired. So do they where inputs cannot be
    drawn, as they are tokens.

    Args:
        fn: The function of all models, `fn(params, *inputs)` of a batch of inputs, hashable.
        models: The parameters of the K >= 2 models, a list of pytrees of one structure.
        batches: Inputs without labels: a list, a generator or a loader (tf.data, grain, PyTorch) of
            batches, each an array `[n, ...]` or a tuple or list of arrays for functions of several
            inputs. It is gone through once, until there are `max_samples` samples; these are kept
            in the memory of the host, and every fifth is held out, drawn at random. None draws
            inputs.
        inputs: Without batches, what the inputs look like: an array or `jax.ShapeDtypeStruct` `[n,
            ...]`, or a tuple of these. Values do not matter.
        outputs: What `fn` returns, wherever inputs are looked at: `"logits"` of classes along the
            last axis, compared by the divergence of their probabilities, or `"values"`, compared by
            squared differences.
        loss: A loss `loss(params, *inputs)`, a scalar mean over a batch, in place of `outputs`. To
            score by labels, let `fn` take them as another input, and ignore them.
        symmetry: The symmetry of the models; None traces it. Pass `symmetry.only(...)` to leave
            groups as they are.
        weights: The K weights of the models in the average and in their mean prediction, summing to
            1; uniform if None.
        leaf_weight: How much each parameter counts, see `align`. Those that count 0 are not
            polished either. Batch norm's running statistics are best left out.
        candidates: What to match by: some of `"as they are"`; `"weights"`, as `fuse`;
            `"preactivations"`, Algorithm 1 of the paper with activations; `"features"`, which are
            correlations after the nonlinearity, and features themselves of units that rotate;
            `"features, then weights"`, coordinate descent from there; `"learned rotations"`, which
            takes longest and needs batches; and `"barycenter"`, of three models or more. None tries
            all that apply. Where units can be rotated, models are matched with rotations, and by
            weights and preactivations without them as well; where units can change their signs,
            with signs and without.
        repairs: The repairs to try on each average, instances; `()` tries none. All features of the
            inputs that are fitted to are in memory at once, see `repair`.
        polish: How many steps of `distill` to try on the best, on the same inputs; 0 tries none.
            300 take about as long as all else.
        path: At how many points of the lines between the models to take the score, before they were
            moved and after, for `report.plot()`; 0 for none.
        max_samples: The number of samples that are kept at most, 2 or more.
        key: The source of all randomness, a key of JAX; `jax.random.key(0)` if None. The same key
            and inputs give the same result, bit by bit, on one machine.
        progress: Whether to show a bar of the trials; it needs tqdm.

    Returns:
        The fused parameters, the report (`print` it), the symmetry, and the models as moved.

    Raises:
        ValueError: Before any work: if models do not fit each other or the symmetry or are not
            finite, by key path; if there are fewer than two; if batches are empty or differ; if it
            is not said what the outputs are; if a candidate is unknown or does not apply. In the
            end: if every trial has failed.
        TypeError: If arguments are of another type, before any work.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Example:
        >>> import jax
        >>> import otfusion_jax as otf
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> def draw(seed):
        ...     keys = jax.random.split(jax.random.key(seed))
        ...     return {"in": jax.random.normal(keys[0], (8, 16)),
        ...             "out": jax.random.normal(keys[1], (16, 4))}
        >>> x = jax.random.normal(jax.random.key(2), (100, 8))
        >>> merged = otf.merge(net, [draw(0), draw(1)], [x], outputs="values")
        >>> merged.report.chosen.repair
        'LeastSquares'
    """
    began = time.perf_counter()
    as_function(fn, ())
    require_function(fn, _CALL)
    _require_hashable(fn)
    require_alike(models)
    if not all_known(models):
        raise TypeError(
            "merge was called inside of jax.jit or another transformation, where there are no "
            "scores to choose by; call it outside: it jits what it computes"
        )
    if len(models) < 2:
        raise ValueError(f"{len(models)} model given; merging takes at least two")
    shares = mixture(weights, len(models))
    if leaf_weight is not None:
        require_function(leaf_weight, "merge(..., leaf_weight=lambda path: 1.0)")
    chosen_candidates = checked_candidates(candidates)
    _require_repairs(repairs)
    for name, count in (("polish", polish), ("path", path)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} is {count!r}; give a whole number, 0 or more")
    key = jax.random.key(0) if key is None else key
    bar = _bar() if progress else _silent
    most = max(2, checked_count(max_samples, "max_samples", "2 or more"))
    known = _known_inputs(batches, inputs, most, key)
    objective = None
    if known.fit is not None:
        objective = objective_of(fn, outputs, loss, _CALL)
        objective.check(models[0], known.example)
    if symmetry is None:
        symmetry = trace_symmetry(fn, models[0], *known.example)
    require_symmetry(symmetry, "merge(fn, models, batches, symmetry=symmetry)")
    require_alike(models, symmetry)
    setting = Setting(
        fn, list(models), shares, leaf_weight, symmetry, known, objective, tuple(repairs), key
    )
    search = Search(setting)
    search.run(planned(chosen_candidates, candidates is not None, setting), polish, bar)
    return search.result(path, began)


# --- arguments


def _known_inputs(batches: Any, inputs: Any, most: int, key: Array) -> Known:
    """Reads inputs and holds a share out, or draws them."""
    if batches is not None:
        if inputs is not None:
            raise ValueError("both batches and inputs are given; inputs is for want of batches")
        samples = read_samples(batches, most)
        fit, held_out = divided(samples, _HELD_OUT, jax.random.fold_in(key, 0))
        return Known(_as_shapes(fit.inputs), fit, held_out, samples)
    if inputs is None:
        raise ValueError(
            "neither batches nor inputs are given; pass inputs=jax.ShapeDtypeStruct((2, 28, 28), "
            "jnp.float32), or an array, to say what the inputs look like"
        )
    example = _as_shapes(inputs if isinstance(inputs, tuple) else (inputs,))
    if not can_be_drawn(example):
        return Known(example, None, None)
    fit, held_out = drawn_samples(example, _DRAWN, jax.random.fold_in(key, 0))
    return Known(example, fit, held_out)


def _as_shapes(inputs: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Returns the shapes of inputs, of two samples each: the axis of one sample could be any."""
    described = []
    leaves, structure = jax.tree_util.tree_flatten_with_path(inputs)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = getattr(leaf, "shape", None)
        if shape is None or not hasattr(leaf, "dtype"):
            raise TypeError(f"input {name} is {kind_of(leaf)}; pass an array or ShapeDtypeStruct")
        if not shape:
            raise ValueError(f"input {name} is a scalar; its first axis must be the samples")
        if 0 in shape[1:]:
            raise ValueError(f"input {name} is empty: shape {tuple(shape)}")
        described.append(jax.ShapeDtypeStruct((2, *shape[1:]), leaf.dtype))
    return structure.unflatten(described)


def _require_hashable(fn: Any) -> None:
    """Refuses a function that JAX could not keep what it compiles of."""
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"the function, {kind_of(fn)}, cannot be hashed; pass a function of parameters and "
            "inputs, as otf.functional(module) makes of a module"
        ) from None


def _require_repairs(repairs: Any) -> None:
    """Refuses what is no sequence of repairs."""
    examples = "a list of instances, as [otf.LeastSquares()]"
    if isinstance(repairs, AbstractRepair) or not isinstance(repairs, Sequence):
        raise TypeError(f"repairs is {kind_of(repairs)}; pass {examples}")
    for number, method in enumerate(repairs):
        require_kind(method, AbstractRepair, f"repair {number}", examples)


def _bar() -> Bar:
    """Returns what shows a bar of the items that are gone through."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm; install it with: pip install tqdm, or leave it out"
        ) from None
    return lambda items: tqdm(items, desc="merging")


def _silent(items: Sequence[Any]) -> Iterable[Any]:
    return items

"""One call that tries what the library has, and keeps what is best on inputs it was not fitted to.

`merge` checks its arguments and reads or draws inputs (`merge_arguments`). `merge_search` goes
through candidates and repairs; how each trial is made is in `merge_trials`. Whatever it does can be
done with public functions, one by one.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import StatisticsWarning
from otfusion_jax.common.arguments import checked_count, checked_key, require_function
from otfusion_jax.common.host import Array
from otfusion_jax.common.known import all_known
from otfusion_jax.common.progress import shown_bar, silent_bar
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.candidates import checked_candidates
from otfusion_jax.fusion.distill import trained_leaves
from otfusion_jax.fusion.divergence import Outputs, checked_shares, objective_of
from otfusion_jax.fusion.merge_arguments import (
    known_inputs,
    require_counts,
    require_hashable,
    require_repairs,
    usual_repairs,
    weighed_leaves,
)
from otfusion_jax.fusion.merge_report import Merged
from otfusion_jax.fusion.merge_search import Search
from otfusion_jax.fusion.merge_setting import Setting, planned
from otfusion_jax.fusion.mixup import mixes_inputs
from otfusion_jax.fusion.repair_methods import AbstractRepair
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.programs import as_function
from otfusion_jax.tracing.trace import trace_symmetry

_CALL = "merge(fn, models, batches, outputs='logits')"
_POLISH_STEPS = 300
"""How many steps of distillation are tried at the end where inputs are given."""


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
    repairs: Sequence[AbstractRepair] | None = None,
    update: Callable[[PyTree, Any], PyTree] | None = None,
    polish: int | None = None,
    mixes: bool | None = None,
    path: int = 0,
    max_samples: int = 2000,
    key: Array | None = None,
    progress: bool = False,
) -> Merged:
    """Fuses models by whatever is best: tries several ways, and scores each on held-out inputs.

    What is best differs by network. So models are matched by weights, by features, by both, and by
    learned rotations where units can be rotated; the best three averages are repaired in every way;
    and of all of them that is kept which answers most like the models do on average, on inputs that
    nothing was fitted to. In the end some steps of training towards these answers are tried, on the
    best of all, and on the best of what was learned. No labels are needed. A trial that fails is a
    row of the report that says why.

    One half of the inputs is fitted to, the other decides; for the best three trials once more with
    the two exchanged. In the end, what was chosen is matched and fitted once more, by both halves.
    Of more than 2,000 inputs, a half is 1,000; then the repair is fitted to all but the half that
    decides, rotations are learned from these, and steps of training made on them; each is taken if
    it is better for this half.
    Batches are all of one size, 250 samples at most, for which a few inputs are left out: up to
    seven of 2,000.

    Without batches, inputs are drawn at random, of mean 0 and variance 1: smooth noise cut at 0 to
    fit to, and smooth noise to choose by; for both images of overlapping discs and squares where
    inputs look like images in colour (`[n, height, width, channels]` or `[n, channels, height,
    width]`, with 3 or 4 channels). Which match is repaired is decided by the weights for images:
    the one that brings the models closest to each other. Where units can be rotated, or inputs
    cannot be drawn, as they are tokens, the weights decide about all, and nothing is repaired.

    Args:
        fn: The function of all models, `fn(params, *inputs)` of a batch of inputs, hashable.
        models: The parameters of the K >= 2 models, a list of pytrees of one structure.
        batches: Inputs without labels: a list, a generator or a loader (tf.data, grain, PyTorch) of
            batches, each an array `[n, ...]` or a tuple or list of arrays for functions of several
            inputs. It is gone through once, until there are `max_samples` samples; these are kept
            in the memory of the host, and divided at random. None draws inputs.
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
            polished either. If None, all count 1 but batch norm's running statistics, which count
            0.
        candidates: What to match by: some of `"as they are"`; `"weights"`, as `fuse`;
            `"preactivations"`, Algorithm 1 of the paper with activations; `"features"`, which are
            correlations after the nonlinearity, and features themselves of units that rotate;
            `"features, then weights"`, coordinate descent from there; `"learned rotations"`, by
            which each model is turned until the average of all answers as they do on average, which
            takes longest and needs batches; and `"barycenter"`, of three models or more. None tries
            all that apply. Where units can be rotated, models are matched with rotations, and by
            weights and preactivations without them as well; where units can change their signs,
            with signs and without.
        repairs: The repairs to try, instances; `()` tries none. None tries `RestoreStatistics` and
            `LeastSquares`. If there may be ReLUs, least squares are tried at preactivations and,
            unless noise was drawn, at activations; if units can be rotated and batches are given,
            at outputs alone as well. Of several ridges the best is taken for each parameter where
            batches are given, but for activations; else the ridge is 0.01.
        update: For networks with batch norm, one step in training mode, `update(params, batch)`, as
            `estimate_statistics` takes it; a batch is an array, or a tuple for functions of several
            inputs. With it, each average and each repair is tried with running statistics estimated
            anew as well.
        polish: How many steps of `distill` to try at the end, on the same inputs; 0 tries none.
            None tries 300, which take about as long as all else without learned rotations; and none
            where inputs are drawn at random, or a loss is given.
        mixes: Whether learned rotations and `polish` train on mixtures of two inputs (`mixup`),
            which have to be floating-point. None mixes where they are, and no loss is given. Pass
            False if floats are masks or codes. What is chosen by are inputs as they are.
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
            is not said what the outputs are, or they are a scalar; if a candidate is unknown or
            does not apply. In the end: if every trial has failed.
        TypeError: If arguments are of another type, before any work.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Warns:
        StatisticsWarning: If running statistics are averaged, for want of `update`.
        RepairWarning: If a repair that was tried corrects nothing, or not all, see `repair`.

    Examples:
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
        'LeastSquares(at=preactivation), distilled'
    """
    began = time.perf_counter()
    require_function(fn, _CALL)
    as_function(fn, ())
    require_hashable(fn)
    require_alike(models)
    if not all_known(models):
        raise TypeError(
            "merge was called inside of jax.jit or another transformation, where there are no "
            "scores to choose by; call it outside: it jits what it computes"
        )
    if len(models) < 2:
        raise ValueError(f"{len(models)} model given; merging takes at least two")
    shares = checked_shares(weights, len(models), outputs)
    chosen_candidates = checked_candidates(candidates)
    require_counts(polish=0 if polish is None else polish, path=path)
    key = checked_key(key)
    bar = shown_bar() if progress else silent_bar
    most = checked_count(max_samples, "max_samples", "2 or more")
    if most < 2:
        raise ValueError(
            "max_samples is 1; give 2 or more: one half is fitted to, the other scores"
        )
    known = known_inputs(batches, inputs, most, key)
    if repairs is not None:
        require_repairs(repairs)
    objective = None
    if known.fit is not None:
        objective = objective_of(fn, outputs, loss, _CALL)
        objective.check(models[0], known.example)
    is_mixed = mixes_inputs(mixes, objective, known.example)
    if symmetry is None:
        symmetry = trace_symmetry(fn, models[0], *known.example)
    require_symmetry(symmetry, "merge(fn, models, batches, symmetry=symmetry)")
    require_alike(models, symmetry)
    leaf_weight = weighed_leaves(symmetry, models, shares, leaf_weight, update)
    chosen_repairs = (
        usual_repairs(fn, models[0], known, symmetry) if repairs is None else tuple(repairs)
    )
    fixed = (symmetry, known, objective, is_mixed, chosen_repairs, update, key)
    setting = Setting(fn, list(models), shares, leaf_weight, *fixed)
    if polish is None:
        # To train on a loss, which may have labels, has to be asked for.
        may_train = known.are_given and loss is None and trained_leaves(models[0], leaf_weight)
        polish = _POLISH_STEPS if may_train else 0
    search = Search(setting)
    with warnings.catch_warnings():
        # It was said once already, or they are estimated anew.
        warnings.simplefilter("ignore", StatisticsWarning)
        search.run(planned(chosen_candidates, candidates is not None, setting), polish, bar)
        return search.result(path, began)

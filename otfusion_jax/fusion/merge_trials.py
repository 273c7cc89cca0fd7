"""How a trial of `merge` is made: models moved, averaged, repaired, and what follows.

A `Recipe` says which steps; a `Workshop` takes them, on inputs of its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from otfusion_jax.averaging.average import average
from otfusion_jax.averaging.estimation import estimate_statistics
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.candidates import Task
from otfusion_jax.fusion.distill import trained
from otfusion_jax.fusion.merge_setting import NOTHING, Known, Setting, Step
from otfusion_jax.fusion.passes import Passes
from otfusion_jax.fusion.repair import Repaired, repaired
from otfusion_jax.fusion.repair_methods import AbstractRepair
from otfusion_jax.fusion.samples import Samples
from otfusion_jax.symmetry.symmetry import Symmetry

_KEPT_BYTES = 2**30
"""How many bytes of features a repair may keep from pass to pass."""


class Recipe(NamedTuple):
    """What is done in a trial.

    Attributes:
        step: How models are moved.
        method: The repair of their average; None for none.
        anew: Whether running statistics are estimated anew.
        polish_steps: How many steps it is polished for.
        fit_more: How many inputs are fitted to, where these are more than in other trials; else 0.
        learn_more: How many inputs models are moved by, where these are more than in other trials;
            else 0.
        polish_more: How many inputs it is polished on, where these are more than in other trials;
            else 0.
    """

    step: Step
    method: AbstractRepair | None = None
    anew: bool = False
    polish_steps: int = 0
    fit_more: int = 0
    learn_more: int = 0
    polish_more: int = 0

    @property
    def fits(self) -> bool:
        """Whether anything after the average is fitted to inputs."""
        return self.method is not None or self.anew or self.polish_steps > 0

    @property
    def then(self) -> str:
        """What is done after the average, in words."""
        words = []
        if self.method is not None:
            words.append(_name_of(self.method))
        if self.anew:
            words.append("statistics anew")
        if self.polish_steps:
            words.append("distilled")
        then = ", ".join(words) or NOTHING
        more = max(self.fit_more, self.learn_more, self.polish_more)
        return f"{then} ({more:,} inputs)" if more else then


def _name_of(method: AbstractRepair) -> str:
    """Names a repair, with those of its settings that are not the usual ones."""
    changed = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        # Of several values, the one that was chosen is said elsewhere.
        if value != field.default and not isinstance(value, tuple):
            changed.append(f"{field.name}={value}")
    name = type(method).__name__
    return f"{name}({', '.join(changed)})" if changed else name


class Found(NamedTuple):
    """What came of a trial.

    Attributes:
        recipe: What was done.
        params: The parameters.
        task: The models in the form that they were moved in.
        moved: The models as they were moved.
        ridges: The ridges that the repair has chosen, by the key path of a parameter.
    """

    recipe: Recipe
    params: PyTree
    task: Task
    moved: list[PyTree]
    ridges: dict[str, Array]


class Workshop:
    """Makes what is to be tried.

    Attributes:
        setting: What was asked for, with the inputs to fit to.
    """

    def __init__(self, setting: Setting):
        """Starts with nothing made."""
        self.setting = setting
        # What several candidates need, such as inner products of features, is kept by the task.
        self._tasks: dict[Symmetry, Task] = {}
        self._moved: dict[Step, list[PyTree]] = {}
        # The repair that was made last: what follows it differs from trial to trial.
        self._repaired: tuple[Any, Repaired] | None = None

    def keep(self, steps: list[Step]) -> None:
        """Keeps the models as they were moved by some steps, and lets go of all others."""
        self._moved = {step: self._moved[step] for step in steps}

    def with_inputs(self, known: Known) -> "Workshop":
        """Returns a workshop for other inputs. What was moved without a look at any is kept."""
        other = Workshop(dataclasses.replace(self.setting, known=known))
        for step, moved in self._moved.items():
            if not step.candidate.looks_at_inputs:
                other._moved[step] = moved
        return other

    @functools.cached_property
    def _learning_from_more(self) -> "Workshop":
        """Where models are moved by more inputs; what was learned of these is kept."""
        known = self.setting.known
        return self.with_inputs(known._replace(fit=known.more))

    def make(self, recipe: Recipe, samples: Samples | None = None) -> Found:
        """Makes what a recipe says.

        Args:
            recipe: What to do.
            samples: The inputs to fit to, once models are moved; None for those of the setting that
                the recipe says, which decide how models are moved in any case.

        Returns:
            The result.

        Raises:
            ValueError: If something can't be done with these models, as too few samples.
            FloatingPointError: If numbers are out of range.
        """
        setting = self.setting
        known = setting.known
        # Of what is held out no repair may see anything, until all is chosen.
        if samples is None:
            samples = known.more if recipe.fit_more else known.fit
        workshop = self._learning_from_more if recipe.learn_more else self
        task, moved = workshop._move(recipe.step)
        ridges: dict[str, Array] = {}
        if recipe.method is None:
            params = average(moved, setting.shares.tolist())
        else:
            assert samples is not None
            params, ridges = workshop._repair(task, moved, recipe, samples)
        if recipe.anew:
            params = self._with_statistics(params, samples)
        if recipe.polish_steps:
            polished_on = known.more if recipe.polish_more else samples
            params = self._polished(params, recipe.polish_steps, polished_on)
        return Found(recipe, params, task, moved, ridges)

    def _repair(
        self, task: Task, moved: list[PyTree], recipe: Recipe, samples: Samples
    ) -> Repaired:
        """Repairs the average of models, unless that was done in the trial before."""
        assert recipe.method is not None
        made = recipe.step, recipe.method, samples
        if self._repaired is None or self._repaired[0] != made:
            found = repaired(
                task.symmetry,
                self.setting.fn,
                moved,
                Passes(list(samples.batches())),
                self.setting.shares.tolist(),
                recipe.method,
                [None] * len(moved),
                _KEPT_BYTES,
            )
            self._repaired = made, found
        return self._repaired[1]

    def _move(self, step: Step) -> tuple[Task, list[PyTree]]:
        """Moves the models, unless that was done before."""
        if step.symmetry not in self._tasks:
            self._tasks[step.symmetry] = self.setting.task(step.symmetry)
        task = self._tasks[step.symmetry]
        if step not in self._moved:
            self._moved[step] = step.candidate.move(task)
        return task, self._moved[step]

    def _with_statistics(self, params: PyTree, samples: Samples | None) -> PyTree:
        """Estimates running statistics anew."""
        assert samples is not None
        assert self.setting.update is not None
        batches = []
        for inputs in samples.batches():
            # As the user has them: an array, or a tuple for functions of several inputs.
            (batch,) = inputs if len(inputs) == 1 else (inputs,)
            batches.append(batch)
        return estimate_statistics(self.setting.update, params, batches)

    def _polished(self, params: PyTree, count: int, samples: Samples | None) -> PyTree:
        """Trains a model towards the mean prediction of all."""
        setting = self.setting
        assert setting.objective is not None
        assert samples is not None
        return trained(
            setting.objective,
            params,
            setting.models,
            setting.shares,
            samples,
            steps=count,
            trains=setting.leaf_weight,
            mixes=setting.mixes,
            key=jax.random.fold_in(setting.key, 2),
        )

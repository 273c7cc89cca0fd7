"""Knowledge distillation into a narrow network (Hinton et al. 2015), from several starts."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pandas as pd

import otfusion_jax as otf
from experiments.crossings import Crossing
from experiments.evaluate import ACCURACY
from experiments.methods import DESCENT_ACROSS
from experiments.narrow import narrowed
from experiments.networks import reestimated
from experiments.pairs import seen_images
from experiments.plots import bars, plot_bars
from experiments.report import mean_and_deviation, pivot, table, where
from experiments.runs import Run, Study
from experiments.train import Teacher, initial

# Between the seeds of the models and those of the orders of examples that students are trained in.
_NEXT = 1000
_TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class Distill(Study):
    """Train a narrow network by a wide one's answers, started from fused and other networks."""

    command: ClassVar[str] = "distill"

    seeds: tuple[int, int] = (0, 1)
    """Seeds of the teacher and of the narrow network."""
    student: float = 0.25
    """Width of the student, as a multiple of the teacher's."""
    temperature: float = 4.0
    """Temperature that softens the answers."""
    teacher_share: float = 0.9
    """Share of the loss that is the teacher's, the rest being the labels'."""
    distill_epochs: int = 5
    """Epochs of training from every start."""
    factor: float = 0.3
    """Step size, as a multiple of the recipe's: the gradients of a teacher are up to as many times
    larger as its temperature says."""
    orders: int = 3
    """Orders of examples to train each start in."""
    images: int = 1000
    """Training images that batch norm is estimated on."""

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        return f"{super().title}: student of {self.student:g} the width"

    def check(self) -> None:
        """Refuses a student that is no narrower than the teacher, or is never trained."""
        super().check()
        if not 0 < self.student < 1:
            raise ValueError(f"--student is {self.student}; give more than 0 and less than 1.")
        if self.orders < 1:
            raise ValueError(f"--orders is {self.orders}; give at least 1.")

    def measure(self, run: Run) -> None:
        """Trains a wide teacher, and narrow students from several starts by its answers.

        The second seed is that of the narrow network which the teacher is fused into. Each student
        is also trained by the labels alone.
        """
        wide = run.network
        narrow = run.network_of(self.student)
        judge = run.judge(narrow)
        teacher = run.train(self.seeds[0])
        small = run.train(self.seeds[1], model=narrow.config)
        drawn = initial(narrow.config, run.dataset, self.seeds[1])

        onto_small = _moved(Crossing(wide, narrow, teacher, small))
        starts = {
            "drawn at random": drawn,
            "teacher, pruned by l1 norm": narrowed(wide.symmetry, teacher, narrow.symmetry),
            "teacher, moved onto the one at random": _moved(Crossing(wide, narrow, teacher, drawn)),
            "teacher, moved onto the narrow network": onto_small,
            "narrow network": small,
            "teacher and narrow network, fused": otf.average([onto_small, small]),
        }
        recipe = self.train_config
        recipe = dataclasses.replace(
            recipe,
            epochs=self.distill_epochs,
            learning_rate=self.factor * recipe.learning_rate,
        )
        answers = Teacher(self.model_config, teacher, self.temperature, self.teacher_share)
        images = seen_images(run.dataset, self.seeds, self.images)
        for name, start in starts.items():
            # What was moved, cut or averaged has no statistics that are its own.
            start = reestimated(narrow, start, images)
            run.add(judge.accuracy(start), start=name, trained="before", order=0)
            for by, master in {"by labels alone": None, "by the teacher too": answers}.items():
                for order in range(1, self.orders + 1):
                    student = run.train(
                        self.seeds[1] + _NEXT * order,
                        model=narrow.config,
                        config=recipe,
                        start=start,
                        teacher=master,
                    )
                    labels = {"start": name, "trained": by, "order": order}
                    run.add(judge.accuracy(student), **labels)
        of_teacher = run.judge(wide)
        run.add(of_teacher.accuracy(teacher), start=_TEACHER, trained="before", order=0)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows each start before and after training."""
        return [table(pivot(records, "start", "trained", mean_and_deviation), ACCURACY)]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the same as bars."""
        teacher = where(records, start=_TEACHER)["value"].item()
        students = records[records["start"] != _TEACHER]
        cells = bars(students, "start", "trained")
        plot_bars(path, self.title, ACCURACY, cells, {_TEACHER: teacher})


def _moved(crossing: Crossing):
    """Moves the teacher onto a narrower network."""
    return crossing.moved(DESCENT_ACROSS.plans(crossing))

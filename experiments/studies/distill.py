"""Knowledge distillation into a narrow network (Hinton et al. 2015), from several starts."""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import tester
from experiments.methods import across, reestimated
from experiments.narrow import narrowed
from experiments.pairs import network, seen_images
from experiments.runs import Request
from experiments.train import Teacher, initial, train

# Between the seeds of the models and those of the orders of examples that students are trained in.
_NEXT = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--student",
        type=float,
        default=0.25,
        help="width of the student, as a multiple of the teacher's (default: 0.25)",
    )
    parser.add_argument(
        "--temperature", type=float, default=4.0, help="that softens the answers (default: 4)"
    )
    parser.add_argument(
        "--teacher-share",
        type=float,
        default=0.9,
        help="of the loss that is the teacher's, the rest being the labels' (default: 0.9)",
    )
    parser.add_argument("--distill-epochs", type=int, default=5, help="of every start (default: 5)")
    parser.add_argument(
        "--factor",
        type=float,
        default=0.3,
        help="step size, as a multiple of the recipe's: a teacher's gradients are up to as many"
        " times larger as its temperature says (default: 0.3)",
    )
    parser.add_argument(
        "--orders", type=int, default=3, help="of examples, to train each start in (default: 3)"
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="training images that batch norm is estimated on"
    )


def run(request: Request) -> None:
    """Trains a wide teacher, and narrow students from several starts by its answers.

    The first seed is the teacher's, the second that of the narrow network which the teacher is
    fused into. Each student is also trained by the labels alone.

    Args:
        request: The command.

    Raises:
        ValueError: The student is no narrower than the teacher, or is never trained.
    """
    options = request.options
    if not 0 < options["student"] < 1:
        raise ValueError(f"--student is {options['student']}; give more than 0 and less than 1.")
    if options["orders"] < 1:
        raise ValueError(f"--orders is {options['orders']}; give at least 1.")
    folder = request.folder("distill")
    timings: dict[str, float] = {}
    dataset = request.load()
    few = dataclasses.replace(request.model, width=options["student"] * request.model.width)
    recipe = request.train_config
    wide, narrow = (network(config, dataset, recipe.augment) for config in (request.model, few))
    test = tester(dataset)
    models = []
    for name, config, seed in zip(
        ("teacher", "narrow network"), (request.model, few), request.seeds, strict=True
    ):
        trained = train(config, recipe, dataset, seed, folder / "models")
        timings[f"training, {name}"] = trained.seconds
        models.append(trained.params)
    wise, small = models

    drawn = initial(few, dataset, request.seeds[1])
    moved = across(wide, narrow, wise, small)
    starts = {
        "drawn at random": drawn,
        "teacher, pruned by l1 norm": narrowed(wide.symmetry, wise, narrow.symmetry),
        "teacher, moved onto the one at random": across(wide, narrow, wise, drawn),
        "teacher, moved onto the narrow network": moved,
        "narrow network": small,
        "teacher and narrow network, fused": otf.average([moved, small]),
    }
    seen = seen_images(request, dataset, options["images"])
    config = dataclasses.replace(
        recipe,
        epochs=options["distill_epochs"],
        learning_rate=options["factor"] * recipe.learning_rate,
    )
    answers = Teacher(request.model, wise, options["temperature"], options["teacher_share"])
    found: dict[str, Any] = {}
    for name, start in starts.items():
        began = time.perf_counter()
        start = reestimated(narrow, start, seen)
        found[name] = {"before": test(narrow.apply, start)}
        for by, teacher in {"labels": None, "teacher": answers}.items():
            after = []
            for number in range(1, options["orders"] + 1):
                seed = request.seeds[1] + _NEXT * number
                where = folder / "students"
                trained = train(few, config, dataset, seed, where, start, teacher)
                after.append(test(narrow.apply, trained.params))
            found[name][by] = after
        timings[name] = time.perf_counter() - began

    results = {"teacher": test(wide.apply, wise), "starts": found}
    report.plot_bars(
        folder / "distill.png",
        f"{request.title}: student of {options['student']:g} the width",
        "test accuracy (%)",
        {
            name: (start["before"], np.mean(start["labels"]), np.mean(start["teacher"]))
            for name, start in found.items()
        },
        ("before", "by labels alone", "by the teacher too"),
        {"teacher": results["teacher"]},
    )
    report.write_results(folder, request, request.title, _table(results), results, timings)


def _table(results: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{start['before']:.2f}",
            *(report.summary(start[by]) for by in ("labels", "teacher")),
        )
        for name, start in results["starts"].items()
    ]
    rows.append(("teacher", f"{results['teacher']:.2f}", "", ""))
    header = ("student's start", "before (%)", "by labels alone", "by the teacher too")
    return report.markdown_table(header, rows)

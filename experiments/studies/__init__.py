"""The studies by the name of their subcommand; each is a small module of its own."""

from experiments.runs import Study
from experiments.studies import one_shot

STUDIES: dict[str, Study] = {
    "one_shot": Study(
        "fuse two models trained from different seeds, with no retraining", one_shot.run
    )
}

"""The studies by the name of their subcommand; each is a small module of its own."""

from experiments.runs import Study
from experiments.studies import (
    ablate,
    distill,
    federated,
    fine_tune,
    learn,
    many,
    non_iid,
    one_shot,
    prune,
    widths,
)

STUDIES: dict[str, Study] = {
    "one_shot": Study(
        "fuse two models trained from different seeds, with no retraining",
        one_shot.run,
        one_shot.arguments,
    ),
    "fine_tune": Study(
        "train fused models on, beside their parents and the vanilla average",
        fine_tune.run,
        fine_tune.arguments,
        any_number=True,
    ),
    "non_iid": Study(
        "fuse two models that have seen different data", non_iid.run, non_iid.arguments
    ),
    "federated": Study(
        "average two clients that hold different data, round by round",
        federated.run,
        federated.arguments,
    ),
    "ablate": Study(
        "entropy of the plans, and the number of samples, of Algorithm 1",
        ablate.run,
        ablate.arguments,
    ),
    "widths": Study(
        "fuse networks of other widths, wide into narrow and narrow into wide",
        widths.run,
        widths.arguments,
    ),
    "prune": Study(
        "leave out units of a network, and fuse the whole into what is left",
        prune.run,
        prune.arguments,
        seeds=(0,),
        any_number=True,
    ),
    "distill": Study(
        "train a narrow network by a wide one's answers, started from fused and other networks",
        distill.run,
        distill.arguments,
    ),
    "learn": Study(
        "learn the alignment by descent on the loss of the average",
        learn.run,
        learn.arguments,
        seeds=tuple(range(4)),
        any_number=True,
    ),
    "many": Study(
        "fuse 2, 4, 6 and 8 models at once: accuracy, time and memory",
        many.run,
        many.arguments,
        seeds=tuple(range(8)),
        any_number=True,
    ),
}

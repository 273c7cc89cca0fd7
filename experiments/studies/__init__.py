"""The studies by the name of their subcommand; each is a small module of its own."""

from experiments.runs import Study
from experiments.studies.ablate import Ablate
from experiments.studies.distill import Distill
from experiments.studies.federated import Federated
from experiments.studies.fine_tune import FineTune
from experiments.studies.learn import Learn
from experiments.studies.many import Many
from experiments.studies.merge import Merge
from experiments.studies.non_iid import NonIid
from experiments.studies.one_shot import OneShot
from experiments.studies.prune import Prune
from experiments.studies.soups import Soups
from experiments.studies.widths import Widths

STUDIES: dict[str, type[Study]] = {
    study.command: study
    for study in (
        OneShot,
        FineTune,
        NonIid,
        Federated,
        Ablate,
        Widths,
        Prune,
        Distill,
        Learn,
        Many,
        Soups,
        Merge,
    )
}

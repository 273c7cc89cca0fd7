"""Fusion of networks of different widths, wide into narrow and narrow into wide."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Num, PyTree

import otfusion_jax as otf
from experiments import report
from experiments.data import Dataset
from experiments.evaluate import tester
from experiments.importer import import_pytorch, read_arrays
from experiments.methods import counts, plans_across, reestimated
from experiments.narrow import reordered, selected, strongest
from experiments.pairs import Network, network, seen_images
from experiments.runs import Request
from experiments.train import train
from otfusion_jax.symmetry.groups import Plans


def as_original(source: Network, target: Network, moved: PyTree) -> PyTree:
    """Scales a moved model as the original's code does.

    There, what consumes units is multiplied by P diag(1/b), as what produces them is, and not by
    diag(1/a) P. Of n units that become m this makes each kernel m/n times as large.

    Args:
        source: The architecture it comes from.
        target: The architecture it has been moved to.
        moved: Its variables there.
    """
    leaves, treedef = jax.tree.flatten(moved)
    sizes = {group.name: group.size for group in target.symmetry.groups}
    for group in source.symmetry.groups:
        for member in group.having("consumes"):
            leaves[member.leaf] = leaves[member.leaf] * (sizes[group.name] / group.size)
    return jax.tree.unflatten(treedef, leaves)


@dataclasses.dataclass(frozen=True)
class _Crossing:
    """A model that is to be fused with one of other widths, in the shapes of that one."""

    source: Network
    target: Network
    a: PyTree
    b: PyTree

    def moved(self, plans: Plans) -> PyTree:
        return otf.transport(self.source.symmetry, plans, self.a, onto=self.target.symmetry)


def _forward(pair: _Crossing) -> Plans:
    return plans_across(pair.source, pair.target, pair.a, pair.b, method=otf.ForwardPass())


def _descent(pair: _Crossing) -> Plans:
    return plans_across(pair.source, pair.target, pair.a, pair.b)


def _truncated(pair: _Crossing) -> Plans:
    sizes = {group.name: group.size for group in pair.target.symmetry.groups}
    symmetry = pair.source.symmetry
    return selected(symmetry, strongest(symmetry, pair.a, sizes))


def _truncated_and_aligned(pair: _Crossing) -> Plans:
    few = _truncated(pair)
    order = otf.align(pair.target.symmetry, pair.moved(few), pair.b, leaf_weight=counts)
    return reordered(pair.source.symmetry, few, order.plans)


# Where the units of A go, and whether what has been moved is scaled as in the original.
_METHODS: dict[str, tuple[Callable[[_Crossing], Plans], bool]] = {
    "Algorithm 1, scaled as in the original": (_forward, True),
    "Algorithm 1": (_forward, False),
    "coordinate descent, scaled as in the original": (_descent, True),
    "coordinate descent": (_descent, False),
}
# These only make networks narrower.
_NARROWING: dict[str, tuple[Callable[[_Crossing], Plans], bool]] = {
    "truncated by l1 norm": (_truncated, False),
    "truncated, then aligned": (_truncated_and_aligned, False),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--weights",
        nargs=1,
        type=Path,
        metavar="B",
        help="safetensors or npz with PyTorch's names and layouts, instead of training B",
    )
    parser.add_argument(
        "--factors",
        nargs="+",
        type=float,
        default=(2.0, 0.5),
        help="widths of A as multiples of those of B (default: 2 0.5)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*_METHODS, *_NARROWING],
        default=[*_METHODS, *_NARROWING],
        metavar="METHOD",
        help=f"of {', '.join(map(repr, (*_METHODS, *_NARROWING)))} (default: all)",
    )
    parser.add_argument(
        "--t",
        nargs="+",
        type=float,
        default=(0.5, 0.67),
        help="of the averages, (1 - t) · A + t · B; the first is corrected by least squares too"
        " (default: 0.5 0.67)",
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        type=float,
        default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        help="of the averages that the best is one of (default: 0.2 to 0.8)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        help="share of the training images that are not for training but for choosing the best t:"
        " the last ones (default: 0.05)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="training images, without labels, for least squares and batch norm (default: 1000)",
    )


def run(request: Request) -> None:
    """Fuses networks A, wider and narrower, with a network B, each onto the other.

    Args:
        request: The command.

    Raises:
        ValueError: A is as wide as B, a t is not on the way, or nothing or all is held out.
    """
    options = request.options
    factors = options["factors"]
    if not all(factor > 0 and factor != 1 for factor in factors):
        raise ValueError(f"--factors are {list(factors)}; give positive ones other than 1.")
    for name, values in (("t", options["t"]), ("grid", options["grid"])):
        if not all(0 < value < 1 for value in values):
            raise ValueError(f"--{name} is {list(values)}; give numbers between 0 and 1.")
    folder = request.folder("widths")
    timings: dict[str, float] = {}
    dataset, held_out = _divided(request.load(), options["held_out"])
    measures = _Measures(
        tester(dataset),
        tester(held_out),
        seen_images(request, dataset, options["images"]),
        options["t"],
        options["grid"],
    )
    recipe = request.train_config

    def model(factor: float) -> tuple[Network, PyTree, float]:
        config = dataclasses.replace(request.model, width=factor * request.model.width)
        architecture = network(config, dataset, recipe.augment)
        if factor == 1 and options["weights"]:
            params = import_pytorch(architecture.symmetry, read_arrays(options["weights"][0]))
        else:
            seed = request.seeds[factor == 1]
            trained = train(config, recipe, dataset, seed, folder / "models")
            timings[f"training, x{factor:g}"] = trained.seconds
            params = trained.params
        return architecture, params, measures.test(architecture.apply, params)

    models = {factor: model(factor) for factor in (1.0, *factors)}
    directions: dict[str, Any] = {}
    ways = [way for factor in factors for way in ((factor, 1.0), (1.0, factor))]
    for way in report.progress(ways, "fusing"):
        began = time.perf_counter()
        (source, a, alone_a), (target, b, alone_b) = (models[factor] for factor in way)
        pair = _Crossing(source, target, a, b)
        there = _METHODS | (_NARROWING if way[0] > way[1] else {})
        methods = {name: there[name] for name in options["methods"] if name in there}
        plans = {compute: compute(pair) for compute in {c: None for c, _ in methods.values()}}
        title = "x{:g} onto x{:g}".format(*way)
        directions[title] = {
            "source": alone_a,
            "target": alone_b,
            "methods": {
                name: measures.of(pair, plans[compute], scaled)
                for name, (compute, scaled) in methods.items()
            },
        }
        timings[title] = time.perf_counter() - began

    levels = {f"x{factor:g} alone": alone for factor, (_, _, alone) in models.items()}
    _plot(request, folder, directions, levels)
    results = {"directions": directions}
    report.write_results(folder, request, request.title, _table(directions), results, timings)


def _divided(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Splits the last training images off, as what another dataset tests with."""
    count = len(dataset.train_labels)
    rest = count - round(share * count)
    if not 0 < rest < count:
        raise ValueError(
            f"--held-out is {share}, which leaves {rest} of {count} images to train on; give a"
            " share that holds some out, and not all."
        )
    held_out = dataclasses.replace(
        dataset,
        test_images=dataset.train_images[rest:],
        test_labels=dataset.train_labels[rest:],
    )
    return dataset.part(slice(rest)), held_out


@dataclasses.dataclass(frozen=True)
class _Measures:
    """What is measured of every method.

    Attributes:
        test: From a function and parameters to the test accuracy in percent.
        judge: The same of the images that are held out.
        images: That least squares and batch norm see.
        t: Of the averages.
        grid: Of the averages that the best is one of.
    """

    test: Callable[[Callable[[PyTree, Array], Array], PyTree], float]
    judge: Callable[[Callable[[PyTree, Array], Array], PyTree], float]
    images: Num[Array, "samples ..."]
    t: Sequence[float]
    grid: Sequence[float]

    def of(self, pair: _Crossing, plans: Plans, scaled: bool) -> dict[str, Any]:
        """Measures A as moved along plans, alone and averaged with B."""
        target = pair.target
        moved = pair.moved(plans)
        if scaled:
            moved = as_original(pair.source, target, moved)

        def averaged(t: float) -> PyTree:
            return reestimated(target, otf.average([moved, pair.b], (1 - t, t)), self.images)

        judged = {f"{t:g}": self.judge(target.apply, averaged(t)) for t in sorted(self.grid)}
        best = max(judged, key=judged.__getitem__)
        return {
            "moved": self.test(target.apply, reestimated(target, moved, self.images)),
            "averages": {f"{t:g}": self.test(target.apply, averaged(t)) for t in self.t},
            "held out": judged,
            "best": {"t": best, "accuracy": self.test(target.apply, averaged(float(best)))},
            "least squares": None if scaled else self._corrected(pair, plans, moved),
        }

    def _corrected(self, pair: _Crossing, plans: Plans, moved: PyTree) -> dict[str, float]:
        """Measures the same, each layer corrected so that its features are those of A and B."""
        target, t = pair.target, self.t[0]
        original = otf.Original(pair.source.symmetry, pair.source.apply, pair.a, plans)

        def corrected(models: list[PyTree], weights: tuple[float, ...]) -> float:
            fused = otf.repair(
                target.symmetry,
                target.apply,
                models,
                self.images,
                weights=weights,
                method=otf.LeastSquares(),
                originals=[original, None][: len(models)],
            )
            return self.test(target.apply, reestimated(target, fused, self.images))

        return {
            "moved": corrected([moved], (1.0,)),
            f"{t:g}": corrected([moved, pair.b], (1 - t, t)),
        }


def _plot(
    request: Request, folder: Path, directions: dict[str, Any], levels: dict[str, float]
) -> None:
    first = f"{request.options['t'][0]:g}"
    missing = {"moved": float("nan"), first: float("nan")}
    bars = {}
    for title, found in directions.items():
        for name, values in found["methods"].items():
            corrected = values["least squares"] or missing
            cells = (values["moved"], corrected["moved"])
            cells += (values["averages"][first], corrected[first])
            bars[f"{title}: {name}"] = cells
    labels = ("A moved", f"average, t = {first}")
    report.plot_bars(
        folder / "widths.png",
        request.title,
        "test accuracy (%)",
        bars,
        [label + mend for label in labels for mend in ("", ", least squares")],
        levels,
    )


def _table(directions: dict[str, Any]) -> str:
    rows, titles = [], []
    for title, found in directions.items():
        alone = f"{found['source']:.2f} / {found['target']:.2f}"
        for name, values in found["methods"].items():
            first, *others = values["averages"]
            corrected = values["least squares"] or {}
            averages = (values["averages"][t] for t in others)
            cells = (values["moved"], corrected.get("moved"))
            cells += (values["averages"][first], corrected.get(first), *averages)
            best = "{accuracy:.2f} ({t})".format(**values["best"])
            written = ("" if value is None else f"{value:.2f}" for value in cells)
            rows.append((title, alone, name, *written, best))
            titles = [f"t = {first}", "least squares", *(f"t = {t}" for t in others)]
    header = ("A onto B (%)", "A / B", "method", "A moved", "least squares", *titles, "best (t)")
    return report.markdown_table(header, rows)

"""The code of others on the weights of a benchmark, timed by itself. Who runs this fetches it.

    python -m benchmarks.peers otfusion CHECKOUT WEIGHTS.npz
    python -m benchmarks.peers git-re-basin CHECKOUT WEIGHTS.npz

CHECKOUT is a clone of https://github.com/sidak/otfusion (which takes PyTorch and POT) or of
https://github.com/samuela/git-re-basin. The file has the arrays of two VGGs, as `first_call` writes
them. Prints one line of JSON: seconds of a first call and of later ones, imports not counted, and
the squared distance of the moved network to the other where the peer tells its permutations.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import later_seconds

Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def read(path: str) -> Pair:
    """Reads two networks, by the names of their parameters."""
    with np.load(path) as file:
        names = [name.removeprefix("a:") for name in file.files if name.startswith("a:")]
        return {name: file[f"a:{name}"] for name in names}, {n: file[f"b:{n}"] for n in names}


class Settings(dict[str, Any]):
    """Options as attributes; what is not set is None."""

    __getattr__ = dict.get
    __setattr__ = dict.__setitem__


def otfusion(checkout: str, pair: Pair) -> Callable[[], None]:
    """Sets up Algorithm 1 on weights, the exact solver, Euclidean distances."""
    torch = importlib.import_module("torch")

    # What its module imports and this call does not use.
    for name in ("routines", "compute_activations"):
        sys.modules[name] = types.ModuleType(name)
    model = types.ModuleType("model")
    vars(model)["get_model_from_name"] = None
    utils = types.ModuleType("utils")
    vars(utils)["isnan"] = torch.isnan
    sys.modules |= {"model": model, "utils": utils}
    sys.path.insert(0, checkout)
    module = importlib.import_module("wasserstein_ensemble")
    settings = Settings(
        exact=True,
        correction=True,
        past_correction=True,
        ensemble_step=0.5,
        gpu_id=-1,
        ground_metric="euclidean",
        ground_metric_eff=True,
        ground_metric_normalize="none",
        geom_ensemble_type="wts",
        width_ratio=1,
        reg=1e-2,
        not_squared=True,
    )
    networks = []
    for params in pair:
        network = torch.nn.Module()
        for name, array in params.items():
            # PyTorch has the units that a layer produces first.
            axes = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
            value = torch.tensor(np.ascontiguousarray(array.transpose(axes)))
            network.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        networks.append(network)
    return lambda: module.get_wassersteinized_layers_modularized(settings, networks)


def git_re_basin(checkout: str, pair: Pair) -> Callable[[], float]:
    """Sets up weight matching from the identity, by its specification of VGG16 with LayerNorm."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, f"{checkout}/src")
    # Its utilities import what the call does not use.
    utils = types.ModuleType("utils")
    vars(utils)["rngmix"] = lambda key, number: jax.random.fold_in(key, number)
    sys.modules["utils"] = utils
    module = importlib.import_module("weight_matching")
    specification = module.vgg16_permutation_spec()
    a, b = ({name: jnp.asarray(x) for name, x in params.items()} for params in pair)

    def match() -> float:
        found = module.weight_matching(jax.random.key(0), specification, a, b, silent=True)
        moved = module.apply_permutation(specification, found, b)
        return float(sum(jnp.sum((moved[name] - a[name]) ** 2) for name in a))

    return match


def main() -> None:
    """Times a peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("peer", choices=["otfusion", "git-re-basin"])
    parser.add_argument("checkout")
    parser.add_argument("weights")
    options = parser.parse_args()
    set_up = otfusion if options.peer == "otfusion" else git_re_basin
    # They print as they go.
    with contextlib.redirect_stdout(io.StringIO()):
        call = set_up(options.checkout, read(options.weights))
        start = time.perf_counter()
        result = call()
        cold = time.perf_counter() - start
        warm = later_seconds(call)
    objective = result if isinstance(result, float) else None
    print(json.dumps({"cold": cold, "warm": warm, "objective": objective}))


if __name__ == "__main__":
    main()

"""Sets up what every test relies on: shapes checked at each call, JAX's strict modes, the CPU."""

import os

# Both are read once, when JAX and matplotlib are first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"

import ctypes
import gc
import inspect
import mmap
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import beartype
import jax
import pytest
from jaxtyping import install_import_hook

checked: dict[tuple, Callable] = {}
"""What `typecheck` made of functions inside of others."""


def typecheck(function: Callable, *args, **kwargs) -> Callable:
    """Checks calls of functions and methods, but not the construction of dataclasses.

    JAX rebuilds a registered dataclass by calling its constructor, with batched arrays under vmap
    and with None, ints or `ShapeDtypeStruct` where it only handles the structure: no annotation of
    a field holds for all of these.

    Functions inside of others are decorated again at each call of the outer one. What jaxtyping
    passes here is an empty function of their signature, without a closure: one does for all calls.
    """
    if function.__name__ == "__init__":
        return function
    if "<locals>" not in function.__qualname__:
        return beartype.beartype(function)
    key = (function.__module__, function.__qualname__, inspect.signature(function))
    try:
        hash(key)
    except TypeError:  # arguments whose default is an array or a list
        return beartype.beartype(function)
    if key not in checked:
        checked[key] = beartype.beartype(function)
    return checked[key]


# Checked are the modules that say what shapes they take. The others, which trace and group, hardly
# see an array, and checks of their types would take longer than all that they do. Of all modules,
# only those imported from here on are checked.
PACKAGE = Path(__file__).parents[1] / "otfusion_jax"
SHAPED = re.compile(r"\b(Float|Inexact|Int|Bool)\[")


def module(path: Path) -> str:
    """Returns the dotted name of a file of the package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


install_import_hook(
    [module(x) for x in PACKAGE.rglob("*.py") if SHAPED.search(x.read_text())],
    f"{__name__}.typecheck",
)

# Workers of pytest-xdist are started after this, with the same environment.
CONTROLLER = "PYTEST_XDIST_WORKER" not in os.environ

# Most of the suite's time goes into compiling small programs once. XLA's costlier passes would make
# it half as long again and change nothing but the last digits.
jax.config.update("jax_disable_most_optimizations", True)
# Its new emitters of fused loops would double the time of a compilation. A module in parts, each of
# them compiled by itself, and passes that few of our programs need would add a third.
PASSES = (
    "tree_reduction_rewriter,while-loop-invariant-code-motion,while-loop-constant-sinking,"
    "reshape-mover,propagate-call-metadata"
)
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    f"--xla_disable_hlo_passes={PASSES}",
)


def known(flags: tuple[str, ...]) -> bool:
    """Whether XLA knows some flags. It aborts the process over others: another process tries."""
    attempt = "import jaxlib.xla_client as xla; xla.make_cpu_client()"
    tried = subprocess.run(
        [sys.executable, "-c", attempt],
        env={**os.environ, "XLA_FLAGS": " ".join((os.environ.get("XLA_FLAGS", ""), *flags))},
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


if CONTROLLER:
    # JAX from 0.11 on does not know the first, for one.
    taken = FLAGS if known(FLAGS) else [flag for flag in FLAGS if known((flag,))]
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *taken))

# Half of all programs have been compiled before: by the other worker, or by this one, which has
# forgotten them since. A folder of this run's own, so that none outlives what it was made from.
programs = tempfile.TemporaryDirectory(prefix="otfusion-tests-") if CONTROLLER else None
if programs:
    for option, value in {
        "jax_compilation_cache_dir": programs.name,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }.items():
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)

# Tracing makes and drops objects by the million. By Python's own thresholds much time would go into
# looking through all that stays to the end, again and again.
gc.set_threshold(50_000, 20, 100)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    if programs:
        programs.cleanup()


# Our own code holds to both everywhere. Not all of our dependencies do: ott's Sinkhorn promotes
# ranks and dtypes (its Hungarian algorithm and costs do not); Flax's avg_pool, optax's Adam and its
# schedules promote dtypes. Code of ours that calls ott's Sinkhorn relaxes them there, by context
# managers, so that users can be strict too. Tests that train, or that differentiate Sinkhorn's plan
# (the backward pass is traced outside of such a context), ask for `default_promotion`.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def default_promotion() -> Iterator[None]:
    """JAX's own defaults, for what third parties or readers of our documentation run."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# A process that has so much is to give back what it can. A quarter more is left for one test.
MEMORY_BYTES = 1_200_000_000


@pytest.fixture(autouse=True)
def compiled_programs_are_few() -> Iterator[None]:
    """Forgets all compiled programs when the process takes much memory, about two MB for each.

    Freeing them is not enough: the C library keeps the holes between what is still in use, so that
    a process would grow all the same. Programs take memory maps too, some 13 for a MB. At the
    system's limit of these (65,530 on Linux) XLA aborts the process; this keeps far below.
    """
    yield
    usage = Path("/proc/self/statm")
    if usage.exists() and int(usage.read_text().split()[1]) * mmap.PAGESIZE > MEMORY_BYTES:
        jax.clear_caches()
        gc.collect()
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc alone has it
            library.malloc_trim(0)

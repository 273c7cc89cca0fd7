"""Training that can be killed at any point and, run again, ends with the very same parameters."""

import dataclasses
import functools
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments.data import Dataset
from experiments.models import Model, ModelConfig, build_model

# Steps between two updates of the progress bar.
_CHUNK_STEPS = 100


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train: plain SGD with momentum on the cross-entropy.

    Attributes:
        epochs: Passes over the training split, each in its own random order.
        batch_size: Examples per step; those that do not fill a last batch are left out of an epoch.
        learning_rate: Step size.
        momentum: Decay of the gradient's running sum, in [0, 1).
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float


class TrainState(NamedTuple):
    """All that one epoch hands to the next, and so all that a checkpoint holds."""

    params: PyTree
    opt_state: PyTree
    history: Float[Array, "epochs 2"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        params: The variables of the Flax module.
        history: float32 `[epochs, 2]`: mean training loss and accuracy in percent of each epoch.
        seconds: Time spent training in this call.
        epochs_reused: Epochs that came from checkpoints of earlier calls.
    """

    params: PyTree
    history: np.ndarray
    seconds: float
    epochs_reused: int


def fingerprint(*parts: Any) -> str:
    """Returns a short digest of dataclasses and JSON values, the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(
    model_config: ModelConfig, config: TrainConfig, dataset: Dataset, seed: int, folder: Path
) -> Trained:
    """Trains a model, or resumes or reuses an earlier training of the same configuration.

    The result depends on the arguments other than `folder` alone, however often the training was
    interrupted. Checkpoints lie in a subfolder named after everything that the result depends
    on, so that a changed configuration never meets the checkpoints of another.

    Args:
        model_config: What to train.
        config: How to train it.
        dataset: What to train it on; only the training split is used.
        seed: Source of the initialisation and of the order of the examples.
        folder: Where the checkpoints of all trainings of one run are kept.

    Returns:
        The trained model.

    Raises:
        ValueError: The batch is larger than the training split, or there are no epochs.
    """
    count = len(dataset.train_labels)
    if config.batch_size > count or config.epochs < 1:
        raise ValueError(
            f"Nothing to train with {config.epochs} epochs of batches of {config.batch_size} from"
            f" {count} examples; give at least one epoch and a batch that the examples fill."
        )
    model = build_model(model_config, dataset.classes)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    state = _initial_state(model, config, init_key, dataset.train_images[:1])

    label = f"{model_config.label}-seed-{seed}"
    digest = fingerprint(model_config, config, seed, dataset.name, dataset.fingerprint())
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / f"{label}-{digest}").resolve(), options=options) as saved:
        # Checkpoints are numbered by the epochs that they have behind them.
        done = saved.latest_step() or 0
        if done:
            restored = saved.restore(done, args=ocp.args.StandardRestore(state))
            # Orbax commits arrays to a device, for which JAX would compile everything once more.
            state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)
        start = time.perf_counter()
        if done < config.epochs:
            images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
            with _Progress(f"{dataset.name} {label}", config, count, done) as progress:
                for epoch in range(done, config.epochs):
                    order = _epoch_order(order_key, epoch, count, config.batch_size)
                    state = _run_epoch(model, config, state, epoch, order, images, labels, progress)
                    saved.save(epoch + 1, args=ocp.args.StandardSave(state))
        else:
            print(f"{dataset.name} {label}: reusing the training finished earlier", file=sys.stderr)
    return Trained(
        state.params, np.asarray(state.history), time.perf_counter() - start, epochs_reused=done
    )


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return optax.sgd(config.learning_rate, config.momentum)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _initial_state(
    model: Model, config: TrainConfig, key: PRNGKeyArray, images: Float[Array, "1 ..."]
) -> TrainState:
    params = model.init(key, images)
    return TrainState(params, _optimizer(config).init(params), jnp.zeros((config.epochs, 2)))


def _epoch_order(
    key: PRNGKeyArray, epoch: int, count: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """The examples of each step of an epoch, the same whether or not earlier epochs ran here."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
    steps = count // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def _run_epoch(
    model: Model,
    config: TrainConfig,
    state: TrainState,
    epoch: int,
    order: Int[Array, "steps batch"],
    images: Float[Array, "n height width channels"],
    labels: Int[Array, " n"],
    progress: "_Progress",
) -> TrainState:
    """Runs one epoch in chunks of steps and notes its mean loss and accuracy in the history."""
    steps, batch_size = order.shape
    sums = jnp.zeros(2)
    params, opt_state, history = state
    for low in range(0, steps, _CHUNK_STEPS):
        high = min(low + _CHUNK_STEPS, steps)
        params, opt_state, sums = _run_steps(
            model, config, (params, opt_state, sums), order, low, high, images, labels
        )
        loss, correct = sums.tolist()
        progress.advance(high - low, loss / high, 100 * correct / (high * batch_size))
    means = sums / jnp.asarray([steps, steps * batch_size / 100], dtype=sums.dtype)
    return TrainState(params, opt_state, history.at[epoch].set(means))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="carry")
def _run_steps(
    model: Model,
    config: TrainConfig,
    carry: tuple[PyTree, PyTree, Float[Array, " 2"]],
    order: Int[Array, "steps batch"],
    low: int,
    high: int,
    images: Float[Array, "n height width channels"],
    labels: Int[Array, " n"],
) -> tuple[PyTree, PyTree, Float[Array, " 2"]]:
    """Runs the steps `low` to `high` of an epoch; adds up the loss and the number of correct ones.

    The bounds are traced, so that a last, shorter chunk needs no compilation of its own.
    """

    def objective(params: PyTree, step: Int[Array, ""]) -> tuple[Array, Array]:
        chosen = order[step]
        logits = model.apply(params, images[chosen])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels[chosen], dtype=jnp.float32)
        return loss, correct

    def one_step(step: Int[Array, ""], carry: tuple[PyTree, PyTree, Array]) -> Any:
        params, opt_state, sums = carry
        (loss, correct), grads = jax.value_and_grad(objective, has_aux=True)(params, step)
        updates, opt_state = _optimizer(config).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, sums + jnp.stack([loss, correct])

    return jax.lax.fori_loop(low, high, one_step, carry)


class _Progress:
    """A progress bar where a person watches, one line before and one after where nobody does."""

    def __init__(self, title: str, config: TrainConfig, examples: int, epochs_done: int):
        self._title = title
        self._epochs = config.epochs
        steps = examples // config.batch_size
        self._bar = tqdm(
            total=config.epochs * steps,
            initial=epochs_done * steps,
            desc=title,
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        self._last = ""
        if self._bar.disable:
            print(f"{title}: training, {epochs_done}/{self._epochs} epochs done", file=sys.stderr)

    def advance(self, steps: int, loss: float, accuracy: float) -> None:
        """Moves on by some steps; loss and accuracy in percent are means over the epoch so far."""
        self._last = f"loss {loss:.4f}, accuracy {accuracy:.2f} %"
        self._bar.set_postfix_str(self._last, refresh=False)
        self._bar.update(steps)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._bar.close()
        if self._bar.disable and error is None:
            print(f"{self._title}: trained {self._epochs} epochs, {self._last}", file=sys.stderr)

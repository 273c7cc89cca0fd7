"""Training that can be killed at any point and, run again, ends with the very same parameters."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, PyTree
from tqdm import tqdm

from experiments.checkpoints import Checkpoints
from experiments.data import Dataset
from experiments.models import Model, ModelConfig, build_model

# Steps between two updates of the progress bar.
_CHUNK_STEPS = 20
# Pixels of margin that a crop is moved in.
_MARGIN = 4


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train: SGD with momentum, or AdamW, on the cross-entropy.

    Attributes:
        epochs: Passes over the training split, each in its own random order.
        batch_size: Examples per step; those that do not fill a last batch are left out of an epoch.
        learning_rate: Step size; of the one-cycle schedule the peak.
        momentum: Decay of the gradient's running sum (AdamW: mean), in [0, 1).
        weight_decay: Multiple of each parameter added to its gradient (AdamW: to its step).
        one_cycle: Whether the step size rises from a 25th for 30 % of the steps, and then falls to
            almost nothing, each along a cosine (Smith and Topin 2019, as in PyTorch).
        drops: Pairs of an epoch and a factor that the step size is multiplied by from then on.
        augment: Whether images are cropped at random out of a black margin of 4 pixels, and
            flipped.
        dtype: Of the activations, float32 or bfloat16.
        adam: Whether steps are those of AdamW (Loshchilov and Hutter 2019), not SGD.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float = 0.0
    one_cycle: bool = False
    drops: tuple[tuple[int, float], ...] = ()
    augment: bool = False
    dtype: str = "float32"
    adam: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("variables",),
    meta_fields=("config", "temperature", "share"),
)
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model whose answers another one learns (Hinton, Vinyals and Dean 2015).

    The loss is `share * temperature² * KL + (1 - share) * cross-entropy`. KL is the divergence of
    the student's softmax from the teacher's, both of logits divided by the temperature; its
    gradients shrink with the square of that.

    Attributes:
        config: Which model.
        variables: Of the model; it is run in inference mode.
        temperature: That softens both.
        share: Of the loss that is the teacher's, in [0, 1].
    """

    config: ModelConfig
    variables: PyTree
    temperature: float = 4.0
    share: float = 0.9

    def loss(
        self, logits: Float[Array, "*batch classes"], answers: Float[Array, "*batch classes"]
    ) -> Float[Array, " *batch"]:
        """Returns the divergence from the teacher, times the square of the temperature.

        Args:
            logits: Of the student.
            answers: Logits of the teacher.
        """
        mine, theirs = (jax.nn.log_softmax(x / self.temperature) for x in (logits, answers))
        return self.temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=-1)


class TrainState(NamedTuple):
    """All that one epoch hands to the next, and so all that a checkpoint holds."""

    variables: PyTree
    opt_state: PyTree
    history: Float[Array, "epochs 2"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        params: The variables of the Flax module: parameters, and statistics if it has batch norm.
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
    model_config: ModelConfig,
    config: TrainConfig,
    dataset: Dataset,
    seed: int,
    folder: Path,
    start: PyTree | None = None,
    teacher: Teacher | None = None,
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
        start: Variables to go on from, as in fine-tuning; None draws them by the seed.
        teacher: Whose answers to learn beside the labels; None for the labels alone.

    Returns:
        The trained model.

    Raises:
        ValueError: The batch is larger than the training split, there are no epochs, or the teacher
            has a temperature or share that makes no sense.
    """
    count = len(dataset.train_labels)
    if config.batch_size > count or config.epochs < 1:
        raise ValueError(
            f"Nothing to train with {config.epochs} epochs of batches of {config.batch_size} from"
            f" {count} examples; give at least one epoch and a batch that the examples fill."
        )
    if teacher and not (teacher.temperature > 0 and 0 <= teacher.share <= 1):
        raise ValueError(
            f"A teacher with temperature {teacher.temperature} and share {teacher.share}; give a"
            " temperature above 0 and a share of 0 to 1."
        )
    model = build_model(model_config, dataset.classes, config.dtype)
    _, order_key = jax.random.split(jax.random.key(seed))
    noise_key = jax.random.fold_in(order_key, config.epochs)  # epochs have the smaller numbers
    steps = count // config.batch_size
    origin = None if start is None else _digest(start)
    variables = initial(model_config, dataset, seed) if start is None else start
    state = TrainState(
        variables,
        jax.jit(_optimizer(config, steps).init)(variables["params"]),
        jnp.zeros((config.epochs, 2)),
    )

    label = f"{model_config.label}-seed-{seed}"
    parts = [model_config, config, seed, dataset.name, dataset.fingerprint(), origin]
    if teacher:
        values = _digest(teacher.variables)
        parts.append([teacher.config, values, teacher.temperature, teacher.share])
    digest = fingerprint(*parts)
    saved = Checkpoints(folder / f"{label}-{digest}")
    done, restored = saved.newest(state)
    # Orbax commits arrays to a device, for which JAX would compile everything once more.
    state = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), restored)
    began = time.perf_counter()
    if done < config.epochs:
        images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        with _Progress(f"{dataset.name} {label}", config, count, done) as progress:
            for epoch in range(done, config.epochs):
                order = _epoch_order(order_key, epoch, count, config.batch_size)
                noise = jax.random.fold_in(noise_key, epoch)
                state = _run_epoch(
                    model, config, state, epoch, order, images, labels, noise, teacher, progress
                )
                saved.save(epoch + 1, state)
    else:
        print(f"{dataset.name} {label}: reusing the training finished earlier", file=sys.stderr)
    return Trained(
        state.variables, np.asarray(state.history), time.perf_counter() - began, epochs_reused=done
    )


def initial(model_config: ModelConfig, dataset: Dataset, seed: int) -> PyTree:
    """Draws the variables that `train` starts from.

    Args:
        model_config: Which model.
        dataset: What it is for.
        seed: As given to `train`.
    """
    init_key, _ = jax.random.split(jax.random.key(seed))
    model = build_model(model_config, dataset.classes)
    return _draw(model, init_key, dataset.train_images[:1])


def _digest(tree: PyTree) -> str:
    """Returns a hexadecimal digest of the values of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Builds the optimiser for epochs of some number of steps."""
    if config.one_cycle:
        schedule = optax.cosine_onecycle_schedule(config.epochs * steps, config.learning_rate)
    else:
        drops = {epoch * steps: factor for epoch, factor in config.drops}
        schedule = optax.piecewise_constant_schedule(config.learning_rate, drops)
    if config.adam:
        return optax.adamw(schedule, config.momentum, weight_decay=config.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, config.momentum)
    )


@functools.partial(jax.jit, static_argnames="model")
def _draw(model: Model, key: PRNGKeyArray, images: Num[Array, "1 ..."]) -> PyTree:
    return model.init(key, images)


@functools.partial(jax.jit, static_argnames=("count", "batch_size"))
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
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
    key: PRNGKeyArray,
    teacher: Teacher | None,
    progress: "_Progress",
) -> TrainState:
    """Runs one epoch in chunks of steps and notes its mean loss and accuracy in the history."""
    steps, batch_size = order.shape
    judged = batch_size * math.prod(labels.shape[1:])  # of a text, every token of a window
    sums = jnp.zeros(2)
    variables, opt_state, history = state
    # A chunk gives its buffers away, and the first ones may be the caller's.
    variables = _copied(variables)
    for low in range(0, steps, _CHUNK_STEPS):
        high = min(low + _CHUNK_STEPS, steps)
        carry = (variables, opt_state, sums)
        variables, opt_state, sums = _run_steps(
            model, config, carry, order, low, high, images, labels, key, teacher
        )
        loss, correct = sums.tolist()
        progress.advance(high - low, loss / high, 100 * correct / (high * judged))
    means = sums / jnp.asarray([steps, steps * judged / 100], dtype=sums.dtype)
    return TrainState(variables, opt_state, history.at[epoch].set(means))


@jax.jit
def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="carry")
def _run_steps(
    model: Model,
    config: TrainConfig,
    carry: tuple[PyTree, PyTree, Float[Array, " 2"]],
    order: Int[Array, "steps batch"],
    low: int,
    high: int,
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
    key: PRNGKeyArray,
    teacher: Teacher | None,
) -> tuple[PyTree, PyTree, Float[Array, " 2"]]:
    """Runs the steps `low` to `high` of an epoch; adds up the loss and the number of correct ones.

    The bounds are traced, so that a last, shorter chunk needs no compilation of its own.
    """
    optimizer = _optimizer(config, len(order))

    def objective(params: PyTree, rest: PyTree, step: Int[Array, ""]) -> tuple[Array, Any]:
        chosen = order[step]
        batch = images[chosen]
        if config.augment:
            black = jnp.min(images, axis=(0, 1, 2), keepdims=True)
            batch = augmented(jax.random.fold_in(key, step), batch, black)
        logits, changed = model.apply(
            {**rest, "params": params}, batch, train=True, mutable=list(rest)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()
        if teacher:
            master = build_model(teacher.config, logits.shape[-1], config.dtype)
            divergence = teacher.loss(logits, master.apply(teacher.variables, batch)).mean()
            loss = teacher.share * divergence + (1 - teacher.share) * loss
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels[chosen], dtype=jnp.float32)
        return loss, (changed, correct)

    def one_step(step: Int[Array, ""], carry: tuple[PyTree, PyTree, Array]) -> Any:
        variables, opt_state, sums = carry
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        graded = jax.value_and_grad(objective, has_aux=True)
        (loss, (changed, correct)), grads = graded(params, rest, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        variables = {**changed, "params": optax.apply_updates(params, updates)}
        return variables, opt_state, sums + jnp.stack([loss, correct])

    return jax.lax.fori_loop(low, high, one_step, carry)


def augmented(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    black: Float[Array, "1 1 1 channels"],
) -> Float[Array, "batch height width channels"]:
    """Crops each image out of a black margin, somewhere, and flips every other one.

    Args:
        key: Source of both.
        images: The images.
        black: The value of each channel in the margin.
    """
    count, height, width, channels = images.shape
    where, flips = jax.random.split(key)
    corners = jax.random.randint(where, (count, 2), 0, 2 * _MARGIN + 1)
    flipped = jax.random.bernoulli(flips, shape=(count, 1, 1, 1))
    margins = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0))
    padded = jnp.pad(images - black, margins) + black

    def crop(image: Array, corner: Int[Array, " 2"]) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


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
